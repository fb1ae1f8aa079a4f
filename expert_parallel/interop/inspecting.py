"""Describes a Hugging Face folder without reading its weights: what it is, whether it can be imported, and what it
would take to train it."""

import math
import shlex
import textwrap
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from expert_parallel.data.open import TOKENIZER_FILE
from expert_parallel.data.reading import read_json
from expert_parallel.data.tokenizer import FileTokenizer
from expert_parallel.interop.config_only import check_arguments, describe_left_out, write_config
from expert_parallel.interop.folder import (
    CONFIG,
    COPIED_FILES,
    GENERATION,
    PICKLED,
    HuggingFaceFolder,
    format_bytes,
    missing,
)
from expert_parallel.interop.hf_config import Tree, short, shown
from expert_parallel.interop.hf_model import HuggingFaceModel, find_family, read_model_config
from expert_parallel.interop.ignored_tensors import MTP
from expert_parallel.interop.importing import check_origin_files, refuse_larger_tokenizer
from expert_parallel.model.config import ModelConfig
from expert_parallel.training.check import LABEL, format_config_report
from expert_parallel.training.comparison import WIDTH, format_count
from expert_parallel.training.config import Config, load_config
from expert_parallel.training.memory import GPU_BYTES, estimate_memory
from expert_parallel.training.setup import check_degrees


@dataclass(frozen=True)
class OnGPUs:
    """Holds the fewest GPUs that have the memory to train a model, the arguments of `check` for them, and the bytes
    that a rank needs at the highest moment of a step. If no number of GPUs is enough, they are those of one."""

    config: Config
    gpus: int
    arguments: list[str]
    rank_bytes: float

    @property
    def fits(self) -> bool:
        """Returns False if no number of GPUs is enough."""
        return self.rank_bytes <= GPU_BYTES


