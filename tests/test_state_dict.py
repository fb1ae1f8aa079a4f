"""State dicts: experts under their global numbers, saved in every way that torch's users know, loaded on any layout."""

import contextlib
import copy
import hashlib
import io
import logging
import pickle
import re
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from expert_parallel import (
    ExpertPlacement,
    MoEConfig,
    MoELayer,
    full_state_dict,
    load_full_state_dict,
    load_optimizer_state_dict,
    optimizer_state_dict,
)
from expert_parallel.model.config import ModelConfig
from expert_parallel.model.parallelize import build_model
from expert_parallel.moe.parameters import full_tensor, logical_parameters
from tests.layouts import build_on
from tests.ranks import run_ranks

NUM_EXPERTS, WIDTH = 5, 8
CONFIG = {
    "d_model": WIDTH,
    "num_experts": NUM_EXPERTS,
    "router": {"k": 2, "score": "sigmoid", "balance_bias_rate": 0.01},
    "experts": {"hidden": 8, "activation": "swiglu", "bias": True},
    "capacity": {"kind": "dropless"},
    "dispatcher": {"kind": "all_to_all", "one_row_per": "choice"},
}
PLACEMENT = (3, 1, 0, 1, 2)  # on four ranks, not in the order of the ranks


class Model(nn.Module):
    """A user's model: a dense layer on each side of the mixture of experts."""

    def __init__(self, group: dist.ProcessGroup | None = None, seed: int = 1, **groups: Any) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.moe = MoELayer(MoEConfig.model_validate(CONFIG), group, seed=seed, **groups)
        self.outer = nn.Linear(WIDTH, WIDTH)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.moe(self.inner(x)).y)


@cache
def mesh_of(edp: int, ep: int) -> DeviceMesh:
    return init_device_mesh("cpu", (edp, ep), mesh_dim_names=("edp", "ep"))


def build(layout: dict[str, Any], seed: int) -> Model:
    """layout: `edp`, `ep`, `placement`, and `fsdp` for experts sharded over edp and all else over all ranks."""
    ep, edp = layout.get("ep", 1), layout.get("edp", 1)
    if ep * edp == 1:
        return Model(seed=seed)
    mesh = mesh_of(edp, ep)
    placement = ExpertPlacement(layout["placement"], ep) if "placement" in layout else None
    model = Model(mesh["ep"].get_group() if ep > 1 else None, seed, placement=placement)
    if layout.get("fsdp"):
        fully_shard(model.moe.experts, mesh=mesh["edp"], reshard_after_forward=False)
        fully_shard(model, mesh=mesh["edp"])
    return model


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    """One step with gradients that are functions of the names, so that they are the same on every layout."""
    for logical in logical_parameters(model):
        drawn = []
        for name in logical.names:
            key = int.from_bytes(hashlib.sha256(f"{number} {name}".encode()).digest()[:7], "big")
            generator = torch.Generator().manual_seed(key)
            drawn.append(torch.randn(logical.shape, generator=generator, dtype=torch.float64))
        logical.parameter.grad = torch.zeros_like(logical.parameter)
        logical.fill(logical.parameter.grad, drawn)
    optimizer.step()


def weights(model: nn.Module) -> dict[str, Tensor]:
    """This rank's weights by logical name; by collectives over FSDP2's meshes, not by a state dict."""
    found = {}
    for logical in logical_parameters(model):
        found |= {name: tensor.clone() for name, tensor in logical.whole(logical.parameter.detach()).items()}
    return found


def outputs(model: Model, rank: int, world: int) -> Tensor:
    """Of this rank's part of 8 tokens, the same 8 for every number of ranks."""
    x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        y = model(x.chunk(world)[rank])
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return y


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)


