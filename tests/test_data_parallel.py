"""The layer in a user's own model under DistributedDataParallel, FSDP2 and plain loops: the recipes of moe/README.md,
run as they are printed, against one rank that has every expert and the whole batch; and what is refused."""

import copy
import re
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import expert_parallel
from expert_parallel.moe.config import MoEConfig
from expert_parallel.moe.context import StepContext
from expert_parallel.moe.layer import MoELayer
from expert_parallel.moe.parameters import logical_parameters
from tests.ranks import run_ranks

README = (Path(__file__).parents[1] / "expert_parallel" / "moe" / "README.md").read_text()
GROUPS, DDP, FSDP_WHOLE, FSDP_SHARDED, PLAIN = re.findall(
    r"```py\n(.*?)```", README.partition("## In your own model")[2].partition("\n## ")[0], flags=re.DOTALL
)[:5]
SETTINGS: dict[str, Any] = {
    "d_model": 8,
    "num_experts": 8,
    "router": {"kind": "top_k", "k": 2},
    "capacity": {"kind": "factor", "train": 1.0, "eval": 1.0, "scope": "global"},
    "losses": [{"kind": "balance", "coefficient": 0.1}, {"kind": "z_loss", "coefficient": 0.01}],
    "experts": {"hidden": 6},
    "shared_experts": {"hidden": 4},
}
BIAS = {"experts": {"hidden": 6, "bias": True}}
SEQUENCES, LENGTH = 2, 3  # of one rank


class Model(nn.Module):
    def __init__(self, ep_group: Any = None, data_group: Any = None, etp_group: Any = None, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = MoEConfig.model_validate({**SETTINGS, **settings})
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)
        self.layers = nn.ModuleList(
            [MoELayer(config, ep_group, data_group, seed=seed, etp_group=etp_group) for seed in range(2)]
        )
        self.double()

    def forward(self, x: Tensor, index_B: Tensor, *, recompute: bool = False) -> tuple[Tensor, Tensor]:
        x, losses = self.first(x), torch.zeros(())
        for layer in self.layers:
            block = partial(run_block, layer)
            y, loss = checkpoint(block, x, index_B, use_reentrant=False) if recompute else block(x, index_B)
            x, losses = x + y, losses + loss
        return self.last(x), losses


def run_block(layer: MoELayer, x: Tensor, index_B: Tensor) -> tuple[Tensor, Tensor]:
    moe = layer(x, StepContext(sequence_index_B=index_B))
    return moe.y, sum(moe.losses.values(), torch.zeros(()))


