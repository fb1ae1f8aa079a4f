"""Makes a config of ours from a config.json alone, for an untrained model of these sizes."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from expert_parallel.config import dump_tree
from expert_parallel.data.reading import read_json
from expert_parallel.interop.folder import CONFIG, missing
from expert_parallel.interop.hf_config import LARGEST, HuggingFaceConfig, Tree, short
from expert_parallel.interop.hf_model import describe_model_losses, describe_positions, find_family
from expert_parallel.interop.importing import run_tree
from expert_parallel.model.config import ModelConfig
from expert_parallel.training.config import Config, load_config, read_config
from expert_parallel.training.memory import GPU_BYTES, estimate_memory
from expert_parallel.training.setup import check_degrees

MAX_RANKS = 4096
SUFFIXES = (".yaml", ".yml")
HEADER = """\
# An untrained {family} with the sizes of its config.json, by `expert-parallel convert import --config-only`.
# data.corpora is empty: name your own. Adapt `training` and `parallel`; `check` shows the memory that they take.

"""


def write_config(source: Path, out: Path, print_message: Callable[[str], None] = print) -> ModelConfig:
    """Writes the YAML file `out`, which has only the settings that config.json gives. Returns the model's settings.

    source: a config.json, or a folder with one. print_message: called, once the config is written, for what it does not
    take over. Raises a ValueError, before anything is written, if `out` exists or config.json describes no model of
    ours.
    """
    if out.suffix not in SUFFIXES:
        raise ValueError(f"{out} is to be a config, its name must end with {' or '.join(SUFFIXES)}")
    if os.path.lexists(out):  # a broken link, too
        raise ValueError(f"{out} exists already")
    path = source / CONFIG if source.is_dir() else source
    if not path.is_file():
        raise ValueError(missing("file", path))
    theirs = read_json(path)
    family = find_family(theirs, path)
    notes, unquantized = describe_left_out(theirs, family.imports_mtp), {**theirs, "quantization_config": None}
    tree = run_tree(theirs, order(family.read(unquantized) | initial_weights(theirs)), f"runs/{out.stem}")
    model = read_config(tree, f"{path} gives a config that is not valid").model
    text = HEADER.format(family=theirs["model_type"]) + dump_tree(tree, Config)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("x", encoding="utf-8") as file:  # not the file that another command has written meanwhile
        file.write(text)
    for note in [*notes, *describe_positions(model), *describe_model_losses(family, theirs, model)]:
        print_message(note)
    return model


def check_arguments(path: Path, further: Sequence[str] = ()) -> list[str]:
    """Returns the arguments with which `check` shows how a config can be trained on GPUs: in bfloat16, and on the
    fewest ranks, a power of 2, that have the memory for it if experts and weights are divided over all of them.

    If no number up to MAX_RANKS is enough, they are the arguments for one rank. further: settings that are among them.
    """
    on_gpus = ["runtime.device=cuda", "training.dtype=bfloat16", *further]
    for exponent in range(MAX_RANKS.bit_length()):
        ranks = 2**exponent
        for settings in layouts(load_config(path), ranks):
            config = load_config(path, [*on_gpus, *settings])
            try:
                degrees = check_degrees(config, ranks)
            except ValueError:  # such as a width of the experts that is not a multiple of parallel.etp
                continue
            if estimate_memory(config, degrees, "cuda").total <= GPU_BYTES:
                return ["--world-size", str(ranks), *on_gpus, *settings]
    return ["--world-size", "1", *on_gpus]


def layouts(config: Config, ranks: int) -> Iterator[list[str]]:
    """Yields settings that divide a model over this many ranks: FSDP2, expert parallelism as wide as the number of
    experts allows and, for models of few large experts, each of them over several ranks, too."""
    if ranks == 1:
        yield []
        return
    batch = [f"training.global_batch={ranks}"] if ranks > config.training.global_batch else []
    settings = [*batch, "training.recompute=block", "parallel.data={kind: sharded}"]
    if config.model.moe is None:
        yield settings
        return
    for etp in (1, 2, 4):
        ep = math.gcd(config.model.moe.num_experts, ranks // etp)
        divided = [f"parallel.{axis}={degree}" for axis, degree in (("ep", ep), ("etp", etp)) if degree > 1]
        yield [*settings, *divided]


def initial_weights(theirs: Tree) -> Tree:
    """Returns the setting that initializer_range gives, which has no effect on an import of weights."""
    std = theirs.get("initializer_range")
    if std is None:
        return {}
    if isinstance(std, bool) or not isinstance(std, int | float) or not 0 < std <= LARGEST:  # also NaN
        raise HuggingFaceConfig(theirs).refuse("initializer_range", f"it must be above 0 and at most {LARGEST:,}")
    return {"init_std": float(std)}


def order(model: Tree) -> Tree:
    """Returns the settings of a model in the order of ModelConfig."""
    return {name: model[name] for name in ModelConfig.model_fields if name in model}


def describe_left_out(theirs: Tree, imports_mtp: bool) -> list[str]:
    """Returns sentences on the keys of a config.json that matter for its weights alone. imports_mtp: see `Family`."""
    notes = []
    if quantized := theirs.get("quantization_config"):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        notes.append(
            f"quantization_config ({short(method)}) is left out: it describes weights, and training has its own"
        )
    for key in ("num_nextn_predict_layers", "num_mtp_layers", "num_mtp_modules"):
        if count := theirs.get(key):
            trained = "model.mtp.depth trains layers of multi-token prediction"
            kept = "an import keeps layers of multi-token prediction for exports, and does not train them"
            notes.append(f"{key} ({short(count)}) is left out: {trained if imports_mtp else kept}")
    return notes
