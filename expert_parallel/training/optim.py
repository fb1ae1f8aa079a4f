"""Builds the optimizer, and computes the learning-rate schedule."""

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import Discriminator, Field, Tag
from torch import Tensor, nn

from expert_parallel.moe.parameters import logical_parameters
from expert_parallel.settings import Settings
from expert_parallel.training.freeze import AllTrainable, TrainableConfig, frozen_rows, frozen_rows_pre_hook


class OptimizerConfig(Settings):
    """Updates the weights with AdamW (Loshchilov and Hutter 2017)."""

    kind: Literal["adamw"] = "adamw"
    learning_rate: float = Field(default=3e-4, gt=0)
    """Sets the peak learning rate, which the schedule multiplies."""
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(
        default_factory=lambda: [0.9, 0.95], min_length=2, max_length=2
    )
    """Sets the decay rates of the first and the second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Adds this epsilon to the denominator of the update."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Sets the weight decay of matrices; norms and biases have none."""


class WarmupSchedule(Settings):
    """Is the base class of learning-rate schedules, which all begin with a linear warm-up."""

    warmup_steps: int = Field(default=100, ge=0)
    """Raises the learning rate linearly from 0 to its peak over this many steps."""


class CosineConfig(WarmupSchedule):
    """Decays the learning rate along half a cosine until the last step (Loshchilov and Hutter 2016)."""

    kind: Literal["cosine"] = "cosine"
    final_fraction: float = Field(default=0.1, ge=0, le=1)
    """Sets the learning rate of the last step, as a fraction of the peak."""

    def fraction(self, step: int, total_steps: int) -> float:
        progress = (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return self.final_fraction + (1 - self.final_fraction) * cosine


class InverseSqrtConfig(WarmupSchedule):
    """Decays the learning rate as sqrt(warmup_steps / step), whatever the run's length (T5, Switch, GLaM)."""

    kind: Literal["inverse_sqrt"]
    warmup_steps: int = Field(default=100, ge=1)
    """Raises the learning rate linearly from 0 to its peak over this many steps."""

    def fraction(self, step: int, total_steps: int) -> float:
        return math.sqrt(self.warmup_steps / (step + 1))


class ConstantConfig(WarmupSchedule):
    """Keeps the learning rate at its peak."""

    kind: Literal["constant"]

    def fraction(self, step: int, total_steps: int) -> float:
        return 1.0


class WSDConfig(WarmupSchedule):
    """Keeps the learning rate at its peak until the last steps, and decays it linearly there (warmup-stable-decay, Hu
    et al. 2024)."""

    kind: Literal["wsd"]
    decay_steps: int = Field(default=100, ge=1)
    """Decays the learning rate over this many steps, the last ones of the run."""
    final_fraction: float = Field(default=0.0, ge=0, le=1)
    """Sets the learning rate after the last step, as a fraction of the peak."""

    def fraction(self, step: int, total_steps: int) -> float:
        begin = max(self.warmup_steps, total_steps - self.decay_steps)
        progress = (step - begin) / max(1, total_steps - begin)
        return 1 - (1 - self.final_fraction) * min(1.0, max(0.0, progress))


def _schedule_kind(value: Any) -> str:
    return value.get("kind", "cosine") if isinstance(value, dict) else getattr(value, "kind", "")


ScheduleConfig = Annotated[
    Annotated[CosineConfig, Tag("cosine")]
    | Annotated[InverseSqrtConfig, Tag("inverse_sqrt")]
    | Annotated[ConstantConfig, Tag("constant")]
    | Annotated[WSDConfig, Tag("wsd")],
    Discriminator(_schedule_kind),
]


def learning_rate(optimizer: OptimizerConfig, schedule: ScheduleConfig, step: int, total_steps: int) -> float:
    """Returns the learning rate of a step, counted from 0. It depends on the arguments only, so a resumed run needs no
    scheduler state."""
    if step < schedule.warmup_steps:
        return optimizer.learning_rate * (step + 1) / schedule.warmup_steps
    return optimizer.learning_rate * schedule.fraction(step, total_steps)


def build_optimizer(
    config: OptimizerConfig,
    model: nn.Module,
    trainable: TrainableConfig = AllTrainable(),  # noqa: B008 - immutable
) -> torch.optim.AdamW:
    """Builds AdamW with up to four parameter groups: dense or expert parameters, with or without weight decay.

    Dense and expert parameters are in different groups, since under FSDP2 they are on different device meshes, and a
    fused update takes one mesh. trainable: which weights are trained; groups with frozen rows list these in
    `frozen_rows`.
    """
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for logical in logical_parameters(model):
        decays = len(logical.shape) > 1
        group = groups.setdefault((logical.is_expert, decays), {"params": [], "frozen_rows": {}})
        group["params"].append(logical.parameter)
        rows = frozen_rows(trainable, logical)
        if rows is not None:
            group["frozen_rows"][logical.parameter] = rows
    assert sum(len(group["params"]) for group in groups.values()) == len(list(model.parameters()))
    for (_, decays), group in groups.items():
        decay = config.weight_decay if decays else 0.0
        group["weight_decay"], group["row_weight_decay"] = (0.0, decay) if group["frozen_rows"] else (decay, 0.0)
    optimizer = torch.optim.AdamW(
        list(groups.values()),
        lr=config.learning_rate,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        fused=True,
    )
    optimizer.register_step_pre_hook(frozen_rows_pre_hook)
    return optimizer


def skip_update_if_not_finite(optimizer: torch.optim.Optimizer, norm: Tensor) -> None:
    """Makes the optimizer's next step leave weights and moments as they are if the gradient norm is NaN or infinite, so
    that the step can be run again to find the cause.

    norm: a scalar on the device. The device decides, so the host does not wait. The optimizer must be fused: its kernel
    then reads the attribute `found_inf`, by which torch.amp.GradScaler skips updates.
    """
    optimizer.found_inf = norm.isfinite().logical_not().float()  # type: ignore[attr-defined]
