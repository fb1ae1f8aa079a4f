"""The MoE layer on real ranks against moe/reference/reference_layer.py, in float64: values, input gradients and the
gradient of every parameter.

Every router x policy x dispatcher x ep, with scenarios made from the router's bias, the ranks' token counts and the
token ids; each case asserts that it is what it says. Row counts are checked over all ranks, forward and backward.
"""

import zlib
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from expert_parallel.moe.config import MoEConfig
from expert_parallel.moe.conservation import LayerTotals, check_conservation
from expert_parallel.moe.context import StepContext
from expert_parallel.moe.dispatch.dispatcher import LocalConfig
from expert_parallel.moe.dispatch.ledger import Ledger
from expert_parallel.moe.layer import MoELayer
from expert_parallel.moe.parameters import logical_parameters
from expert_parallel.moe.reference.reference_layer import RankTokens, ReferenceOutput, reference_layer
from expert_parallel.moe.routers.losses import loss_name
from expert_parallel.moe.types import Outcome
from expert_parallel.nn.random import mix, uniform
from expert_parallel.parallel.mesh import NodeGroups, ParallelDegrees, build_node_groups, group_builder
from expert_parallel.parallel.placement import ExpertPlacement
from tests.pairwise import all_cases, pairwise_cases
from tests.ranks import run_ranks

D_MODEL, LENGTH = 8, 5

ROUTERS = {
    "softmax": {"kind": "top_k", "k": 3, "jitter": 0.1},
    "softmax raw": {"kind": "top_k", "k": 3, "normalise": False},
    "top-1": {"kind": "top_k", "k": 1, "normalise": False},
    "sigmoid": {"kind": "top_k", "k": 3, "score": "sigmoid", "balance_bias_rate": 0.1},
    "groups": {
        "kind": "top_k",
        "k": 3,
        "score": "sigmoid",
        "normalise": False,
        "group_limit": {"count": 2, "limit": 1},
    },
    "noisy learned": {"kind": "noisy_top_k", "k": 3},
    "noisy normal": {"kind": "noisy_top_k", "k": 2, "noise": "normal", "std": 0.7},
    "noisy gumbel": {"kind": "noisy_top_k", "k": 2, "noise": "gumbel"},
    "gshard": {"kind": "gshard"},
    "expert choice": {"kind": "expert_choice", "train": 2.0, "eval": 1.5},
    "expert choice global": {"kind": "expert_choice", "train": 2.0, "eval": 1.5, "scope": "global"},
    "hash": {"kind": "hash", "k": 2},
    "sinkhorn": {"kind": "sinkhorn", "k": 2, "score": "sigmoid", "scope": "sequence"},
    "sinkhorn global": {"kind": "sinkhorn", "k": 1, "scope": "global"},
}
_FACTOR = {"kind": "factor", "train": 1.0, "eval": 0.9, "minimum": 0}
CAPACITIES = {
    "dropless": {"kind": "dropless"},
    "receive bound": {"kind": "dropless", "receive_bound": 1.05},
    "position": _FACTOR,
    "position sequence": {**_FACTOR, "scope": "sequence", "minimum": 1},
    "position global": {**_FACTOR, "scope": "global"},
    "token by token": {**_FACTOR, "first_choices_first": False, "pad": True},
    "probability": {**_FACTOR, "priority": "probability", "pad": True, "scope": "sequence"},
    "probability global": {**_FACTOR, "priority": "probability", "scope": "global"},
    "batch priority": {**_FACTOR, "priority": "batch_priority"},
    "random global": {**_FACTOR, "priority": "random", "scope": "global"},
    "renormalise": {**_FACTOR, "renormalise": True},
    "reroute": {**_FACTOR, "overflow": "reroute"},
    "reroute global": {**_FACTOR, "overflow": "reroute", "scope": "global", "priority": "probability"},
    "absolute": {"kind": "absolute", "train": 3, "eval": 2, "pad": True},
}
DISPATCHERS = {
    "local": {"kind": "local"},
    "all_to_all": {"kind": "all_to_all"},
    "all_to_all, row a choice": {"kind": "all_to_all", "one_row_per": "choice"},
    "all_gather": {"kind": "all_gather"},
    "hierarchical": {"kind": "hierarchical"},
    "hierarchical, row a choice": {"kind": "hierarchical", "one_row_per": "choice"},
    "all_to_all, overlap": {"kind": "all_to_all", "overlap": 3},
    "all_gather, overlap": {"kind": "all_gather", "overlap": 2},
    "hierarchical, overlap": {"kind": "hierarchical", "overlap": 3},
}
SCENARIOS = [
    "random",
    "hot expert",
    "rank without tokens",
    "expert without tokens",
    "all experts chosen",
    "no tokens",
    "uneven placement",
    "padding",
]
FACTORS = {
    "ep": [1, 2, 4, 8],
    "dispatcher": list(DISPATCHERS),
    "router": list(ROUTERS),
    "capacity": list(CAPACITIES),
    "scenario": SCENARIOS,
    "experts": ["swiglu", "relu bias", "geglu shared gate", "gelu shared bias", "swiglu weight_input"],
    "ledger": ["counts", "rows"],
    "training": [True, False],
}
CONTEXT = StepContext(seed=3, step=5, micro_step=1, layer=2)

