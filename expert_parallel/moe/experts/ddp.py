"""Keeps DistributedDataParallel (DDP) away from experts that are sharded over ranks. No other file reads its private
attributes."""

from collections.abc import Iterable

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from expert_parallel.moe.experts.grouped import GroupedExperts
from expert_parallel.moe.experts.replicas import RECIPE
from expert_parallel.parallel.collectives import group_size


def active_ddp() -> DistributedDataParallel | None:
    """Returns the DDP module whose forward pass is running, or None; always None if torch does not record it."""
    return getattr(DistributedDataParallel, "_active_ddp_module", None)


def ignore_in_ddp(model: nn.Module, names: Iterable[str]) -> None:
    """Adds to the parameters that DDP leaves alone if it wraps `model`. names: as in `model.named_parameters()`."""
    ignored = {*getattr(model, "_ddp_params_and_buffers_to_ignore", ()), *names}
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)


def check_ddp(ddp: DistributedDataParallel, experts: GroupedExperts, num_copies: int, num_loss_ranks: int) -> None:
    """Raises a ValueError, on all ranks alike, if the gradients that this DDP averages would be wrong.

    num_copies: the number of ranks over which the layer averages the gradients of its experts. num_loss_ranks: the
    number of ranks of whose losses the layer returns this rank's share; 0 if it has no losses.
    """
    num_ranks = experts.num_ranks
    managed = {id(parameter) for parameter in getattr(ddp, "_module_parameters", ())}
    if num_ranks > 1 and any(id(parameter) in managed for parameter in experts.parameters()):
        raise ValueError(
            f"DistributedDataParallel takes the experts of a layer for replicas, but they are sharded over {num_ranks} "
            f"ranks: {RECIPE}"
        )
    if experts.reduction == "sum" and max(num_ranks, num_loss_ranks) > 1:
        raise ValueError(
            "DistributedDataParallel averages gradients, but those of a layer's losses (shares of "
            f"{num_loss_ranks} ranks) and experts (of {num_ranks} ranks) are to be summed: {RECIPE}"
        )
    num_ddp_ranks = group_size(ddp.process_group)
    if num_ranks > num_ddp_ranks:
        raise ValueError(
            f"DistributedDataParallel has {num_ddp_ranks} ranks, but the experts are sharded over {num_ranks}: its "
            "process_group must be that of all ranks"
        )
    if num_ranks > 1 and num_ranks * num_copies != num_ddp_ranks:
        raise ValueError(
            f"DistributedDataParallel has {num_ddp_ranks} ranks, but the experts are sharded over {num_ranks} and "
            f"averaged over expert_data_group, {num_copies} ranks: give prepare_data_parallel the group of the "
            f"{num_ddp_ranks / num_ranks:g} ranks that hold the same experts"
        )
    if num_ranks > 1 and num_loss_ranks not in (0, num_ddp_ranks):
        raise ValueError(
            f"DistributedDataParallel has {num_ddp_ranks} ranks, but data_group, whose tokens the losses count, has "
            f"{num_loss_ranks}: give MoELayer data_group=torch.distributed.group.WORLD"
        )
