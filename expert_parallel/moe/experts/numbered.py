"""Defines the state dict of a rank's experts: one tensor for each expert, named by the expert's global number.

A rank that holds experts 2 and 3 in a stack `w_in` has the keys `2.w_in` and `3.w_in`. So the state dicts of two ranks
never have different weights under one key: they can be merged, and a rank cannot load those of another.
"""

import logging
import re
from collections.abc import Collection, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from expert_parallel.parallel.sharding import TensorShard, get_tensor_shards

logger = logging.getLogger(__name__)

_KEY = re.compile(r"(\d+)\.(\w+)(\.shard_\d+_of_\d+)?")


class NumberedExperts(nn.Module):
    """Saves and loads parameters that are stacks of experts, (e, ...), as one tensor for each expert.

    expert_ids: the global numbers of the experts in the stacks, in order. num_experts: the number of experts on all
    ranks. Where FSDP2 shards a stack, the state dict holds the experts of this rank's shard, as plain tensors. Where a
    weight is sharded over etp, its key ends in `.shard_0_of_2`.

    Loading takes this rank's experts out of a dict that may hold more: those of other ranks, or unsharded weights. It
    is an error, with strict=False too, if the dict holds other experts but not those of this rank, numbers from
    num_experts on, or other shapes. Stacks that earlier versions wrote are read.
    """

    def __init__(self, expert_ids: tuple[int, ...], num_experts: int) -> None:
        super().__init__()
        self.expert_ids = expert_ids
        self.num_experts = num_experts

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, parameter in self.named_parameters(recurse=False):
            local = local_stack(destination.pop(prefix + name))
            for slot, key in enumerate(self._keys(name, parameter)):
                # Shares its memory with the stack, so that torch.distributed.checkpoint loads in place.
                destination[prefix + key] = local[slot] if keep_vars else with_own_storage(local[slot])

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if isinstance(self, FSDPModule):
            self.reshard()  # stacks that are gathered for a forward pass become shards again
        parameters = dict(self.named_parameters(recurse=False))
        given = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        stacks = {}
        try:
            for name, parameter in parameters.items():
                stack = self._find_stack(name, parameter, given)
                if stack is None:
                    missing_keys += [prefix + key for key in self._keys(name, parameter)]
                else:
                    stacks[prefix + name] = stack
        except ValueError as error:  # before anything of this module is written
            error_msgs.append(f"{prefix.removesuffix('.') or 'experts'}: {error}")
            return
        others = {prefix + key: value for key, value in given.items() if _expert_of(key, parameters) is None}
        super()._load_from_state_dict(
            {**others, **stacks}, prefix, local_metadata, strict, [], unexpected_keys, error_msgs
        )

    def _fqn_modifiers(self) -> dict[str, str]:
        """Serves torch.distributed.checkpoint.state_dict (get_model_state_dict, set_..., get_optimizer_state_dict),
        which looks up each key's attributes and asks modules that rename keys where to look.

        Raises a ValueError on a rank that does not hold all experts: those functions would take its stack for that of
        all ranks.
        """
        for name, parameter in self.named_parameters(recurse=False):
            held = self._keys(name, parameter)
            if len(held) < self.num_experts or get_tensor_shards(self):
                raise ValueError(
                    f"torch.distributed.checkpoint.state_dict would lose experts, as a rank holds {len(held)} of "
                    f"{self.num_experts}: use expert_parallel.full_state_dict(model), or save model.state_dict() and "
                    "expert_parallel.optimizer_state_dict(model, optimizer) with torch.distributed.checkpoint"
                )
        return dict.fromkeys(map(str, self.expert_ids), "by_number")

    @property
    def by_number(self) -> SimpleNamespace:
        """Returns an object with an attribute for each expert of this rank, such as `3`, which has its parameters'
        names as attributes: the counterpart of the state dict's keys."""
        names = SimpleNamespace(**dict(self.named_parameters(recurse=False)))
        return SimpleNamespace(**{str(expert): names for expert in self.expert_ids})

    def _keys(self, name: str, parameter: Tensor) -> list[str]:
        """Returns the keys of this rank's experts in a parameter, in the order of its local stack."""
        shard = get_tensor_shards(self).get(name)
        suffix = "" if shard is None else shard.suffix
        return [f"{expert}.{name}{suffix}" for expert in held_experts(parameter, self.expert_ids)]

    def _find_stack(self, name: str, parameter: Tensor, given: Mapping[str, Tensor]) -> Tensor | None:
        """Returns the value of a parameter in a state dict, or None if the dict has no weights of that name. Raises a
        ValueError if it has some, but not those of this rank."""
        numbers = {number for key in given if (number := _expert_of(key, (name,))) is not None}
        if not numbers:
            return self._from_old_stack(name, parameter, given[name]) if name in given else None
        if max(numbers) >= self.num_experts:
            raise ValueError(
                f"the state dict has an expert {max(numbers)}, but the layer has {self.num_experts} experts, of which "
                "the first is 0"
            )
        if given.get(name, parameter) is not parameter:  # torch's set_model_state_dict adds the parameter itself
            raise ValueError(f"the state dict has {name} twice, as one stack and by the experts' numbers")
        held, shard = held_experts(parameter, self.expert_ids), get_tensor_shards(self).get(name)
        if not numbers.issuperset(held):
            raise ValueError(
                f"the state dict has the experts {format_numbers(numbers)}, but this rank holds "
                f"{format_numbers(held)}: load this rank's own file, one of all ranks "
                "(expert_parallel.full_state_dict), or use torch.distributed.checkpoint"
            )
        shape = local_stack(parameter).shape[1:]
        experts = [_find_expert(key, shard, shape, given) for key in self._keys(name, parameter)]
        return _like(parameter, torch.stack(experts) if experts else local_stack(parameter).detach())

    def _from_old_stack(self, name: str, parameter: Tensor, stack: Tensor) -> Tensor:
        """Returns the value of a parameter, given a stack as earlier versions wrote it: the experts of one rank, or of
        all ranks. Raises a ValueError if the shape is neither; warns if a rank's stack could be that of another."""
        if isinstance(stack, DTensor) or stack is parameter:
            return stack  # torch copies it, and compares the shapes
        shard, rank_shape = get_tensor_shards(self).get(name), parameter.shape[1:]
        whole_shape = rank_shape if shard is None else shard.full_shape(rank_shape)
        sizes = (self.num_experts, len(self.expert_ids))
        if stack.shape[1:] not in (whole_shape, rank_shape) or stack.shape[:1] not in [(size,) for size in sizes]:
            raise ValueError(
                f"{name} has shape {tuple(stack.shape)} in the state dict, but needs {(self.num_experts, *whole_shape)}"
            )
        if stack.shape != (self.num_experts, *whole_shape):
            logger.warning(
                "%s of shape %s in the state dict does not name its experts, as an earlier version wrote it: it is "
                "right only if this rank (experts %s) wrote it",
                name,
                tuple(stack.shape),
                format_numbers(self.expert_ids),
            )
        held = held_experts(parameter, self.expert_ids)
        rows = held if len(stack) == self.num_experts else [self.expert_ids.index(expert) for expert in held]
        stack = stack[list(rows)]
        return _like(parameter, shard.narrow_to_shard(stack) if shard and stack.shape[1:] == whole_shape else stack)


