"""Starts a run from a Hugging Face folder: each rank reads its own part of the weights, and nothing is converted on
disk."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from expert_parallel.checkpoint.load import fill_weights
from expert_parallel.checkpoint.state import TrainingState
from expert_parallel.data.config import TokensData
from expert_parallel.data.open import ORIGIN, TOKENIZER_FILE
from expert_parallel.data.reading import read_json
from expert_parallel.interop.exporting import leaves
from expert_parallel.interop.family import settings
from expert_parallel.interop.folder import CONFIG, format_bytes
from expert_parallel.interop.hf_config import Tree
from expert_parallel.interop.hf_model import HuggingFaceModel
from expert_parallel.interop.importing import check_origin_files, copy_origin_files, refuse_larger_tokenizer
from expert_parallel.interop.quantization import read_quantization
from expert_parallel.interop.quantized_folder import QuantizedFolder
from expert_parallel.interop.set_aside import keep_set_aside
from expert_parallel.model.config import ModelConfig
from expert_parallel.model.transformer import LanguageModel
from expert_parallel.parallel.collectives import all_gather_text
from expert_parallel.parallel.mesh import ParallelMesh
from expert_parallel.runtime.process import Runtime
from expert_parallel.training.config import Config
from expert_parallel.training.start import STARTS, OpenStart


def mtp_depth(model: ModelConfig) -> Tree:
    """Returns the depth of multi-token prediction as a tree of settings, in which 0 is none."""
    return {"mtp": {"depth": len(model.mtp_layers)}}


class HuggingFaceStart:
    """Starts from the weights of a Hugging Face folder. See `Start`.

    Everything that an import refuses is refused when it is opened, from config.json and the headers of the files. So is
    a folder of another model than the run's.
    """

    def __init__(self, path: Path, config: Config) -> None:
        self.config, self.dtype = config, quantized_dtype(path, config)
        # Without model.mtp, layers of multi-token prediction are set aside, and so kept for export.
        self.source = HuggingFaceModel(path, self.dtype, with_mtp=config.model.mtp is not None)
        theirs, ours = (leaves(mtp_depth(m) | settings(m), "model") for m in (self.source.model, config.model))
        for name in dict.fromkeys([*ours, *theirs]):
            if ours.get(name) != theirs.get(name):
                raise ValueError(
                    f"{path} holds another model: {name} is {theirs.get(name)!r} there and {ours.get(name)!r} here; "
                    "`convert import --config-only` writes the settings of its model"
                )
        if (path / TOKENIZER_FILE).is_file():
            refuse_larger_tokenizer(path / TOKENIZER_FILE, config.model.vocab_size)
        check_origin_files(path)
        self.kept: list[str] = []

    def check_values(self) -> None:
        """Checks the scales of quantized weights."""
        self.source.check_values()

    def keep_files(self, folder: Path) -> None:
        """Keeps the same files as an import: config.json, those of tokenizer and generation, what is set aside."""
        partial, final = folder / f"partial_{ORIGIN}", folder / ORIGIN
        for earlier in (partial, final):  # of an attempt that wrote no checkpoint
            shutil.rmtree(earlier, ignore_errors=True)
        copy_origin_files(self.source.folder.path, partial)
        self.kept = keep_set_aside(self.source, partial)
        partial.rename(final)

    def load(self, model: LanguageModel, state: TrainingState, runtime: Runtime, mesh: ParallelMesh) -> list[str]:
        """Reads this rank's part of each tensor, one after another."""
        fill_weights(self.source.read_slice, model, state, runtime, mesh)
        read = max(int(count) for count in all_gather_text(str(self.source.bytes_read), torch.device("cpu")))
        folder = self.source.folder
        amounts = f"a rank read at most {format_bytes(read)} of {format_bytes(folder.num_bytes)}"
        first = f"started from the weights of {folder.path}: {amounts}"
        if isinstance(folder, QuantizedFolder) and folder.weights:
            first += f"; weights in {folder.quantization.describe()} become {self.dtype}"
        return [first, *self.source.tensor_notes, *self.kept, *describe_other_tokens(self.config)]


def describe_other_tokens(config: Config) -> list[str]:
    """Returns a sentence if a run reads data as bytes, which no published model was trained on."""
    if isinstance(config.data, TokensData):
        return []
    return [
        f"data.kind is {config.data.kind!r}, whose tokens are bytes; the model was trained on those of its tokenizer, "
        "with which `data prepare --tokenizer` makes data of kind 'tokens'"
    ]


def quantized_dtype(path: Path, config: Config) -> str | None:
    """Returns the dtype in which a run holds weights, and so what quantized weights become; None if the weights of the
    folder are not quantized."""
    if not (path / CONFIG).is_file() or read_quantization(read_json(path / CONFIG)) is None:
        return None
    return "float64" if config.training.dtype == "float64" else "float32"


START_KINDS: Mapping[str, OpenStart] = {**STARTS, "hf": HuggingFaceStart}
