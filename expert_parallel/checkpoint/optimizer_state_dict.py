"""Turns the state of a torch optimizer into one flat dict of tensors, with experts under their global numbers.

In torch's own dicts the stacks of experts of all ranks have one name, so torch.distributed.checkpoint would keep the
moments of one rank's experts.
"""

import logging
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from expert_parallel.checkpoint.full_state_dict import local_keys, named_logical_parameters, unwrap
from expert_parallel.moe.experts.numbered import local_stack
from expert_parallel.moe.parameters import LogicalParameter, fill

logger = logging.getLogger(__name__)

# How a step is computed, not what: these stay those of the optimizer that loads.
KERNEL_OPTIONS = ("foreach", "fused", "capturable", "differentiable")
_STATE_KEY = re.compile(r"(.+?)(?:\.shard_\d+_of_\d+)?\.\w+")  # `a.weight.shard_0_of_2.step` belongs to `a.weight`
_GROUP_KEY = re.compile(r"param_groups\.(\d+)\.(\w+)")


@torch.no_grad()
def optimizer_state_dict(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Returns the optimizer's state as tensors under the names of the model's state dict, such as
    `moe.experts.3.w_in.exp_avg` and `moe.experts.3.w_in.step`, and the numbers of its parameter groups, such as
    `param_groups.0.lr`.

    Tensors of a parameter's shape are views, so that torch.distributed.checkpoint loads into them; call
    `load_optimizer_state_dict` afterwards. An optimizer without state gets its initial one, for a checkpoint to fill.
    Options that are no numbers are left out, and those that choose a kernel. Raises a ValueError for a parameter that
    the model does not have, and for state that is neither a number nor of its parameter's shape.
    """
    parameters = _named_parameters(model, optimizer)
    if not optimizer.state:
        _init_state(optimizer)
    state: dict[str, Tensor] = {}
    for logical in parameters:
        for entry, value in _entries(optimizer, logical).items():
            parts = zip(local_keys(logical), _parts(logical, value), strict=True)
            state |= {f"{key}.{entry}": part for key, part in parts}
    for number, group in enumerate(optimizer.param_groups):
        options = {name: _to_tensor(value) for name, value in group.items() if name not in KERNEL_OPTIONS}
        state |= {f"param_groups.{number}.{name}": tensor for name, tensor in options.items() if tensor is not None}
    return state


@torch.no_grad()
def load_optimizer_state_dict(model: nn.Module, optimizer: Optimizer, state: Mapping[str, Tensor]) -> None:
    """Loads what `optimizer_state_dict` returned on this rank, or the dicts of several ranks merged into one.

    Entries of other ranks' experts and shards are left out. A parameter of which the dict has nothing, as it had no
    gradient, starts afresh, and a warning says so. Options that the dict lacks stay those of the optimizer.
    Raises a ValueError, before it writes a value, if the dict lacks what this rank needs, has entries or parameters
    that the optimizer does not have, or another number of groups.
    """
    parameters = _named_parameters(model, optimizer)
    _init_state(optimizer)
    keys_of: dict[str, set[str]] = {}
    for key in state:
        match = _STATE_KEY.fullmatch(key)
        if match is None:
            raise ValueError(f"the optimizer's state dict has {key}, which is no name of optimizer state")
        if not _GROUP_KEY.fullmatch(key):
            keys_of.setdefault(match[1], set()).add(key)
    writes = _plan_groups(optimizer, state)
    fresh: list[LogicalParameter] = []
    for logical in parameters:
        names = _names_on_all_ranks(logical, keys_of) if logical.is_expert else logical.names
        theirs = {key for name in names for key in keys_of.pop(name, ())}
        if theirs or not _entries(optimizer, logical) or not local_keys(logical):
            writes += _plan_parameter(optimizer, logical, state, theirs)
        else:
            fresh.append(logical)
    if keys_of:
        raise ValueError(f"the optimizer's state dict has {next(iter(keys_of))}, which the optimizer does not have")
    for write in writes:
        write()
    for logical in fresh:
        del optimizer.state[logical.parameter]
    if fresh:
        first = ", ".join(logical.names[0] for logical in fresh[:3]) + f" and {len(fresh) - 3} more" * (len(fresh) > 3)
        logger.warning("the optimizer's state dict has nothing of %s: their state starts afresh", first)


def _plan_groups(optimizer: Optimizer, state: Mapping[str, Tensor]) -> list[Callable[[], object]]:
    """Returns the calls that set the options of the parameter groups. Raises a ValueError for another number of
    groups."""
    found = [(int(match[1]), match[2], value) for key, value in state.items() if (match := _GROUP_KEY.fullmatch(key))]
    groups = optimizer.param_groups
    if {number for number, _, _ in found} != set(range(len(groups))):
        raise ValueError(
            f"the optimizer's state dict has the parameter groups {sorted({number for number, _, _ in found})}, but "
            f"the optimizer has {len(groups)}, numbered from 0"
        )
    return [partial(_set_number, groups[number], option, value) for number, option, value in found]


def _plan_parameter(
    optimizer: Optimizer, logical: LogicalParameter, state: Mapping[str, Tensor], theirs: Collection[str]
) -> list[Callable[[], object]]:
    """Returns the calls that fill the state of one parameter. Raises a ValueError if `theirs`, the keys of `state` that
    belong to it on any rank, are not those that this rank needs."""
    keys, entries = local_keys(logical), _entries(optimizer, logical)
    wanted = {f"{key}.{entry}" for key in keys for entry in entries}
    unwanted = sorted(key for key in theirs if key not in wanted and key.rpartition(".")[0] in keys)
    if unwanted:
        raise ValueError(
            f"the optimizer's state dict has {unwanted[0]}, which this rank's {type(optimizer).__name__} does not keep"
        )
    lacking = sorted(wanted.difference(theirs))
    if lacking:
        raise ValueError(
            f"the optimizer's state dict has {min(theirs)}, but not {lacking[0]}, which this rank needs: load this "
            "rank's own file, those of all ranks merged, or use torch.distributed.checkpoint"
        )
    writes: list[Callable[[], object]] = []
    for entry, value in entries.items():
        sources = [state[f"{key}.{entry}"] for key in keys]
        if not _has_shape_of(logical, value):
            if len({source.item() for source in sources}) > 1:
                raise ValueError(f"{entry} differs between {', '.join(keys)} in the optimizer's state dict")
            writes += [
                partial(_set_number, optimizer.state[logical.parameter], entry, source) for source in sources[:1]
            ]
            continue
        for key, target, source in zip(keys, _parts(logical, value), sources, strict=True):
            if target.shape != source.shape:
                raise ValueError(
                    f"{key}.{entry} has shape {tuple(source.shape)} in the optimizer's state dict, but needs "
                    f"{tuple(target.shape)}"
                )
            writes.append(
                partial(target.copy_, source) if isinstance(source, DTensor) else partial(fill, target, source)
            )
    return writes


def _named_parameters(model: nn.Module, optimizer: Optimizer) -> list[LogicalParameter]:
    """Returns the optimizer's parameters with their names. Raises a ValueError if the model does not have one."""
    by_id = {id(logical.parameter): logical for logical in named_logical_parameters(unwrap(model))}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in parameters:
        if id(parameter) not in by_id:
            raise ValueError(
                f"the optimizer has a parameter of shape {tuple(parameter.shape)} that the model does not have: make "
                "the optimizer after the model is moved, wrapped or sharded"
            )
    return [by_id[id(parameter)] for parameter in parameters]


def _entries(optimizer: Optimizer, logical: LogicalParameter) -> dict[str, Any]:
    """Returns the optimizer's state of a parameter by name, without None. Raises a ValueError for state that is neither
    a number nor of the parameter's shape, as it cannot be divided by experts."""
    entries = {name: v for name, v in optimizer.state.get(logical.parameter, {}).items() if v is not None}
    for name, value in entries.items():
        if not _is_number(value) and not _has_shape_of(logical, value):
            shape = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise ValueError(
                f"{type(optimizer).__name__} keeps {name}, {shape}, for {logical.names[0]} of shape "
                f"{tuple(logical.parameter.shape)}: optimizer_state_dict takes numbers and tensors of the same shape"
            )
    return entries


def _has_shape_of(logical: LogicalParameter, value: object) -> bool:
    return isinstance(value, Tensor) and value.shape == logical.parameter.shape


def _parts(logical: LogicalParameter, value: Any) -> list[Tensor]:
    """Returns an entry of the optimizer's state as one tensor for each of the parameter's `local_keys`: a view, or a
    copy of a number."""
    if not _has_shape_of(logical, value):
        return [_number_tensor(value) for _ in local_keys(logical)]
    return list(local_stack(value)) if logical.is_expert else [value]


def _names_on_all_ranks(logical: LogicalParameter, names: Iterable[str]) -> list[str]:
    """Returns those of the names that belong to the same stack of experts, on any rank."""
    path, _, leaf = logical.names[0].rsplit(".", 2)
    pattern = re.compile(rf"{re.escape(path)}\.\d+\.{leaf}")
    return [name for name in names if name.startswith(path) and pattern.fullmatch(name)]


def _init_state(optimizer: Optimizer) -> None:
    """Gives parameters without optimizer state the one that a first step creates, by a step that changes nothing."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    fresh = [p for p in parameters if p.requires_grad and not optimizer.state.get(p)]
    if not fresh:
        return
    gradients = [(p, p.grad) for p in parameters]
    neutral = {"lr": 0.0, "weight_decay": 0.0, "eps": 1.0}  # with a gradient of 0 the weights keep their bits
    options = [
        (group, name, group[name])
        for group in optimizer.param_groups
        for name in neutral
        if _is_number(group.get(name))
    ]
    try:
        for parameter in parameters:
            parameter.grad = None
        for parameter in fresh:
            parameter.grad = torch.zeros_like(parameter)
        for group, name, value in options:
            group[name] = torch.full_like(value, neutral[name]) if isinstance(value, Tensor) else neutral[name]
        optimizer.step()
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for group, name, value in options:
            group[name] = value
    for parameter in fresh:
        step = optimizer.state.get(parameter, {}).get("step")
        if step is not None:
            _set_number(optimizer.state[parameter], "step", torch.zeros(()))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)


def _number_tensor(value: float | Tensor) -> Tensor:
    """Returns a number as a tensor of its own: float64 for a float of Python, so that it is kept exactly."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)


def _to_tensor(value: Any) -> Tensor | None:
    """Returns a number, or a tuple of numbers, as a tensor that keeps it exactly; None for what is neither."""
    if _is_number(value):
        return _number_tensor(value)
    if isinstance(value, tuple | list) and value and all(isinstance(number, int | float) for number in value):
        return torch.tensor(value, dtype=torch.float64)
    return None


def _set_number(options: dict[str, Any], name: str, value: Tensor) -> None:
    """Sets options[name]: in place if it is a tensor, to a tuple if `value` has several numbers."""
    if isinstance(options.get(name), Tensor):
        options[name].copy_(value.view_as(options[name]))
    else:
        options[name] = tuple(value.tolist()) if value.dim() else value.item()