def run_save(rank: int, layout: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Saves in every way, takes two more steps, and returns what loading must give."""
    model = build(layout, seed=1)
    optimizer = adamw(model)
    model.moe.router.get_buffer("balance_bias_E").copy_(torch.arange(NUM_EXPERTS))
    for number in range(2):
        step(model, optimizer, number)
    optimizer.param_groups[0]["lr"] = 0.05
    state = {"model": model.state_dict(), "optimizer": optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=folder / "dcp")
    torch.save(state, folder / f"rank{rank}.pt")
    if not layout.get("fsdp"):
        save_file(state["model"], folder / f"model{rank}.safetensors")
        save_file(state["optimizer"], folder / f"optimizer{rank}.safetensors")
    full = full_state_dict(model)
    assert bool(full) == (rank == 0)
    if rank == 0:
        torch.save(full, folder / "full.pt")
    y, then = outputs(model, rank, dist.get_world_size()), weights(model)
    for number in range(2, 4):
        step(model, optimizer, number)
    return {"y": y, "weights": then, "later": weights(model)}


def run_load(rank: int, layout: dict[str, Any], folder: Path, way: str) -> dict[str, Any]:
    model = build(layout, seed=2)
    optimizer = adamw(model)
    x = torch.zeros(2, WIDTH, dtype=torch.float64)
    model(x)  # after which FSDP2's parameters are whole
    if way == "dcp":
        state = {"optimizer": optimizer_state_dict(model, optimizer), "model": model.state_dict()}
        dcp.load(state, checkpoint_id=folder / "dcp")
    elif way == "merged":  # the files of all ranks in one dict
        state = {"model": {}, "optimizer": {}}
        for part in state:
            for file in sorted(folder.glob(f"{part}*.safetensors")):
                state[part] |= load_file(file)
    elif way == "own":
        state = torch.load(folder / f"rank{rank}.pt", weights_only=True)
    else:
        state = {"model": torch.load(folder / "full.pt", weights_only=True)}
    model(x)
    if way == "full" and layout.get("fsdp"):
        load_full_state_dict(model, state["model"])
    else:
        model.load_state_dict(state["model"])
    found = {"y": outputs(model, rank, layout.get("edp", 1) * layout.get("ep", 1)), "weights": weights(model)}
    assert torch.equal(model.moe.router.get_buffer("balance_bias_E"), torch.arange(NUM_EXPERTS).double())
    if way != "full":
        load_optimizer_state_dict(model, optimizer, state["optimizer"])
        assert optimizer.param_groups[0]["lr"] == 0.05
        for number in range(2, 4):
            step(model, optimizer, number)
        found["later"] = weights(model)
    return found


def joined(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The outputs of all ranks in order, and the weights of all experts, which ranks that share them hold alike."""
    whole: dict[str, Any] = {"y": torch.cat([result["y"] for result in results])}
    for part in ("weights", "later"):
        for result in results:
            for name, tensor in result.get(part, {}).items():
                assert torch.equal(whole.setdefault(part, {}).setdefault(name, tensor), tensor), name
    return whole


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two")
    return folder, joined(run_ranks(2, run_save, {"ep": 2}, folder))


@pytest.fixture(scope="module")
def of_fsdp(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("fsdp")
    return folder, joined(run_ranks(4, run_save, {"ep": 2, "edp": 2, "fsdp": True}, folder))


def compare(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert torch.equal(found["y"], wanted["y"])
    for part in found.keys() - {"y"}:
        assert found[part].keys() == wanted[part].keys()
        assert [name for name, tensor in found[part].items() if not torch.equal(tensor, wanted[part][name])] == []


LOADS = [
    ({"ep": 1}, "dcp"),
    ({"ep": 1}, "merged"),
    ({"ep": 1}, "full"),
    ({"ep": 2}, "own"),
    ({"ep": 2}, "full"),
    ({"ep": 4}, "dcp"),
    ({"ep": 4, "placement": PLACEMENT}, "dcp"),
    ({"ep": 4, "placement": PLACEMENT}, "merged"),
    ({"ep": 2, "edp": 2, "fsdp": True}, "dcp"),
    ({"ep": 2, "edp": 2, "fsdp": True}, "full"),
]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one rank loads alone
@pytest.mark.parametrize(("layout", "way"), LOADS)
def test_what_two_ranks_saved_loads_on_any_layout(
    layout: dict[str, Any], way: str, of_two: tuple[Path, dict[str, Any]]
) -> None:
    folder, wanted = of_two
    world = layout["ep"] * layout.get("edp", 1)
    arguments = (layout, folder, way)
    compare(joined([run_load(0, *arguments)] if world == 1 else run_ranks(world, run_load, *arguments)), wanted)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one rank loads alone
@pytest.mark.parametrize("way", ["dcp", "full"])
def test_what_fsdp_sharded_loads_on_one_rank(way: str, of_fsdp: tuple[Path, dict[str, Any]]) -> None:
    folder, wanted = of_fsdp
    compare({**run_load(0, {"ep": 1}, folder, way), "y": wanted["y"]}, wanted)


def refusal(act: Callable[[], object]) -> str:
    try:
        act()
    except (RuntimeError, ValueError, TypeError) as error:
        return str(error)
    return "nothing"


def run_refused(rank: int, folder: Path) -> dict[str, str]:
    model = build({"ep": 2}, seed=1)
    optimizer = adamw(model)
    before = weights(model)
    theirs = torch.load(folder / f"rank{1 - rank}.pt", weights_only=True)
    said = {
        "load": refusal(lambda: model.load_state_dict(theirs["model"])),
        "not strict": refusal(lambda: model.load_state_dict(theirs["model"], strict=False)),
        "optimizer": refusal(lambda: load_optimizer_state_dict(model, optimizer, theirs["optimizer"])),
        "get": refusal(lambda: get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))),
        "set": refusal(lambda: set_model_state_dict(model, theirs["model"])),
        "get optimizer": refusal(lambda: get_optimizer_state_dict(model, optimizer)),
        "pickle": refusal(lambda: pickle.dumps(model)),
        "save": refusal(lambda: torch.save(model, io.BytesIO())),
    }
    experts = {name for name in before if ".experts." in name}
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(model).items() if name in experts)
    return said


