"""The systems in configs/: what their pages say is what `check` counts, each small twin has its original's shape and is
equal to that system's own code or formulas, passes `verify`; and 2,048 experts run, sharded."""

import re
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from expert_parallel.checkpoint.config import CheckpointConfig
from expert_parallel.checkpoint.load import load_checkpoint
from expert_parallel.checkpoint.save import CheckpointSaver
from expert_parallel.cli.verify import build_verification_spec
from expert_parallel.data.batch import MicroBatch, shard_bounds
from expert_parallel.model.activation_memory import block_memory
from expert_parallel.moe.config import MoEConfig
from expert_parallel.moe.context import StepContext, pass_seed, token_batch
from expert_parallel.moe.layer import MoELayer
from expert_parallel.moe.parameters import logical_parameters
from expert_parallel.moe.routers.registry import build_router
from expert_parallel.nn import random
from expert_parallel.nn.random import Stream
from expert_parallel.runtime.process import CPU, Launch, Runtime
from expert_parallel.training.check import format_config_report
from expert_parallel.training.comparison import format_comparison
from expert_parallel.training.config import Config, load_config
from expert_parallel.training.engines.native import NativeEngine
from expert_parallel.training.memory import Gathered, estimate_memory, pass_sizes
from expert_parallel.training.setup import build, check_degrees
from expert_parallel.training.step import train_step
from expert_parallel.verify.compare import TOLERANCES
from expert_parallel.verify.explain import explain
from expert_parallel.verify.run import verify
from tests.launches import ROOT
from tests.ranks import run_ranks

SYSTEMS = ["uomni", "switch", "switch-2048", "glam", "mixtral-8x7b", "gpt4-class", "1t-20b"]
IMPORTED = ["olmoe", "gpt-oss-20b", "qwen3-30b-a3b", "deepseek-v3"]  # by `convert import`, too; they have no twins
SIZES = ["uomni", "uomni-140m", "uomni-140m-dense", *SYSTEMS[1:], *IMPORTED]  # the rows of the page's table
FEWER_EXPERTS = {"switch": 64, "1t-20b": 64}  # of the twins; the others have as many as their originals
PAGE = (ROOT / "configs" / "README.md").read_text()


@cache
def config_of(name: str) -> Config:
    return load_config(ROOT / "configs" / f"{name}.yaml")


# ---------------------------------------------------------------------------------------------------------------------
# Counts


def rows_of_page() -> list[list[str]]:
    """The cells of the page's table of sizes: system, config, world size, published, counted, memory."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines()]
    return [row for row in rows if len(row) == 6 and row[1].strip("`").removesuffix(".yaml") in SIZES]


class Allocations(TorchDispatchMode):
    """The largest tensor that was made of memory; those on the meta device have none."""

    largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(result) if isinstance(t, Tensor) and not t.is_meta]
        self.largest = max([self.largest, *sizes])
        return result


def test_the_page_has_every_system() -> None:
    assert [row[1].strip("`").removesuffix(".yaml") for row in rows_of_page()] == SIZES


def on_gpus(file: str) -> Config:
    return load_config(ROOT / "configs" / file, ["runtime.device=cuda"])


@pytest.mark.parametrize("row", rows_of_page(), ids=lambda row: row[1].strip("`"))
def test_check_counts_what_the_page_says(row: list[str]) -> None:
    """And no number of the page is another than `check` prints; nothing of that size is allocated."""
    _, file, world_size, _, counted, memory = row
    with Allocations() as made:
        text = format_config_report(on_gpus(file.strip("`")), int(world_size.replace(",", "")))
    assert made.largest <= 8192  # ranks, experts, blocks; not weights
    said = dict(line.split("  ", 1) for line in text.splitlines() if "  " in line)
    total, active = counted.split(" / ")
    assert f" {total} in all, {active} active for a token" in said["parameters"]
    numbers = re.findall(r"[\d.]+", memory)
    assert numbers == re.findall(r"[\d.]+(?= GiB)", said["memory of a rank"])
    assert float(numbers[-1]) < 80e9 / 2**30


def test_uomni_fits_its_gpu_and_eight_times_its_experts_do_not() -> None:
    """12 GB; its mixture and its dense twin have the same parameters but for a router in each block."""
    mixture, dense = (load_config(ROOT / "configs" / f"uomni-140m{name}.yaml") for name in ("", "-dense"))
    wide = load_config(ROOT / "configs" / "uomni-140m.yaml", ["model.moe.experts.hidden=3072"])
    assert mixture.model.num_params() - dense.model.num_params() == 18 * 8 * 768
    assert mixture.model_dump(exclude={"run": True, "model": {"moe", "ffn"}}) == dense.model_dump(
        exclude={"run": True, "model": {"moe", "ffn"}}
    )
    for config in (mixture, dense):
        assert 120e6 < config.model.num_params() < 140e6
    *fitting, too_large = (estimate_memory(c, check_degrees(c, 1), "cuda").total for c in (mixture, dense, wide))
    assert max(fitting) < 12e9 < too_large


def test_exact_counts() -> None:
    """Mixtral by hand; the others' published sums are on the page."""
    block = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 8 * (3 * 4096 * 14336) + 8 * 4096 + 2 * 4096
    total = 32 * block + 2 * 32000 * 4096 + 4096
    assert total == 46_702_792_704
    assert f"{total:,} in all" in format_config_report(config_of("mixtral-8x7b"), 32)


