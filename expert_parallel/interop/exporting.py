"""Exports a run or a checkpoint as a Hugging Face folder, for transformers and inference servers."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from expert_parallel.checkpoint.files import Checkpoint, open_checkpoint
from expert_parallel.data.open import TOKENIZER_FILE
from expert_parallel.data.reading import read_json
from expert_parallel.interop.balance_loss import LOSS_KEYS, POOLED, SEQUENCE
from expert_parallel.interop.families.registry import FAMILIES
from expert_parallel.interop.family import Family, settings
from expert_parallel.interop.folder import CONFIG, COPIED_FILES, GENERATION, FolderWriter
from expert_parallel.interop.fp8_export import Fp8Writer, open_fp8_writer
from expert_parallel.interop.hf_config import HuggingFaceConfig, Tree
from expert_parallel.interop.hf_model import match_model_tensors, read_model_config
from expert_parallel.interop.importing import find_origin, find_tokenizer, refuse_larger_tokenizer
from expert_parallel.interop.mtp_layers import copies
from expert_parallel.interop.neutral_keys import is_neutral
from expert_parallel.interop.set_aside import set_aside_for_export
from expert_parallel.model.config import ModelConfig
from expert_parallel.moe.routers.losses import LossConfig, loss_name
from expert_parallel.training.config import read_config

INCOMPATIBLE = 1000  # number of differences that an incompatible structure counts as
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FP8 = "fp8"  # a value of --dtype, too


class Exported(NamedTuple):
    """Holds what an export wrote: the family's name, the folder, and as text the step that the weights are of."""

    family: str
    folder: Path
    step: str