# Of the hash router's map of 100 tokens to 2 of 8 experts: one that goes to expert 0, and those that avoid expert 1.
_HASHED = uniform(mix(0), torch.arange(100), 8).topk(2).indices.tolist()
HOT_TOKEN = next(token for token, experts in enumerate(_HASHED) if 0 in experts)
TOKENS_WITHOUT_EXPERT_1 = [token for token, experts in enumerate(_HASHED) if 1 not in experts]


def possible(case: dict[str, Any]) -> bool:
    router, capacity, scenario = case["router"], CAPACITIES[case["capacity"]], case["scenario"]
    if case["dispatcher"] == "local" and case["ep"] > 1:
        return False
    if "overlap" in case["dispatcher"] and capacity.get("pad"):
        return False
    if router.startswith("expert choice"):
        return capacity["kind"] == "dropless" and scenario not in ("hot expert", "expert without tokens")
    if router in ("sinkhorn", "sinkhorn global", "groups") and scenario in ("hot expert", "expert without tokens"):
        return False  # sinkhorn prevents it; a hot expert's group may lose
    if scenario == "all experts chosen" and (router in ("gshard", "groups", "top-1", "sinkhorn global")):
        return False
    if capacity.get("overflow") == "reroute" and (scenario == "all experts chosen"):
        return False
    return not capacity.get("renormalise") or router not in (
        "softmax raw",
        "top-1",
        "groups",
        "sinkhorn",
        "sinkhorn global",
    )


def identify(case: dict[str, Any]) -> str:
    return "-".join(str(value).replace(" ", "_") for value in case.values())