def test_weights_that_stay_gathered_count() -> None:
    """Switch-C without `reshard_after_forward`, at its loss: attention, router and 4 experts of its 30 blocks, in
    bfloat16, beside a table of 7 numbers."""
    config = load_config(ROOT / "configs" / "switch-2048.yaml", ["parallel.data.reshard_after_forward=false"])
    model, sizes = config.model, pass_sizes(config, check_degrees(config, 512), "cuda")
    assert (model.num_layers, model.moe_layers, model.ffn) == (30, list(range(30)), None)
    weights = sum(part.weights for block in range(30) for part in block_memory(model, block, sizes))
    assert weights == 30 * (4 * 2080 * 2048 + 2048 * 2080 + 4 * 2 * 2080 * 6144)
    assert Gathered.of(config, sizes, weights, 7).always == 2 * (weights + 7)


# ---------------------------------------------------------------------------------------------------------------------
# Twins


def shape_of(config: Config) -> dict[str, Any]:
    """What a twin shares with its original: everything but sizes and where it runs."""
    model, moe = config.model, config.model.moe
    assert moe is not None
    attention, shared, position = model.attention, moe.shared_experts, model.position
    return {
        "router": moe.router,
        "capacity": moe.capacity,
        "losses": moe.losses,
        "experts": (moe.experts.activation, moe.experts.bias, moe.experts.hidden_dropout, moe.experts.output_dropout),
        "shared": shared and (shared.activation, shared.bias, shared.hidden == moe.experts.hidden),
        "blocks": model.moe_blocks,
        "ffn": model.ffn and (model.ffn.activation, model.ffn.bias),
        "norm": (model.norm, model.norm_placement),
        "position": position,
        "attention": (attention.kind, attention.kv_heads < attention.num_heads, attention.window, attention.bias),  # type: ignore[union-attr]
        "tied": model.tied_embeddings,
        "dropout": model.dropout,
        "schedule": config.training.schedule.kind,
    }


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_twin_has_the_shape_of_its_original(name: str) -> None:
    original, twin = config_of(name), config_of(f"{name}-small")
    assert shape_of(twin) == shape_of(original)
    assert original.model.moe is not None
    assert twin.model.moe is not None
    assert twin.model.moe.num_experts == FEWER_EXPERTS.get(name, original.model.moe.num_experts)


