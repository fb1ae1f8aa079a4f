"""Experts whose columns are divided over ranks (etp), and sequences whose tokens are (sequence group), on real ranks
against moe/reference/reference_layer.py, in float64: values, input gradients, the gradient of every parameter, losses
and counts."""

import copy
import zlib
from dataclasses import replace
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from expert_parallel.moe import context as context_module
from expert_parallel.moe import layer
from expert_parallel.moe.config import MoEConfig
from expert_parallel.moe.conservation import check_conservation
from expert_parallel.moe.context import StepContext
from expert_parallel.moe.dispatch.dispatcher import LocalConfig
from expert_parallel.moe.experts import expert_tensor_parallel, grouped
from expert_parallel.moe.experts.expert_tensor_parallel import all_gather_by_expert, reduce_scatter_by_expert
from expert_parallel.moe.layer import MoELayer
from expert_parallel.moe.parameters import logical_parameters
from expert_parallel.moe.reference.reference_layer import RankTokens, ReferenceOutput, reference_layer
from expert_parallel.moe.routers import losses as balance
from expert_parallel.moe.routers.losses import loss_name
from expert_parallel.moe.types import Outcome
from expert_parallel.parallel.collectives import group_rank, group_size
from expert_parallel.parallel.placement import ExpertPlacement
from tests.pairwise import pairwise_cases
from tests.ranks import run_ranks

D_MODEL, NUM_EXPERTS = 6, 8

# (ranks, ep, etp, ranks of a sequence). Rank r stands at r of the grids (edp, ep, etp) and (data, sequence): ep may
# span sequences, etp may not be their ranks.
LAYOUTS = {
    "ep 1, etp 2": (2, 1, 2, 1),
    "ep 2, sequences over 2": (2, 2, 1, 2),
    "ep 1, etp 2, sequences over 2": (2, 1, 2, 2),
    "edp 2, ep 1, etp 2, sequences over 2": (4, 1, 2, 2),
    "ep 2, etp 2, sequences over 2": (4, 2, 2, 2),
    "ep 2, etp 2, sequences over 4": (4, 2, 2, 4),
    "edp 2, ep 2, etp 2, sequences over 4": (8, 2, 2, 4),
    "ep 2, etp 4, sequences over 2": (8, 2, 4, 2),
}
ROUTERS = {
    "softmax": {"kind": "top_k", "k": 3, "jitter": 0.1},
    "gshard": {"kind": "gshard"},
    "noisy": {"kind": "noisy_top_k", "k": 2},
    "hash": {"kind": "hash", "k": 2},
    "expert choice sequence": {"kind": "expert_choice", "scope": "sequence"},
    "expert choice global": {"kind": "expert_choice", "scope": "global"},
    "sinkhorn sequence": {"kind": "sinkhorn", "k": 2, "score": "sigmoid", "scope": "sequence"},
}
_FACTOR = {"kind": "factor", "train": 1.0, "minimum": 0}
CAPACITIES = {
    "dropless": {"kind": "dropless"},
    "position rank": {**_FACTOR, "pad": True},
    "position sequence": {**_FACTOR, "scope": "sequence", "pad": True},
    "token by token sequence": {**_FACTOR, "scope": "sequence", "first_choices_first": False},
    "reroute sequence": {**_FACTOR, "scope": "sequence", "priority": "probability", "overflow": "reroute"},
    "random sequence": {**_FACTOR, "scope": "sequence", "priority": "random"},
    "batch priority global": {**_FACTOR, "scope": "global", "priority": "batch_priority", "pad": True},
}
FACTORS = {
    "layout": list(LAYOUTS),
    "router": list(ROUTERS),
    "capacity": list(CAPACITIES),
    "way": ["contiguous", "zigzag", "scattered"],
    "scenario": ["random", "padding", "ranks without tokens", "no tokens", "uneven placement"],
    "experts": ["swiglu bias", "geglu", "relu bias shared gate", "swiglu bias weight_input"],
    "dispatcher": ["all_to_all", "all_gather"],
    "ledger": ["counts", "rows"],
}
CONTEXT = StepContext(seed=3, step=5, micro_step=1, layer=2)


