"""The MoE layer on real ranks against reference.py: values, input gradients, every parameter's gradient, in float64.

Scenarios are made with the router's bias and with the ranks' token counts; each case asserts that it is what it says.
"""

from dataclasses import asdict
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from expert_parallel.collectives import CommLog
from expert_parallel.moe.balance import loss_name
from expert_parallel.moe.dispatch import AllToAllDispatcher
from expert_parallel.moe.layer import MoEConfig, MoELayer
from expert_parallel.moe.parameters import logical_parameters
from expert_parallel.moe.plan import Reason, RoutingPlan
from expert_parallel.moe.reference import ReferenceOutput, reference_layer
from expert_parallel.placement import ExpertPlacement
from tests.pairwise import all_cases, pairwise_cases
from tests.ranks import run_ranks

D_MODEL, LENGTH = 8, 5

FACTORS = {
    "ep": [1, 2, 4, 8],
    "dispatcher": ["local", "all_to_all"],
    "scenario": [
        "random",
        "hot expert",
        "rank without tokens",
        "expert without tokens",
        "all experts chosen",
        "no tokens",
        "uneven placement",
    ],
    "capacity": ["dropless", "position", "probability"],
    "experts": ["swiglu", "relu bias", "geglu shared", "gelu shared bias"],
    "router": ["softmax", "softmax raw", "sigmoid", "sigmoid biased"],
    "training": [True, False],
}


def possible(case: dict[str, Any]) -> bool:
    return case["dispatcher"] == "all_to_all" or case["ep"] == 1


def identify(case: dict[str, Any]) -> str:
    return "-".join(str(value).replace(" ", "_") for value in case.values())


def make_config(case: dict[str, Any]) -> MoEConfig:
    num_experts = 8
    num_experts = {"uneven placement": 11, "all experts chosen": 8}.get(case["scenario"], num_experts)
    k = num_experts if case["scenario"] == "all experts chosen" else 3
    factor = {"kind": "factor", "train": 1.0, "eval": 0.9, "minimum": 0, "drop": case["capacity"]}
    activation, *options = case["experts"].split()
    score, *router_options = case["router"].split()
    return MoEConfig.model_validate(
        {
            "d_model": D_MODEL,
            "num_experts": num_experts,
            "router": {
                "k": k,
                "score": score,
                "normalise": "raw" not in router_options,
                "bias": True,
                "scale": 1.5,
                "balance_bias_rate": 0.1 if "biased" in router_options else 0.0,
            },
            "capacity": {"kind": "dropless"} if case["capacity"] == "dropless" else factor,
            "losses": [
                {"kind": "balance", "coefficient": 0.3},
                {"kind": "balance", "coefficient": 0.5, "scope": "rank"},
                {"kind": "balance", "coefficient": 0.7, "scope": "sequence"},
                {"kind": "z_loss", "coefficient": 0.1},
            ],
            "experts": {"hidden": 6, "activation": activation, "bias": "bias" in options},
            "shared_experts": {"hidden": 4, "activation": activation} if "shared" in options else None,
            "dispatcher": {"kind": case["dispatcher"]},
        }
    )


def make_inputs(case: dict[str, Any]) -> list[Tensor]:
    """(B, S, D) of each rank: unequal, with 1 to 3 sequences."""
    generator = torch.Generator().manual_seed(1)
    sequences = [1 + (rank + 1) % 3 for rank in range(case["ep"])]
    if case["scenario"] == "rank without tokens":
        sequences[-1] = 0
    if case["scenario"] == "no tokens":
        sequences = [0] * case["ep"]
    return [torch.randn(b, LENGTH, D_MODEL, generator=generator, dtype=torch.float64) for b in sequences]