def make_config(case: dict[str, Any]) -> MoEConfig:
    num_experts = 11 if case["scenario"] == "uneven placement" else 8
    router: dict[str, Any] = dict(ROUTERS[case["router"]])
    if router["kind"] not in ("hash", "expert_choice"):
        router |= {"bias": True, "scale": 1.5}
    if case["scenario"] == "all experts chosen":
        router |= {"train": 8.0, "eval": 8.0} if router["kind"] == "expert_choice" else {"k": num_experts}
    if num_experts == 11 and "group_limit" in router:
        router["group_limit"] = {"count": 11, "limit": 6, "score": "max"}
    losses: list[dict[str, Any]] = [{"kind": "z_loss", "coefficient": 0.1}]
    losses += [
        {"kind": "balance", "coefficient": 0.3},
        {"kind": "balance", "coefficient": 0.5, "scope": "rank", "choices": "first"},
        {"kind": "balance", "coefficient": 0.7, "scope": "sequence", "layers": "pooled"},
    ]
    noise = router.get("noise", "learned") if router["kind"] == "noisy_top_k" else None
    losses.append({"kind": "importance", "of": "probabilities" if noise == "normal" else "weights"})
    if noise in ("learned", "normal") and case["scenario"] != "all experts chosen":
        losses.append({"kind": "load", "threshold": "all" if noise == "normal" else "others"})
    activation, *options = case["experts"].split()
    return MoEConfig.model_validate(
        {
            "d_model": D_MODEL,
            "num_experts": num_experts,
            "router": router,
            "capacity": CAPACITIES[case["capacity"]],
            "losses": {"hash": [], "expert_choice": losses[:1]}.get(router["kind"], losses),
            "experts": {
                "hidden": 6,
                "activation": activation,
                "bias": "bias" in options,
                "weight_input": "weight_input" in options,
            },
            "shared_experts": {"hidden": 4, "activation": activation} if "shared" in options else None,
            "shared_expert_gate": "gate" in options,
            "dispatcher": DISPATCHERS[case["dispatcher"]],
            "ledger": {"kind": case["ledger"]},
        }
    )


def make_inputs(case: dict[str, Any]) -> list[RankTokens]:
    """Of each rank: 1 to 3 sequences, whose indices in the global batch do not follow the ranks."""
    generator = torch.Generator().manual_seed(zlib.crc32(identify(case).encode()))
    sequences = [1 + (rank + 1) % 3 for rank in range(case["ep"])] if case["ep"] > 1 else [4]
    if case["scenario"] == "rank without tokens":
        sequences[-1] = 0
    if case["scenario"] == "no tokens":
        sequences = [0] * case["ep"]
    indices = iter(torch.randperm(sum(sequences), generator=generator).tolist())
    inputs = []
    for num_sequences in sequences:
        x_BSD = torch.randn(num_sequences, LENGTH, D_MODEL, generator=generator, dtype=torch.float64)
        ids_BS = torch.randint(0, 50, (num_sequences, LENGTH), generator=generator)
        if case["scenario"] == "hot expert":
            ids_BS = ids_BS * 0 + HOT_TOKEN
        if case["scenario"] == "expert without tokens":
            ids_BS = torch.tensor(TOKENS_WITHOUT_EXPERT_1)[ids_BS % len(TOKENS_WITHOUT_EXPERT_1)]
        mask_BS = None
        if case["scenario"] == "padding":
            mask_BS = torch.arange(LENGTH) < torch.randint(2, LENGTH + 1, (num_sequences, 1), generator=generator)
        index = [next(indices) for _ in range(num_sequences)]
        inputs.append(RankTokens(x_BSD, index, ids_BS, mask_BS))
    return inputs


def make_parameters(case: dict[str, Any], config: MoEConfig) -> dict[str, Tensor]:
    layer = MoELayer(config.model_copy(update={"dispatcher": LocalConfig(kind="local")}))
    generator = torch.Generator().manual_seed(2)
    parameters = {}
    for logical in logical_parameters(layer.double()):
        for name in logical.names:
            parameters[name] = torch.randn(logical.shape, generator=generator, dtype=torch.float64) * 0.7
    if "router.bias" in parameters:
        if case["scenario"] == "hot expert":
            parameters["router.bias"][0] += 30.0
        if case["scenario"] == "expert without tokens":
            parameters["router.bias"][1] -= 50.0
    if "balance_bias_rate" in ROUTERS[case["router"]]:
        shift_E = torch.randn(config.num_experts, generator=generator, dtype=torch.float64) * 0.2
        hot_or_dead = case["scenario"] in ("hot expert", "expert without tokens")
        parameters["router.balance_bias_E"] = shift_E * (not hot_or_dead)
    return parameters


