"""Defects of the kinds that training code has had, to be planted into copies of the product's functions, and how
`verify` must find and name each of them.

A patch is (object, attribute, replacement), made on the rank that it is planted on."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from math import floor
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Patch = tuple[Any, str, Any]


@dataclass(frozen=True)
class Planted:
    """patch: what is planted. column: of the table, which must differ, or `errors` or `dropout`. words: a sentence must
    hold all of them. layout: the layout that shows it, on 2 ranks. part: `step` is one step, `steps` are three,
    `all` is everything. moe: settings that it needs. others: further layouts,
    which tell equal degrees apart. is_slow: True leaves it to the full selection, since another one shows the same
    property."""

    patch: Callable[[], Patch]
    column: str
    words: tuple[str, ...]
    layout: str = "ep=2,micro_steps=2"
    part: str = "steps"
    moe: dict[str, Any] = field(default_factory=dict)
    others: tuple[str, ...] = ()
    is_slow: bool = False


# --------------------------------------------------------------------------------------------------------- capacity


def capacity_of_halves() -> Patch:
    from expert_parallel.moe.capacity import policies

    original = policies.block_capacities

    def wrong(config: Any, sizes: Any, *others: Any) -> list[int]:
        halves = [[size // 2, size - size // 2] for size in sizes]
        return [sum(original(config, half, *others)) for half in halves]

    return policies, "block_capacities", wrong


def capacity_rounded_down() -> Patch:
    from expert_parallel.moe.capacity import policies

    def wrong(factor: float, minimum: int, num_tokens: int, num_choices: int, num_experts: int) -> int:
        return max(minimum, floor(Fraction(str(factor)) * num_tokens * num_choices / num_experts))

    return policies, "expert_capacity", wrong


def evaluation_with_training_factor() -> Patch:
    from expert_parallel.moe.capacity import policies

    original = policies.block_capacities
    return policies, "block_capacities", lambda *arguments: original(*arguments[:-1], True)


def evaluation_in_training_mode() -> Patch:
    return torch.nn.Module, "eval", lambda self: self


# -------------------------------------------------------------------------------------------------------- optimizer


def schedule_late(first: int) -> Patch:
    from expert_parallel.training import step

    original = step.learning_rate
    return (
        step,
        "learning_rate",
        lambda optimizer, schedule, number, total: original(optimizer, schedule, max(first, number - 1), total),
    )


def optimizer_with(**changes: Any) -> Patch:
    from expert_parallel.training import setup

    original = setup.build_optimizer

    def wrong(config: Any, *others: Any) -> Any:
        named = {name: change(getattr(config, name)) for name, change in changes.items()}
        return original(config.model_copy(update=named), *others)

    return setup, "build_optimizer", wrong


def decay_of_norms() -> Patch:
    from expert_parallel.training import setup

    original = setup.build_optimizer

    def wrong(config: Any, *others: Any) -> Any:
        optimizer = original(config, *others)
        for group in optimizer.param_groups:
            group["weight_decay"] = config.weight_decay
        return optimizer

    return setup, "build_optimizer", wrong


def expert_gradients_kept() -> Patch:
    original = torch.optim.Optimizer.zero_grad

    def wrong(self: Any, set_to_none: bool = True) -> None:
        kept = {p: p.grad for group in self.param_groups for p in group["params"] if p.dim() == 3}
        original(self, set_to_none)
        for parameter, gradient in kept.items():
            parameter.grad = gradient

    return torch.optim.AdamW, "zero_grad", wrong


def clipping_by_rank() -> Patch:
    from expert_parallel.training.engines import native

    original = native.clip_gradients

    def wrong(model: Any, norm: Tensor, limit: float) -> None:
        original(model, norm, limit * (1 + 0.1 * dist.get_rank()))

    return native, "clip_gradients", wrong


def loss_scaled() -> Patch:
    from expert_parallel.training.engines.native import NativeEngine

    original = NativeEngine.backward
    return NativeEngine, "backward", lambda self, loss, *, is_last: original(self, 0.7 * loss, is_last=is_last)


# ------------------------------------------------------------------------------------------------------- gradients


def scaled_gradient(part: str, degree: str) -> Patch:
    """Gradients of parameters whose name has the part, times a degree."""
    from expert_parallel.moe.parameters import logical_parameters
    from expert_parallel.training.engines import native

    original = native.reduce_gradients

    def wrong(model: Any, mesh: Any, *, sharded: bool) -> None:
        original(model, mesh, sharded=sharded)
        for logical in logical_parameters(model):
            if part in logical.names[0]:
                logical.parameter.grad *= getattr(mesh.degrees, degree)

    return native, "reduce_gradients", wrong


def bias_not_summed_over_edp() -> Patch:
    from expert_parallel.training import grads

    original = grads._all_reduce_in_buckets

    def wrong(logicals: Any, group: Any) -> None:
        original([one for one in logicals if not one.names[0].endswith("b_out")], group)

    return grads, "_all_reduce_in_buckets", wrong


def z_loss_of_own_tokens() -> Patch:
    from expert_parallel.moe.routers import losses

    def wrong(config: Any, plan: Any, batch: Any, step: Any) -> Tensor:
        return plan.logits_TE.logsumexp(-1).square().sum() / step.counts["rank"][0, -1].clamp(min=1)

    return losses, "LOSSES", {**losses.LOSSES, "z_loss": wrong}


def balance_bias_of_own_counts() -> Patch:
    from expert_parallel.training import step

    original = step.update_balance_bias

    def wrong(bias_E: Tensor, routed_E: Tensor, rate: float) -> None:
        original(bias_E, routed_E.roll(dist.get_rank()), rate)  # each rank has other counts

    return step, "update_balance_bias", wrong


# ----------------------------------------------------------------------------------------------------- forward pass


def weights_exchanged() -> Patch:
    from expert_parallel.moe.routers.base import LinearRouter

    original = LinearRouter.weights
    return LinearRouter, "weights", lambda *arguments: original(*arguments).flip(1)


def second_choice_without_gradient() -> Patch:
    from expert_parallel.moe.routers.base import LinearRouter

    original = LinearRouter.weights

    def wrong(*arguments: Any) -> Tensor:
        first_T1, others_TK = original(*arguments).split([1, 1], dim=1)
        return torch.cat([first_T1, others_TK.detach()], 1)

    return LinearRouter, "weights", wrong


def gated_bias_cut_as_ungated() -> Patch:
    from expert_parallel.moe.experts import grouped

    original = grouped.shard_parameter

    def wrong(module: Any, name: str, dim: int, group: Any, *parts: int) -> None:
        original(module, name, dim, group, *(() if name == "b_in" else parts))

    return grouped, "shard_parameter", wrong


def blocks_swapped() -> Patch:
    """The rows of two ranks change places on their way, where they are equally many."""
    from expert_parallel.parallel import collectives

    original = collectives.start_all_to_all_rows

    def wrong(x: Tensor, send_counts: Any, receive_counts: Any, group: Any) -> Any:
        wait = original(x, send_counts, receive_counts, group)
        if len(set(receive_counts)) > 1 or len(receive_counts) != 2:
            return wait
        return lambda: wait().roll(receive_counts[0], 0)

    return collectives, "start_all_to_all_rows", wrong


def wrong_product(name: str) -> Patch:
    """Rows of the first expert that has some are multiplied with the last expert's matrix."""
    from expert_parallel.moe.experts import grouped, grouped_gemm

    right = grouped_gemm.GROUPED_GEMMS[name]

    def rows(x_RK: Tensor, weight_eKN: Tensor, groups: Any) -> Tensor:
        return right.rows(x_RK, torch.cat([weight_eKN[-1:], weight_eKN[1:]]), groups)

    return grouped, "GROUPED_GEMMS", {**grouped_gemm.GROUPED_GEMMS, name: replace(right, rows=rows)}