def make_parameters(case: dict[str, Any], config: MoEConfig) -> dict[str, Tensor]:
    layer = MoELayer(config.model_copy(update={"dispatcher": config.dispatcher.model_copy(update={"kind": "local"})}))
    generator = torch.Generator().manual_seed(2)
    parameters = {}
    for logical in logical_parameters(layer.double()):
        for name in logical.names:
            parameters[name] = torch.randn(logical.shape, generator=generator, dtype=torch.float64) * 0.7
    if case["scenario"] == "hot expert":
        parameters["router.bias"][0] += 9.0
    if case["scenario"] == "expert without tokens":
        parameters["router.bias"][1] -= 50.0
    if config.router.balance_bias_rate > 0:
        shift = torch.randn(config.num_experts, generator=generator, dtype=torch.float64) * 0.2
        parameters["router.balance_bias_E"] = shift if case["scenario"] not in ("hot expert",) else shift * 0
    return parameters


def make_placement(case: dict[str, Any], config: MoEConfig) -> ExpertPlacement:
    if case["scenario"] != "uneven placement":
        return ExpertPlacement.contiguous(config.num_experts, case["ep"])
    ranks = [(5 * expert + expert // case["ep"]) % case["ep"] for expert in range(config.num_experts)]
    return ExpertPlacement(tuple(ranks), case["ep"])


def upstream(y: Tensor, rank: int) -> Tensor:
    """A gradient for y that tells rows apart."""
    return torch.arange(1, y.numel() + 1, dtype=y.dtype).view(y.shape).div(y.numel() + 1).sin() * (rank + 1)


def run_layer(rank: int, case: dict[str, Any]) -> dict[str, Any]:
    """On one rank: the layer forward and backward; what it gave."""
    config = make_config(case)
    group = dist.group.WORLD if case["ep"] > 1 else None
    layer = MoELayer(config, group, placement=make_placement(case, config)).double().train(case["training"])
    parameters = make_parameters(case, config)
    for logical in logical_parameters(layer):
        logical.parameter.data.copy_(logical.join([parameters[name] for name in logical.names]))
    if "router.balance_bias_E" in parameters:
        layer.router.balance_bias_E.copy_(parameters["router.balance_bias_E"])
    x = make_inputs(case)[rank].requires_grad_()
    output = layer(x)
    objective = (output.y * upstream(output.y, rank)).sum() + sum(output.losses.values())
    objective.backward()
    grads = {}
    for logical in logical_parameters(layer):
        assert logical.parameter.grad is not None, f"{logical.names}: no gradient"
        grads.update(logical.split(logical.parameter.grad))
    stats = asdict(output.stats)
    return {"y": output.y.detach(), "x_grad": x.grad, "grads": grads, "stats": stats}


def run_reference(case: dict[str, Any]) -> tuple[ReferenceOutput, list[Tensor], dict[str, Tensor]]:
    config = make_config(case)
    parameters = {name: value.requires_grad_() for name, value in make_parameters(case, config).items()}
    inputs = [x.requires_grad_() for x in make_inputs(case)]
    reference = reference_layer(config, parameters, inputs, case["training"])
    objective = sum(((y * upstream(y, rank)).sum() for rank, y in enumerate(reference.y)), torch.zeros(()))
    objective = objective + sum(loss.coefficient * reference.losses[loss_name(loss)] for loss in config.losses)
    objective.backward()
    return reference, inputs, parameters


def close(actual: Tensor, expected: Tensor | None, what: str) -> None:
    expected = torch.zeros_like(actual) if expected is None else expected
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12, msg=lambda text: f"{what}: {text}")


def check_case(case: dict[str, Any]) -> None:
    compare(case, run_ranks(case["ep"], run_layer, case))


def compare(case: dict[str, Any], results: list[dict[str, Any]]) -> None:
    config = make_config(case)
    reference, inputs, parameters = run_reference(case)

    for rank, result in enumerate(results):
        close(result["y"], reference.y[rank].detach(), f"output of rank {rank}")
        close(result["x_grad"], inputs[rank].grad, f"input gradient of rank {rank}")
    for name in (name for name in parameters if "balance_bias" not in name):
        holders = [result["grads"][name] for result in results if name in result["grads"]]
        assert len(holders) == (1 if name.startswith("experts.") else case["ep"]), name
        close(torch.stack(holders).sum(0), parameters[name].grad, f"gradient of {name}")
    for name, loss in reference.losses.items():
        close(torch.stack([r["stats"]["losses"][name] for r in results]).sum(0), loss.detach(), f"loss {name}")
    check_ledger(case, config, reference, [result["stats"] for result in results])
    check_scenario(case, config, reference)


def check_ledger(case: dict[str, Any], config: MoEConfig, reference: ReferenceOutput, stats: list[Any]) -> None:
    """Conservation: routed = kept + dropped; rows sent = received = returned; and the reference's own counts."""
    total = {name: sum(s[name] for s in stats) for name in ("routed_E", "kept_E", "rerouted_E", "dropped_capacity_E")}
    assert total["routed_E"].tolist() == reference.routed_E
    assert torch.equal(total["routed_E"], total["kept_E"] + total["rerouted_E"] + total["dropped_capacity_E"])
    assert int(total["dropped_capacity_E"].sum()) == sum(int(dropped.sum()) for dropped in reference.dropped)
    rows = [s["rows"] for s in stats]
    sent, received, returned = (sum(r[name] for r in rows) for name in ("sent", "received", "returned"))
    assert sent == received == returned
    assert sent == 0 or case["ep"] > 1


def check_scenario(case: dict[str, Any], config: MoEConfig, reference: ReferenceOutput) -> None:
    routed, dropped = sum(reference.routed_E), sum(int(d.sum()) for d in reference.dropped)
    match case["scenario"]:
        case "no tokens":
            assert routed == 0
        case "hot expert":
            assert reference.routed_E[0] == sum(len(d) for d in reference.dropped)
        case "expert without tokens":
            assert reference.routed_E[1] == 0
        case "random" if case["capacity"] != "dropless":
            assert 0.05 <= dropped / routed <= 0.4, dropped / routed
    if case["capacity"] == "dropless" or case["scenario"] == "no tokens":
        assert dropped == 0


@pytest.mark.parametrize("case", pairwise_cases(FACTORS, possible), ids=identify)
def test_layer_equals_reference(case: dict[str, Any]) -> None:
    check_case(case)


@pytest.mark.full
@pytest.mark.parametrize("ep", [1, 2, 4, 8])
def test_layer_equals_reference_in_every_combination(ep: int) -> None:
    for case in all_cases({**FACTORS, "ep": [ep]}, possible):
        try:
            check_case(case)
        except AssertionError as error:
            raise AssertionError(f"{identify(case)}: {error}") from error


# ----------------------------------------------------------------------------------- rows that say where they come from


def run_dispatch(rank: int, world_size: int) -> dict[str, Any]:
    """Row t of rank r is (r, t, r, t, ...). Returns what arrives, and what identity experts bring back."""
    log = CommLog()
    placement = ExpertPlacement.contiguous(8, world_size)
    dispatcher = AllToAllDispatcher(placement, dist.group.WORLD, log)
    num_tokens = 6 + rank
    generator = torch.Generator().manual_seed(rank)
    ids_TK = torch.stack([torch.randperm(8, generator=generator)[:3] for _ in range(num_tokens)])
    reason_TK = (torch.rand(num_tokens, 3, generator=generator) < 0.2).to(torch.uint8) * Reason.DROPPED_CAPACITY
    x_TD = torch.tensor([[rank, token] * 4 for token in range(num_tokens)], dtype=torch.float32)
    blank = torch.zeros(num_tokens, 8)
    plan = RoutingPlan(blank, blank, blank, ids_TK, torch.ones(num_tokens, 3), reason_TK.to(torch.uint8), 8)
    tokens, state = dispatcher.dispatch(x_TD, plan)
    returned_TD = dispatcher.combine(tokens.x_RD * tokens.weights_R[:, None], state)
    expert_R = torch.tensor(placement.experts_on(rank)).repeat_interleave(tokens.counts_e)
    return {
        "sent": [(rank, t, int(e)) for t in range(num_tokens) for e in ids_TK[t][plan.kept_TK[t]]],
        "arrived": [(*map(int, row[:2]), int(e)) for row, e in zip(tokens.x_RD, expert_R, strict=True)],
        "returned": returned_TD,
        "expected": x_TD * plan.kept_TK.sum(1)[:, None],
        "own": rank,
        "log": log.bytes_sent,
        "rows": state.rows,
        "owner": placement.rank_of_expert,
    }


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_no_row_is_lost_doubled_or_swapped(world_size: int) -> None:
    results = run_ranks(world_size, run_dispatch, world_size)
    sent = [choice for result in results for choice in result["sent"]]
    arrived = [choice for result in results for choice in result["arrived"]]
    assert sorted(sent) == sorted(arrived)
    assert len(set(arrived)) == len(arrived) > 0
    for result in results:
        assert torch.equal(result["returned"], result["expected"])


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_a_token_crosses_to_a_rank_at_most_once(world_size: int) -> None:
    """Bytes sent are those of the unique (token, other rank) pairs, no more; metadata is 8 bytes a choice, 4 a row."""
    for rank, result in enumerate(run_ranks(world_size, run_dispatch, world_size)):
        to_others = [(token, result["owner"][e]) for _, token, e in result["sent"] if result["owner"][e] != rank]
        pairs, choices = len(set(to_others)), len(to_others)
        assert len(to_others) > pairs or world_size == 8
        assert result["rows"].sent == pairs
        assert result["log"]["rows"] == pairs * 8 * 4
        assert result["log"]["rows back"] == result["rows"].received * 8 * 4
        assert result["log"]["metadata"] == choices * 8 + pairs * 4


# ---------------------------------------------------------------------- the suite can fail: defects put in on purpose


def run_with_defect(rank: int, defect: str, case: dict[str, Any]) -> dict[str, Any]:
    import expert_parallel.collectives as collectives
    import expert_parallel.moe.capacity as capacity

    exchange, place = collectives._exchange, capacity.place_in_expert

    def token_major_places(ids_TK: Tensor, num_experts: int, scores_TK: Tensor | None = None) -> Tensor:
        return place(ids_TK.flatten()[:, None], num_experts, scores_TK).view(ids_TK.shape)

    def scaled_backward(x: Tensor, send: Any, receive: Any, group: Any, log: Any, purpose: str) -> Tensor:
        received = exchange(x, send, receive, group, log, purpose)
        return received / case["ep"] if purpose == "rows back backward" else received

    def swapped_rows(x: Tensor, send: Any, receive: Any, group: Any, log: Any, purpose: str) -> Tensor:
        received = exchange(x, send, receive, group, log, purpose)
        return received.flip(0) if purpose == "rows" and rank == 1 else received

    try:
        if defect == "drops in token order":
            capacity.place_in_expert = token_major_places
        if defect == "gradient divided by ep":
            collectives._exchange = scaled_backward
        if defect == "rows swapped":
            collectives._exchange = swapped_rows
        return run_layer(rank, case)
    finally:
        collectives._exchange, capacity.place_in_expert = exchange, place


@pytest.mark.parametrize(
    ("defect", "what"),
    [
        ("none", None),
        ("drops in token order", "output of rank"),
        ("gradient divided by ep", "input gradient of rank"),
        ("rows swapped", "output of rank"),
    ],
)
def test_a_defect_is_found(defect: str, what: str | None) -> None:
    case = {
        "ep": 4,
        "dispatcher": "all_to_all",
        "scenario": "random",
        "capacity": "position",
        "experts": "swiglu",
        "router": "softmax",
        "training": True,
    }
    results = run_ranks(4, run_with_defect, defect, case)
    if what is None:
        compare(case, results)
        return
    with pytest.raises(AssertionError, match=what):
        compare(case, results)
