"""Defines what every measured implementation receives, and the interface that it provides."""

import io
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from expert_parallel.bench.shapes import LayerShape
from expert_parallel.nn.ffn import w_in_columns
from expert_parallel.parallel.collectives import any_rank, group_rank, group_size
from expert_parallel.parallel.placement import ExpertPlacement
from expert_parallel.runtime.process import Runtime

T = TypeVar("T")


class NotMeasured(Exception):
    """Says why a peer cannot be measured here: it is not installed, or does not support what is asked."""


@dataclass(frozen=True)
class Weights:
    """Holds the weights of the layer, the same numbers for any number of ranks, scaled so that outputs have a size near
    1.

    router_ED: all experts. w_in_eDF ([gate | up] concatenated where gated: (e, D, 2F)), w_out_eFD: this rank's
    experts."""

    router_ED: Tensor
    w_in_eDF: Tensor
    w_out_eFD: Tensor


@dataclass(frozen=True)
class Case:
    """Describes a layer to build and its input.

    group: the ranks that divide tokens and experts; None: one rank. x_TD: this rank's tokens, a leaf. dy_TD: the
    gradient of the output."""

    shape: LayerShape
    activation: str
    dtype: torch.dtype
    device: torch.device
    group: dist.ProcessGroup | None
    runtime: Runtime
    weights: Weights
    x_TD: Tensor
    dy_TD: Tensor

    @property
    def ranks(self) -> int:
        return group_size(self.group)

    def routing(self) -> tuple[Tensor, Tensor]:
        """Returns the experts of this rank's tokens, (T, K), and the ranks that hold them, both on the CPU."""
        with torch.no_grad():
            # float32, as the router computes.
            logits_TE = self.x_TD.float() @ self.weights.router_ED.float().T
        ids_TK = logits_TE.topk(self.shape.k).indices.cpu()  # waits for the device
        placement = ExpertPlacement.contiguous(self.shape.num_experts, self.ranks)
        return ids_TK, torch.tensor(placement.rank_of_expert)[ids_TK]

    def bytes_of_one_row_per_choice(self) -> int:
        """Returns the bytes that this rank sends if each choice on another rank is a row, out and back, forward and
        backward."""
        _, ranks_TK = self.routing()
        return 4 * int((ranks_TK != group_rank(self.group)).sum()) * self.shape.d_model * self.dtype.itemsize

    def require_one_rank(self) -> None:
        """Raises `NotMeasured` on more than one rank."""
        if self.ranks > 1:
            raise NotMeasured("on one rank only: it does not divide experts over ranks")

    def experts_per_rank(self) -> int:
        """Returns the number of experts on each rank. Raises `NotMeasured` where they do not divide evenly."""
        if self.shape.num_experts % self.ranks:
            raise NotMeasured(f"its {self.shape.num_experts} experts must divide evenly over {self.ranks} ranks")
        return self.shape.num_experts // self.ranks


class Implementation:
    """Wraps one layer for the benchmark.

    computes: a description for the table. is_compared: True if its outputs must equal ours. An implementation with a
    capacity overrides `forward_dropless` and `dropped_share`; one whose traffic is known overrides `bytes_sent`."""

    is_compared = True

    def __init__(self, module: nn.Module, computes: str, version: str = "") -> None:
        self.module: Any = module  # Any: the attributes of the peers' modules have no types
        self.computes, self.version = computes, version

    def forward(self, x_TD: Tensor) -> Tensor:
        """Computes the layer, (T, D) -> (T, D)."""
        return self.module(x_TD)

    def forward_dropless(self, x_TD: Tensor) -> Tensor:
        """Computes the layer without dropping any choice, for the comparison of outputs."""
        return self.forward(x_TD)

    def execution_context(self) -> AbstractContextManager[None]:
        """Returns the context in which forward and backward run."""
        return nullcontext()

    def dropped_share(self) -> float:
        """Returns the share of this rank's choices that the last forward pass dropped."""
        return 0.0

    def bytes_sent(self) -> int | None:
        """Returns the bytes that this rank sent in the last step, forward and backward; None: not known."""
        return None

    def parameters(self) -> list[nn.Parameter]:
        return list(self.module.parameters())

    def replicated_parameters(self) -> list[nn.Parameter]:
        """Returns the parameters that all ranks hold: all but the experts."""
        return [parameter for name, parameter in self.module.named_parameters() if "experts" not in name]


def try_build(trial: Callable[[], T]) -> T:
    """Returns what `trial` builds. Raises `NotMeasured` on all ranks if it fails on one, with any exception, so that a
    failing peer does not end the benchmark. A collective."""
    result, why = None, ""
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):  # peers print what could be installed as well
            warnings.simplefilter("ignore")
            result = trial()
    except NotMeasured:  # raised by all ranks together
        raise
    except Exception as error:
        text = (str(error).strip() or "no message").splitlines()[0]
        why = f"it fails with {type(error).__name__}: {text}"
    if any_rank(bool(why)):
        raise NotMeasured(why or "it fails on another rank")
    assert result is not None
    return result


def first_supported(build: Callable[[Case], T], cases: Sequence[Case]) -> tuple[T, Case]:
    """Builds with the first case that is supported, and returns both. Raises `NotMeasured` with all reasons if none
    is."""
    reasons = []
    for case in cases:
        try:
            return build(case), case
        except NotMeasured as reason:
            reasons.append(str(reason))
    raise NotMeasured("; ".join(dict.fromkeys(reasons)))


def installed_version(package: str, extra: str = "bench") -> str:
    """Returns the version of an installed package. Raises `NotMeasured` where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        hint = f": pip install 'expert-parallel[{extra}]'" if extra else ""
        raise NotMeasured(f"{package} is not installed{hint}") from None


def build_case(
    shape: LayerShape, activation: str, dtype: torch.dtype, runtime: Runtime, group: dist.ProcessGroup | None
) -> Case:
    """Builds weights and tokens that depend on seeds and indices alone."""
    device = runtime.device
    rank, ranks = group_rank(group), group_size(group)
    placement = ExpertPlacement.contiguous(shape.num_experts, ranks)
    d_model, hidden = shape.d_model, shape.hidden

    def normal(seed: int, *size: int, std: float = 1.0) -> Tensor:
        generator = torch.Generator(device).manual_seed(seed)
        return (torch.randn(*size, generator=generator, device=device) * std).to(dtype)

    experts = placement.experts_on(rank)
    columns = w_in_columns(activation, hidden)
    weights = Weights(
        router_ED=normal(0, shape.num_experts, d_model, std=d_model**-0.5),
        w_in_eDF=torch.stack([normal(1000 + 2 * e, d_model, columns, std=d_model**-0.5) for e in experts]),
        w_out_eFD=torch.stack([normal(1001 + 2 * e, hidden, d_model, std=hidden**-0.5) for e in experts]),
    )
    tokens = len(range(rank, shape.tokens, ranks))
    x_TD = normal(10**6 + rank, tokens, d_model).requires_grad_()
    return Case(
        shape, activation, dtype, device, group, runtime, weights, x_TD, normal(2 * 10**6 + rank, tokens, d_model)
    )