def held_experts(parameter: Tensor, expert_ids: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the numbers of the experts of which this rank has the weights: `expert_ids`, those of the whole stack, or
    fewer if FSDP2 shards it. Raises a ValueError if FSDP2 shards the stack along another dimension."""
    if not isinstance(parameter, DTensor):
        return expert_ids
    mesh, placements = parameter.device_mesh, parameter.placements
    if any(isinstance(placement, Shard) and placement.dim != 0 for placement in placements):
        raise ValueError(f"a stack of experts is sharded as {placements}: state dicts need shards of dimension 0")
    # Sharded like the stack, so that FSDP2's rule for uneven shards is not repeated here.
    numbers = distribute_tensor(torch.tensor(expert_ids, device=mesh.device_type), mesh, placements, src_data_rank=None)
    return tuple(numbers.to_local().tolist())  # the host waits; used for saving and loading alone


def local_stack(parameter: Tensor) -> Tensor:
    """Returns this rank's part of a stack that FSDP2 may have sharded, without a copy."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def with_own_storage(view: Tensor) -> Tensor:
    """Returns a view as a tensor on the same memory whose storage is the view alone.

    Of tensors that share a storage, safetensors' and Accelerate's functions for whole models save one and drop the
    others.
    """
    has_memory = view.device.type in ("cpu", "cuda") and type(view) is Tensor and view.numel() > 0
    return torch.from_dlpack(view.detach()) if has_memory else view


def format_numbers(numbers: Collection[int]) -> str:
    """Formats numbers as ranges.

    >>> format_numbers({0, 1, 2, 5})
    '0-2, 5'
    """
    starts = sorted(number for number in numbers if number - 1 not in numbers)
    ends = sorted(number for number in numbers if number + 1 not in numbers)
    return ", ".join(f"{a}-{b}" if a < b else f"{a}" for a, b in zip(starts, ends, strict=True))


def _expert_of(key: str, names: Collection[str]) -> int | None:
    """Returns the expert that a key such as `3.w_in` or `3.w_in.shard_0_of_2` belongs to; None if it is no such key of
    one of the parameters `names`."""
    match = _KEY.fullmatch(key)
    return int(match[1]) if match is not None and match[2] in names else None


def _find_expert(key: str, shard: TensorShard | None, shape: torch.Size, given: Mapping[str, Tensor]) -> Tensor:
    """Returns one expert of the local `shape`: the value of `key`, or this rank's shard of unsharded weights. Raises a
    ValueError if there is neither, or if it has another shape."""
    whole = key if shard is None else key.removesuffix(shard.suffix)
    if key not in given and whole not in given:
        raise ValueError(
            f"the state dict has other shards of {whole} than {key}, which this rank holds: load this rank's own file, "
            "or one of unsharded weights (expert_parallel.full_state_dict)"
        )
    found, expected = (key, shape) if key in given or shard is None else (whole, shard.full_shape(shape))
    if given[found].shape != expected:
        raise ValueError(
            f"{found} has shape {tuple(given[found].shape)} in the state dict, but needs {tuple(expected)}"
        )
    return given[found] if found == key or shard is None else shard.narrow_to_shard(given[found])


def _like(parameter: Tensor, local: Tensor) -> Tensor:
    """Returns a rank's part of a stack as a tensor of the parameter's kind: a DTensor if FSDP2 shards the parameter."""
    if not isinstance(parameter, DTensor):
        return local
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(
        local.to(mesh.device_type), mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
