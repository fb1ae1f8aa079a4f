"""Fits a user's own model, with MoE layers in it, to data parallelism by means: DistributedDataParallel, FSDP2, or a
loop.

A layer by itself leaves sums (see MoELayer). Users of these wrappers have a mean loss on each rank, and gradients that
are averaged over ranks; `prepare_data_parallel` fits the layer to that:

    gradient of                 contains after backward                    then averaged over
    dense weights, router       this rank's mean loss                      all ranks, by the wrapper
    experts                     the mean over the ep ranks, by the layer   the ranks with copies, by the layer or FSDP2
    auxiliary losses            this rank's share x ranks, by the layer    as the weights that they reach
"""

import math
import warnings
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from expert_parallel.moe.experts.ddp import ignore_in_ddp
from expert_parallel.moe.experts.grouped import GroupedExperts
from expert_parallel.moe.layer import MoELayer
from expert_parallel.moe.parameters import local_tensor
from expert_parallel.parallel.collectives import Peers, all_gather_rows, group_size
from expert_parallel.parallel.sharding import get_tensor_shards

Model = TypeVar("Model", bound=nn.Module)


def expert_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Returns the weights of experts that are sharded over ranks, so that no wrapper may take them for replicas.

    They are those of the MoE layers in `model` whose ep_group or etp_group has several ranks. The experts of other
    layers are replicated like all dense weights.
    """
    return [parameter for layer in _sharded_layers(model) for parameter in layer.experts.parameters()]


def prepare_data_parallel(model: Model, expert_data_group: dist.ProcessGroup | None = None) -> Model:
    """Fits the MoE layers in `model`, in place, to a mean loss on each rank and averaged gradients; returns `model`.

    Call it on every rank, on the module that DistributedDataParallel is to wrap. After it: `moe.losses` are multiplied
    by the number of ranks of data_group, so that their mean over ranks is the loss. The gradients of experts are means
    over the ranks whose rows they sum up. DistributedDataParallel(model) leaves experts alone.

    expert_data_group: the ranks that hold the same experts as this rank. Their weights become those of its first rank,
    as DistributedDataParallel does with the rest, and their gradients are averaged during the backward pass, except
    within `no_sync`. None: no other rank has the same experts, or FSDP2 shards the experts over these ranks.

    Raises a ValueError if the experts have no memory yet (meta device), if expert_data_group shares more than this rank
    with a layer's groups, or if it is missing or superfluous.
    """
    for layer in _sharded_layers(model):
        _check_groups(layer, expert_data_group)
    _warn_of_equal_layers(model)
    for module in model.modules():
        if isinstance(module, MoELayer):
            module.use_mean_reduction(expert_data_group if module.experts.num_ranks > 1 else None)
    experts = {id(parameter) for parameter in expert_parameters(model)}
    named = model.named_parameters(remove_duplicate=False)
    ignore_in_ddp(model, [name for name, parameter in named if id(parameter) in experts])
    if group_size(expert_data_group) > 1:
        for parameter in expert_parameters(model):
            dist.broadcast(parameter.detach(), group=expert_data_group, group_src=0)
    return model


@torch.no_grad()
def clip_grad_norm_(
    model: nn.Module, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
) -> Tensor:
    """Returns the norm of the whole gradient, a float64 scalar, and multiplies all gradients by max_norm / (norm +
    1e-6), in place, if that is below 1.

    Use it in place of torch.nn.utils.clip_grad_norm_, whose norm has this rank's experts alone: each rank would clip by
    another factor, and replicated weights would drift apart. Here each element counts once, whichever rank holds it, so
    the norm is the same on all ranks, to the bit. Every rank must call it, with its gradients averaged or summed.

    model: the module itself or wrapped, its weights plain tensors or shards of FSDP2. norm_type: above 0, or inf.
    Parameters without a gradient are left out. The host does not wait, unless error_if_nonfinite is True: then a norm
    that is infinite or NaN raises a RuntimeError, before any gradient is changed.

    Raises a ValueError for another norm_type, and for parameters in place of the model.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"clip_grad_norm_ takes the model and not its parameters, since modules tell which weights are experts; "
            f"it was given a {type(model).__name__}"
        )
    if not norm_type > 0:
        raise ValueError(f"norm_type is {norm_type}, it must be above 0")
    norm = _gradient_norm(model, norm_type)
    if error_if_nonfinite and not norm.isfinite():  # the host waits
        raise RuntimeError(
            f"the norm of the gradient is {norm.item()}, and clip_grad_norm_ was called with error_if_nonfinite=True"
        )
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # torch's formula
    for parameter in model.parameters():
        if parameter.grad is not None:
            grad = local_tensor(parameter.grad)
            grad.mul_(factor.to(grad.device, grad.dtype))
    return norm


