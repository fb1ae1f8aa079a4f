"""Records the routing of a run, the experts of every token in every step, in a folder of safetensors files, and replays
it.

    training.routing={kind: record, folder: routing}      training.routing={kind: play, folder: routing}

Each rank writes one file per step. Tokens are found by their global index, so a record can be replayed on any layout,
for example to compare two layouts without differences of routing. Combine weights are recomputed from the router's
scores.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from expert_parallel.data.batch import MicroBatch
from expert_parallel.moe.context import RecordedChoices, RouterReplay, global_index
from expert_parallel.settings import PathText, Settings

# The names of the tensors in a file, in the order of the fields of `RecordedChoices`. Files are read by later versions.
_TENSORS = ("index_T", "routed_ids_TK", "routed_reason_TK", "ids_TK", "reason_TK")


@dataclass(frozen=True)
class ReplaySpec:
    """Holds the properties of this run that a record must match.

    layers: the numbers of the MoE blocks. num_choices: K, the number of choices of a token. positions_S: int64, the
    positions of each sequence that this rank holds.
    """

    layers: list[int]
    num_experts: int
    num_choices: int
    positions_S: Tensor


class RecordConfig(Settings):
    """Records the experts of every token in every step."""

    kind: Literal["record"]
    folder: PathText
    """Sets the folder that the record is written to."""


class ReplayConfig(Settings):
    """Replays the experts of every token from a record, made by a run with the same data, steps and MoE layers."""

    kind: Literal["play"]
    folder: PathText
    """Sets the folder that the record is read from."""


RoutingConfig = Annotated[RecordConfig | ReplayConfig, Field(discriminator="kind")]


def save_routing(
    config: RecordConfig, step: int, rank: int, batches: Sequence[MicroBatch], replay: RouterReplay
) -> None:
    """Writes this rank's choices of one step to a file. Raises ValueError if the folder cannot be written.

    batches: the micro-batches of the step, with the positions of this rank only. replay: holds the recorded choices.
    The tokens are saved with their choices, so that a replay on other data is detected.
    """
    tensors = {
        f"{micro_step}.{layer}.{name}": getattr(choices, field.name).cpu().contiguous()
        for (_, micro_step, layer), choices in replay.recorded.items()
        for name, field in zip(_TENSORS, fields(RecordedChoices), strict=False)  # the last field is no tensor
    }
    tensors |= {f"{number}.tokens": batch.inputs_BS.flatten().cpu() for number, batch in enumerate(batches)}
    path = Path(config.folder) / f"step_{step:08d}.rank_{rank:05d}.safetensors"
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial)
        partial.rename(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"training.routing.folder: cannot write {path}: {error}") from error


def load_routing(config: ReplayConfig, step: int, batches: Sequence[MicroBatch], moe: ReplaySpec) -> RouterReplay:
    """Returns the choices of this rank's tokens in one step, read from the files of all ranks that recorded it.

    batches: the micro-batches of the step, with the positions of this rank only. Raises ValueError if the step is
    missing or the record does not match this run.
    """
    files = sorted(Path(config.folder).glob(f"step_{step:08d}.rank_*.safetensors"))
    where = f"training.routing.folder: {config.folder}"
    if not files:
        known = sorted({int(re.findall(r"\d+", f.name)[0]) for f in Path(config.folder).glob("step_*.safetensors")})
        held = f"it holds steps {known[0]} to {known[-1]}" if known else "it is empty"
        raise ValueError(f"{where} has no record of step {step}: {held}")
    try:
        parts = [load_file(file) for file in files]
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{where}: a record of step {step} cannot be read: {error}") from error
    where = f"{where}, step {step}"
    expected = {f"{number}.{layer}.index_T" for number in range(len(batches)) for layer in moe.layers}
    found = {key for part in parts for key in part if key.endswith(".index_T")}
    if found != expected:
        raise ValueError(
            f"{where}: {len(found)} passes through MoE layers were recorded, but this run has {len(expected)} "
            f"(training.micro_steps {len(batches)}, MoE blocks {', '.join(map(str, moe.layers))})"
        )
    indices = torch.cat([part[min(found)] for part in parts if min(found) in part])
    if len(indices.unique()) < len(indices):
        raise ValueError(f"{where} was recorded twice, on different numbers of ranks: use an empty folder to record")
    recorded = {}
    for number, batch in enumerate(batches):
        for layer in moe.layers:
            choices, tokens_T = _find_rows(parts, number, layer, batch, moe.positions_S)
            if tokens_T is None:
                raise ValueError(
                    f"{where} does not hold all of this rank's tokens: a rank's file is missing, or "
                    "training.global_batch or training.sequence_length was another"
                )
            if not torch.equal(tokens_T, batch.inputs_BS.flatten().cpu()):
                raise ValueError(f"{where} was recorded with other data (data or seed)")
            if choices.ids_TK.shape[1] != moe.num_choices:
                raise ValueError(
                    f"{where} holds {choices.ids_TK.shape[1]} choices a token, model.moe.router makes {moe.num_choices}"
                )
            if choices.ids_TK.numel() and int(choices.ids_TK.max()) >= moe.num_experts:
                raise ValueError(
                    f"{where} names expert {int(choices.ids_TK.max())}, model.moe.num_experts is {moe.num_experts}"
                )
            recorded[step, number, layer] = choices
    return RouterReplay(recorded)


def _find_rows(
    parts: list[dict[str, Tensor]], number: int, layer: int, batch: MicroBatch, positions_S: Tensor
) -> tuple[RecordedChoices, Tensor | None]:
    """Returns the choices of this batch's tokens, and the tokens as recorded, or None if any is missing."""
    key = f"{number}.{layer}"
    parts = [
        part for part in parts if f"{key}.index_T" in part
    ]  # ranks of other pipeline stages have recorded other layers
    whole = {name: torch.cat([part[f"{key}.{name}"] for part in parts]) for name in _TENSORS}
    index_T = global_index(batch.sequence_index_B.cpu(), len(positions_S), positions_S)
    index_G, order_G = whole["index_T"].sort()
    place_T = torch.searchsorted(index_G, index_T)
    there_T = place_T < len(index_G)
    row_T = order_G[place_T[there_T]]
    rows: dict[str, Any] = {
        field.name: whole[name][row_T].to(batch.inputs_BS.device)
        for name, field in zip(_TENSORS, fields(RecordedChoices), strict=False)
    }
    found = bool(there_T.all()) and torch.equal(whole["index_T"][row_T], index_T)
    tokens_G = torch.cat([part[f"{number}.tokens"] for part in parts])
    return RecordedChoices(**rows), tokens_G[row_T] if found else None