def batch(step: int, sequences: slice, world: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns inputs, targets and indices of some sequences of a step's batch."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(world * SEQUENCES, LENGTH, 8, generator=generator, dtype=torch.float64)
    target = torch.randn(world * SEQUENCES, LENGTH, 4, generator=generator, dtype=torch.float64)
    return x[sequences], target[sequences], torch.arange(len(x))[sequences]


def train(
    model: nn.Module,
    inner: nn.Module,
    sequences: slice,
    world: int,
    *,
    backward: Callable[[Tensor], None] = Tensor.backward,
    steps: int = 5,
    micro_steps: int = 1,
    no_sync: Any = nullcontext,
    clip: Callable[..., Tensor] | None = None,
) -> dict[str, list[Tensor]]:
    """Takes AdamW steps with the mean loss of these sequences; returns the losses, norms and outputs, and each
    parameter's gradients and last values by logical name."""
    found: dict[str, list[Tensor]] = {"loss": [], "y": [], "norm": []}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(steps):
        optimizer.zero_grad()
        for micro_step in range(micro_steps):
            x, target, index_B = batch(step * micro_steps + micro_step, sequences, world)
            with no_sync() if micro_step < micro_steps - 1 else nullcontext():
                y, losses = model(x, index_B)
                loss = ((y - target).square().mean() + losses) / micro_steps
                backward(loss)
            found["loss"].append(loss.detach())
            found["y"].append(y.detach())
        if clip is not None:
            found["norm"].append(clip(model, 0.1))
        for logical in logical_parameters(inner):
            assert logical.parameter.grad is not None, logical.names
            for name, grad in logical.whole(logical.parameter.grad).items():
                found.setdefault(f"grad {name}", []).append(grad.clone())
        optimizer.step()
    for logical in logical_parameters(inner):
        found |= {name: [value] for name, value in logical.whole(logical.parameter.detach()).items()}
    return found


def follow(recipe: str, model: Model, mesh: DeviceMesh) -> tuple[nn.Module, Callable[[Tensor], None]]:
    """Runs the recipe's text; returns the wrapped model, and what its backward pass is."""
    names = vars(expert_parallel).keys() | set(dir(expert_parallel))
    scope = {name: getattr(expert_parallel, name) for name in names if name in ("MoELayer", *NEW)}
    scope |= {"model": model, "mesh": mesh, "dist": dist, "fully_shard": fully_shard}
    scope["DistributedDataParallel"] = DistributedDataParallel
    setup, found, after = recipe.partition("loss.backward()")
    exec(setup, scope)

    def backward(loss: Tensor) -> None:
        exec(found + after, {**scope, "loss": loss})

    return scope["model"], backward if found else Tensor.backward


NEW = ("prepare_data_parallel", "expert_parameters", "clip_grad_norm_")


def compare(ours: dict[str, list[Tensor]], whole: dict[str, list[Tensor]], rank: int, world: int) -> None:
    mine = slice(rank * SEQUENCES, (rank + 1) * SEQUENCES)
    for loss, expected in zip(ours["loss"], whole["loss"], strict=True):
        dist.all_reduce(loss)
        torch.testing.assert_close(loss / world, expected, rtol=0, atol=1e-12)
    assert len(ours["y"]) == len(whole["y"])
    expected_y = [y[mine] for y in whole["y"]]
    for name, values in ours.items():
        if name != "loss":
            expected_values = expected_y if name == "y" else whole[name]
            for step, (value, expected) in enumerate(zip(values, expected_values, strict=True)):
                assert torch.allclose(value, expected, rtol=0, atol=1e-11), (name, step, value - expected)


def one_rank(
    world: int, *, norm_type: float | None = None, steps: int = 5, micro_steps: int = 1, **settings: Any
) -> dict[str, list[Tensor]]:
    """The same training on one rank, clipped by torch's function if a norm_type is given."""

    def clip(model: nn.Module, limit: float) -> Tensor:
        assert norm_type is not None
        return nn.utils.clip_grad_norm_(model.parameters(), limit, norm_type)

    options: dict[str, Any] = {"steps": steps, "micro_steps": micro_steps, "clip": None if norm_type is None else clip}
    model = Model(**settings)
    return train(model, model, slice(None), world, **options)


def run_recipes(rank: int, world: int, ep: int) -> None:
    """Every recipe, against one rank; with DDP also micro-steps within no_sync, and clipping."""
    mine = slice(rank * SEQUENCES, (rank + 1) * SEQUENCES)
    whole = one_rank(world)
    mesh = init_device_mesh("cpu", (world // ep, ep), mesh_dim_names=("edp", "ep"))
    for recipe in (DDP, FSDP_WHOLE, FSDP_SHARDED, PLAIN):
        inner = Model(mesh["ep"].get_group(), dist.group.WORLD)
        model, backward = follow(recipe, inner, mesh)
        compare(train(model, inner, mine, world, backward=backward), whole, rank, world)
    inner = Model(mesh["ep"].get_group(), dist.group.WORLD)
    if ep > 1 and mesh["edp"].get_local_rank() > 0:  # copies of experts start like the first ones, as all of DDP's do
        for parameter in expert_parallel.expert_parameters(inner):
            nn.init.ones_(parameter)
    model, _ = follow(DDP, inner, mesh)
    accumulation: dict[str, Any] = {"steps": 2, "micro_steps": 2}
    found = train(
        model, inner, mine, world, no_sync=model.no_sync, clip=expert_parallel.clip_grad_norm_, **accumulation
    )
    compare(found, one_rank(world, norm_type=2.0, **accumulation), rank, world)


@pytest.mark.parametrize(
    ("world", "ep"),
    [(4, 2), *(pytest.param(*case, marks=pytest.mark.full) for case in [(2, 1), (2, 2), (4, 1), (4, 4)])],
)
def test_the_recipes_train_like_one_rank(world: int, ep: int) -> None:
    """Values, every gradient and five steps of AdamW."""
    run_ranks(world, run_recipes, world, ep)


def run_clipping(rank: int, norm_types: tuple[float, float]) -> None:
    """Experts sharded over ranks by number and by columns, and by number and FSDP2."""
    mine, world = slice(rank * SEQUENCES, (rank + 1) * SEQUENCES), dist.group.WORLD
    cases = [(DDP, ("edp", "ep", "etp")), (FSDP_SHARDED, ("etp", "ep", "edp"))]
    for (recipe, names), norm_type in zip(cases, norm_types, strict=True):
        mesh = init_device_mesh("cpu", (1, 2, 2), mesh_dim_names=names)
        inner = Model(mesh["ep"].get_group(), world, mesh["etp"].get_group(), **BIAS)
        model, _ = follow(recipe, inner, mesh)
        clip = partial(expert_parallel.clip_grad_norm_, norm_type=norm_type)
        found = train(model, inner, mine, 4, steps=2, clip=clip)
        compare(found, one_rank(4, steps=2, norm_type=norm_type, **BIAS), rank, 4)
        norms = torch.stack(found["norm"])
        first = norms.clone()
        dist.broadcast(first, 0)
        assert torch.equal(norms, first), norms - first  # to the bit


@pytest.mark.parametrize("norm_types", [(3.0, torch.inf), pytest.param((torch.inf, 1.0), marks=pytest.mark.full)])
def test_clipping_counts_each_element_once(norm_types: tuple[float, float]) -> None:
    """Against torch's function on one rank."""
    run_ranks(4, run_clipping, norm_types)


def run_micro_steps(rank: int) -> dict[str, bool]:
    """Whether the gradients of the experts are equal on the ranks that hold the same, after backward passes of DDP and
    of a copy, each micro-step with other data on each rank."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("edp", "ep"))
    inner = Model(mesh["ep"].get_group(), dist.group.WORLD)
    model, _ = follow(DDP, inner, mesh)
    x, _, index_B = batch(0, slice(rank * SEQUENCES, (rank + 1) * SEQUENCES), 4)

    def step(module: nn.Module) -> bool:
        y, losses = module(x, index_B, recompute=True)
        (y.square().mean() + losses).backward()
        grads = [parameter.grad for parameter in expert_parallel.expert_parameters(module)]
        flat = torch.cat([grad.flatten() for grad in grads if grad is not None])
        first = flat.clone()
        dist.broadcast(first, group=mesh["edp"].get_group(), group_src=0)
        return torch.equal(flat, first)

    found = {"first": step(model)}
    with model.no_sync():
        found["within no_sync"] = step(model)
    found["after no_sync"] = step(model)
    copied = copy.deepcopy(inner)
    copied.zero_grad()
    found["copy"] = step(copied)
    found["marked"] = all(parameter.allreduce is False for parameter in expert_parallel.expert_parameters(copied))
    return found


def test_no_sync_leaves_out_the_experts_average_and_a_copy_keeps_it() -> None:
    """With activation checkpointing, whose recomputation runs outside of DDP's forward pass."""
    expected = {"first": True, "within no_sync": False, "after no_sync": True, "copy": True, "marked": True}
    for found in run_ranks(4, run_micro_steps)[2:]:  # of the second ranks of edp; the first compare with themselves
        assert found == expected


def run_lost_gradients(rank: int) -> list[str]:
    """One rank's experts have no gradient, or one that is NaN."""
    model = Model(dist.group.WORLD)
    model.last.weight.grad = torch.ones_like(model.last.weight)
    if rank == 0:
        model.layers[0].experts.w_in.grad = torch.full_like(model.layers[0].experts.w_in, torch.nan)
    norms = [expert_parallel.clip_grad_norm_(model, 1.0, p).item() for p in (2.0, torch.inf)]
    errors = []
    for given, options in (model, {"error_if_nonfinite": True}), (model, {"norm_type": 0.0}), (model.parameters(), {}):
        try:
            expert_parallel.clip_grad_norm_(given, 1.0, **options)
        except (RuntimeError, ValueError) as error:
            errors.append(str(error))
    return [str(norms), *errors]


def test_a_norm_is_the_same_on_all_ranks_whatever_they_lack() -> None:
    for norms, nonfinite, norm_type, parameters in run_ranks(2, run_lost_gradients):
        assert norms == "[nan, nan]"
        assert nonfinite.startswith("the norm of the gradient is nan")
        assert norm_type == "norm_type is 0.0, it must be above 0"
        assert parameters.endswith("it was given a generator")


def refusal(build: Callable[[], Any], x: Tensor, index_B: Tensor) -> str:
    try:
        build()(x, index_B)
    except ValueError as error:
        return str(error)
    return "nothing"


def run_bare_wrappers(rank: int) -> list[str]:
    """What a rank of two is told: by bare wrappers, and by some that were prepared otherwise than they are used."""
    world = dist.group.WORLD
    x, _, index_B = batch(0, slice(rank * 2, rank * 2 + 2), 2)

    def forward_then_ddp() -> nn.Module:
        model = Model(world)
        model(x, index_B)
        return DistributedDataParallel(model)

    def without_losses(*, broadcast: bool) -> nn.Module:
        model = Model(world, losses=[], num_experts=2)
        for parameter in model.parameters() if broadcast else ():
            dist.broadcast(parameter.detach(), 0)
        return model

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = expert_parallel.prepare_data_parallel(Model(world))

        def forward(self, x: Tensor, index_B: Tensor) -> tuple[Tensor, Tensor]:
            y: tuple[Tensor, Tensor] = self.inner(x, index_B)
            return y

    cases: list[Callable[[], Any]] = [
        lambda: DistributedDataParallel(Model(world)),
        lambda: fully_shard(Model(world)),
        forward_then_ddp,
        lambda: fully_shard(expert_parallel.prepare_data_parallel(Model(world))),
        lambda: DistributedDataParallel(Outer()),
        lambda: without_losses(broadcast=True),  # one expert on each rank
        lambda: DistributedDataParallel(Model(None, world)),  # losses are shares
        lambda: DistributedDataParallel(Model(None, world, losses=[])),
        lambda: DistributedDataParallel(Model()),
        lambda: without_losses(broadcast=False),
    ]
    return [refusal(case, x, index_B) for case in cases]


def test_bare_wrappers_are_refused_on_all_ranks() -> None:
    """And only they: with every expert on each rank, DDP needs no preparation where no loss is a share."""
    first, second = run_ranks(2, run_bare_wrappers)
    assert first == second
    replicas = "DistributedDataParallel takes the experts of a layer for replicas, but they are sharded over 2 ranks"
    equal = "ranks 0 and 1 of ep_group have equal weights in their experts"
    starts = [replicas, equal, replicas, equal, replicas, equal, "DistributedDataParallel averages gradients"]
    for said, expected in zip(first, [*starts, "nothing", "nothing", "nothing"], strict=True):
        assert said.startswith(expected), said
        assert said == "nothing" or "prepare_data_parallel" in said


def run_wrong_groups(rank: int) -> list[str]:
    """What a rank of four is told, with the experts divided over two."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("edp", "ep"))
    ep, edp = mesh["ep"].get_group(), mesh["edp"].get_group()
    prepare, x, index_B = expert_parallel.prepare_data_parallel, *batch(0, slice(0, 2), 2)[::2]

    def sharded() -> nn.Module:
        model = Model(ep, dist.group.WORLD)
        for layer in model.layers:
            fully_shard(layer.experts, mesh=mesh["edp"])
        return prepare(model, edp)

    def on_meta() -> nn.Module:
        with torch.device("meta"):
            return prepare(Model(ep, dist.group.WORLD), edp)

    cases: list[Callable[[], Any]] = [
        lambda: prepare(Model(ep, dist.group.WORLD)),
        lambda: prepare(Model(ep, dist.group.WORLD), ep),
        lambda: prepare(Model(ep, dist.group.WORLD), dist.group.WORLD),
        sharded,
        on_meta,
        lambda: DistributedDataParallel(prepare(Model(ep))),
        lambda: DistributedDataParallel(prepare(Model(ep, ep), edp)),
    ]
    return [refusal(case, x, index_B) for case in cases]


def test_wrong_groups_are_refused() -> None:
    for missing, own, world, sharded, on_meta, ddp, data in run_ranks(4, run_wrong_groups):
        assert missing.startswith("a layer has 4 ranks in data_group and its experts are sharded over 2")
        assert own.startswith("expert_data_group has the ranks [")
        assert world.startswith("expert_data_group has the ranks [0, 1, 2, 3]")
        assert sharded.startswith("expert_data_group has 2 ranks, but FSDP2 has sharded the experts")
        assert on_meta.startswith("prepare_data_parallel needs weights with memory")
        assert ddp.startswith(
            "DistributedDataParallel has 4 ranks, but the experts are sharded over 2 and averaged over"
        )
        assert data.startswith(
            "DistributedDataParallel has 4 ranks, but data_group, whose tokens the losses count, has 2"
        )


def test_layers_that_begin_alike_are_named() -> None:
    config = MoEConfig.model_validate(SETTINGS)
    with pytest.warns(UserWarning, match="the layers 0 and 1 have equal experts: .* give each layer another one"):
        expert_parallel.prepare_data_parallel(nn.ModuleList([MoELayer(config), MoELayer(config)]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expert_parallel.prepare_data_parallel(nn.ModuleList([MoELayer(config), MoELayer(config, seed=1)]))