def export_run(
    path: Path,
    out: Path,
    *,
    family: str | None,
    dtype: str | None,
    shard_bytes: int,
    print_message: Callable[[str], None] = print,
) -> Exported:
    """Exports a model. Returns the family, the folder and the step.

    family: None chooses one that computes the same. dtype: None keeps every tensor's dtype and bits; fp8 writes the
    weights that were imported from fp8 as such. print_message: called for what config.json cannot state, and for what
    fp8 has rounded. Raises a ValueError that names the setting that differs if no family computes the same as the
    model, and for fp8 if the import kept no scales.
    """
    if dtype not in (None, FP8, *DTYPES):
        raise ValueError(f"--dtype is {dtype!r}, it must be one of {', '.join((*DTYPES, FP8))}")
    checkpoint = open_checkpoint(path)
    model = read_config(checkpoint.config, str(checkpoint.path)).model
    origin, tokenizer = find_origin(path), find_tokenizer(path)
    if tokenizer is not None:
        refuse_larger_tokenizer(tokenizer, model.vocab_size)
    their_origin = {} if origin is None else read_json(origin / CONFIG)
    family_name = choose_family(model, family, their_origin.get("model_type"))
    config = export_config(family_name, model, their_origin, checkpoint.config)
    if (sentence := describe_lost_losses(family_name, model, config)) is not None:
        print_message(sentence)
    if (kind := config["model_type"]) != family_name:
        print_message(f"model_type is {kind}, by which transformers loads {family_name}: its own code is not exported")
    fp8 = open_fp8_writer(origin, family_name, their_origin) if dtype == FP8 else None
    form = fp8 or DTYPES.get(dtype or "")
    key = "dtype" if "dtype" in config else "torch_dtype"
    if fp8 is None:
        written = DTYPES.get(dtype or "", checkpoint.tensors["weights/embedding.weight"].dtype)
        config[key] = str(written).removeprefix("torch.")
    else:
        config |= {key: config.get(key, "bfloat16"), "quantization_config": fp8.config}
    set_aside = set_aside_for_export(origin, family_name, model, config, print_message)
    with FolderWriter(out, shard_bytes) as writer:
        write_weights(writer, checkpoint, FAMILIES[family_name], config, model, form)
        if set_aside is not None:
            table = checkpoint.read("weights/embedding.weight") if model.tied_embeddings else None
            for name, tensor in set_aside.exported(table, form if isinstance(form, torch.dtype) else None):
                write_tensor(writer, name, tensor, fp8)
        writer.write_json(CONFIG, config)
        files = files_to_copy(tokenizer, origin)
        for file in files:
            writer.copy(file)
        if GENERATION not in (file.name for file in files):
            ends = {key: config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
            writer.write_json(GENERATION, ends)
        exported = Exported(family_name, writer.finish(), describe_step(checkpoint, path))
    if fp8 is not None:
        print_message(fp8.rounding.describe())
    return exported


def describe_step(checkpoint: Checkpoint, path: Path) -> str:
    """Returns the checkpoint's step as text, such as `step 55 of 1,000`, and whether the run is not finished, unless
    `path` is the checkpoint itself: the run may have later ones."""
    step, steps = checkpoint.step, checkpoint.config["training"]["steps"]
    is_newest = path.resolve() != checkpoint.path.resolve()
    text = f"step {step:,} of {steps:,}"
    return f"{text}: the run is not finished" if is_newest and step < steps else text


def files_to_copy(tokenizer: Path | None, origin: Path | None) -> list[Path]:
    """Returns the files to copy: the run's tokenizer, and the files of the model that it was imported from.

    Omits that model's tokenizer files if the run now has another tokenizer, since it was then trained on other tokens.
    """
    if origin is None:
        return [] if tokenizer is None else [tokenizer]
    theirs = origin / TOKENIZER_FILE
    both = theirs.is_file(), tokenizer is not None
    is_other = both[0] != both[1] or (tokenizer is not None and tokenizer.read_bytes() != theirs.read_bytes())
    names = [GENERATION] if is_other else [name for name in COPIED_FILES if name != TOKENIZER_FILE]
    own = [] if tokenizer is None else [tokenizer]
    return own + [origin / name for name in names if (origin / name).is_file()]


def write_weights(
    writer: FolderWriter,
    checkpoint: Checkpoint,
    family: Family,
    config: Tree,
    model: ModelConfig,
    form: torch.dtype | Fp8Writer | None,
) -> None:
    """Writes all weights, pair by pair. config: the config.json of the export. form: a dtype or fp8; None keeps each
    tensor's dtype. Selection biases always keep theirs: bfloat16 would round away their small updates."""
    for pair in (*match_model_tensors(family, config, model), *copies(model)):
        ours = [checkpoint.read(f"weights/{name}") for name in pair.ours]
        is_bias = pair.ours[0].endswith("balance_bias_E")
        if isinstance(form, torch.dtype) and not is_bias:
            ours = [tensor.to(form) for tensor in ours]
        fp8 = form if isinstance(form, Fp8Writer) and not is_bias else None
        for name, tensor in zip(pair.theirs, pair.transform.to_theirs(ours), strict=True):
            write_tensor(writer, name, tensor, fp8)


def write_tensor(writer: FolderWriter, name: str, tensor: Tensor, fp8: Fp8Writer | None) -> None:
    """Writes a tensor as it is, or what holds it in fp8."""
    for part, values in [(name, tensor)] if fp8 is None else fp8.tensors(name, tensor):
        writer.add(part, values)


def choose_family(model: ModelConfig, wanted: str | None, origin: str | None) -> str:
    """Returns the name of a family that computes the same: its config.json, read back, gives the same model.

    wanted: considers this family only. origin: the family that the model was imported from, which is preferred; then
    the order is that of FAMILIES. Raises a ValueError that names the first setting that the closest family lacks.
    """
    if wanted is not None and wanted not in FAMILIES:
        raise ValueError(f"--family is {wanted!r}, it must be one of {', '.join(FAMILIES)}")
    names = [wanted] if wanted else sorted(FAMILIES, key=lambda name: name != origin)
    found = {name: differences(FAMILIES[name], model) for name in names}
    fitting = [name for name, reasons in found.items() if not reasons]
    if fitting:
        return fitting[0]
    nearest = min(found, key=lambda name: len(found[name]))
    count = len(found[nearest])
    more = f" (and {count - 1} more)" if 1 < count < INCOMPATIBLE else ""
    reason = f"{found[nearest][0]}{more}"
    if wanted:
        raise ValueError(f"the family {wanted} does not compute the same as this model: {reason}")
    families = ", ".join(FAMILIES)
    raise ValueError(f"none of the families {families} computes the same as this model; nearest is {nearest}: {reason}")


def differences(family: Family, model: ModelConfig) -> list[str]:
    """Returns the differences between a model and what the family's config.json for it gives, one sentence each."""
    lost = []
    if model.mtp is not None and not (family.imports_mtp and set(model.mtp_layers) <= set(model.moe_layers)):
        lost = [f"model.mtp.depth is {model.mtp.depth}, the family has no layers of multi-token prediction like these"]
    config, ours = family.write(model), leaves(settings(model), "model")
    try:
        read = family.read(config)
    except ValueError as error:  # another structure, such as no experts or another kind of attention
        return [f"the family has no such model ({error})"] * INCOMPATIBLE
    refusal: list[str] = []
    try:
        back = leaves(settings(read_model_config(family, config)), "model")
    except ValueError as error:  # the settings that it can express are not valid together
        refusal = [str(error)]
        back = ours | {path: value for path, value in leaves(read, "model").items() if path in ours}
    different = [
        f"{path} is {ours.get(path)!r}, the family has {back.get(path)!r}"
        for path in dict.fromkeys([*ours, *back])
        if ours.get(path) != back.get(path)
    ]
    return [*lost, *(different or refusal)]


def leaves(tree: Tree, prefix: str) -> dict[str, Any]:
    """Flattens a tree. Returns the values by dotted path."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= leaves(value, f"{prefix}.{key}") if isinstance(value, dict) else {f"{prefix}.{key}": value}
    return found


def export_config(name: str, model: ModelConfig, origin: Tree, run: Tree) -> Tree:
    """Returns the model's config.json.

    It is that of the model's origin, unchanged, if that still describes the model and its losses. Otherwise it is a new
    one that keeps the origin's keys that do not affect the logits. Its model_type is that of a class of transformers.
    run: the run's config.
    """
    family = FAMILIES[name]
    named = {"model_type": family.exported_as or name, **mtp_count(family, model, origin)}
    # The exported weights are not quantized, and no code is exported.
    origin = {key: value for key, value in origin.items() if key not in ("quantization_config", "auto_map")}
    written = family.write(model)
    if origin.get("model_type") == name:
        described = read_model_config(family, origin)
        if settings(described) == settings(model):
            losses = {key: value for key, value in written.items() if key in LOSS_KEYS}
            return (origin if has_losses_of(described, model) else without_losses(origin) | losses) | named
    kept = {
        key: value
        for key, value in without_losses(origin).items()
        if is_neutral(key) or key in ("rope_interleave", *family.neutral)
    }
    beside = {
        "max_position_embeddings": run["training"]["sequence_length"],
        "initializer_range": model.init_std,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    return {**beside, **kept, **written, **named}


def mtp_count(family: Family, model: ModelConfig, origin: Tree) -> Tree:
    """Returns the keys of config.json for the number of layers of multi-token prediction, if the origin does not state
    it."""
    keys = [key for key in ("num_nextn_predict_layers", "num_mtp_layers") if key in origin]
    if model.mtp is None or (keys and family.num_mtp_layers(HuggingFaceConfig(origin)) == model.mtp.depth):
        return {}
    return dict.fromkeys(keys or ["num_nextn_predict_layers"], model.mtp.depth)


def without_losses(config: Tree) -> Tree:
    """Returns a config.json without the keys of losses."""
    return {key: value for key, value in config.items() if key not in LOSS_KEYS}


def has_losses_of(one: ModelConfig, other: ModelConfig) -> bool:
    """Returns True if two models train with the same losses of their routers."""
    first, second = ([] if model.moe is None else model.moe.losses for model in (one, other))
    return first == second


def is_same_loss(one: LossConfig, other: LossConfig) -> bool:
    """Returns True if two losses are equal but for a rounding of the coefficient, which config.json divides by k."""
    is_close = math.isclose(one.coefficient, other.coefficient, rel_tol=1e-12)
    return is_close and one.model_copy(update={"coefficient": other.coefficient}) == other


def describe_lost_losses(name: str, model: ModelConfig, config: Tree) -> str | None:
    """Returns a sentence on the losses of the model that a family's config.json, `config`, does not state, and on the
    balance loss if it states that one; None if it states all of them."""
    described = read_model_config(FAMILIES[name], config)
    if model.moe is None or described.moe is None or has_losses_of(described, model):
        return None
    theirs = described.moe.losses
    stated = [loss for loss in model.moe.losses if any(is_same_loss(loss, their) for their in theirs)]
    lost = [loss_name(loss) for loss in model.moe.losses if loss not in stated]
    if not lost:
        return None
    verb, them = ("is", "such loss") if len(lost) == 1 else ("are", "such losses")
    kept = [f"; the balance loss is {key} {config[key]:g}" for key in (POOLED, SEQUENCE) if stated and config.get(key)]
    return (
        f"{', '.join(lost)} of model.moe.losses {verb} not in config.json, as {name} has no {them} (the logits are the "
        f"same){''.join(kept)}"
    )