def sample_read_twice() -> Patch:
    from expert_parallel.training import run

    original = run.micro_batch

    def wrong(*arguments: Any, **named: Any) -> Any:
        batch = original(*arguments, **named)
        twice = torch.tensor([0, *range(len(batch.inputs_BS) - 1)])
        return replace(batch, inputs_BS=batch.inputs_BS[twice], targets_BS=batch.targets_BS[twice])

    return run, "micro_batch", wrong


def positions_off_by_one() -> Patch:
    from expert_parallel.model.attention_mask import AttentionContext

    original = AttentionContext.of

    def wrong(*arguments: Any) -> AttentionContext:
        found = original(*arguments)
        return replace(found, position_BS=found.position_BS + (dist.get_rank() == 1) * (found.position_BS > 4))

    return AttentionContext, "of", staticmethod(wrong)


# -------------------------------------------------------------------------------------------------- loading, saving


def experts_exchanged(module: str) -> Patch:
    """In loading (`load`) or saving (`shards`): the first two experts, in weights and moments alike."""
    from importlib import import_module

    where = import_module(f"expert_parallel.checkpoint.{module}")
    original = where.pieces
    other = {"0": "1", "1": "0"}

    def wrong(*arguments: Any) -> Any:
        for name, start, view in original(*arguments):
            parts = [
                other.get(part, part) if before == "experts" else part
                for before, part in zip(["", *name.split(".")], name.split("."), strict=False)
            ]
            yield ".".join(parts), start, view

    return where, "pieces", wrong