def test_the_file_of_another_rank_and_functions_that_would_lose_experts_are_refused(
    of_two: tuple[Path, dict[str, Any]],
) -> None:
    for rank, said in enumerate(run_ranks(2, run_refused, of_two[0])):
        held, others = ("0-2", "3-4")[:: 1 - 2 * rank]
        for way in ("load", "not strict"):
            assert (
                f"moe.experts: the state dict has the experts {others}, but this rank holds {held}: load" in said[way]
            )
        keys = [f"moe.experts.{experts[0]}.w_in.exp_avg" for experts in (others, held)]
        assert f"has {keys[0]}, but not {keys[1]}, which this rank needs: load" in said["optimizer"]
        for way in ("get", "set", "get optimizer"):
            assert "as a rank holds" in said[way], said[way]
            assert "use expert_parallel.full_state_dict(model), or save model.state_dict()" in said[way]
        for way in ("pickle", "save"):
            assert said[way].startswith("a MoELayer with process groups cannot be pickled: save layer.state_dict()")


def run_recipes(rank: int, blocks: list[str], folder: Path) -> bool:
    model = build({"ep": 2}, seed=1)
    optimizer = adamw(model)
    step(model, optimizer, 0)
    before = weights(model)
    names: dict[str, Any] = {"torch": torch, "model": model, "optimizer": optimizer, "rank": rank}
    with contextlib.chdir(folder):
        for block in blocks:
            save, load = block.rsplit("\n\n", 1)
            exec(save, names)
            step(model, optimizer, 1)  # as if training went on, before it fell back
            exec(load, names)
    return all(torch.equal(tensor, before[name]) for name, tensor in weights(model).items())


def test_the_recipes_of_the_page_run(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "expert_parallel" / "moe" / "README.md").read_text()
    section = page.split("## Saving and loading")[1].split("\n## ")[0]
    blocks = re.findall(r"```py\n(.*?)```", section, flags=re.DOTALL)
    assert len(blocks) == 3
    assert run_ranks(2, run_recipes, blocks, tmp_path) == [True, True]


def run_copies(rank: int) -> dict[str, list[str]]:
    """Copies of a model on two ranks, and the whole state dict of one inside DDP."""
    model = build({"ep": 2}, seed=1)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    copied = copy.deepcopy(model)
    step(model, adamw(model), 0)
    average.update_parameters(model)
    average.update_parameters(model)
    ours, theirs = model.state_dict(), average.module.state_dict()
    assert ours.keys() == theirs.keys() == copied.state_dict().keys()
    copied.load_state_dict(theirs)
    assert torch.equal(weights(copied)["moe.experts.0.w_in"], theirs["moe.experts.0.w_in"]) if rank == 0 else True
    names = [name for name, _ in model.named_parameters() if ".experts." in name]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    full = full_state_dict(DistributedDataParallel(model))
    return {"own": list(ours), "full": list(full)}


