"""Checks dropout masks, since the main comparison runs without dropout: masks must differ between ranks, which hold
different tokens, and between steps and micro-steps, and be the same when a block is recomputed in the backward pass.

The check runs steps in which every block receives the same vector for every token, and which do not change the weights.
Without dropout all tokens of all ranks then have equal outputs, so outputs of two ranks, or of two steps, are equal if
and only if their masks are."""

from dataclasses import asdict, dataclass, field
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
from expert_parallel.verify.random_numbers import SIGMAS

DEFAULT_PROBABILITY = 0.1
BRANCHES = ("model.dropout",)
SMALLEST_RATE = 1e-300  # so small that an update is less than the rounding of a weight
EXPERTS = ("model.moe.experts.hidden_dropout", "model.moe.experts.output_dropout")


def dropout_probabilities(config: Config) -> dict[str, float]:
    """Returns the dropout probabilities to check, by setting: the config's own, or 0.1 where that is 0."""
    found = {"model.dropout": config.model.dropout}
    if config.model.moe is not None:
        experts = config.model.moe.experts
        found |= dict(zip(EXPERTS, (experts.hidden_dropout, experts.output_dropout), strict=True))
    return {path: value or DEFAULT_PROBABILITY for path, value in found.items()}


def check_dropout(config: Config, probabilities: dict[str, float], runtime: Runtime, num_steps: int = 1) -> list[str]:
    """Runs the check with dropout at the branches of blocks, then in the experts. Returns each error as a sentence, the
    same list on every rank. A collective. num_steps: with 2 or more, masks of steps and micro-steps are compared."""
    found = []
    for settings in (BRANCHES, EXPERTS):
        chosen = {path: probabilities[path] for path in settings if path in probabilities}
        if chosen:
            num_data_ranks = check_world_size(config, runtime).dp
            plain = _with_dropout(config, chosen, num_data_ranks, min(2, num_steps))
            found += _check(plain, " and ".join(chosen), runtime, num_steps)
    return found


