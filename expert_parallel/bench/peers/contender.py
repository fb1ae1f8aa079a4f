"""What each contender is given, and what it must say of itself."""

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

from expert_parallel.bench.shapes import Shape
from expert_parallel.nn.ffn import width_in
from expert_parallel.parallel.collectives import anywhere, group_rank, group_size
from expert_parallel.parallel.placement import ExpertPlacement
from expert_parallel.runtime.process import Runtime

T = TypeVar("T")


class NotMeasured(Exception):
    """Why a peer cannot be measured here: it is not installed, or cannot do what is asked."""


@dataclass(frozen=True)
class Weights:
    """router_ED: everyone's. w_in_eDF ([gate | up] side by side where gated: (e, D, 2F)), w_out_eFD: of this rank's
    experts. The same numbers whatever the ranks, of size 1 in all outputs."""

    router_ED: Tensor
    w_in_eDF: Tensor
    w_out_eFD: Tensor


@dataclass(frozen=True)
class Case:
    """A layer to build and what it is run on. group: the ranks that divide tokens and experts; None: one rank.
    x_TD: this rank's tokens, a leaf; dy_TD: the gradient of the output."""

    shape: Shape
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
        """Of this rank's tokens the experts, (T, K), and the ranks that hold them; on the CPU."""
        with torch.no_grad():
            logits_TE = self.x_TD.float() @ self.weights.router_ED.float().T
        ids_TK = logits_TE.topk(self.shape.k).indices.cpu()
        placement = ExpertPlacement.contiguous(self.shape.num_experts, self.ranks)
        return ids_TK, torch.tensor(placement.rank_of_expert)[ids_TK]

    def bytes_of_choices(self) -> int:
        """What this rank's tokens cost where each choice on another rank is a row, there and back, forward and
        backward."""
        _, ranks_TK = self.routing()
        return 4 * int((ranks_TK != group_rank(self.group)).sum()) * self.shape.d_model * self.dtype.itemsize

    def one_rank(self) -> None:
        if self.ranks > 1:
            raise NotMeasured("on one rank only: it does not divide experts over ranks")

    def even_experts(self) -> int:
        """Experts of each rank."""
        if self.shape.num_experts % self.ranks:
            raise NotMeasured(f"its {self.shape.num_experts} experts must divide evenly over {self.ranks} ranks")
        return self.shape.num_experts // self.ranks


class Contender:
    """One layer. forward: (T, D) -> (T, D). computes: in words, for the table. is_compared: whether its outputs must be
    those of ours. Whoever has a capacity overrides forward_all and dropped_share; who knows what it sends, bytes_sent.
    """

    is_compared = True

    def __init__(self, module: nn.Module, computes: str, version: str = "") -> None:
        self.module: Any = module  # of others, whose attributes have no types
        self.computes, self.version = computes, version

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.module(x_TD)

    def forward_all(self, x_TD: Tensor) -> Tensor:
        """The same without dropping anything, to be compared."""
        return self.forward(x_TD)

    def surroundings(self) -> AbstractContextManager[None]:
        """In which it runs, forward and backward."""
        return nullcontext()

    def dropped_share(self) -> float:
        """Of this rank's choices in the last forward pass."""
        return 0.0

    def bytes_sent(self) -> int | None:
        """To other ranks in the last step, forward and backward; None: not known."""
        return None

    def parameters(self) -> list[nn.Parameter]:
        return list(self.module.parameters())

    def replicated(self) -> list[nn.Parameter]:
        """Those that all ranks hold: all but the experts."""
        return [parameter for name, parameter in self.module.named_parameters() if "experts" not in name]


def attempt(trial: Callable[[], T]) -> T:
    """What `trial` builds. NotMeasured on all ranks where it fails on one: a peer's own trouble is no reason to measure
    nobody. It may raise anything."""
    result, why = None, ""
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):  # what they say of what else could be installed
            warnings.simplefilter("ignore")
            result = trial()
    except NotMeasured:  # on all ranks alike
        raise
    except Exception as error:
        text = (str(error).strip() or "no message").splitlines()[0]
        why = f"it fails with {type(error).__name__}: {text}"
    if anywhere(bool(why)):
        raise NotMeasured(why or "it fails on another rank")
    assert result is not None
    return result


def first_that_fits(build: Callable[[Case], T], cases: Sequence[Case]) -> tuple[T, Case]:
    """The first case that it can do. NotMeasured with the reason of each where there is none."""
    reasons = []
    for case in cases:
        try:
            return build(case), case
        except NotMeasured as reason:
            reasons.append(str(reason))
    raise NotMeasured("; ".join(dict.fromkeys(reasons)))


def installed(package: str, extra: str = "bench") -> str:
    """Its version. NotMeasured where it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        hint = f": pip install 'expert-parallel[{extra}]'" if extra else ""
        raise NotMeasured(f"{package} is not installed{hint}") from None


def build_case(
    shape: Shape, activation: str, dtype: torch.dtype, runtime: Runtime, group: dist.ProcessGroup | None
) -> Case:
    """Tokens and weights are functions of their numbers alone."""
    device, rank, ranks = runtime.device, group_rank(group), group_size(group)
    placement = ExpertPlacement.contiguous(shape.num_experts, ranks)
    d_model, hidden = shape.d_model, shape.hidden

    def normal(seed: int, *size: int, std: float = 1.0) -> Tensor:
        generator = torch.Generator(device).manual_seed(seed)
        return (torch.randn(*size, generator=generator, device=device) * std).to(dtype)

    experts = placement.experts_on(rank)
    columns = width_in(activation, hidden)
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
