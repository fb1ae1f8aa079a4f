"""Trains some experts while all other weights stay unchanged, bit for bit.

Frozen rows get no gradient (nor a share in the gradient norm), no weight decay and no momentum. They stay in the
optimizer, so that checkpoints hold the same tensors whatever is frozen; no memory is saved.
"""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from expert_parallel.model.config import ModelConfig
from expert_parallel.moe.parameters import LogicalParameter, local_tensor
from expert_parallel.settings import Settings


class AllTrainable(Settings):
    """Trains every weight."""

    kind: Literal["all"] = "all"


class ExpertsTrainable(Settings):
    """Trains chosen experts and freezes all other weights."""

    kind: Literal["experts"]
    experts: list[Annotated[int, Field(ge=0)]] = Field(min_length=1)
    """Lists the trained experts by their numbers in a layer, counted from 0."""
    blocks: list[int] | None = None
    """Lists the MoE blocks whose experts are trained; null is all of them."""
    router: Literal["frozen", "chosen"] = "frozen"
    """Freezes the router, or trains its rows of the chosen experts and updates the balance bias (`chosen`)."""


TrainableConfig = Annotated[AllTrainable | ExpertsTrainable, Field(discriminator="kind")]


def validate_trainable(config: TrainableConfig, model: ModelConfig) -> None:
    """Raises ValueError if the config names experts or blocks that the model does not have."""
    if isinstance(config, AllTrainable):
        return
    if model.moe is None:
        raise ValueError("training.trainable.kind is 'experts' but the model has no experts (model.moe)")
    if max(config.experts) >= model.moe.num_experts:
        raise ValueError(
            f"training.trainable.experts names expert {max(config.experts)}, model.moe.num_experts is "
            f"{model.moe.num_experts}"
        )
    for block in config.blocks or []:
        if block not in model.moe_layers:
            raise ValueError(f"training.trainable.blocks names block {block}; the MoE blocks are {model.moe_layers}")


def frozen_rows(config: TrainableConfig, logical: LogicalParameter) -> Tensor | None:
    """Returns a bool mask (rows,) of the frozen rows of this rank's shard of a parameter; None if all weights are
    trained.

    Rows are the indices of dimension 0: the experts of a stack of experts, or the rows of a router, one for each
    expert.
    """
    if isinstance(config, AllTrainable):
        return None
    rows = torch.ones(logical.parameter.shape[0], dtype=torch.bool)
    for row, expert in _row_experts(config, logical).items():
        rows[row] = expert not in config.experts
    if isinstance(logical.parameter, DTensor):
        mesh, placements = logical.parameter.device_mesh, logical.parameter.placements
        rows = distribute_tensor(rows.to(logical.parameter.device), mesh, placements, src_data_rank=None).to_local()
    return rows.to(logical.parameter.device)


def _row_experts(config: ExpertsTrainable, logical: LogicalParameter) -> dict[int, int]:
    """Maps each row to its expert; empty for parameters of neither chosen experts nor a trainable router."""
    path = logical.names[0].split(".")
    is_router = "router" in path and config.router == "chosen"
    if not (logical.is_expert or is_router) or (config.blocks is not None and int(path[1]) not in config.blocks):
        return {}
    if is_router:
        return {row: row for row in range(logical.parameter.shape[0])}
    return {row: int(name.split(".")[-2]) for row, name in enumerate(logical.names)}


def zero_frozen_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Sets the gradients of frozen rows to 0, even where they are NaN."""
    for group in optimizer.param_groups:
        for parameter, rows in group.get("frozen_rows", {}).items():
            if parameter.grad is not None:
                local_tensor(parameter.grad)[rows] = 0


def frozen_rows_pre_hook(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Prepares parameters with frozen rows for AdamW's step; registered as an optimizer step pre-hook.

    AdamW's weight decay would change whole parameters, so it is off for these, and the rows that are trained are
    decayed here. Moments of frozen rows, left from earlier training, are set to 0. Engines that replace parameters by
    flat tensors must put masks of their elements into the optimizer group's `frozen_rows`.
    """
    with torch.no_grad():
        for group in optimizer.param_groups:
            frozen = group.get("frozen_rows", {})
            for parameter in group["params"]:
                if parameter not in frozen:
                    continue
                rows, weight = frozen[parameter], local_tensor(parameter)
                weight[~rows] *= 1 - group["lr"] * group["row_weight_decay"]
                for moment in ("exp_avg", "exp_avg_sq"):
                    if moment in optimizer.state[parameter]:
                        local_tensor(optimizer.state[parameter][moment])[rows] = 0