def _with_dropout(config: Config, probabilities: dict[str, float], num_data_ranks: int, micro_steps: int) -> Config:
    """Returns the config with these probabilities, the fewest micro-steps from `micro_steps` on that a pipeline takes,
    one sequence per data rank, a rate that leaves the weights unchanged, and without capacity, losses and router kinds
    that would tell equal tokens apart."""
    tree, pp = config.model_dump(mode="json"), config.parallel.pp
    micro_steps = -(-micro_steps // pp) * pp
    tree["training"] |= {"micro_steps": micro_steps, "global_batch": num_data_ranks * micro_steps}
    tree["training"]["optimizer"]["learning_rate"] = SMALLEST_RATE
    tree["parallel"]["data"] = {"kind": "replicated"}
    if (moe := tree["model"]["moe"]) is not None:
        k = min(2, moe["num_experts"])
        moe |= {"router": {"kind": "top_k", "k": k, "normalise": k > 1}, "capacity": {"kind": "dropless"}, "losses": []}
    return with_probabilities(Config.model_validate(tree), probabilities)


def with_probabilities(config: Config, probabilities: dict[str, float]) -> Config:
    """Returns the config with these dropout probabilities, by path of the setting."""
    tree = config.model_dump(mode="json")
    for path, probability in probabilities.items():
        *blocks, leaf = path.split(".")
        here = tree
        for block in blocks:
            here = here[block]
        here[leaf] = probability
    return Config.model_validate(tree)


def _check(config: Config, setting: str, runtime: Runtime, num_steps: int) -> list[str]:
    in_experts = setting != BRANCHES[0]
    first, *later = _run(config, runtime, in_experts, num_steps)
    recompute = config.training.recompute
    repeats = True
    if recompute != "none":
        training = config.training.model_copy(update={"recompute": "none"})
        (once,) = _run(config.model_copy(update={"training": training}), runtime, in_experts, 1)
        repeats = first.is_close(once)
    again = [place for step in later for place in first.same_masks(step)]
    everyone = [(DropoutSums(**rank), fine, same) for rank, fine, same in gather_json([asdict(first), repeats, again])]
    found = []
    if not all(fine for _, fine, _ in everyone):
        found.append(
            f"{setting}: the step differs between training.recompute {recompute!r} and 'none': masks must depend on "
            "the seed and the position alone"
        )
    if places := list(dict.fromkeys(place for *_, same in everyone for place in same)):
        found.append(
            f"{setting}: masks are the same in every step in {', '.join(places)}: the step must be in the seed"
        )
    sums = [rank for rank, *_ in everyone]
    return found + _check_micro_steps(setting, sums) + _check_ranks(setting, sums) + _check_share(config, setting, sums)


def _check_micro_steps(setting: str, sums: list["DropoutSums"]) -> list[str]:
    places = list(dict.fromkeys(place for rank in sums for place in rank.repeated_places()))
    if not places:
        return []
    return [f"{setting}: masks are the same in every micro-step in {', '.join(places)}: it must be in the seed"]


def _check_ranks(setting: str, sums: list["DropoutSums"]) -> list[str]:
    pairs = [
        (one, other, same)
        for (one, mine), (other, theirs) in combinations(enumerate(sums), 2)
        if (same := mine.same_masks(theirs))
    ]
    if not pairs:
        return []
    (one, other, same), more = pairs[0], f", and so do {len(pairs) - 1} more pairs of ranks" * (len(pairs) > 1)
    return [
        f"{setting}: ranks {one} and {other} have different tokens but draw the same masks in "
        f"{', '.join(same)}{more}: the rank's coordinate is missing in the seed"
    ]


def _check_share(config: Config, setting: str, sums: list["DropoutSums"]) -> list[str]:
    """Checks the share of features that dropout has zeroed after the embedding."""
    probability = config.model.dropout
    dropped, total = sum(rank.num_dropped for rank in sums), sum(rank.num_features for rank in sums)
    if total == 0 or abs(dropped - probability * total) <= SIGMAS * (probability * (1 - probability) * total) ** 0.5:
        return []
    return [
        f"{setting}: {dropped / total:.1%} of the features are dropped after the embedding instead of "
        f"{probability:.1%}: the random numbers do not fill their range"
    ]


@dataclass
class DropoutSums:
    """Holds what shows the masks of one rank in one step. outputs: by micro-step and place (`embedding`, `block 3`),
    the sum over the features of each token's output. num_dropped, num_features: after the embedding."""

    outputs: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    grad_norm: float = 0.0
    num_dropped: int = 0
    num_features: int = 0

    def is_close(self, other: Self) -> bool:
        """Returns True if outputs and gradient norm are equal but for rounding."""
        places = [(micro_step, place) for micro_step, held in self.outputs.items() for place in held]
        alike = all(_is_close(self.outputs[m][place], other.outputs[m][place]) for m, place in places)
        return alike and _is_close([self.grad_norm], [other.grad_norm])

    def same_masks(self, other: Self) -> list[str]:
        """Returns the places at which both have equal outputs in the first micro-step, and so have drawn equal
        masks."""
        return _same_places(self.outputs.get("0", {}), other.outputs.get("0", {}))

    def repeated_places(self) -> list[str]:
        """Returns the places at which the first two micro-steps have equal outputs."""
        return _same_places(self.outputs.get("0", {}), self.outputs.get("1", {}))


def _same_places(one: dict[str, list[float]], other: dict[str, list[float]]) -> list[str]:
    return [place for place in one if place in other and _is_close(one[place], other[place])]


def _is_close(one: list[float], other: list[float]) -> bool:
    largest = max(map(abs, [*one, *other]), default=0.0)
    return len(one) == len(other) and all(abs(a - b) <= 1e-9 * largest for a, b in zip(one, other, strict=True))


def _run(config: Config, runtime: Runtime, in_experts: bool, num_steps: int) -> list[DropoutSums]:
    """Takes steps in which every block receives the same vectors, and returns the sums of each. in_experts: dropout is
    in the experts alone."""
    steps = [DropoutSums() for _ in range(num_steps)]
    generator = torch.Generator().manual_seed(config.seed)
    given_D = torch.randn(config.model.d_model, generator=generator, dtype=torch.float64)

    def give(block: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        x, context, *rest = arguments
        places = steps[current].outputs.setdefault(str(context.micro_step), {})
        if context.layer == 0 and not in_experts and "embedding" not in places:  # not again in recomputation
            # Encodes which features were dropped. Waits for the device.
            is_dropped = (x == 0).double()
            places["embedding"] = is_dropped.cumsum(-1).sum(-1).flatten().tolist()
            steps[current].num_dropped += int(is_dropped.sum())
            steps[current].num_features += x.numel()
        repeats = x.shape[-1] // len(given_D)  # 2 for a block of multi-token prediction
        return x * 0 + given_D.to(x.device).repeat(repeats), context, *rest

    def take(block: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        context = arguments[1]
        if in_experts and context.mask_BS is not None and not context.mask_BS.any():  # waits for the device
            return  # no token of this rank is routed, as at the end of a row in a block of multi-token prediction
        if not in_experts or context.layer in config.model.moe_layers:
            places = steps[current].outputs.setdefault(str(context.micro_step), {})
            places[f"block {context.layer}"] = output.x.detach().double().sum(-1).flatten().tolist()

    training, seed = config.training, config.seed
    sequences_GS = system_under_test.random_sequences(config, num_steps)
    with system_under_test.set_up(config, runtime, sequences_GS) as run:
        for block in run.model.modules():
            if isinstance(block, Block):
                block.register_forward_pre_hook(give)
                block.register_forward_hook(take)
        for current in range(num_steps):
            mine = list(run.batches(current))
            with system_under_test.collecting_ledger_errors([]):  # reported by the comparison already
                report = train_step(run.model, run.engine, mine, training, run.mesh, step=current, seed=seed)
            steps[current].grad_norm = report.grad_norm
    return steps