def layer_of(name: str, d_model: int = 8, hidden: int = 6, **changes: Any) -> MoELayer:
    """The twin's own MoE layer in float64 and in training, narrower. changes: blocks in the place of its own."""
    moe = config_of(f"{name}-small").model.moe
    assert moe is not None
    tree = moe.model_dump(mode="json")
    for block in ("experts", "shared_experts"):
        if tree[block] is not None:
            tree[block]["hidden"] = hidden
    return MoELayer(MoEConfig.model_validate({**tree, "d_model": d_model, **changes})).double()


# ---------------------------------------------------------------------------------------------------------------------
# Each against its own system


@pytest.mark.parametrize("name", ["uomni", "gpt4-class"])
def test_uomni_and_gpt4_class_are_a_loop_over_slots_and_experts(name: str) -> None:
    """Softmax over all experts, top-2, renormalised; experts with GELU and without biases."""
    from tests.oracles import compare_with_loops

    compare_with_loops(layer_of(name, d_model=32, hidden=16))


@pytest.mark.parametrize(
    ("name", "num_sequences", "num_tokens", "capacity"),
    [("switch", 1, 192, 4), ("switch", 3, 96, 2), ("switch-2048", 1, 512, 1)],
)
def test_switch_is_transformers_switch(name: str, num_sequences: int, num_tokens: int, capacity: int) -> None:
    """As the config stands with one sequence on one rank; for several, capacity and loss by sequence, as theirs are.
    Their capacity is a number, ceil(1.25 * tokens / experts); with jitter, and drops."""
    from tests.oracles import compare_switch_layers

    changes: dict[str, Any] = {}
    if num_sequences > 1:
        moe = config_of(f"{name}-small").model.moe
        assert moe is not None
        changes["capacity"] = {**moe.capacity.model_dump(mode="json"), "scope": "sequence"}
        changes["losses"] = [{**loss.model_dump(mode="json"), "scope": "sequence"} for loss in moe.losses]
    layer = layer_of(name, **changes)
    assert layer.config.router.jitter == 0.01
    dropped = compare_switch_layers(layer, capacity, num_sequences, num_tokens)
    assert 0.02 < dropped / (num_sequences * num_tokens) < 0.9


def test_mixtral_layer_is_transformers_mixtral() -> None:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    from tests.oracles import compare_blocks
    from tests.peers import peers_in_float64

    sizes = {"hidden_size": 8, "intermediate_size": 6, "num_local_experts": 8, "num_experts_per_tok": 2}
    with peers_in_float64():
        theirs = MixtralSparseMoeBlock(MixtralConfig(**sizes, experts_implementation="eager")).double()
    compare_blocks(theirs, layer_of("mixtral-8x7b"))


def test_mixtral_model_is_transformers_mixtral() -> None:
    """The whole twin, at its own size: logits, the loss with its balance loss, every gradient."""
    from transformers import MixtralConfig, MixtralForCausalLM

    from tests.oracles import compare_mixtral_models
    from tests.peers import peers_in_float64

    model = config_of("mixtral-8x7b-small").model
    heads, moe = model.attention, model.moe
    assert moe is not None
    with peers_in_float64():
        config = MixtralConfig(
            vocab_size=model.vocab_size,
            hidden_size=model.d_model,
            intermediate_size=moe.experts.hidden,
            num_hidden_layers=model.num_layers,
            num_attention_heads=heads.num_heads,  # type: ignore[union-attr]
            num_key_value_heads=heads.num_kv_heads,  # type: ignore[union-attr]
            head_dim=heads.head_size,  # type: ignore[union-attr]
            num_local_experts=moe.num_experts,
            num_experts_per_tok=2,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            tie_word_embeddings=False,
            output_router_logits=True,
            router_aux_loss_coef=0.02,
            attn_implementation="eager",
            experts_implementation="eager",
        )
        theirs = MixtralForCausalLM(config).double()
    compare_mixtral_models(theirs, model, weight_factor=0.2)