@dataclass
class Inspection:
    """Holds what is known of a Hugging Face folder.

    path: the folder, or a config.json alone. theirs: its content. num_files, num_bytes: of the safetensors files.
    numbers: how many elements the files hold, by dtype as safetensors names it. token_ids: of tokenizer.json; None if
    there is none that can be read. model: our settings for it; None if config.json is refused. mtp: how many numbers
    each tensor of multi-token prediction has that is set aside, by name. refusals: why it cannot be imported, in
    sentences. notes: what an import says. training: what it takes to train the model; None without one.
    """

    path: Path
    theirs: Tree
    num_files: int = 0
    num_bytes: int = 0
    numbers: Counter[str] = field(default_factory=Counter)
    token_ids: int | None = None
    model: ModelConfig | None = None
    mtp: dict[str, int] = field(default_factory=dict)
    refusals: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    training: OnGPUs | None = None

    @property
    def has_weights(self) -> bool:
        """Returns False if there is config.json alone, which can be imported with --config-only."""
        return self.path.is_dir() and any(
            found for kind in ("*.safetensors*", *PICKLED) for found in self.path.glob(kind)
        )

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Adds what is refused inside the context to the refusals, each sentence once."""
        try:
            yield
        except ValueError as error:
            sentence = str(error).removeprefix(f"{self.path}: ")
            self.refusals += [sentence] if sentence not in self.refusals else []


def inspect_folder(path: Path) -> Inspection:
    """Inspects a folder, or a config.json alone. Reads JSON files and the headers of safetensors files, no weights.

    Raises a ValueError if there is no config.json that can be read; all other faults are in the result.
    """
    file = path / CONFIG if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        raise ValueError(f"{path} is not a Hugging Face model: it has no {CONFIG}")
    if not file.is_file():
        raise ValueError(missing("folder", path))
    found = Inspection(path, read_json(file))
    with found.collecting():
        family = find_family(found.theirs, path)
        found.model = read_model_config(family, {**found.theirs, "quantization_config": None})
        found.notes = describe_left_out(found.theirs, family.imports_mtp)
    if found.has_weights:
        _inspect_files(found)
    if found.model is not None:
        with found.collecting():
            found.training = plan_training(file, len(found.model.mtp_layers))
    return found


def _inspect_files(found: Inspection) -> None:
    """Adds what the files beside config.json say."""
    path = found.path
    with found.collecting():
        folder = HuggingFaceFolder(path)
        found.num_files, found.num_bytes = len(folder.file_names), folder.num_bytes
        for name in folder.files:
            found.numbers[folder.dtype(name)] += math.prod(folder.shape(name))
    with found.collecting():
        source = HuggingFaceModel(path, compare_heads=False)
        found.model, found.notes = source.model, source.notes
        names = [name for name, kind in source.ignored.items() if kind == MTP]
        found.mtp = {name: math.prod(source.folder.shape(name)) for name in names}
    if (path / TOKENIZER_FILE).is_file():
        with found.collecting():
            found.token_ids = FileTokenizer(path / TOKENIZER_FILE).vocab_size
            if found.model is not None:
                refuse_larger_tokenizer(path / TOKENIZER_FILE, found.model.vocab_size)
    with found.collecting():
        check_origin_files(path)


def plan_training(config_json: Path, mtp_depth: int) -> OnGPUs:
    """Returns what it takes to train the model of a config.json; see `check_arguments`. mtp_depth: the number of its
    layers of multi-token prediction, which the files tell. Raises a ValueError if the config of a run for it is not
    valid."""
    further = [f"model.mtp.depth={mtp_depth}"] if mtp_depth else []
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.yaml"
        write_config(config_json, path, print_message=lambda note: None)
        _, gpus, *overrides = arguments = check_arguments(path, further)
        config = load_config(path, overrides)
    memory = estimate_memory(config, check_degrees(config, int(gpus)), "cuda")
    return OnGPUs(config, int(gpus), arguments, memory.total)


def format_inspection(found: Inspection) -> str:
    """Returns the output of `convert inspect`."""
    lines = [*_row("family", _family(found)), *_row("files", _files(found))]
    if quantized := found.theirs.get("quantization_config"):
        lines += _row("quantization", short(quantized))
    if found.path.is_dir():
        lines += _row("tokenizer", _tokenizer(found))
    if found.mtp:
        text = f"{format_count(sum(found.mtp.values()))} numbers in {len(found.mtp):,} tensors beside the model"
        lines += _row("MTP", text)
    for number, note in enumerate(found.notes):
        lines += _row("" if number else "notes", note)
    for refusal in found.refusals:
        lines += _row("refused", refusal)
    lines += _row("result", _result(found))
    if (training := found.training) is None:
        return "\n".join(lines)
    lines += [
        "",
        f"To train it, {_gpus(training)}:",
        f"  {shlex.join(['expert-parallel', 'convert', 'import', '--config-only', str(found.path), 'OUT.yaml'])}",
        f"  {shlex.join(['expert-parallel', 'check', 'OUT.yaml', *training.arguments])}",
    ]
    return "\n".join([*lines, format_config_report(training.config, training.gpus)])


def _gpus(training: OnGPUs) -> str:
    if not training.fits:
        return "no number of GPUs of 80 GB has the memory; on one"
    if training.gpus == 1:
        return "one GPU of 80 GB has the memory"
    return f"{training.gpus:,} GPUs of 80 GB have the memory, and no fewer"


def _family(found: Inspection) -> str:
    kind = found.theirs.get("model_type")
    architecture = found.theirs.get("architectures")
    named = architecture[0] if isinstance(architecture, list) and architecture else "no architecture"
    return f"{shown(kind)} ({shown(named)})"


def _files(found: Inspection) -> str:
    if not found.num_files:
        return "no safetensors files" if found.has_weights else "config.json alone, no weights"
    dtypes = ", ".join(f"{format_count(count)} {dtype}" for dtype, count in found.numbers.most_common())
    return f"{found.num_files:,} of safetensors, {format_bytes(found.num_bytes)}: {dtypes}"


def _tokenizer(found: Inspection) -> str:
    if found.token_ids is not None:
        return f"{TOKENIZER_FILE}, {found.token_ids:,} ids"
    there = [name for name in COPIED_FILES if (found.path / name).is_file() and name != GENERATION]
    return f"none that can be read, but {', '.join(there)}" if there else "none"


def _result(found: Inspection) -> str:
    if not found.refusals:
        command = "convert import" if found.has_weights else "convert import --config-only"
        return f"can be imported: {command} {found.path} OUT{'' if found.has_weights else '.yaml'}"
    if found.model is not None and found.has_weights:
        return f"the weights cannot be imported, config.json can: convert import --config-only {found.path} OUT.yaml"
    return "cannot be imported"


def _row(name: str, text: str) -> list[str]:
    """Returns a row, broken into lines of at most WIDTH columns; paths stay whole."""
    row = textwrap.TextWrapper(WIDTH, f"{name:<{LABEL}}", " " * LABEL, break_long_words=False, break_on_hyphens=False)
    return row.wrap(text)


def as_json(found: Inspection) -> Tree:
    """Returns what was found as a tree for JSON. Sizes are numbers of parameters, elements, tensors and bytes."""
    model, training = found.model, found.training
    moe = None if model is None else model.moe
    return {
        "path": str(found.path),
        "model_type": found.theirs.get("model_type"),
        "files": {"count": found.num_files, "bytes": found.num_bytes, "elements": dict(found.numbers)},
        "quantization_config": found.theirs.get("quantization_config"),
        "token_ids": found.token_ids,
        "importable": found.has_weights and not found.refusals,
        "refusals": found.refusals,
        "notes": found.notes,
        "multi_token_prediction": {"tensors": len(found.mtp), "elements": sum(found.mtp.values())},
        "model": model
        and {
            "parameters": model.num_params(),
            "active_parameters": model.num_active_params(),
            "layers": model.num_layers,
            "moe_layers": len(model.moe_layers),
            "experts": moe.num_experts if moe else 0,
            "experts_per_token": moe.router.experts_per_token(moe.num_experts) if moe else 0,
        },
        "training": training
        and {
            "gpus": training.gpus,
            "fits": training.fits,
            "rank_bytes": round(training.rank_bytes),
            "check_arguments": training.arguments,
        },
    }