def moments_exchanged() -> Patch:
    from expert_parallel.checkpoint.state import TorchState

    original = TorchState.tensor
    other = {"exp_avg": "exp_avg_sq", "exp_avg_sq": "exp_avg"}

    def wrong(self: Any, part: str, parameter: Any) -> Tensor:
        is_loading = parameter.grad is None and not self.optimizer.state[parameter]["exp_avg"].any()
        return original(self, other.get(part, part) if is_loading else part, parameter)

    return TorchState, "tensor", wrong


# --------------------------------------------------------------------------------------------------- random numbers


def key_without(index: int) -> Patch:
    """Seeds of noise and dropout without the step (1) or the micro-step (2)."""
    from expert_parallel.moe import context

    original = context.mix
    return context, "mix", lambda *keys: original(*(0 if i == index else key for i, key in enumerate(keys)))


def steps_all_the_first() -> Patch:
    """Passes are told that every step is the first."""
    from expert_parallel.training import step

    original = step.StepContext
    return step, "StepContext", lambda seed, number, *others, **named: original(seed, 0, *others, **named)


def numbers_over_half(function: str) -> Patch:
    from expert_parallel.nn import random

    original = getattr(random, function)
    return random, function, lambda *arguments: original(*arguments) / 2


def dropout_over_half() -> Patch:
    from expert_parallel.model import transformer

    original = transformer.dropout
    return transformer, "dropout", lambda x, probability, seed: original(x, min(0.99, 2 * probability), seed)


SHARED = {"shared_experts": {"hidden": 8, "bias": True}}
NOISE = {"router": {"kind": "noisy_top_k", "k": 2}}
EQUAL = {"kind": "absolute", "train": 4, "eval": 4, "scope": "rank"}  # so that experts have equally many rows
NO_LIMIT = {"capacity": {"kind": "dropless"}}