def test_1t_20b_layer_is_transformers_deepseek_v3() -> None:
    """64 experts in 8 groups of which a token uses 4, one shared, sigmoid scores, and a bias that moves the choice."""
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    from tests.oracles import compare_blocks, draw
    from tests.peers import peers_in_float64

    with peers_in_float64():
        config = DeepseekV3Config(
            hidden_size=8,
            moe_intermediate_size=6,
            n_routed_experts=64,
            n_shared_experts=1,
            num_experts_per_tok=6,
            n_group=8,
            topk_group=4,
            routed_scaling_factor=2.5,
            experts_implementation="eager",
        )
        theirs = DeepseekV3MoE(config).double()
    theirs.gate.e_score_correction_bias.copy_(0.2 * draw(64))
    compare_blocks(theirs, layer_of("1t-20b"))


def gshard_by_loops(
    x_TD: Tensor, router_ED: Tensor, w_in_EDF: Tensor, w_out_EFD: Tensor, capacity: int, lots_T: list[float]
) -> tuple[Tensor, Tensor, int, int]:
    """Algorithm 1 of GShard (Lepikhin et al. 2020): outputs, auxiliary loss, and how many second experts the lot left
    out and how many choices overflowed.

    As its authors' code has it, a second expert that the lot leaves out takes no place either. The printed loss is
    1/E sum_e c_e / S m_e; times E^2, so that balanced ones have 1.
    """
    num_tokens, num_experts = len(x_TD), len(router_ED)
    gates_TE = (x_TD @ router_ED.T).softmax(-1)
    places, left_out, overflowed = [0] * num_experts, 0, 0
    y_TD: list[Any] = [torch.zeros_like(x) for x in x_TD]
    best_two = [sorted(range(num_experts), key=lambda e, row=row: -row[e])[:2] for row in gates_TE.tolist()]  # type: ignore[misc]

    def send(token: int, expert: int, gate: Tensor) -> int:
        """Whether the expert is full."""
        places[expert] += 1
        if places[expert] > capacity:
            return 1
        y_TD[token] = y_TD[token] + gate * (F.gelu(x_TD[token] @ w_in_EDF[expert]) @ w_out_EFD[expert])
        return 0

    for token, (first, second) in enumerate(best_two):
        overflowed += send(token, first, gates_TE[token, first] / (gates_TE[token, first] + gates_TE[token, second]))
    share_E = torch.tensor(places, dtype=torch.float64) / num_tokens
    loss = num_experts * (share_E * gates_TE.mean(0)).sum()
    for token, (first, second) in enumerate(best_two):
        gate = gates_TE[token, second] / (gates_TE[token, first] + gates_TE[token, second])
        if 2 * gate > lots_T[token]:
            overflowed += send(token, second, gate)
        else:
            left_out += 1
    return torch.stack(y_TD), loss, left_out, overflowed


def test_glam_is_gshards_algorithm() -> None:
    """80 tokens and 64 experts with room for 3: output, loss and every gradient, with lots and drops."""
    from tests.oracles import close, draw

    layer = layer_of("glam")
    for parameter in layer.parameters():
        parameter.data = draw(*parameter.shape, seed=parameter.dim()) * 0.4
    weights = [layer.router.weight, layer.experts.w_in, layer.experts.w_out]
    x_TD, upstream = draw(80, 8).requires_grad_(), draw(80, 8, seed=1)
    batch = token_batch(x_TD[None], StepContext(), None)
    lots_T = random.uniform(pass_seed(batch.context, Stream.SECOND_EXPERT), batch.index_T, 1)[:, 0].tolist()
    expected, expected_loss, left_out, overflowed = gshard_by_loops(x_TD, *weights, 3, lots_T)
    actual = layer(x_TD)
    assert left_out > 5
    assert overflowed > 5
    assert int(actual.stats.kept_E.sum()) == 160 - left_out - overflowed
    close(actual.y, expected, "output")
    (loss,) = actual.losses.values()
    close(loss, 0.01 * expected_loss, "loss")
    wanted = torch.autograd.grad((expected * upstream).sum() + 0.01 * expected_loss, [x_TD, *weights])
    found = torch.autograd.grad((actual.y * upstream).sum() + loss, [x_TD, *weights])
    for name, own, their in zip(["input", "router", "w_in", "w_out"], found, wanted, strict=True):
        close(own, their, name)