def make_placement(case: dict[str, Any], config: MoEConfig) -> ExpertPlacement:
    if case["scenario"] != "uneven placement":
        return ExpertPlacement.contiguous(config.num_experts, case["ep"])
    ranks = [(5 * expert + expert // case["ep"]) % case["ep"] for expert in range(config.num_experts)]
    return ExpertPlacement(tuple(ranks), case["ep"])


@cache
def nodes_of(world_size: int, ranks_per_node: int) -> NodeGroups:
    degrees = ParallelDegrees(world_size, ep=world_size)
    return build_node_groups(degrees, ranks_per_node, group_builder("cpu", timedelta(seconds=120)))


def upstream(y: Tensor, rank: int) -> Tensor:
    """A gradient for y that tells rows apart."""
    return torch.arange(1, y.numel() + 1, dtype=y.dtype).view(y.shape).div(y.numel() + 1).sin() * (rank + 1)


def context_of(tokens: RankTokens) -> StepContext:
    index_B = torch.tensor(tokens.sequence_index, dtype=torch.int64)
    return replace(CONTEXT, sequence_index_B=index_B, token_ids_BS=tokens.token_ids_BS, mask_BS=tokens.mask_BS)


def run_layer(rank: int, case: dict[str, Any]) -> dict[str, Any]:
    """On one rank: the layer forward and backward; what it gave."""
    config, ep = make_config(case), case["ep"]
    group = dist.group.WORLD if ep > 1 else None
    nodes = nodes_of(ep, {1: 1, 2: 1, 4: 2, 8: 4}[ep]) if case["dispatcher"].startswith("hierarchical") else None
    layer = MoELayer(config, group, placement=make_placement(case, config), nodes=nodes).double()
    layer.train(case["training"])
    parameters = make_parameters(case, config)
    for logical in logical_parameters(layer):
        logical.fill(logical.parameter, [parameters[name] for name in logical.names])
    if "router.balance_bias_E" in parameters:
        layer.router.balance_bias_E.copy_(parameters["router.balance_bias_E"])
    tokens = make_inputs(case)[rank]
    x = tokens.x_BSD.requires_grad_()
    output = layer(x, context_of(tokens))
    objective = (output.y * upstream(output.y, rank)).sum() + sum(output.losses.values())
    objective.backward()
    grads = {}
    for logical in logical_parameters(layer):
        assert logical.parameter.grad is not None, f"{logical.names}: no gradient"
        grads.update(logical.whole(logical.parameter.grad))
    totals = check_conservation(output.stats, group, config.ledger)
    return {"y": output.y.detach(), "x_grad": x.grad, "grads": grads, "totals": totals, "rows": output.stats.rows}


def run_reference(case: dict[str, Any]) -> tuple[ReferenceOutput, list[Tensor], dict[str, Tensor]]:
    config = make_config(case)
    parameters = {name: value.requires_grad_() for name, value in make_parameters(case, config).items()}
    inputs = make_inputs(case)
    for tokens in inputs:
        tokens.x_BSD.requires_grad_()
    placement = make_placement(case, config)
    reference = reference_layer(config, parameters, inputs, case["training"], CONTEXT, placement.rank_of_expert)
    objective = sum(((y * upstream(y, rank)).sum() for rank, y in enumerate(reference.y)), torch.zeros(()))
    objective = objective + sum(loss.coefficient * reference.losses[loss_name(loss)] for loss in config.losses)
    if objective.requires_grad:
        objective.backward()
    return reference, [tokens.x_BSD for tokens in inputs], parameters


def close(actual: Tensor, expected: Tensor | None, what: str) -> None:
    expected = torch.zeros_like(actual) if expected is None else expected
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11, msg=lambda text: f"{what}: {text}")


def check_case(case: dict[str, Any]) -> None:
    compare(case, run_ranks(case["ep"], run_layer, case))


def compare(case: dict[str, Any], results: list[dict[str, Any]]) -> None:
    reference, inputs, parameters = run_reference(case)
    for rank, result in enumerate(results):
        close(result["y"], reference.y[rank].detach(), f"output of rank {rank}")
        close(result["x_grad"], inputs[rank].grad, f"input gradient of rank {rank}")
    for name in (name for name in parameters if "balance_bias" not in name):
        holders = [result["grads"][name] for result in results if name in result["grads"]]
        assert len(holders) == (1 if name.startswith("experts.") else case["ep"]), name
        close(torch.stack(holders).sum(0), parameters[name].grad, f"gradient of {name}")
    totals: LayerTotals = results[0]["totals"]
    for name, loss in reference.losses.items():
        assert totals.losses[name] == pytest.approx(loss.item(), rel=1e-9, abs=1e-12), f"loss {name}"
    check_ledger(case, reference, totals, [result["rows"] for result in results])
    check_scenario(case, reference)


def check_ledger(case: dict[str, Any], reference: ReferenceOutput, totals: LayerTotals, rows: list[Any]) -> None:
    """The layer's counts add up (check_conservation has seen to that on the ranks) and are the reference's own."""
    assert totals.breaches() == []
    outcomes = torch.cat([outcome_TK.flatten() for outcome_TK in reference.outcomes])
    assert totals.routed_E.tolist() == reference.routed_E
    assert (totals.kept_E + totals.rerouted_E).tolist() == reference.kept_E
    for reason, counts_E in (
        (Outcome.REROUTED, totals.rerouted_E),
        (Outcome.DROPPED_CAPACITY, totals.dropped_capacity_E),
        (Outcome.DROPPED_RECEIVE_BOUND, totals.dropped_receive_bound_E),
    ):
        assert int(counts_E.sum()) == int((outcomes == reason).sum()), reason
    sent, received, returned = (sum(getattr(r, name) for r in rows) for name in ("sent", "received", "returned"))
    assert sent == received == returned
    if not case["dispatcher"].startswith("hierarchical"):
        assert sent == rows_that_cross(case, reference)


def rows_that_cross(case: dict[str, Any], reference: ReferenceOutput) -> int:
    """Unique (token, other rank) pairs of the kept choices; with a row a choice, each of them."""
    owner = make_placement(case, make_config(case)).rank_of_expert
    crossings = [
        (rank, token, owner[expert])
        for rank, (ids_TK, outcome_TK) in enumerate(zip(reference.expert_ids, reference.outcomes, strict=True))
        for token, choice in (outcome_TK <= Outcome.REROUTED).nonzero().tolist()
        if owner[expert := int(ids_TK[token, choice])] != rank
    ]
    return len(crossings) if "row a choice" in case["dispatcher"] else len(set(crossings))


def check_scenario(case: dict[str, Any], reference: ReferenceOutput) -> None:
    outcomes = torch.cat([outcome_TK.flatten() for outcome_TK in reference.outcomes])
    routed = int((outcomes != Outcome.NOT_ROUTED).sum())
    dropped = sum(int(d.sum()) for d in reference.dropped)
    num_tokens = sum(len(d) for d in reference.dropped)
    skewed = case["scenario"] == "random" and case["router"] not in ("sinkhorn", "sinkhorn global", "top-1")
    match case["scenario"]:
        case "no tokens":
            assert routed == 0
        case "hot expert":
            assert reference.routed_E[0] == num_tokens
        case "expert without tokens":
            assert reference.routed_E[1] == 0
        case "padding":
            assert bool((torch.cat(reference.outcomes) == Outcome.NOT_ROUTED).all(1).any()) or case["ep"] == 1
        case "random" if skewed and CAPACITIES[case["capacity"]] == _FACTOR:
            assert 0.02 <= dropped / routed <= 0.5, dropped / routed
        case "random" if skewed and "reroute" in case["capacity"]:
            assert int((outcomes == Outcome.REROUTED).sum()) > 0
    if case["capacity"] == "dropless":
        assert dropped == 0


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Here and not in a decorator: the ranks import this module too, and have no use for the search for cases. Of cases
    that cover as much, two ranks are preferred: one exchanges nothing, and 8 take 8 times the time."""
    if metafunc.function is test_layer_equals_reference:
        cases = pairwise_cases(FACTORS, possible, cost=lambda case: abs(case["ep"] - 2))
        metafunc.parametrize("case", cases, ids=identify)


def test_layer_equals_reference(case: dict[str, Any]) -> None:
    check_case(case)


def every_case(ep: int) -> list[dict[str, Any]]:
    """Router x policy x dispatcher; the other factors take turns."""
    whole = {name: FACTORS[name] for name in ("dispatcher", "router", "capacity")}
    others = all_cases(
        {name: FACTORS[name] for name in FACTORS if name not in whole and name != "ep"}, lambda case: True
    )
    cases, turn = [], 0
    for case in all_cases({"ep": [ep], **whole}, lambda case: True):
        for attempt in range(len(others)):
            full_case = {**case, **others[(turn + attempt * 7) % len(others)]}
            if possible(full_case):
                cases.append(full_case)
                turn += attempt * 7 + 1
                break
    return cases


@pytest.mark.full
@pytest.mark.parametrize("ep", [1, 2, 4, 8])
def test_layer_equals_reference_in_every_combination(ep: int) -> None:
    cases = every_case(ep)
    assert len({case["scenario"] for case in cases}) == len(SCENARIOS)
    for case in cases:
        try:
            check_case(case)
        except AssertionError as error:
            raise AssertionError(f"{identify(case)}: {error}") from error


# ---------------------------------------------------------------------- the suite can fail: defects put in on purpose


def run_with_defect(rank: int, defect: str, case: dict[str, Any]) -> dict[str, Any]:
    import expert_parallel.moe.capacity.policies as capacity

    rows, metadata, order = Ledger.all_to_all, Ledger.all_to_all_metadata, capacity.queue_order

    def token_major(config: Any, *arguments: Any) -> Tensor:
        return order(config.model_copy(update={"first_choices_first": False}), *arguments)

    def faulty(*arguments: Any) -> Callable[[], Tensor]:
        wait, name = rows(*arguments), str(arguments[-1])
        if defect == "gradient divided by ep" and name == "combine backward":
            return lambda: wait() / case["ep"]
        if defect == "rows swapped" and name == "dispatch" and rank == 1:
            return lambda: wait().flip(0)
        return wait

    def faulty_metadata(*arguments: Any) -> Callable[[], Tensor]:
        wait, name = metadata(*arguments), str(arguments[-1])
        if defect == "gradients of weights lost" and name == "metadata backward":
            return lambda: wait() * 0
        return wait

    queue = token_major if defect == "drops in token order" else order
    with (
        mock.patch.object(Ledger, "all_to_all", faulty),
        mock.patch.object(Ledger, "all_to_all_metadata", faulty_metadata),
        mock.patch.object(capacity, "queue_order", queue),
    ):
        return run_layer(rank, case)


@pytest.mark.parametrize(
    ("defect", "what"),
    [
        ("none", None),
        ("drops in token order", "output of rank"),
        ("gradient divided by ep", "input gradient of rank"),
        ("gradients of weights lost", "input gradient of rank"),
        ("rows swapped", "output of rank"),
    ],
)
def test_a_defect_is_found(defect: str, what: str | None) -> None:
    case = {
        "ep": 4,
        "dispatcher": "all_to_all",
        "router": "softmax",
        "capacity": "position",
        "scenario": "random",
        "experts": "swiglu",
        "ledger": "counts",
        "training": True,
    }
    results = run_ranks(4, run_with_defect, defect, case)
    if what is None:
        compare(case, results)
        return
    with pytest.raises(AssertionError, match=what):
        compare(case, results)