PLANTED: dict[str, Planted] = {
    "capacity of two halves added": Planted(
        capacity_of_halves, "dropped", ("block 1", "too few are dropped", "each rounded up"), part="step"
    ),
    "capacity rounded down": Planted(
        capacity_rounded_down, "dropped", ("block 1", "too many are dropped", "rounded down"), part="step"
    ),
    "evaluation with the training factor": Planted(
        evaluation_with_training_factor, "evaluation", ("model.moe.capacity.eval", "training factor"), part="all"
    ),
    "evaluation in training mode": Planted(
        evaluation_in_training_mode, "evaluation", ("left in training mode",), part="all", is_slow=True
    ),
    "evaluation in training mode, no capacity": Planted(
        evaluation_in_training_mode, "evaluation", ("dropout", "left in training mode"), part="all", moe=NO_LIMIT
    ),
    "the schedule one step late": Planted(
        lambda: schedule_late(0), "learning rate", ("step 2", "the schedule is one step late")
    ),
    "the schedule one step late from the start": Planted(
        lambda: schedule_late(-1), "learning rate", ("the schedule is one step late",), part="step", is_slow=True
    ),
    "Adam's betas swapped": Planted(
        lambda: optimizer_with(betas=lambda betas: betas[::-1]), "moments", ("the betas are swapped",), part="step"
    ),
    "another beta": Planted(
        lambda: optimizer_with(betas=lambda betas: [0.7, betas[1]]),
        "moments",
        ("decay with 0.7 and 0.9 instead of 0.6 and 0.9",),
        part="step",
        is_slow=True,
    ),
    "eps of Adam times 10": Planted(
        lambda: optimizer_with(eps=lambda eps: 10 * eps), "update", ("moments are right", "eps"), part="step"
    ),
    "decay of norms": Planted(decay_of_norms, "update", ("norms and biases have no weight decay",), part="step"),
    "expert gradients not zeroed": Planted(
        expert_gradients_kept, "gradient: experts", ("step 2", "they were not set to zero")
    ),
    "clipping by rank": Planted(clipping_by_rank, "gradient: experts", ("the factor of clipping",), part="step"),
    "the loss scaled": Planted(loss_scaled, "gradient: experts", ("a common factor", "scaled"), part="step"),
    "bias of shared experts times tp": Planted(
        lambda: scaled_gradient("shared_experts.w_out.bias", "tp"),
        "gradient: shared experts",
        ("exactly tp",),
        "tp=2,ep=2,micro_steps=2",
        "step",
        SHARED,
    ),
    "gradients of experts times tp": Planted(
        lambda: scaled_gradient(".experts.", "tp"),
        "gradient: experts",
        ("exactly tp;",),
        "tp=2,micro_steps=2",
        "step",
        others=("ep=1,micro_steps=2",),
    ),
    "output bias not summed over edp": Planted(
        bias_not_summed_over_edp, "gradient: experts", ("b_out",), "ep=1,micro_steps=2", "step"
    ),
    "z-loss of own tokens": Planted(
        z_loss_of_own_tokens, "balance loss", ("z_loss", "over the tokens of all ranks"), part="step"
    ),
    "balance bias of own counts": Planted(
        balance_bias_of_own_counts, "update", ("counted over all ranks",), part="step"
    ),
    "weights of choices exchanged": Planted(
        weights_exchanged, "output", ("block 1", "weights of choices"), part="step"
    ),
    "router gradient of second choices lost": Planted(
        second_choice_without_gradient,
        "gradient: router",
        ("gradient of blocks", "the experts' gradients are right", "the weights of some choices"),
        part="step",
    ),
    "gated input bias cut as an ungated one": Planted(
        gated_bias_cut_as_ungated, "output", ("block 1", "grouped products"), "etp=2,micro_steps=2", "step"
    ),
    "blocks of ranks swapped at equal counts": Planted(
        blocks_swapped, "output", ("dispatch", "is out of order"), part="step", moe={"capacity": EQUAL}, is_slow=True
    ),
    "a wrong product in float64": Planted(
        lambda: wrong_product("loop"), "output", ("block 1", "grouped products"), part="step"
    ),
    "a wrong product in training": Planted(
        lambda: wrong_product("grouped_mm"),
        "training dtype",
        ("the experts' grouped product", "float32 with experts by grouped_mm"),
        part="all",
    ),
    "a sample read twice": Planted(sample_read_twice, "output", ("block 0 differs",), part="step"),
    "positions off by one on a cp rank": Planted(
        positions_off_by_one, "output", ("block 0 differs",), "cp=2,micro_steps=2", "step"
    ),
    "experts exchanged in loading": Planted(
        lambda: experts_exchanged("load"), "loaded", ("tensors are exchanged in saving or loading",), part="all"
    ),
    "experts exchanged in saving": Planted(
        lambda: experts_exchanged("shards"),
        "loaded",
        ("tensors are exchanged in saving or loading",),
        part="all",
        is_slow=True,
    ),
    "moments exchanged in loading": Planted(
        moments_exchanged, "errors", ("cannot be loaded", "exp_avg"), part="all", is_slow=True
    ),
    "noise the same in every step": Planted(
        lambda: key_without(1), "dropout", ("noise is the same in every step",), part="step"
    ),
    "noise the same in every micro-step": Planted(
        lambda: key_without(2), "dropout", ("noise is the same in every micro-step",), part="step", is_slow=True
    ),
    "every step told that it is the first": Planted(
        steps_all_the_first, "dropped", ("step 2", "the same in every step"), moe=NOISE
    ),
    "dropout the same in every step": Planted(
        steps_all_the_first, "dropout", ("masks are the same in every step",), part="all"
    ),
    "uniform numbers over half their range": Planted(
        lambda: numbers_over_half("uniform"), "dropout", ("uniform", "do not fill their range"), part="step"
    ),
    "normal numbers over half their range": Planted(
        lambda: numbers_over_half("normal"), "dropout", ("normal", "do not fill their range"), part="step", is_slow=True
    ),
    "dropout's numbers over half their range": Planted(
        dropout_over_half, "dropout", ("do not fill their range",), part="all", is_slow=True
    ),
}

# Without a defect: nothing may differ.
WITHOUT: dict[str, Planted] = {
    "three steps": Planted(lambda: (torch, "pi", torch.pi), "", (), moe=SHARED),
    "everything, with noise": Planted(lambda: (torch, "pi", torch.pi), "", (), part="all", moe=SHARED | NOISE),
}