# ---------------------------------------------------------------------------------------------------------------------
# The lessons' numbers


def route_logits(logits: list[float]) -> tuple[list[int], list[float]]:
    """By the router of the lessons' model, uOmni's: experts and weights of one token."""
    moe = config_of("uomni-small").model.moe
    assert moe is not None
    router = build_router(moe.router, len(logits), len(logits)).double()
    torch.nn.init.eye_(router.weight)
    x_TD = torch.tensor([logits], dtype=torch.float64)
    plan = router(x_TD, token_batch(x_TD[None], StepContext(), None))
    return plan.expert_ids_TK[0].tolist(), plan.weights_TK[0].tolist()


def test_the_lessons_numbers() -> None:
    logits = [2.1, 0.5, 1.8, 0.2, 0.9, 1.5, 0.3, 0.4]
    assert route_logits(logits) == ([0, 2], pytest.approx([0.574, 0.426], abs=5e-4))
    probabilities = torch.tensor(logits, dtype=torch.float64).softmax(0).tolist()
    assert ", ".join(f"{p:.3f}" for p in probabilities) in PAGE
    rest = [0.45 / 6] * 6  # of which all are less
    chosen, weights = route_logits([*torch.tensor([0.28, 0.27, *rest], dtype=torch.float64).log().tolist()])
    assert (chosen, weights) == ([0, 1], pytest.approx([0.509, 0.491], abs=5e-4))
    moe = config_of("uomni").model.moe
    assert moe is not None
    in_eight = 8 * 2 * 256 * moe.experts.hidden
    assert in_eight == 2 * 256 * 4 * 256, "as many as the dense layer of 4 d"
    assert 8 * 2 * 256 * 512 == 2_097_152
    assert "2,097,152" in PAGE


def test_the_page_shows_the_lessons_comparison_as_check_prints_it() -> None:
    config = load_config(ROOT / "configs" / "uomni.yaml", ["model.moe.experts.hidden=512"])
    printed = format_comparison(config, check_degrees(config, 1))
    assert "".join(f"    {line}\n" for line in printed) in PAGE
    assert next(line for line in printed if line.startswith("this mixture")).endswith("1,024        4,096")
    assert sum(line.strip().startswith(("size    against", "GPUs    against")) for line in printed) == 2


def test_advice_follows_the_configs_numbers() -> None:
    """Mixtral on 32 ranks: large, and a cluster; two corpora are diverse data; an exchange on one rank is none."""
    path, corpora = ROOT / "configs" / "mixtral-8x7b.yaml", "data={kind: tokens, corpora: [{path: a}, {path: b}]}"
    config = load_config(path, [corpora])
    text = "\n".join(format_comparison(config, check_degrees(config, 32)))
    for words in (
        "size    for: above 10 B",
        "data    for: experts can specialize in 2 corpora",
        "GPUs    for: 32 ranks",
    ):
        assert words in text
    assert "links   a token's rows are 1,835 kB" in text


def test_the_lessons_slips() -> None:
    """What the page says instead: the sums of printed probabilities, the drawing's weights, Mixtral's expert."""
    drawn, printed = [0.05, 0.12, 0.42, 0.03, 0.38, 0.08, 0.02, 0.01], [0.28, 0.05, 0.21, 0.04, 0.08, 0.16, 0.05, 0.05]
    for numbers in (drawn, printed):
        assert f"{', '.join(f'{p:g}' for p in numbers)}, sum" in " ".join(PAGE.split())
    assert (sum(drawn), sum(printed)) == (pytest.approx(1.11), pytest.approx(0.92))
    assert route_logits(torch.tensor(drawn, dtype=torch.float64).log().tolist()) == (
        [2, 4],
        pytest.approx([0.525, 0.475], abs=1e-9),
    )
    mixtral = config_of("mixtral-8x7b").model
    assert mixtral.moe is not None
    assert 32 * mixtral.moe.experts.num_params(4096) == 32 * 3 * 4096 * 14336 == pytest.approx(5.6e9, rel=0.01)
    assert 2 * 8192 * 256 == 4_194_304


