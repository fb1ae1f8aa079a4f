"""Checks dropout masks, since the main comparison runs without dropout: masks must differ between ranks, which hold
different tokens, and be the same when a block is recomputed in the backward pass.

The check runs one more step in which every block receives the same vector for every token. Without dropout all tokens
of all ranks then have equal outputs, so outputs of two ranks are equal if and only if their masks are."""

from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, Self

import torch
from torch import nn

from expert_parallel.model.transformer import Block
from expert_parallel.runtime.process import Runtime
from expert_parallel.training.config import Config
from expert_parallel.training.setup import check_world_size
from expert_parallel.training.step import train_step
from expert_parallel.verify import system_under_test
from expert_parallel.verify.compare import gather_json

DEFAULT_PROBABILITY = 0.1
BRANCHES = ("model.dropout",)
EXPERTS = ("model.moe.experts.hidden_dropout", "model.moe.experts.output_dropout")


def dropout_probabilities(config: Config) -> dict[str, float]:
    """Returns the dropout probabilities to check, by setting: the config's own, or 0.1 where that is 0."""
    found = {"model.dropout": config.model.dropout}
    if config.model.moe is not None:
        experts = config.model.moe.experts
        found |= dict(zip(EXPERTS, (experts.hidden_dropout, experts.output_dropout), strict=True))
    return {path: value or DEFAULT_PROBABILITY for path, value in found.items()}


def check_dropout(config: Config, probabilities: dict[str, float], runtime: Runtime) -> list[str]:
    """Runs the check with dropout at the branches of blocks, then in the experts. Returns each error as a sentence, the
    same list on every rank. A collective."""
    found = []
    for settings in (BRANCHES, EXPERTS):
        chosen = {path: probabilities[path] for path in settings if path in probabilities}
        if chosen:
            num_data_ranks = check_world_size(config, runtime).dp
            found += _check(_with_dropout(config, chosen, num_data_ranks), " and ".join(chosen), runtime)
    return found


def _with_dropout(config: Config, probabilities: dict[str, float], num_data_ranks: int) -> Config:
    """Returns the config with these probabilities, the fewest micro-steps that a pipeline takes, one sequence per data
    rank, and without capacity, losses and router kinds that would tell equal tokens apart."""
    tree, micro_steps = config.model_dump(mode="json"), config.parallel.pp
    tree["training"] |= {"micro_steps": micro_steps, "global_batch": num_data_ranks * micro_steps}
    tree["parallel"]["data"] = {"kind": "replicated"}
    if (moe := tree["model"]["moe"]) is not None:
        k = min(2, moe["num_experts"])
        moe |= {"router": {"kind": "top_k", "k": k, "normalise": k > 1}, "capacity": {"kind": "dropless"}, "losses": []}
    for path, probability in probabilities.items():
        *blocks, leaf = path.split(".")
        here = tree
        for block in blocks:
            here = here[block]
        here[leaf] = probability
    return Config.model_validate(tree)


def _check(config: Config, setting: str, runtime: Runtime) -> list[str]:
    in_experts = setting != BRANCHES[0]
    first = _run(config, runtime, in_experts)
    recompute = config.training.recompute
    repeats = True
    if recompute != "none":
        training = config.training.model_copy(update={"recompute": "none"})
        repeats = first.is_close(_run(config.model_copy(update={"training": training}), runtime, in_experts))
    everyone = [(DropoutSums(**rank), fine) for rank, fine in gather_json([asdict(first), repeats])]
    found = []
    if not all(fine for _, fine in everyone):
        found.append(
            f"{setting}: the step differs between training.recompute {recompute!r} and 'none': masks must depend on "
            "the seed and the position alone"
        )
    pairs = [
        (one, other, same)
        for (one, (mine, _)), (other, (theirs, _)) in combinations(enumerate(everyone), 2)
        if (same := mine.same_masks(theirs))
    ]
    if pairs:
        (one, other, same), more = pairs[0], f", and so do {len(pairs) - 1} more pairs of ranks" * (len(pairs) > 1)
        found.append(
            f"{setting}: ranks {one} and {other} have different tokens but draw the same masks in "
            f"{', '.join(same)}{more}: the rank's coordinate is missing in the seed"
        )
    return found


@dataclass(frozen=True)
class DropoutSums:
    """Holds what shows the masks of one rank. outputs: by place (`embedding`, `block 3`), the sum over the features of
    each token's output in the first micro-step."""

    outputs: dict[str, list[float]]
    grad_norm: float

    def is_close(self, other: Self) -> bool:
        """Returns True if outputs and gradient norm are equal but for rounding."""
        alike = all(_is_close(seen, other.outputs[where]) for where, seen in self.outputs.items())
        return alike and _is_close([self.grad_norm], [other.grad_norm])

    def same_masks(self, other: Self) -> list[str]:
        """Returns the places at which both ranks have equal outputs, which means that they have drawn equal masks."""
        both = [where for where in self.outputs if where in other.outputs]
        return [where for where in both if _is_close(self.outputs[where], other.outputs[where])]


def _is_close(one: list[float], other: list[float]) -> bool:
    largest = max(map(abs, [*one, *other]), default=0.0)
    return len(one) == len(other) and all(abs(a - b) <= 1e-9 * largest for a, b in zip(one, other, strict=True))


def _run(config: Config, runtime: Runtime, in_experts: bool) -> DropoutSums:
    """Takes one step in which every block receives the same vectors. in_experts: dropout is in the experts alone."""
    outputs: dict[str, list[float]] = {}
    generator = torch.Generator().manual_seed(config.seed)
    given_D = torch.randn(config.model.d_model, generator=generator, dtype=torch.float64)

    def give(block: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        x, context, *rest = arguments
        if context.layer == 0 and context.micro_step == 0 and not in_experts:
            # Encodes which features were dropped. Waits for the device.
            outputs["embedding"] = (x == 0).double().cumsum(-1).sum(-1).flatten().tolist()
        return x * 0 + given_D.to(x.device), context, *rest

    def take(block: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        context = arguments[1]
        if context.micro_step == 0 and (not in_experts or context.layer in config.model.moe_layers):
            outputs[f"block {context.layer}"] = output.x.detach().double().sum(-1).flatten().tolist()

    training, seed = config.training, config.seed
    with system_under_test.set_up(config, runtime, system_under_test.random_sequences(config)) as run:
        for block in run.model.modules():
            if isinstance(block, Block):
                block.register_forward_pre_hook(give)
                block.register_forward_hook(take)
        mine = list(run.batches(0))
        with system_under_test.collecting_ledger_errors([]):  # reported by the comparison already
            report = train_step(run.model, run.engine, mine, training, run.mesh, step=0, seed=seed)
    return DropoutSums(outputs, report.grad_norm)
