"""Locates the weights and moments that ZeRO stores on this rank: ranges of flattened parameters, in flat tensors.

Stages 1 and 2 flatten each optimizer group over its data-parallel ranks (experts: over the EDP ranks); a rank keeps the
moments and a float32 copy of the weights of its partition. Stage 3 partitions each parameter separately, weights
included.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from expert_parallel.checkpoint.manifest import MOMENTS, WEIGHTS
from expert_parallel.checkpoint.state import FlatRange


@dataclass(frozen=True)
class FlatSlice:
    """Locates this rank's range of a parameter: it begins at `offset` in `flat`, which the optimizer updates."""

    flat: Tensor
    offset: int
    range: FlatRange


class ZeroState:
    """Implements TrainingState (checkpoint/state.py) for ZeRO. zero: DeepSpeed's optimizer, which wraps `optimizer`."""

    def __init__(self, zero: Any, optimizer: torch.optim.Optimizer, stage: int) -> None:
        self.zero = zero
        self.optimizer = optimizer
        self.stage = stage
        self.flat_tensors: list[Tensor] = (
            zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups
        )

    def flat_range(self, part: str, parameter: nn.Parameter) -> FlatRange | None:
        if part == WEIGHTS and self.stage < 3:
            return None
        return self.flat_slice(parameter).range

    def tensor(self, part: str, parameter: nn.Parameter) -> Tensor:
        if part == WEIGHTS and self.stage < 3:
            return parameter.detach()
        flat_slice = self.flat_slice(parameter)
        flat = flat_slice.flat if part == WEIGHTS else self.optimizer.state[flat_slice.flat][part]
        return flat.detach().narrow(0, flat_slice.offset, flat_slice.range.length)

    def flat_slice(self, parameter: Any) -> FlatSlice:
        """Returns where this rank's range of the parameter is stored."""
        if self.stage == 3:
            number, offset, size = self.zero.grad_position[self.zero.get_param_id(parameter)]
            start = size * dist.get_rank(parameter.ds_process_group)
            length = min(size, max(0, parameter.ds_numel - start))  # the partitions of the last ranks may be padded
            return FlatSlice(self.flat_tensors[number], offset, FlatRange(start, length, tuple(parameter.ds_shape)))
        mapping = parameter._hp_mapping
        if mapping is None:  # other ranks hold all of it
            return FlatSlice(self.flat_tensors[0], 0, FlatRange(0, 0, tuple(parameter.shape)))
        here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
        flat = self.flat_tensors[mapping.param_group_index]
        return FlatSlice(flat, there.start, FlatRange(here.start, here.numel, tuple(parameter.shape)))

    def init_moments(self, step: int) -> None:
        for flat in self.flat_tensors:
            state = self.optimizer.state[flat]
            state["step"] = torch.tensor(float(step), device=flat.device)  # a fused AdamW counts on the device
            state.update({moment: torch.zeros_like(flat, requires_grad=False) for moment in MOMENTS})

    def finish_loading(self) -> None:
        """Updates copies of the loaded weights: compute weights in stage 3, float32 copies in stages 1 and 2."""
        if self.stage < 3:
            self.zero.refresh_fp32_params()
            return
        for number in range(len(self.flat_tensors)):
            self.zero._reassign_or_swap_out_partitioned_parameters(number)
        if self.zero.persistent_parameters:
            self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)

    def flatten_rows(self, rows_of: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """Returns, for each flat tensor, a bool mask of its frozen elements. rows_of: for each parameter, a bool mask
        of its frozen rows.

        A flat tensor without elements of these parameters is not in the result.
        """
        masks: dict[Tensor, Tensor] = {}
        for parameter, rows in rows_of.items():
            flat_slice = self.flat_slice(parameter)
            if flat_slice.range.length == 0:
                continue
            whole = rows.view(-1, *[1] * (len(flat_slice.range.shape) - 1)).expand(flat_slice.range.shape).flatten()
            mask = masks.setdefault(
                flat_slice.flat, torch.zeros_like(flat_slice.flat, dtype=torch.bool, requires_grad=False)
            )
            start, length = flat_slice.range.start, flat_slice.range.length
            mask[flat_slice.offset : flat_slice.offset + length] = whole[start : start + length]
        return masks