def _gradient_norm(model: nn.Module, norm_type: float) -> Tensor:
    """Returns the norm of the whole gradient, each element counted once: a float64 scalar, equal on all ranks."""
    is_max = math.isinf(norm_type)
    parameters = {parameter: module for module in model.modules() for parameter in module.parameters(recurse=False)}
    device = next((parameter.device for parameter in parameters), None)
    # For each combination of groups, one number for each parameter that is sharded over just these: its norm, to the
    # power of norm_type. A parameter without a gradient counts 0, so that all ranks run the same collectives. float64,
    # so that the sum does not depend on the order of the parameters, up to the float32 of each.
    zero = torch.zeros((), dtype=torch.float64, device=device)
    parts: dict[tuple[dist.ProcessGroup, ...], list[Tensor]] = {(): [zero]}
    for parameter, module in parameters.items():
        groups, copies = _shard_groups(module, parameter)
        terms = parts.setdefault(groups, [zero])
        if parameter.grad is not None and (grad := local_tensor(parameter.grad)).numel() > 0:
            wide = torch.promote_types(torch.float32, grad.dtype)
            norm = torch.linalg.vector_norm(grad, norm_type, dtype=wide).double()
            terms.append(norm if is_max else norm**norm_type / copies)
    totals = []
    for groups, terms in parts.items():
        total = _combine(terms, is_max)
        for group in groups:
            # Gathered, and not reduced: in one order on all ranks, and a NaN is not lost in a maximum.
            total = _combine(list(all_gather_rows(total[None], [1] * group_size(group), group)), is_max)
        totals.append(total)
    norm = _combine(totals, is_max)
    return norm if is_max else norm ** (1 / norm_type)


def _combine(terms: list[Tensor], is_max: bool) -> Tensor:
    return torch.stack(terms).max() if is_max else torch.stack(terms).sum()


def _shard_groups(module: nn.Module, parameter: nn.Parameter) -> tuple[tuple[dist.ProcessGroup, ...], int]:
    """Returns the groups of several ranks over which the elements of a module's parameter are sharded, and the number
    of ranks of these groups that hold each element."""
    groups: list[dist.ProcessGroup | None] = []
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        groups += [mesh.get_group(dim) for dim, placement in enumerate(parameter.placements) if placement.is_shard()]
    names = {id(value): name for name, value in module.named_parameters(recurse=False)}
    shard = get_tensor_shards(module).get(names[id(parameter)])
    if shard is not None:
        groups.append(shard.group)
    if isinstance(module, GroupedExperts):
        groups.append(module.ep_group)
    several = tuple(group for group in groups if group is not None and group_size(group) > 1)
    return several, 1 if shard is None else shard.copies


def _sharded_layers(model: nn.Module) -> list[MoELayer]:
    return [module for module in model.modules() if isinstance(module, MoELayer) and module.experts.num_ranks > 1]


def _warn_of_equal_layers(model: nn.Module) -> None:
    """Warns if two MoE layers begin with equal experts: most likely they were built with the same seed."""
    names: dict[tuple[float, ...], str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, MoELayer):
            continue
        sample = tuple(local_tensor(module.experts.w_in.detach()).flatten()[:64].tolist())  # the host waits, once
        if any(sample) and names.setdefault(sample, name) != name:
            warnings.warn(
                f"the layers {names[sample]} and {name} have equal experts: the initial weights of a MoELayer follow "
                "its argument `seed`, so give each layer another one",
                stacklevel=3,
            )


def _check_groups(layer: MoELayer, expert_data_group: dist.ProcessGroup | None) -> None:
    """Raises the errors of `prepare_data_parallel` that concern one layer."""
    weight, num_ranks = layer.experts.w_in, layer.experts.num_ranks
    if weight.is_meta:
        raise ValueError(
            "prepare_data_parallel needs weights with memory, and the experts are on the meta device: call it after "
            "to_empty and loading"
        )
    copies = set(Peers.of(expert_data_group).ranks)
    holders = set(Peers.of(layer.ep_group).ranks) | set(Peers.of(layer.etp_group).ranks)
    if len(copies & holders) > 1:
        raise ValueError(
            f"expert_data_group has the ranks {sorted(copies)}, and {sorted(holders)} hold the parts of a layer's "
            "experts: expert_data_group must be the ranks that hold the same experts, of which the others have none"
        )
    if isinstance(weight, DTensor):
        if len(copies) > 1:
            raise ValueError(
                f"expert_data_group has {len(copies)} ranks, but FSDP2 has sharded the experts and averages their "
                "gradients: leave it out"
            )
    elif len(copies) == 1 and group_size(layer.data_group) > num_ranks:
        raise ValueError(
            f"a layer has {group_size(layer.data_group)} ranks in data_group and its experts are sharded over "
            f"{num_ranks}, so several ranks hold the same experts: give prepare_data_parallel their group as "
            "expert_data_group, or call it after fully_shard(layer.experts, mesh=...)"
        )
