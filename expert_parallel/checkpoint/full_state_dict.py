"""Gathers the state dict of a model on rank 0, with every tensor whole, and loads such a dict in any layout."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from expert_parallel.model.transformer import Transformer
from expert_parallel.moe.experts.numbered import NumberedExperts, held_experts
from expert_parallel.moe.layer import MoELayer
from expert_parallel.moe.parameters import LogicalParameter, fill, full_tensor, logical_parameters
from expert_parallel.parallel.collectives import Peers


@torch.no_grad()
def full_state_dict(model: nn.Module) -> dict[str, Any]:
    """Gathers the state dict of a model on rank 0, as if one rank held it all. Returns {} on other ranks.

    Every rank calls it. One tensor at a time is gathered, experts over ep, shards over etp, tp or FSDP2's mesh, and
    copied to the CPU. The names are those of model.state_dict(), without the prefix of DDP or torch.compile around the
    model. `load_state_dict` takes this rank's experts out of the dict, on any ep; `load_full_state_dict` fills FSDP2's
    shards, too. Raises a ValueError for a pipeline's stages.
    """
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    full = {}
    for name, value in _gather_values(unwrap(model)):
        if is_first:
            full[name] = value.to("cpu", copy=True) if isinstance(value, Tensor) else value
    return full


@torch.no_grad()
def load_full_state_dict(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Copies this rank's part of a whole state dict into the model. Communicates nothing.

    state: what `full_state_dict` returned on rank 0, here needed on every rank, such as `torch.load(path, mmap=True,
    weights_only=True)`. Raises a ValueError before anything is written if a name is missing or unknown, or a shape
    differs, and if the model has no memory yet (meta device).
    """
    model = unwrap(model)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("the model is on the meta device: call model.to_empty(device=...) before load_full_state_dict")
    dense, sharded = _split_state_dict(model)
    shapes = {name: value.shape for name, value in dense.items() if isinstance(value, Tensor)}
    shapes |= {name: logical.shape for logical, _ in sharded for name in logical.names}
    known = {*dense, *(name for logical, layer in sharded for name in _names_on_all_ranks(logical, layer))}
    missing, unknown = [name for name in {**dense, **shapes} if name not in state], [*state.keys() - known]
    if missing or unknown:
        raise ValueError(
            f"the state dict is not the whole one of this model: of {len(state)} tensors {len(unknown)} are unknown, "
            f"and {len(missing)} are missing, such as {(missing + unknown)[0]}; every rank needs what full_state_dict "
            "returns on rank 0"
        )
    for name, shape in shapes.items():
        if state[name].shape != shape:
            raise ValueError(f"{name} has shape {tuple(state[name].shape)} in the state dict, but needs {tuple(shape)}")
    for name, value in dense.items():
        if isinstance(value, Tensor):
            fill(value, state[name])
    for logical, _ in sharded:
        logical.fill(logical.parameter, [state[name] for name in logical.names])
    extra = {name: state[name] for name, value in dense.items() if not isinstance(value, Tensor)}
    if extra:
        model.load_state_dict(extra, strict=False)  # hands each module what its get_extra_state returned


def unwrap(model: nn.Module) -> nn.Module:
    """Returns the model inside DDP and torch.compile."""
    while isinstance(model, DistributedDataParallel) or hasattr(model, "_orig_mod"):
        inner = model.module if isinstance(model, DistributedDataParallel) else model._orig_mod
        assert isinstance(inner, nn.Module)
        model = inner
    return model


def named_logical_parameters(model: nn.Module) -> Iterator[LogicalParameter]:
    """Yields `logical_parameters` under the names that state dicts use, inside checkpoint_wrapper, too. FSDP2's
    parameters are sharded, as an optimizer holds them."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # the last forward pass may have left them whole
    for logical in logical_parameters(model):
        yield replace(logical, names=tuple(name.replace("_checkpoint_wrapped_module.", "") for name in logical.names))


def local_keys(logical: LogicalParameter) -> list[str]:
    """Returns the keys of a parameter in this rank's state dict: for a stack, one for each expert whose weights this
    rank has, in order."""
    slots: tuple[int, ...] = tuple(range(len(logical.names)))
    if logical.is_expert:
        slots = held_experts(logical.parameter, slots)
    suffix = "" if logical.tensor_shard is None else logical.tensor_shard.suffix
    return [logical.names[slot] + suffix for slot in slots]


ShardedParameter = tuple[LogicalParameter, MoELayer | None]  # the layer if the parameter is a stack of its experts


def _split_state_dict(model: nn.Module) -> tuple[dict[str, Any], list[ShardedParameter]]:
    """Returns the state dict without experts and tensor-parallel shards, and the parameters that these belong to."""
    if any(isinstance(module, Transformer) and module.stage_spec.num_stages > 1 for module in model.modules()):
        raise ValueError(
            "a full state dict of a pipeline's stage would lack the other stages: save the state_dict() of every rank "
            "with torch.distributed.checkpoint"
        )
    dense = dict(model.state_dict())
    layers = {id(p): m for m in model.modules() if isinstance(m, MoELayer) for p in m.experts.parameters()}
    sharded = [
        (logical, layers.get(id(logical.parameter)))
        for logical in named_logical_parameters(model)
        if logical.is_expert or logical.tensor_shard is not None
    ]
    for logical, _ in sharded:
        for key in local_keys(logical):
            del dense[key]
    for name, module in model.named_modules(remove_duplicate=False):
        second = [key for key in dense if isinstance(module, NumberedExperts) and key.startswith(f"{name}.")]
        if second:
            raise ValueError(
                f"{second[0]} is a second name of experts that the model uses twice: register their layer in one place "
                "of the model, and pass it to the other when it is called"
            )
    return dense, sharded


def _names_on_all_ranks(logical: LogicalParameter, layer: MoELayer | None) -> list[str]:
    """Returns the names of the logical tensors of which the ranks of the ep_group hold one each, or several."""
    if layer is None:
        return list(logical.names)
    path, _, leaf = logical.names[0].rsplit(".", 2)
    return [f"{path}.{expert}.{leaf}" for expert in range(layer.placement.num_experts)]


def _gather_values(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yields (name, whole value), in the same order on all ranks. Each step may be a collective. Experts come on the
    ranks of one ep_group alone: that of rank 0."""
    dense, sharded = _split_state_dict(model)
    for name, value in dense.items():
        yield name, full_tensor(value)
    for logical, layer in sharded:
        whole = {name: tensor.contiguous() for name, tensor in logical.whole(logical.parameter).items()}
        if layer is None or layer.ep_group is None:
            yield from whole.items()
        elif 0 in Peers.of(layer.ep_group).ranks:
            received = torch.empty_like(next(iter(whole.values())))  # one expert, so that memory stays bounded
            owners = zip(_names_on_all_ranks(logical, layer), layer.placement.rank_of_expert, strict=True)
            for name, owner in owners:
                tensor = whole.get(name, received)
                dist.broadcast(tensor, group=layer.ep_group, group_src=owner)
                yield name, tensor
