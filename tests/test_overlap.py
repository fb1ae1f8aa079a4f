"""Tokens that travel in chunks: the same outputs and gradients as all at once, whatever the ranks have; and exchanges
that lie beneath the experts, in both passes."""

import gc
import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from expert_parallel.moe.config import MoEConfig
from expert_parallel.moe.context import StepContext
from expert_parallel.moe.dispatch.async_collective import AsyncAllToAll, SplitSizes
from expert_parallel.moe.dispatch.chunk import chunk_sizes
from expert_parallel.moe.dispatch.ledger import Ledger
from expert_parallel.moe.layer import MoELayer
from expert_parallel.moe.types import DispatchedTokens
from expert_parallel.parallel.collectives import ExchangeKey, Peers, Phase
from tests.ranks import run_ranks
from tests.test_dispatch import nodes_of

D_MODEL = 8
KINDS: dict[str, dict[str, Any]] = {
    "all_to_all": {"kind": "all_to_all"},
    "all_to_all, row a choice": {"kind": "all_to_all", "one_row_per": "choice"},
    "all_gather": {"kind": "all_gather"},
    "hierarchical": {"kind": "hierarchical"},
}
# Tokens of each of four ranks: more and fewer than chunks, not a multiple of them, none.
TOKENS = {"unequal": (23, 17, 40, 2), "few": (3, 1, 0, 2), "none": (0, 0, 0, 0)}


def make_layer(dispatcher: dict[str, Any], overlap: int, **settings: Any) -> MoELayer:
    config = {
        "d_model": D_MODEL,
        "num_experts": 6,  # on four ranks 2, 2, 1 and 1
        "router": {"k": 3},
        "capacity": {"kind": "factor", "train": 1.0, "minimum": 0},
        "losses": [{"kind": "balance"}],
        "experts": {"hidden": 12},
        "shared_experts": {"hidden": 4},
        "dispatcher": {**dispatcher, "overlap": overlap},
        **settings,
    }
    return MoELayer(MoEConfig.model_validate(config), dist.group.WORLD, nodes=nodes_of(4, 2)).double()


