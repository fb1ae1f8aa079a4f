"""Computes the reference on rank 0 and broadcasts its tensors; layouts that need the same computation share it."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from expert_parallel.moe.routers.across_tokens import ExpertChoiceConfig, SinkhornConfig
from expert_parallel.runtime.process import Runtime
from expert_parallel.training.config import Config
from expert_parallel.verify import system_under_test
from expert_parallel.verify.compare import broadcast_tensors, expected_tensors, layer_tensors, loss_tensors
from expert_parallel.verify.reference import reference_evaluation, reference_generation, reference_step
from expert_parallel.verify.reference_model import TokenPartition
from expert_parallel.verify.reference_optimizer import ReferenceState
from expert_parallel.verify.system_under_test import Tensors

MAX_CACHED_BYTES = 200 * 1024**2  # on each rank, beside the tensors of the newest step


@dataclass(frozen=True)
class ReferencePoint:
    """Names a state of the reference by the steps that led to it. state: None on all ranks but rank 0."""

    key: tuple[Hashable, ...]
    state: ReferenceState | None


@dataclass
class ReferenceCache:
    """Computes on rank 0 what other ranks are sent. Every method is a collective.

    config: the one that is verified. initial: weights as one rank initialises them. start: weights that the first step
    starts from."""

    config: Config
    runtime: Runtime
    initial: Tensors
    start: Tensors
    cache: dict[Hashable, tuple[Tensors, ReferenceState | None]] = field(default_factory=dict)

    @property
    def first(self) -> ReferencePoint:
        """Returns the point before the first step."""
        return ReferencePoint((), ReferenceState.at_start(self.start) if self.runtime.rank == 0 else None)

    def step(
        self, point: ReferencePoint, config: Config, sequences_GS: Tensor, division: TokenPartition, step: int
    ) -> tuple[Tensors, ReferencePoint]:
        """Returns the expected tensors of a step that starts at `point`, by name, and the point after it.

        config: in a layout. sequences_GS: tokens of the step, int64. division: the tokens of each rank in a micro-step,
        on which settings with scope `rank` depend. step: its number."""
        training = config.training
        division = self._divided(division, len(sequences_GS) // training.micro_steps, sequences_GS.shape[1] - 1)
        key = (*point.key, training.micro_steps, _key(division), step)

        def compute() -> tuple[Tensors, ReferenceState | None]:
            assert point.state is not None
            separator = system_under_test.separator(config)
            found = reference_step(
                config.model, training, point.state, sequences_GS, division, config.seed, step, separator
            )
            return expected_tensors(found, point.state), found.after

        if key not in self.cache:
            tensors, after = compute() if self.runtime.rank == 0 else (None, None)
            self.cache[key] = broadcast_tensors(tensors), after
            while len(self.cache) > 1 and self._cached_bytes() > MAX_CACHED_BYTES:
                self.cache.pop(next(iter(self.cache)))
        expected, after = self.cache[key]
        return expected, ReferencePoint(key, after)

    def evaluation(
        self, point: ReferencePoint, config: Config, batches: Sequence[Tensor], divisions: list[TokenPartition]
    ) -> Tensors:
        """Returns the expected loss, balance losses and counts of an evaluation at `point`. batches: the sequences of
        each pass; divisions: of each, the tokens of every rank."""
        passes = [
            (sequences_BS, self._divided(division, len(sequences_BS), sequences_BS.shape[1] - 1))
            for sequences_BS, division in zip(batches, divisions, strict=True)
        ]

        def compute() -> Tensors:
            assert point.state is not None
            separator = system_under_test.separator(config)
            losses, layers = reference_evaluation(config.model, point.state.parameters, passes, config.seed, separator)
            return loss_tensors(losses[0], losses[1:]) | layer_tensors(layers)

        return from_rank_0(self.runtime, compute)

    def generation(
        self, point: ReferencePoint, config: Config, prompts: Sequence[Sequence[int]], num_tokens: int
    ) -> Tensor:
        """Returns the prompts continued at `point`, one text after the other, as float64."""

        def compute() -> Tensors:
            assert point.state is not None
            texts = reference_generation(config.model, point.state.parameters, prompts, num_tokens)
            return {"tokens": torch.tensor([token for text in texts for token in text], dtype=torch.float64)}

        return from_rank_0(self.runtime, compute)["tokens"]

    def _cached_bytes(self) -> int:
        """Returns the size of the cached tensors, the same on every rank."""
        return sum(value.nbytes for tensors, _ in self.cache.values() for value in tensors.values())

    def _divided(self, division: TokenPartition, num_sequences: int, length: int) -> TokenPartition:
        """Returns the division, or that of one rank if no setting depends on it, so that more layouts share a step."""
        return division if _has_rank_scope(self.config) else [(torch.arange(num_sequences), torch.arange(length))]


def from_rank_0(runtime: Runtime, compute: Callable[[], Tensors]) -> Tensors:
    """Computes tensors on rank 0 and returns them on all ranks. A collective."""
    return broadcast_tensors(compute() if runtime.rank == 0 else None)


def _key(division: TokenPartition) -> str:
    return repr([[numbers.tolist() for numbers in place] for place in division])


def _has_rank_scope(config: Config) -> bool:
    """Returns True if a setting has scope `rank`, so that the reference depends on which rank holds which token."""
    moe = config.model.moe
    if moe is None:
        return False
    scopes = [block.scope for block in (moe.capacity, *moe.losses)]
    if isinstance(moe.router, ExpertChoiceConfig | SinkhornConfig):
        scopes.append(moe.router.scope)
    return "rank" in scopes
