"""Defines what is verified, and the result for each layout."""

from dataclasses import dataclass, field

from expert_parallel.training.config import Config
from expert_parallel.verify.compare import TensorDifference
from expert_parallel.verify.layouts import Layout
from expert_parallel.verify.traffic import AxisBytes

NUM_STEPS = 3  # the first in which both moments, and whatever a step leaves behind, count twice


@dataclass(frozen=True)
class VerificationSpec:
    """Describes what to verify.

    config: the shrunk config, in float64. dtype: compute dtype of the compared steps. dropout: probabilities to check
    masks with, by path of the setting. bytes: True also measures the bytes that each parallel axis sends. quick: True
    takes one step in each layout and nothing else. training_dtype, experts_backend: those of the user's config."""

    config: Config
    layouts: list[Layout]
    dtype: str = "float64"
    dropout: dict[str, float] = field(default_factory=dict)
    bytes: bool = False
    quick: bool = True
    training_dtype: str = "float32"
    experts_backend: str = "auto"

    @property
    def num_steps(self) -> int:
        """Returns the number of steps to take in each layout. In a narrower dtype it is 1: later steps would differ by
        the rounding of the first."""
        return 1 if self.quick or self.dtype != "float64" else NUM_STEPS


@dataclass
class LayoutResult:
    """Holds the outcome of one layout.

    differences: of each tensor and step, on the rank where it is largest. routed, dropped: number of (token, expert)
    choices in the first step. grad_norm: the reference's, in the first step. ledger, dropout: errors, as sentences.
    backend: of the experts' matrix products. degrees: parallel degrees and number of micro-steps, one of which may
    explain a wrong factor. bytes: those of each axis; empty if not measured. rates: the right learning rate of each
    step. betas: the optimizer's. checks: what was verified beside steps in float64, by column, with a description.
    errors: of saving and loading, as sentences."""

    layout: str
    differences: list[TensorDifference]
    routed: int
    dropped: int
    grad_norm: float
    ledger: list[str]
    dropout: list[str]
    backend: str
    degrees: dict[str, int]
    seconds: float
    bytes: list[AxisBytes] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    betas: list[float] = field(default_factory=list)
    checks: dict[str, str] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    @property
    def world_size(self) -> int:
        """Returns the number of ranks."""
        return self.degrees["dp"] * self.degrees["cp"] * self.degrees["tp"] * self.degrees["pp"]

    def wrong(self, tolerance: float) -> list[TensorDifference]:
        """Returns the differences above the tolerance, and those of tensors that no rank has."""
        return [difference for difference in self.differences if not difference.passes(tolerance)]

    def passes(self, tolerance: float) -> bool:
        """Returns True if no tensor differs, there are no other errors, and all bytes match the formulas."""
        counts_match = all(axis.matches for axis in self.bytes)
        return not (self.wrong(tolerance) or self.ledger or self.dropout or self.errors) and counts_match