def possible(case: dict[str, Any]) -> bool:
    return case["capacity"] == "dropless" or not case["router"].startswith("expert choice")


def identify(case: dict[str, Any]) -> str:
    return "-".join(value.replace(" ", "_").replace(",", "") for value in case.values())


@cache
def groups(world_size: int, ep: int, etp: int, sharers: int) -> dict[str, Any]:
    """This rank's groups; None where it is alone."""
    expert_grid = torch.arange(world_size).view(-1, ep, etp)
    ranks = {
        "ep": expert_grid.transpose(1, 2).reshape(-1, ep),
        "etp": expert_grid.reshape(-1, etp),
        "edp": expert_grid.flatten(1).T,
        "sequence": torch.arange(world_size).view(-1, sharers),
    }
    return {
        axis: None if grid.shape[1] == 1 else dist.new_subgroups_by_enumeration(grid.tolist())[0]
        for axis, grid in ranks.items()
    }


def positions(way: str, length: int, sharers: int) -> list[list[int]]:
    """Of each rank of a sequence group. `scattered`: by lot, of other numbers, the first rank of several none."""
    if way == "contiguous":
        return torch.arange(length).view(sharers, -1).tolist()
    if way == "zigzag":
        chunks = torch.arange(length).view(2 * sharers, -1).tolist()
        return [chunks[rank] + chunks[2 * sharers - 1 - rank] for rank in range(sharers)]
    order = torch.randperm(length, generator=torch.Generator().manual_seed(length)).tolist()
    bounds = [length * rank**2 // sharers**2 for rank in range(sharers + 1)]
    bounds[1] = bounds[1] if sharers == 1 else 0
    return [order[bounds[rank] : bounds[rank + 1]] for rank in range(sharers)]


def make_config(case: dict[str, Any]) -> MoEConfig:
    router: dict[str, Any] = dict(ROUTERS[case["router"]])
    losses: list[dict[str, Any]] = [
        {"kind": "z_loss", "coefficient": 0.1},
        {"kind": "balance", "coefficient": 0.3},
        {"kind": "balance", "coefficient": 0.5, "scope": "rank"},
        {"kind": "balance", "coefficient": 0.7, "scope": "sequence", "layers": "pooled"},
        {"kind": "balance", "coefficient": 0.9, "scope": "sequence", "choices": "first"},
    ]
    activation, *options = case["experts"].split()
    return MoEConfig.model_validate(
        {
            "d_model": D_MODEL,
            "num_experts": 9 if case["scenario"] == "uneven placement" else NUM_EXPERTS,
            "router": router,
            "capacity": CAPACITIES[case["capacity"]],
            "losses": {"hash": [], "expert_choice": losses[:1]}.get(router["kind"], losses),
            "experts": {
                "hidden": 8,
                "activation": activation,
                "bias": "bias" in options,
                "weight_input": "weight_input" in options,
            },
            "shared_experts": {"hidden": 4, "activation": activation} if "shared" in options else None,
            "shared_expert_gate": "gate" in options,
            "dispatcher": {"kind": case["dispatcher"]},
            "ledger": {"kind": case["ledger"]},
        }
    )


def make_inputs(case: dict[str, Any]) -> list[RankTokens]:
    """Of each rank. Data rank d has 1 + d % 2 sequences, whose indices do not follow the ranks."""
    world_size, _, _, sharers = LAYOUTS[case["layout"]]
    generator = torch.Generator().manual_seed(zlib.crc32(identify(case).encode()))
    num_data, length = world_size // sharers, max(2 * sharers, 6 if sharers == 1 else 0)
    sequences = [1 + (data + 1) % 2 for data in range(num_data)]
    if case["scenario"] == "ranks without tokens" and num_data > 1:
        sequences[-1] = 0
    if case["scenario"] == "no tokens":
        sequences = [0] * num_data
    indices = iter(torch.randperm(sum(sequences), generator=generator).tolist())
    inputs = []
    for num_sequences in sequences:
        x_BSD = torch.randn(num_sequences, length, D_MODEL, generator=generator, dtype=torch.float64)
        ids_BS = torch.randint(0, 50, (num_sequences, length), generator=generator)
        mask_BS = torch.rand(num_sequences, length, generator=generator) < 0.7
        mask_BS[:1, : length // sharers] = False  # the first rank has nothing but padding of the first sequence
        mask_BS[:1, -2:] = True  # Sinkhorn's matrix of one token is all equal: rounding would choose
        mask_BS[1:] = False  # the second sequence is padding alone
        index = [next(indices) for _ in range(num_sequences)]
        for here in positions(case["way"], length, sharers):
            mask = mask_BS[:, here] if case["scenario"] == "padding" else None
            inputs.append(RankTokens(x_BSD[:, here], index, ids_BS[:, here], mask, here))
    return inputs


def make_parameters(config: MoEConfig) -> dict[str, Tensor]:
    alone = MoELayer(config.model_copy(update={"dispatcher": LocalConfig(kind="local")})).double()
    generator = torch.Generator().manual_seed(2)
    return {
        name: torch.randn(logical.shape, generator=generator, dtype=torch.float64) * 0.7
        for logical in logical_parameters(alone)
        for name in logical.names
    }


def make_placement(case: dict[str, Any], config: MoEConfig) -> ExpertPlacement:
    _, ep, _, _ = LAYOUTS[case["layout"]]
    if case["scenario"] != "uneven placement":
        return ExpertPlacement.contiguous(config.num_experts, ep)
    return ExpertPlacement(tuple((5 * expert + expert // ep) % ep for expert in range(config.num_experts)), ep)


def make_layer(case: dict[str, Any], parameters: dict[str, Tensor]) -> MoELayer:
    group, config = groups(*LAYOUTS[case["layout"]]), make_config(case)
    moe = MoELayer(
        config,
        group["ep"],
        dist.group.WORLD,
        make_placement(case, config),
        sequence_group=group["sequence"],
        etp_group=group["etp"],
    ).double()
    for logical in logical_parameters(moe):
        logical.fill(logical.parameter, [parameters[name] for name in logical.names])
    return moe


def context_of(tokens: RankTokens) -> StepContext:
    return replace(
        CONTEXT,
        sequence_index_B=torch.tensor(tokens.sequence_index, dtype=torch.int64),
        positions_S=torch.tensor(tokens.positions_S, dtype=torch.int64),
        token_ids_BS=tokens.token_ids_BS,
        mask_BS=tokens.mask_BS,
    )


def upstream(y: Tensor, rank: int) -> Tensor:
    """A gradient for y that tells rows apart."""
    return torch.arange(1, y.numel() + 1, dtype=y.dtype).view(y.shape).div(y.numel() + 1).sin() * (rank + 1)


def run_layer(rank: int, case: dict[str, Any], sharded: bool = False) -> dict[str, Any]:
    """On one rank: the layer forward and backward; what it gave. Gradients are whole over etp."""
    moe, tokens = make_layer(case, make_parameters(make_config(case))), make_inputs(case)[rank]
    if sharded:
        edp_group = groups(*LAYOUTS[case["layout"]])["edp"]
        fully_shard(moe.experts, mesh=DeviceMesh.from_group(edp_group, "cpu", mesh_dim_names=("edp",)))
        moe.experts.set_gradient_divide_factor(1.0)
        moe.experts.set_force_sum_reduction_for_comms(True)
    x = tokens.x_BSD.requires_grad_()
    output = moe(x, context_of(tokens))
    ((output.y * upstream(output.y, rank)).sum() + sum(output.losses.values())).backward()
    grads = {}
    for logical in logical_parameters(moe):
        assert logical.parameter.grad is not None, f"{logical.names}: no gradient"
        grads.update(logical.whole(logical.parameter.grad))
    totals = check_conservation(output.stats, dist.group.WORLD, moe.config.ledger)
    return {"y": output.y.detach(), "x_grad": x.grad, "grads": grads, "totals": totals}


def run_reference(case: dict[str, Any]) -> tuple[ReferenceOutput, list[Tensor], dict[str, Tensor]]:
    config, inputs = make_config(case), make_inputs(case)
    parameters = {name: value.requires_grad_() for name, value in make_parameters(config).items()}
    for tokens in inputs:
        tokens.x_BSD.requires_grad_()
    reference = reference_layer(config, parameters, inputs, True, CONTEXT)
    objective = sum(((y * upstream(y, rank)).sum() for rank, y in enumerate(reference.y)), torch.zeros(()))
    objective = objective + sum(loss.coefficient * reference.losses[loss_name(loss)] for loss in config.losses)
    if objective.requires_grad:
        objective.backward()
    return reference, [tokens.x_BSD for tokens in inputs], parameters


def close(actual: Tensor, expected: Tensor | None, what: str) -> None:
    expected = torch.zeros_like(actual) if expected is None else expected
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11, msg=lambda text: f"{what}: {text}")


def compare(case: dict[str, Any], results: list[dict[str, Any]], sharded: bool = False) -> ReferenceOutput:
    world_size, ep, etp, _ = LAYOUTS[case["layout"]]
    reference, inputs, parameters = run_reference(case)
    for rank, result in enumerate(results):
        close(result["y"], reference.y[rank].detach(), f"output of rank {rank}")
        close(result["x_grad"], inputs[rank].grad, f"input gradient of rank {rank}")
    copies = 1 if sharded else world_size // (ep * etp)
    for name, parameter in parameters.items():
        is_divided = name.startswith("experts.") and not name.endswith("b_out")  # and so whole on every etp rank
        found = [result["grads"][name] for rank, result in enumerate(results) if name in result["grads"]]
        assert len(found) == (world_size // ep if name.startswith("experts.") else world_size), name
        found = found[::etp] if is_divided else found
        found = found[: copies * (1 if is_divided else etp)] if name.startswith("experts.") else found
        close(torch.stack(found).sum(0), parameter.grad, f"gradient of {name}")
    totals = results[0]["totals"]
    for name, loss in reference.losses.items():
        assert totals.losses[name] == pytest.approx(loss.item(), rel=1e-9, abs=1e-12), f"loss {name}"
    assert totals.breaches() == []
    assert totals.routed_E.tolist() == reference.routed_E
    assert (totals.kept_E + totals.rerouted_E).tolist() == totals.computed_E.tolist() == reference.kept_E
    return reference


@pytest.mark.parametrize("case", pairwise_cases(FACTORS, possible), ids=identify)
def test_layer_equals_reference(case: dict[str, Any]) -> None:
    world_size = LAYOUTS[case["layout"]][0]
    reference = compare(case, run_ranks(world_size, run_layer, case))
    outcomes = torch.cat([outcome_TK.flatten() for outcome_TK in reference.outcomes])
    moved = (outcomes != Outcome.KEPT) & (outcomes != Outcome.NOT_ROUTED)
    if case["capacity"] not in ("dropless", "batch priority global") and case["scenario"] == "random":
        assert 0.02 <= float(moved.double().mean()) <= 0.6
    if case["scenario"] == "no tokens":
        assert len(outcomes) == 0


# ------------------------------------------------------------------------------------------- the suite can fail

PLAIN = {
    "layout": "ep 2, etp 2, sequences over 2",
    "router": "softmax",
    "capacity": "position sequence",
    "way": "zigzag",
    "scenario": "padding",
    "experts": "swiglu bias",
    "dispatcher": "all_to_all",
    "ledger": "counts",
}


def run_with_defect(rank: int, defect: str) -> dict[str, Any]:
    add_bias, index, make = grouped._add_bias, context_module.global_index, layer.token_batch

    def bias_of_every_rank(rows: Tensor, bias_e: Tensor | None, counts_e: Tensor) -> Tensor:
        is_output = bias_e is not None and bias_e.shape[-1] == D_MODEL
        return add_bias(rows, 2 * bias_e if is_output and bias_e is not None else bias_e, counts_e)

    def own_part(y_GD: Tensor, rows: Any) -> Tensor:
        mine = group_rank(rows.group)
        return y_GD[rows.place_G].split(rows.rows_P)[mine]

    defects: dict[str, tuple[Any, str, Any]] = {
        "b_out added by every rank": (grouped, "_add_bias", bias_of_every_rank),
        "outputs not added up": (grouped, "reduce_scatter_by_expert", own_part),
        "input gradients not added up": (
            expert_tensor_parallel._AllGather,
            "backward",
            staticmethod(lambda ctx, grad: (own_part(grad, ctx.rows), None)),
        ),
        "rows not grouped by expert": (
            expert_tensor_parallel,
            "sort_by_expert",
            lambda slot, e: (torch.arange(len(slot)), slot.bincount(minlength=e)),
        ),
        "a rank decides on its own part": (
            layer,
            "token_batch",
            lambda x, context, *groups: make(x, context, groups[0]),
        ),
        "positions by place on the rank": (
            context_module,
            "global_index",
            lambda sequences, length, at: index(sequences, length, at.sort().values),
        ),
        "a sequence counted by each of its ranks": (balance, "group_rank", lambda group: 0),
        "shares of choices on the rank alone": (balance, "group_size", lambda group: 1),
    }
    if defect == "none":
        return run_layer(rank, PLAIN)
    with mock.patch.object(*defects[defect]):
        return run_layer(rank, case_of(defect))


def case_of(defect: str) -> dict[str, Any]:
    if defect == "a rank decides on its own part":
        return {**PLAIN, "scenario": "random"}
    return {**PLAIN, "way": "scattered", "scenario": "random"} if defect.startswith("positions") else PLAIN


@pytest.mark.parametrize(
    ("defect", "what"),
    [
        ("none", None),
        ("b_out added by every rank", "output of rank"),
        ("outputs not added up", "output of rank"),
        ("input gradients not added up", "input gradient of rank"),
        ("rows not grouped by expert", "output of rank"),
        ("a rank decides on its own part", "output of rank"),
        ("positions by place on the rank", "output of rank"),
        ("a sequence counted by each of its ranks", "input gradient of rank"),
        ("shares of choices on the rank alone", "input gradient of rank"),
    ],
)
def test_a_defect_is_found(defect: str, what: str | None) -> None:
    results = run_ranks(4, run_with_defect, defect)
    if what is None:
        compare(PLAIN, results)
        return
    with pytest.raises(AssertionError, match=what):
        compare(case_of(defect), results)


# ------------------------------------------------------------------------------------------- rows there and back


def run_rows(rank: int, counts: list[list[int]]) -> tuple[list[Any], ...]:
    """Rows that name their source: rank, expert, number."""
    mine = [[rank, expert, number] for expert, count in enumerate(counts[rank]) for number in range(count)]
    x_RD = torch.tensor(mine, dtype=torch.float64).view(-1, 3).requires_grad_()
    x_GD, everyones_e, gathered = all_gather_by_expert(x_RD, torch.tensor(counts[rank]), dist.group.WORLD)
    y_RD = reduce_scatter_by_expert(x_GD * 10.0**rank, gathered)
    (grad,) = torch.autograd.grad(y_RD.sum(), x_RD)
    return x_GD.tolist(), everyones_e.tolist(), y_RD.tolist(), grad.tolist()


@pytest.mark.parametrize("counts", [[[2, 0, 1], [1, 3, 0]], [[0, 0, 0], [1, 0, 2]], [[0, 0, 0], [0, 0, 0]]])
def test_rows_of_all_ranks_by_expert_and_their_sums_back(counts: list[list[int]]) -> None:
    """Rank r returns 10^r times each row, so that a sum of 11 means once from each; likewise the gradient."""
    everyone = [[rank, e, n] for e in range(3) for rank in range(2) for n in range(counts[rank][e])]
    for rank, (rows, everyones_e, sums, grad) in enumerate(run_ranks(2, run_rows, counts)):
        mine = [[rank, e, n] for e in range(3) for n in range(counts[rank][e])]
        assert rows == everyone
        assert everyones_e == [counts[0][e] + counts[1][e] for e in range(3)]
        assert sums == [[11 * value for value in row] for row in mine]
        assert grad == [[11, 11, 11] for _ in mine]


def run_sums(rank: int, values: list[float], dtype: torch.dtype) -> tuple[list[float], torch.dtype]:
    x_RD, counts_e = torch.ones(1, 1, dtype=dtype), torch.tensor([1])
    x_GD, _, gathered = all_gather_by_expert(x_RD, counts_e, dist.group.WORLD)
    y_RD = reduce_scatter_by_expert(x_GD * values[rank], gathered)
    return y_RD.flatten().tolist(), y_RD.dtype


def test_sums_are_taken_in_the_order_of_the_ranks_and_rounded_once() -> None:
    """(1e16 + 1) - 1e16 + 3 is 3 in this order alone; in bfloat16 1 + 3 * 2^-8 would stay 1 if each sum were
    rounded."""
    values = [1e16, 1.0, -1e16, 3.0]
    assert run_ranks(4, run_sums, values, torch.float64) == [([3.0], torch.float64)] * 4
    small = [1.0, 2.0**-8, 2.0**-8, 2.0**-8]
    assert run_ranks(4, run_sums, small, torch.bfloat16) == [([1 + 2.0**-7 * 2], torch.bfloat16)] * 4


# ------------------------------------------------------------------------------------------- the layer as a module


def run_alone_and_divided(rank: int, dtype: torch.dtype, settings: dict[str, Any]) -> list[Tensor]:
    """(outputs, input gradient) of a layer of this rank alone, and of one whose columns are divided over the ranks."""
    tree = {"d_model": 8, "num_experts": 4, "router": {"k": 2}, "experts": {"hidden": 16, "bias": True, **settings}}
    config, found = MoEConfig.model_validate(tree), []
    for etp_group in (None, dist.group.WORLD):
        moe = MoELayer(config, seed=3, etp_group=etp_group)
        for logical in logical_parameters(moe):
            generator = torch.Generator().manual_seed(len(logical.names))
            drawn = [torch.randn(logical.shape, generator=generator) for _ in logical.names]
            logical.fill(logical.parameter, drawn)
        x_TD = torch.randn(5 + rank, 8, generator=torch.Generator().manual_seed(rank)).to(dtype).requires_grad_()
        y_TD = moe(x_TD, StepContext(seed=1, coordinate=rank)).y
        y_TD.float().square().sum().backward()
        found += [y_TD.detach(), x_TD.grad]
    assert moe.experts.sizes == (8, moe.experts.w_in.shape[2], 16 // group_size(dist.group.WORLD))
    return found


@pytest.mark.parametrize(
    ("dtype", "settings", "tolerance"),
    [
        (torch.float64, {}, 1e-12),
        (torch.float64, {"output_dropout": 0.5}, 1e-12),  # after the sum: the rank's own rows, one mask
        (torch.float32, {"backend": "grouped_mm"}, 1e-5),
        (torch.bfloat16, {"backend": "grouped_mm"}, 4e-2),
        (torch.bfloat16, {"activation": "relu"}, 4e-2),
    ],
)
def test_columns_on_several_ranks_compute_what_one_rank_does(
    dtype: torch.dtype, settings: dict[str, Any], tolerance: float
) -> None:
    for y, x_grad, divided_y, divided_grad in run_ranks(2, run_alone_and_divided, dtype, settings):
        for actual, expected in ((divided_y, y), (divided_grad, x_grad)):
            error = float((actual.double() - expected.double()).abs().max())
            assert error <= tolerance * float(expected.double().abs().max())


def run_initial(rank: int, ep: int, etp: int) -> dict[str, Tensor]:
    group = groups(ep * etp, ep, etp, 1)
    settings = {"experts": {"hidden": 8, "bias": True}}
    config = MoEConfig.model_validate({"d_model": D_MODEL, "num_experts": 4, "router": {"k": 2}, **settings})
    with torch.device("meta"):
        shapes = MoELayer(config, group["ep"], seed=3, etp_group=group["etp"])
    assert all(parameter.is_meta for parameter in shapes.parameters())
    moe = MoELayer(config, group["ep"], seed=3, etp_group=group["etp"])
    assert moe.experts.w_in.shape == shapes.experts.w_in.shape == (4 // ep, D_MODEL, 16 // etp)
    assert moe.experts.w_out.shape == shapes.experts.w_out.shape == (4 // ep, 8 // etp, D_MODEL)
    whole = {}
    for logical in logical_parameters(moe):
        whole |= logical.whole(logical.parameter.detach())
    return whole


def test_initial_weights_do_not_depend_on_the_columns() -> None:
    (alone,) = run_ranks(1, run_initial, 1, 1)
    assert float(alone["experts.3.w_in"].std()) == pytest.approx(0.02, rel=0.2)
    for ep, etp in ((1, 2), (2, 2), (1, 4)):
        found: dict[str, Tensor] = {}
        for whole in run_ranks(ep * etp, run_initial, ep, etp):
            found |= whole
        assert found.keys() == alone.keys()
        assert all(torch.equal(found[name], alone[name]) for name in alone), (ep, etp)


def run_refused(rank: int, what: str) -> str:
    tree = {"d_model": D_MODEL, "num_experts": 4, "router": {"k": 2}, "experts": {"hidden": 7}}
    config = MoEConfig.model_validate(tree)
    try:
        if what == "columns":
            MoELayer(config, etp_group=dist.group.WORLD)
        else:
            MoELayer(config, data_group=groups(2, 1, 1, 1)["ep"], sequence_group=dist.group.WORLD)
    except ValueError as error:
        return str(error)
    return "nothing"


def test_groups_that_cannot_work_are_refused() -> None:
    said = "model.moe.experts.hidden (7) is not a multiple of parallel.etp (2)"
    assert run_ranks(2, run_refused, "columns") == [said, said]
    said = "every rank of sequence_group must be in data_group"
    assert all(text.endswith(said) for text in run_ranks(2, run_refused, "groups"))


def run_copy_and_derive_twice(rank: int) -> tuple[bool, str]:
    case = {**PLAIN, "scenario": "random"}
    moe, tokens = make_layer(case, make_parameters(make_config(case))), make_inputs(case)[rank]
    average = copy.deepcopy(moe)
    x = tokens.x_BSD.requires_grad_()
    same = torch.equal(average(x, context_of(tokens)).y, moe(x, context_of(tokens)).y)
    (grad,) = torch.autograd.grad(moe(x, context_of(tokens)).y.square().sum(), x, create_graph=True)
    try:
        grad.sum().backward()
    except RuntimeError as error:
        return same, str(error)
    return same, "nothing"


def test_copies_share_groups_and_second_derivatives_are_refused() -> None:
    for same, said in run_ranks(4, run_copy_and_derive_twice):
        assert same
        assert "once_differentiable" in said


@pytest.mark.parametrize("layout", ["edp 2, ep 1, etp 2, sequences over 2", "edp 2, ep 2, etp 2, sequences over 4"])
def test_experts_sharded_over_edp_beside(layout: str) -> None:
    """FSDP2's hooks see parameters alone; its gradients are already sums over edp."""
    case = {**PLAIN, "layout": layout, "scenario": "random"}
    compare(case, run_ranks(LAYOUTS[layout][0], run_layer, case, True), sharded=True)