# ---------------------------------------------------------------------------------------------------------------------
# Whole models on real ranks


def run_verify(rank: int, world: int, tree: dict[str, Any], layouts: list[str]) -> list[tuple[list[str], float]]:
    """Of each layout: what differs, in sentences, and the share of dropped choices."""
    plan, _ = build_verification_spec(Config.model_validate(tree), world, layouts, "float64", full=False)
    runtime = Runtime(Launch("verify", rank, world, rank, world), CPU, "gloo", timedelta(seconds=180))
    tolerance = TOLERANCES["float64"][0]
    return [
        (explain(result, tolerance) + result.ledger + result.dropout, result.dropped / result.routed)
        for result in verify(plan, runtime)
    ]


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_twin_is_the_same_on_one_two_and_four_expert_parallel_ranks(name: str) -> None:
    config = config_of(f"{name}-small")
    layouts = ["ep=1,micro_steps=1", "ep=2,micro_steps=1", "ep=4,micro_steps=1"]
    for results in run_ranks(4, run_verify, 4, config.model_dump(mode="json"), layouts):
        for layout, (sentences, dropped) in zip(layouts, results, strict=True):
            assert not sentences, (layout, sentences)
            assert (dropped > 0) is (config.model.moe.capacity.kind != "dropless"), layout  # type: ignore[union-attr]


# The originals' own layouts with 2 in the place of each degree: (ranks, layout).
OWN_LAYOUTS = {
    "glam": (8, "pp=2,tp=2,ep=4,data=sharded,micro_steps=2"),
    "mixtral-8x7b": (8, "pp=2,cp=4,ep=4,data=sharded,micro_steps=2,recompute=moe"),
    "gpt4-class": (8, "pp=2,tp=2,ep=2,etp=2,data=sharded,micro_steps=2,recompute=block"),
    "1t-20b": (8, "pp=2,ep=4,data=sharded,micro_steps=2,recompute=moe"),
}


@pytest.mark.parametrize(
    "name",
    ["gpt4-class", *(pytest.param(name, marks=pytest.mark.full) for name in OWN_LAYOUTS if name != "gpt4-class")],
)
def test_a_twin_is_the_same_in_its_originals_kind_of_layout(name: str) -> None:
    world, layout = OWN_LAYOUTS[name]
    named = {part.split("=")[0] for part in layout.split(",")} - {"micro_steps", "recompute"}
    parallel, moe = config_of(name).parallel, config_of(name).model.moe
    assert moe is not None
    assert named == {axis for axis in ("cp", "tp", "pp", "ep", "etp") if getattr(parallel, axis) > 1} | {"data"}
    tree = config_of(f"{name}-small").model_dump(mode="json")
    tree["model"]["moe"]["dispatcher"] = moe.dispatcher.model_dump(mode="json")
    for ((sentences, _),) in run_ranks(world, run_verify, world, tree, [layout]):
        assert not sentences


# ---------------------------------------------------------------------------------------------------------------------
# 2,048 experts


def tree_of_2048(folder: Path) -> dict[str, Any]:
    """One block of switch-2048-small, narrower, in float64. Capacity over all tokens: the same drop on every layout."""
    tree = config_of("switch-2048-small").model_dump(mode="json")
    tree["run"]["folder"] = str(folder)
    tree["model"] |= {"num_layers": 1, "d_model": 16, "init_std": 0.3, "attention": {"num_heads": 2, "head_size": 8}}
    tree["model"]["moe"]["experts"]["hidden"] = 8
    tree["model"]["moe"]["capacity"]["scope"] = "global"
    tree["training"] |= {"global_batch": 8, "sequence_length": 64, "dtype": "float64"}
    tree["training"]["schedule"]["warmup_steps"] = 1
    return tree