def pass_through(layer: MoELayer, num_tokens: int, rank: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    x_TD = torch.randn(num_tokens, D_MODEL, generator=generator, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(num_tokens, D_MODEL, generator=generator, dtype=torch.float64)
    output = layer(x_TD)
    ((output.y * upstream).sum() + sum(output.losses.values())).backward()
    assert x_TD.grad is not None
    found = {"y": output.y.detach(), "x": x_TD.grad, "computed": output.stats.computed_E.double()}
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad
    return found


def run_both(rank: int, kind: str, tokens: tuple[int, ...], overlap: int) -> list[dict[str, Tensor]]:
    return [pass_through(make_layer(KINDS[kind], chunks), tokens[rank], rank) for chunks in (1, overlap)]


@pytest.mark.parametrize("overlap", [2, 5])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_change_no_output_and_no_gradient(kind: str, tokens: str, overlap: int) -> None:
    for rank, (whole, in_chunks) in enumerate(run_ranks(4, run_both, kind, TOKENS[tokens], overlap)):
        assert (
            whole.keys() == in_chunks.keys() > {"y", "x", "router.weight", "experts.w_in", "shared_experts.w_in.weight"}
        )
        for name, expected in whole.items():
            torch.testing.assert_close(
                in_chunks[name], expected, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
            )
        if tokens == "unequal":
            assert float(whole["y"].abs().sum()) > 0
            assert float(whole["experts.w_in"].abs().sum()) > 0, rank


# ---------------------------------------------------------------------------------------------------------------- order


def order_of_events(rank: int, kind: str, overlap: int) -> tuple[list[str], list[str]]:
    """Of the forward and of the backward pass: + an exchange of rows starts, - it is waited for, and what computes."""
    layer, events = make_layer(KINDS[kind], overlap), list[str]()
    begin, compute, shared = Ledger.all_to_all, layer.experts.forward, layer.shared_experts
    assert shared is not None

    def watched_begin(self: Ledger, *arguments: Any) -> Callable[[], Tensor]:
        key, wait = arguments[-1], begin(self, *arguments)
        events.append(f"+{key}")

        def watched_wait() -> Tensor:
            events.append(f"-{key}")
            return wait()

        return watched_wait

    def watched_compute(tokens: DispatchedTokens, **named: Any) -> Tensor:
        events.append("experts")
        y_VD = compute(tokens, **named)
        y_VD.register_hook(lambda _: events.append("experts"))
        return y_VD

    x_TD = torch.randn(12, D_MODEL, dtype=torch.float64, requires_grad=True)
    shared.register_forward_hook(lambda *_: events.append("shared experts"))
    shared.w_out.register_full_backward_hook(lambda *_: events.append("shared experts"))
    with (
        mock.patch.object(Ledger, "all_to_all", watched_begin),
        mock.patch.object(layer.experts, "forward", watched_compute),
    ):
        y_TD = layer(x_TD).y
        forward, events[:] = list(events), []
        y_TD.sum().backward()
    return forward, events


def test_the_exchange_of_a_chunk_lies_beneath_the_experts_of_another() -> None:
    """D1, shared experts, d1, D2, C1, M1, d2, C2, M2, m1, m2; and in the backward pass the same the other way round."""
    for forward, backward in run_ranks(4, order_of_events, "all_to_all", 2):
        assert forward == [
            *("+dispatch", "shared experts", "-dispatch", "+dispatch", "experts", "+combine"),
            *("-dispatch", "experts", "+combine", "-combine", "-combine"),
        ]
        assert backward == [
            *("+combine backward", "+combine backward", "-combine backward", "experts", "+dispatch backward"),
            *("-combine backward", "experts", "-dispatch backward", "+dispatch backward", "shared experts"),
            "-dispatch backward",
        ]


@pytest.mark.parametrize("kind", ["all_to_all", "hierarchical"])
@pytest.mark.parametrize("overlap", [3, 4])
def test_whenever_experts_compute_rows_of_other_chunks_are_under_way(kind: str, overlap: int) -> None:
    """Those of the first hop and of the second, forward and backward."""
    for passes in run_ranks(4, order_of_events, kind, overlap):
        for events in passes:
            under_way, beneath = [], []
            for event in events:
                if event == "experts":
                    beneath.append(sorted(set(under_way)))
                elif event[0] == "+":
                    under_way.append(event[1:])
                elif event[0] == "-":
                    under_way.remove(event[1:])
            assert len(beneath) == overlap
            assert all(beneath), beneath
            if kind == "hierarchical" and overlap > 3:
                assert any(any("between" in purpose for purpose in purposes) for purposes in beneath)
                assert any(any("within" in purpose for purpose in purposes) for purposes in beneath)
            assert not under_way


# ------------------------------------------------------------------------------------------------------------- settings


def test_chunks_cover_all_tokens() -> None:
    assert chunk_sizes(7, 3) == [2, 2, 3]
    assert chunk_sizes(2, 4) == [0, 1, 0, 1]
    assert chunk_sizes(0, 2) == [0, 0]
    assert chunk_sizes(5, 1) == [5]


def test_padding_to_the_capacity_is_refused() -> None:
    config = {"num_experts": 4, "experts": {"hidden": 4}, "capacity": {"kind": "factor", "pad": True}}
    MoEConfig.model_validate({**config, "dispatcher": {"kind": "all_to_all", "overlap": 1}})
    with pytest.raises(ValueError, match=r"dispatcher.overlap is 2 and capacity.pad is true"):
        MoEConfig.model_validate({**config, "dispatcher": {"kind": "all_to_all", "overlap": 2}})
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        MoEConfig.model_validate({**config, "dispatcher": {"kind": "hierarchical", "overlap": 0}})


def run_alone(rank: int) -> bool:
    """One rank has nothing to overlap: it computes all at once."""
    config = {"d_model": D_MODEL, "num_experts": 4, "experts": {"hidden": 4}}
    layers = [
        MoELayer(MoEConfig.model_validate({**config, "dispatcher": {"kind": "all_to_all", "overlap": n}}))
        for n in (1, 3)
    ]
    x_TD = torch.randn(9, D_MODEL)
    return torch.equal(*(layer(x_TD, StepContext()).y for layer in layers))


def test_one_rank_computes_all_at_once() -> None:
    assert run_ranks(1, run_alone) == [True]


def what_is_left_of_a_pass(rank: int, kind: str, overlap: int, with_backward: bool) -> int:
    """How many of three inputs are still held by something, when all that came of them is gone."""
    layer, held = make_layer(KINDS[kind], overlap), []
    for _ in range(3):
        x_TD = torch.randn(12, D_MODEL, dtype=torch.float64, requires_grad=True)
        inside = x_TD * 1.0
        held.append(weakref.ref(inside))
        y_TD = layer(inside).y
        if with_backward:
            y_TD.sum().backward()
        del x_TD, inside, y_TD
    gc.collect()
    return sum(reference() is not None for reference in held)


@pytest.mark.parametrize("with_backward", [True, False])
@pytest.mark.parametrize("overlap", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_leaves_nothing_behind(kind: str, overlap: int, with_backward: bool) -> None:
    """A tensor that holds the node that made it, by way of what the node holds, is never let go."""
    assert run_ranks(4, what_is_left_of_a_pass, kind, overlap, with_backward) == [0] * 4


def test_an_exchange_of_one_rank_leaves_its_input_alone() -> None:
    x = torch.ones(2, 3, requires_grad=True)
    y = AsyncAllToAll(Ledger(), SplitSizes([2], [2]), Peers.of(None), ExchangeKey(Phase.DISPATCH)).start(x).finish()
    (2 * y).sum().backward()
    assert x.is_leaf
    assert x.grad is not None
    assert x.grad.tolist() == [[2.0] * 3] * 2