def test_copies_have_state_dicts_and_ddp_adds_no_prefix() -> None:
    first, second = run_ranks(2, run_copies)
    assert second["full"] == []
    assert set(first["full"]) == {*first["own"], *second["own"]} == set(Model().state_dict())


TRANSFORMER = {
    "vocab_size": 17,
    "num_layers": 2,
    "d_model": 8,
    "attention": {"num_heads": 4, "num_kv_heads": 1, "head_size": 2},
    "ffn": {"hidden": 6},
    "moe_blocks": {"kind": "all_but_first", "k": 1},
    "moe": {"num_experts": 4, "experts": {"hidden": 6, "bias": True}, "shared_experts": {"hidden": 4}},
}
LAYOUTS = {
    "tp and etp": {"world": 4, "tp": 2, "ep": 2, "etp": 2},
    "tp and sharded": {"world": 4, "tp": 2, "ep": 2, "data": "sharded"},
}


def run_transformer(rank: int, layout: dict[str, Any], folder: Path) -> list[str]:
    reference = build_model(ModelConfig.model_validate(TRANSFORMER), dtype=torch.float64, seed=1).state_dict()
    first, second = (build_on(layout, TRANSFORMER, seed)[1] for seed in (1, 2))
    full = full_state_dict(first)
    if rank == 0:
        assert full.keys() == reference.keys()
        assert [name for name, tensor in full.items() if not torch.equal(tensor, reference[name])] == []
    load_full_state_dict(second, reference)
    loaded = {name: full_tensor(tensor) for name, tensor in second.state_dict().items()}
    assert [n for n, tensor in first.state_dict().items() if not torch.equal(full_tensor(tensor), loaded[n])] == []
    if layout.get("data") == "sharded":
        return []
    third = build_on(layout, TRANSFORMER, seed=3)[1]
    third.load_state_dict(reference)  # each rank takes its shards
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in third.state_dict().items())
    torch.save(third.state_dict(), folder / f"{rank}.pt")
    dist.barrier()
    neighbour = torch.load(folder / f"{rank ^ 1}.pt", weights_only=True)
    return [refusal(partial(third.load_state_dict, neighbour, strict=strict)) for strict in (True, False)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shards_of_tensor_parallelism_are_named_and_gathered(layout: str, tmp_path: Path) -> None:
    for rank, said in enumerate(run_ranks(4, run_transformer, LAYOUTS[layout], tmp_path)):
        for text in said:
            assert f"this rank holds embedding.weight.shard_{rank % 2}_of_2: load" in text
            assert f"than 0.w_in.shard_{rank % 2}_of_2, which this rank holds" in text or rank > 1
            assert "blocks.1.moe.experts: the state dict has other shards of" in text


# ---------------------------------------------------------------------------------------------------------------------
# On one rank


def stacked(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The dict as versions wrote it that kept the experts of a rank in one stack."""
    old = {name: tensor for name, tensor in state.items() if ".experts." not in name}
    experts = sorted(int(name.split(".")[2]) for name in state if name.endswith(".w_in"))
    for leaf in ("w_in", "w_out", "b_in", "b_out"):
        old[f"moe.experts.{leaf}"] = torch.stack([state[f"moe.experts.{expert}.{leaf}"] for expert in experts])
    return old


def test_all_experts_on_a_rank_are_what_torch_expects() -> None:
    """get_model_state_dict and set_model_state_dict find the experts; `assign` and pickle work."""
    model, options = Model(), StateDictOptions(full_state_dict=True)
    state = get_model_state_dict(model, options=options)
    assert state.keys() == model.state_dict().keys() >= {f"moe.experts.{NUM_EXPERTS - 1}.w_out", "inner.weight"}
    others = [Model(seed=seed) for seed in range(2, 6)]
    set_model_state_dict(others[0], dict(state), options=options)
    with torch.device("meta"):
        others[1] = Model()
    others[1].load_state_dict(state, assign=True)
    others[2].load_state_dict(stacked(state))
    others[3] = pickle.loads(pickle.dumps(model))
    for other in others:
        assert all(torch.equal(tensor, weights(model)[name]) for name, tensor in weights(other).items())
    assert get_optimizer_state_dict(model, adamw(model))["state"].keys() == dict(model.named_parameters()).keys()


FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "too many": (lambda s: s | {"moe.experts.5.w_in": s["moe.experts.4.w_in"]}, "has an expert 5, but the layer has 5"),
    "one missing": (
        lambda s: {name: tensor for name, tensor in s.items() if ".2." not in name},
        "moe.experts: the state dict has the experts 0-1, 3-4, but this rank holds 0-4",
    ),
    "shape": (
        lambda s: s | {"moe.experts.3.w_in": torch.zeros(8, 7)},
        "3.w_in has shape (8, 7) in the state dict, but needs (8, 16)",
    ),
    "a shard": (
        lambda s: {name + ".shard_0_of_2" * (".w_in" in name): tensor for name, tensor in s.items()},
        "the state dict has other shards of 0.w_in than",
    ),
    "twice": (lambda s: s | stacked(s), "the state dict has w_in twice"),
    "a stack of too few": (
        lambda s: stacked(s) | {"moe.experts.w_in": torch.zeros(3, 8, 16)},
        "w_in has shape (3, 8, 16) in the state dict, but needs (5, 8, 16)",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("strict", [True, False])
def test_wrong_experts_are_refused(fault: str, strict: bool) -> None:
    model, (make, message) = Model(), FAULTS[fault]
    before = weights(model)
    assert message in refusal(lambda: model.load_state_dict(make(Model(seed=2).state_dict()), strict=strict))
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(model).items() if ".experts." in name)


def test_missing_and_unknown_names_are_torchs_own() -> None:
    model, state = Model(), Model().state_dict()
    less = {name: tensor for name, tensor in state.items() if not name.endswith(".b_in")}
    more = less | {"moe.experts.0.w_up": torch.zeros(1), "moe.experts.scale": torch.zeros(1)}
    found = model.load_state_dict(more, strict=False)
    assert found.missing_keys == [f"moe.experts.{expert}.b_in" for expert in range(NUM_EXPERTS)]
    assert found.unexpected_keys == ["moe.experts.0.w_up", "moe.experts.scale"]
    assert "Missing key" in refusal(lambda: model.load_state_dict(more))


def run_old_stack(rank: int) -> tuple[list[str], bool, bool]:
    """Stacks of earlier versions: of all experts, and of this rank's."""
    model, whole = build({"ep": 2}, seed=2), Model().state_dict()
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("expert_parallel.moe.experts.numbered").addHandler(handler)
    model.load_state_dict(stacked(whole))
    first = all(torch.equal(tensor, whole[name]) for name, tensor in model.state_dict().items())
    assert said == []
    mine = build({"ep": 2}, seed=3).state_dict()
    model.load_state_dict(stacked(mine))
    logging.getLogger("expert_parallel.moe.experts.numbered").removeHandler(handler)
    return said, first, all(torch.equal(tensor, mine[name]) for name, tensor in model.state_dict().items())


def test_stacks_of_earlier_versions_are_read() -> None:
    for rank, (said, first, second) in enumerate(run_ranks(2, run_old_stack)):
        assert first
        assert second
        assert len(said) == 4
        assert "does not name its experts, as an earlier version wrote it: it is right only if" in said[0]
        assert f"this rank (experts {('0-2', '3-4')[rank]}) wrote it" in said[0]


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.1), amsgrad=True, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "two groups": lambda p: torch.optim.AdamW([{"params": p[:3], "lr": 0.3}, {"params": p[3:]}], betas=(0.8, 0.9)),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_optimizer_goes_on(kind: str) -> None:
    first, second = Model(), Model()
    old, new = (OPTIMIZERS[kind](list(model.parameters())) for model in (first, second))
    target = optimizer_state_dict(second, new)  # for a checkpoint to fill
    assert all(torch.equal(tensor, weights(first)[name]) for name, tensor in weights(second).items())
    assert not any(bool(tensor.any()) for name, tensor in target.items() if name.endswith((".step", ".exp_avg")))
    for number in range(3):
        step(first, old, number)
    state = optimizer_state_dict(first, old)
    assert target.keys() == state.keys()
    second.load_state_dict(first.state_dict())
    load_optimizer_state_dict(second, new, {name: tensor.clone() for name, tensor in state.items()})
    for model, optimizer in ((first, old), (second, new)):
        step(model, optimizer, 3)
    assert all(torch.equal(tensor, weights(first)[name]) for name, tensor in weights(second).items())


def test_optimizer_state_that_does_not_fit_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    model = Model()
    optimizer = adamw(model)
    model.inner.bias.requires_grad_(False)
    state = optimizer_state_dict(model, optimizer)
    name = "moe.experts.1.w_in"
    said = {
        "stray": state | {"stray.exp_avg": torch.zeros(1)},
        "step differs between": state | {f"{name}.step": torch.tensor(7.0)},
        "exp_avg has shape (2,)": state | {f"{name}.exp_avg": torch.zeros(2)},
        f"has {name}.max_exp_avg_sq, which this rank's AdamW does not keep": state
        | {f"{name}.max_exp_avg_sq": torch.zeros(8, 16)},
        "has the parameter groups [0, 1]": state | {"param_groups.1.lr": torch.tensor(0.1)},
        "which is no name": state | {"lr": torch.tensor(0.1)},
    }
    for message, wrong in said.items():
        assert message in refusal(partial(load_optimizer_state_dict, model, optimizer, wrong))
    factored = torch.optim.Adafactor(model.parameters())
    text = refusal(lambda: optimizer_state_dict(model, factored))
    assert "Adafactor keeps row_var" in text
    assert "the optimizer has a parameter" in refusal(lambda: optimizer_state_dict(Model(), optimizer))
    load_optimizer_state_dict(model, optimizer, {n: t for n, t in state.items() if not n.startswith("outer.bias")})
    assert "has nothing of outer.bias: their state starts afresh" in caplog.text
    assert model.outer.bias not in optimizer.state


def test_a_dict_that_is_not_whole_fills_nothing() -> None:
    model, state = Model(), Model(seed=2).state_dict()
    before = weights(model)
    for wrong, message in (
        ({}, "of 0 tensors 0 are unknown, and 26 are missing, such as"),
        (
            state | {"moe.experts.5.w_in": torch.zeros(1)},
            "1 are unknown, and 0 are missing, such as moe.experts.5.w_in",
        ),
        (state | {"inner.bias": torch.zeros(1)}, "inner.bias has shape (1,) in the state dict, but needs (8,)"),
    ):
        assert message in refusal(partial(load_full_state_dict, model, wrong))
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(model).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_savers_of_whole_models_keep_every_expert(dtype: torch.dtype, tmp_path: Path) -> None:
    """Of tensors that share a storage, safetensors' save_model, and so Accelerate's, keeps one. In place still means in
    the stack's memory."""
    layer = MoELayer(MoEConfig.model_validate({"d_model": 8, "num_experts": 4, "experts": {"hidden": 6}})).to(dtype)
    save_model(layer, str(tmp_path / "layer.safetensors"))
    state = load_file(tmp_path / "layer.safetensors")
    assert state.keys() == layer.state_dict().keys()
    assert torch.equal(state["experts.2.w_in"], layer.experts.w_in[2])
    layer.state_dict()["experts.2.w_in"].zero_()
    assert not layer.experts.w_in[2].any()
    assert layer.experts.w_in[1].any()


def test_a_model_without_memory_is_not_loaded_in_silence() -> None:
    config = MoEConfig.model_validate({"d_model": 8, "num_experts": 4, "experts": {"hidden": 6}})
    state = full_state_dict(MoELayer(config))
    with torch.device("meta"):
        layer = MoELayer(config)
    with pytest.raises(ValueError, match=r"meta device: call model.to_empty"):
        load_full_state_dict(layer, state)
    layer.to_empty(device="cpu")
    load_full_state_dict(layer, state)
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())