def take_steps(
    rank: int, world: int, tree: dict[str, Any], steps: list[int], start: str | None = None, save: bool = False
) -> dict[str, Any]:
    """Trains these steps, from the checkpoint `start` if there is one, and saves in the run's folder if asked to.

    By step: loss, norm, drops, and the gradients and updated weights that this rank has, by logical name."""
    tree["parallel"]["ep"] = world
    config = Config.model_validate(tree)
    runtime = Runtime(Launch("test", rank, world, rank, world), CPU, "gloo", timedelta(seconds=180))
    mesh, model, engine = build(config, runtime, check_degrees(config, world), initialize=start is None)
    folder = Path(config.run.folder)
    seen: dict[str, Any] = {}
    assert isinstance(engine, NativeEngine)
    if start is not None:
        load_checkpoint(Path(start), model, engine.state, runtime, mesh)

    def note(what: str) -> None:
        for logical in logical_parameters(model):
            tensor = logical.parameter if what == "weight" else logical.parameter.grad
            assert tensor is not None
            for name, whole in logical.whole(tensor.detach().clone()).items():
                seen[f"{step}/{what}/{name}"] = whole.clone()  # a view would be sent with all experts

    engine.optimizer.register_step_pre_hook(lambda *_: note("gradient"))
    for step in steps:
        tokens = torch.randint(0, 256, (8, 65), generator=torch.Generator().manual_seed(step))
        first, count = shard_bounds(8, mesh.degrees.dp, mesh.dp_rank)
        rows = tokens[first : first + count]
        batch = MicroBatch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), torch.arange(first, first + count))
        report = train_step(model, engine, [batch], config.training, mesh, step=step, seed=config.seed)
        note("weight")
        kept_E = report.layers[0].kept_E
        seen |= {f"{step}/loss": report.loss, f"{step}/norm": report.grad_norm, f"{step}/kept": kept_E.tolist()}
    if save:
        keep, quiet = CheckpointConfig(background=False), {"layout": "", "print_rank_0": lambda text: None}
        with CheckpointSaver(folder, model, engine.state, mesh, runtime, keep, config=tree, **quiet) as saver:
            saver.save(steps[-1] + 1, is_last=True)
    return seen


@pytest.mark.full
def test_2048_experts_on_8_ranks_then_4_are_those_of_one(tmp_path: Path) -> None:
    """A step on 8 ranks, saved, and one more on 4 from there: losses, drops, every gradient and weight are those of one
    rank that takes both."""
    (expected,) = run_ranks(1, take_steps, 1, tree_of_2048(tmp_path / "one"), [0, 1])
    for step in (0, 1):
        kept = expected[f"{step}/kept"]
        assert len(kept) == 2048
        assert 0.05 < 1 - sum(kept) / 512 < 0.9
        assert sum(count > 0 for count in kept) > 100
    tree = tree_of_2048(tmp_path / "many")
    found = run_ranks(8, take_steps, 8, tree, [0], None, True)
    start = str(tmp_path / "many" / "step_00000001")
    found += run_ranks(4, take_steps, 4, tree, [1], start)
    names = set()
    for seen in found:
        assert sum(".experts." in name and name.startswith(("0/gradient", "1/gradient")) for name in seen) in (
            512,
            1024,
        )
        names |= seen.keys()
        for name, value in seen.items():
            wanted = expected[name]
            if isinstance(value, Tensor):
                torch.testing.assert_close(
                    value, wanted, rtol=1e-9, atol=1e-11, msg=lambda text, n=name: f"{n}: {text}"
                )
            else:
                assert value == (pytest.approx(wanted, rel=1e-12) if isinstance(value, float) else wanted), name
    assert names == expected.keys()
