"""The bench: what is counted is counted rightly, what disagrees is found, what cannot be measured says so. No test
looks at how long anything takes.
"""

import json
import statistics
import time
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner, Result

import expert_parallel.bench.peers.registry as peers_module
from expert_parallel.bench import layer as bench_layer_module
from expert_parallel.bench import machine as bench_machine_module
from expert_parallel.bench import timing
from expert_parallel.bench.floor import Floor
from expert_parallel.bench.layer import (
    LayerResult,
    LayerTask,
    OutputMismatch,
    bench_layer,
    build_implementations,
    compare,
    run,
)
from expert_parallel.bench.machine import (
    AllToAllMeasurement,
    MachineProfile,
    MachineTask,
    bench_machine,
    fit_alpha_beta,
    read_machine,
)
from expert_parallel.bench.peers.implementation import Case, Implementation, NotMeasured, build_case, installed_version
from expert_parallel.bench.shapes import (
    SHAPES,
    TRAIN_SHAPES,
    LayerShape,
    choose_shape,
    choose_train_shape,
    layer_flops,
)
from expert_parallel.bench.table import format_layer_result, format_train_result
from expert_parallel.bench.timing import Workload, measure, peak_memory
from expert_parallel.bench.train import TrainTask, bench_train, our_config, random_batch
from expert_parallel.cli.app import app
from expert_parallel.model.parallelize import build_model
from expert_parallel.runtime.process import Launch, Runtime
from tests.launches import ROOT, assert_refused
from tests.ranks import run_ranks

SMALL = LayerShape(tokens=24, d_model=16, hidden=8, num_experts=4, k=2)
ONE = Runtime(Launch("test"), torch.device("cpu"), "gloo", timedelta(seconds=60))
SMALL_DECODER = ["num_layers=2", "num_heads=2", "head_size=8", "sequence_length=8", "vocab_size=32"]
SMALL_LAYER = ["tokens=32", "d_model=16", "hidden=8", "num_experts=4"]
SMALL_TRAIN = choose_train_shape("base", SMALL_DECODER + SMALL_LAYER)


def on_rank(rank: int, world_size: int) -> Runtime:
    launch = Launch("test", rank, world_size, rank, world_size)
    return Runtime(launch, torch.device("cpu"), "gloo", timedelta(seconds=60))


def small_case(activation: str = "gelu", shape: LayerShape = SMALL) -> Case:
    return build_case(shape, activation, torch.float32, ONE, None)


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


@pytest.fixture(autouse=True)
def _threads_as_before() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# ---------------------------------------------------------------------------------------------------------------------
# Shapes and what they cost


def test_shapes_can_be_changed_and_scaled() -> None:
    assert choose_shape("base") == SHAPES["base"]
    assert choose_shape("mixtral", ["tokens=100", "activation=gelu"], 0.5).tokens == 50
    given = choose_shape("given", ["tokens=6", "d_model=4", "hidden=5", "num_experts=3", "k=2"])
    assert given == LayerShape(tokens=6, d_model=4, hidden=5, num_experts=3, k=2)


@pytest.mark.parametrize(
    ("name", "changes", "what"),
    [
        ("huge", [], "--shape is 'huge', it must be one of base, fine-grained, "),
        ("given", ["tokens=6", "k=2"], "--shape given: d_model, hidden, num_experts must be given, as in tokens=1024"),
        (
            "base",
            ["expert=3"],
            "'expert=3' is not a change of a shape: it must be NAME=VALUE with one of tokens, d_model, ",
        ),
        ("base", ["peers=dense"], "'peers=dense' is not a change of a shape"),
        ("base", ["k=two"], "'k=two': k must be a whole number"),
        ("base", ["k=9"], "the shape is invalid: k (9) is larger than num_experts (8)"),
        ("base", ["tokens=0"], "the shape is invalid: tokens: input should be greater than or equal to 1"),
        ("base", ["activation=relu"], "the shape is invalid: activation: input should be 'gelu' or 'swiglu'"),
    ],
)
def test_shapes_that_cannot_be_are_refused(name: str, changes: list[str], what: str) -> None:
    with pytest.raises(ValueError, match=r"^.") as error:
        choose_shape(name, changes)
    assert str(error.value).startswith(what)


def test_a_decoder_has_whole_sequences() -> None:
    with pytest.raises(ValueError, match=r"tokens \(1024\) is not a multiple of sequence_length \(300\)"):
        choose_train_shape("base", ["sequence_length=300"], 0.5)


def test_flops_by_hand() -> None:
    """6 tokens, 2 choices: 12 rows; an expert has two matrices of 4 x 5, each in three products of 2 * 20 a row."""
    shape = LayerShape(tokens=6, d_model=4, hidden=5, num_experts=3, k=2)
    assert layer_flops(shape, "gelu") == 12 * 2 * 3 * 40
    assert layer_flops(shape, "swiglu") == 12 * 3 * 3 * 40


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_flops_are_those_of_a_layer_that_is_counted_by_torch(activation: str) -> None:
    """The plain loop's, less its router's; and the floor's: of all experts, 6 or 9 products each."""
    case = small_case(activation, SMALL.model_copy(update={"tokens": 23}))  # 46 rows do not divide evenly
    loop = peers_module.PEERS["mask loop"](case)
    with FlopCounterMode(display=False) as counter:
        run(loop, case)
    router = 3 * 2 * 23 * 16 * 4
    assert counter.get_total_flops() - router == layer_flops(case.shape, activation)
    floor = Floor(case)
    assert floor.flops == layer_flops(case.shape, activation)
    assert floor.rows_e == [12, 12, 11, 11]
    assert len(floor.products) == 4 * {"gelu": 6, "swiglu": 9}[activation]
    with FlopCounterMode(display=False) as counter:
        floor.run()
    assert counter.get_total_flops() == floor.flops


def floor_of_rank(rank: int) -> int:
    shape = SMALL.model_copy(update={"num_experts": 5})
    return Floor(build_case(shape, "swiglu", torch.float32, on_rank(rank, 2), dist.group.WORLD)).flops


def test_the_ranks_share_the_floor() -> None:
    shape = SMALL.model_copy(update={"num_experts": 5})
    first, second = run_ranks(2, floor_of_rank)
    assert first > second > 0  # three experts and two
    assert first + second == layer_flops(shape, "swiglu")


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_a_trained_shape_is_our_model(activation: str) -> None:
    config = our_config(TrainTask(shape=SMALL_TRAIN), activation, 1).model
    assert config.num_params() == sum(parameter.numel() for parameter in build_model(config).parameters())
    idle = 2 * (4 - 2) * {"gelu": 2, "swiglu": 3}[activation] * 16 * 8  # layers, experts not chosen, their matrices
    assert config.num_active_params() == config.num_params() - idle
    assert config.flops_per_token(8) == 6 * config.num_active_params() + 6 * 2 * 8 * 2 * 8


def test_the_large_model_has_three_billion_parameters() -> None:
    config = our_config(TrainTask(shape=TRAIN_SHAPES["3b"]), "swiglu", 1).model
    assert 2.9e9 < config.num_params() < 3.3e9
    assert config.num_active_params() < config.num_params() / 3


# ---------------------------------------------------------------------------------------------------------------------
# Time and memory


def test_rounds_are_interleaved_and_clearing_is_not_timed() -> None:
    clock, log = [0.0], []

    def work(name: str, seconds: float) -> Workload:
        def take(what: str, duration: float) -> None:
            log.append(f"{what} {name}")
            clock[0] += duration * len(log)

        return Workload(lambda: take("run", seconds), lambda: take("clear", 1000.0))

    with mock.patch.object(timing.time, "perf_counter", side_effect=lambda: clock[0]):
        times = measure({"a": work("a", 1.0), "b": work("b", 2.0)}, torch.device("cpu"), rounds=3)
    assert log == ["run a", "clear a", "run b", "clear b"] * (timing.WARM_UP_ROUNDS + 3)
    # The log is 8 long after the warm-up: a runs as its entry 9, 13 and 17, b as 11, 15 and 19.
    assert (times["a"].smallest, times["a"].median, times["a"].largest) == (9000, 13000, 17000)
    assert (times["b"].smallest, times["b"].median, times["b"].largest) == (22000, 30000, 38000)


def time_of_rank(rank: int) -> list[float]:
    clock = [0.0]

    def work() -> None:
        clock[0] += 1 + rank

    with mock.patch.object(time, "perf_counter", side_effect=lambda: clock[0]):
        times = measure({"work": Workload(work)}, torch.device("cpu"), 2, dist.group.WORLD)
    return [times["work"].smallest, times["work"].largest]


def test_the_slowest_rank_counts() -> None:
    assert run_ranks(2, time_of_rank) == [[2000, 2000], [2000, 2000]]


def test_the_peak_of_memory_is_exact() -> None:
    """1 and 2 MB stand together, then a gradient of 0.5 MB and another 1 MB."""
    weight = torch.nn.Parameter(torch.zeros(125_000))
    stood_before = [torch.zeros(250_000)]

    def step() -> None:
        first, second = torch.empty(250_000), torch.empty(500_000)
        stood_before.clear()
        del first, second
        weight.grad = torch.empty(125_000)
        third = torch.empty(250_000)
        del third

    for _ in range(2):
        weight.grad = None
        peak = peak_memory(step, lambda: [weight.grad], torch.device("cpu"))
        assert (peak.total, peak.activations) == (3_000_000, 3_000_000)


def test_gradients_of_weights_are_told_apart() -> None:
    """A gradient of 0.5 MB that was there before, in memory that the new one may take; then it and 1 MB."""
    weight = torch.nn.Parameter(torch.zeros(125_000))
    weight.grad = torch.empty(125_000)

    def step() -> None:
        weight.grad = None
        weight.grad = torch.empty(125_000)
        torch.empty(250_000)

    peak = peak_memory(step, lambda: [weight.grad], torch.device("cpu"))
    assert (peak.total, peak.activations) == (1_500_000, 1_000_000)


# ---------------------------------------------------------------------------------------------------------------------
# The layer


def test_a_perturbed_weight_is_found() -> None:
    """A hundredth more in one matrix of one expert; without it all agree."""
    task = LayerTask(shape=SMALL, peers=("mask loop", "one-hot einsum"))
    cases = {activation: small_case(activation) for activation in ("gelu", "swiglu")}
    implementations, rows = build_implementations(task, cases)
    (agreement,) = compare(implementations, cases, 1e-4)
    assert agreement.names == ["ours", "mask loop", "one-hot einsum"]
    assert 0 < agreement.largest < 1e-5
    assert [row.name for row in rows] == agreement.names
    with torch.no_grad():
        implementations["mask loop"][0].module.w_out[3] *= 1.01
    with pytest.raises(OutputMismatch, match=r"^mask loop \(dropless, gelu\) and ours differ by .* nothing was timed$"):
        compare(implementations, cases, 1e-4)


def test_a_wrong_gradient_is_found() -> None:
    """Outputs that agree are not enough."""
    cases = {"gelu": small_case()}
    implementations, _ = build_implementations(LayerTask(shape=SMALL, peers=("mask loop",)), cases)
    loop = implementations["mask loop"][0]
    right = loop.forward
    loop.forward = lambda x_TD: right(x_TD * 1.1 - (x_TD * 0.1).detach())  # type: ignore[method-assign]
    with pytest.raises(OutputMismatch):
        compare(implementations, cases, 1e-4)


def no_such_package(case: Case) -> Implementation:
    raise NotMeasured(f"{installed_version('no-such-package')} cannot be")


def breaks(case: Case) -> Implementation:
    raise RuntimeError("no such kernel\nand more")


def test_who_is_missing_or_breaks_is_not_measured_and_never_won(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peers_module.PEERS, "missing", no_such_package)
    monkeypatch.setitem(peers_module.PEERS, "broken", breaks)
    result = bench_layer(LayerTask(shape=SMALL, rounds=1, peers=("missing", "mask loop", "broken")), ONE)
    rows = {row.name: row for row in result.rows}
    assert rows["missing"].why == "no-such-package is not installed: pip install 'expert-parallel[bench]'"
    assert rows["broken"].why == "it fails with RuntimeError: no such kernel"
    for name in ("missing", "broken"):
        assert rows[name].times is rows[name].over_ours is rows[name].over_floor is rows[name].peak is None
        (line,) = [line for line in format_layer_result(result).splitlines() if line.startswith(name)]
        assert line.split(maxsplit=1)[1] == f"not measured: {rows[name].why}"
    assert rows["mask loop"].times is not None


def test_a_result_is_complete_and_is_what_its_json_says() -> None:
    result = bench_layer(LayerTask(shape=SMALL, rounds=3, peers=("mask loop", "dense")), ONE)
    tree = json.loads(json.dumps(result.model_dump(mode="json")))
    assert LayerResult.model_validate(tree, strict=False) == result
    ours, loop, dense = result.rows
    assert ours.times is not None
    assert loop.times is not None
    assert result.floors.keys() == {"gelu"}
    assert loop.over_ours == loop.times.median / ours.times.median
    assert loop.over_floor == loop.times.median / result.floors["gelu"].median
    assert loop.rate == layer_flops(SMALL, "gelu") / loop.times.median * 1000
    assert loop.of_product == loop.rate / result.product_rate
    assert dense.computes == "dense, hidden 32, gelu"
    assert dense.rate is None  # its products are others
    for row in result.rows:
        assert row.peak is not None
        assert row.peak.total >= row.peak.activations > 24 * 16 * 4, "more than the output"
        assert row.bytes_sent is None
    assert "same outputs: ours, mask loop (gelu; largest difference" in format_layer_result(result)
    assert 1 <= result.fullest < 4


def layer_on_rank(rank: int) -> str:
    shape = SMALL.model_copy(update={"num_experts": 2})
    return bench_layer(LayerTask(shape=shape, rounds=1, peers=("mask loop",)), on_rank(rank, 2)).model_dump_json()


def test_bytes_are_compared_with_the_least() -> None:
    """Two experts on two ranks, top-2: each of 24 tokens goes to the other rank once, 16 floats in four directions."""
    first, second = (LayerResult.model_validate_json(text) for text in run_ranks(2, layer_on_rank))
    ours, loop = first.rows
    assert first.minimum_bytes == 24 * 16 * 4 * 4
    assert ours.bytes_sent is not None
    assert ours.over_minimum == ours.bytes_sent / first.minimum_bytes
    assert 1 <= ours.over_minimum < 2, "rows of 16 floats, and what travels beside them"
    assert loop.why == "on one rank only: it does not divide experts over ranks"
    assert second.rows[0].times == ours.times


def test_disagreement_ends_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench_layer_module.TOLERANCES, "float32", 0.0)
    result = invoke("layer", "--shape", "base", "--rounds", "1", "--peers", "mask loop", "tokens=16", "d_model=16")
    assert result.exit_code == 1
    assert not result.stdout
    assert "error: mask loop (dropless, gelu) and ours differ by " in result.stderr


# ---------------------------------------------------------------------------------------------------------------------
# The machine


def test_alpha_and_beta_are_found() -> None:
    sizes = [1 << 10, 1 << 14, 1 << 20, 1 << 24]
    alpha, beta = fit_alpha_beta([(size, 2e-4 + 3e-10 * size) for size in sizes])
    assert alpha == pytest.approx(2e-4)
    assert beta == pytest.approx(3e-10)
    alpha, beta = fit_alpha_beta([(1000, 1e-3), (2000, 2.5e-3)])  # which a line would meet below 0
    assert alpha == 0
    assert beta > 0


def machine_on_rank(rank: int) -> str:
    with (
        mock.patch.object(bench_machine_module, "CPU_MATMULS", [(8, 8, 8), (4, 8, 16)]),
        mock.patch.object(bench_machine_module, "CPU_COPY", 1 << 16),
        mock.patch.object(bench_machine_module, "EXCHANGES", [1 << 10, 1 << 16]),
    ):
        return bench_machine(MachineTask(rounds=1), on_rank(rank, 2)).model_dump_json()


def test_a_machine_file_is_what_was_measured(tmp_path: Path) -> None:
    first, second = (MachineProfile.model_validate_json(text) for text in run_ranks(2, machine_on_rank))
    assert first.products == second.products
    assert [(p.m, p.k, p.n) for p in first.products["bfloat16"]] == [(8, 8, 8), (4, 8, 16)]
    (exchange,) = first.exchanges
    assert (exchange.transport, exchange.ranks) == ("gloo", 2)
    assert [size for size, _ in exchange.measured] == [1 << 10, 1 << 16]
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(first.model_dump(mode="json")))
    assert read_machine(path) == first


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (None, "the machine file {path} cannot be read: No such file or directory"),
        ("{", "{path} is not a file of `bench machine`: invalid json"),
        ("{}", "{path} is not a file of `bench machine`: facts: field required"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str | None, what: str) -> None:
    path = tmp_path / "machine.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=r"^.") as error:
        read_machine(path)
    assert str(error.value).startswith(what.format(path=path))


def test_unknown_keys_of_a_machine_file_are_refused() -> None:
    exchange = {"transport": "gloo", "ranks": 2, "alpha_seconds": 0.0, "beta_seconds_per_byte": 0.0, "measured": []}
    assert AllToAllMeasurement.model_validate(exchange)
    with pytest.raises(ValueError, match="speed"):
        AllToAllMeasurement.model_validate({**exchange, "speed": 1})


# ---------------------------------------------------------------------------------------------------------------------
# Training


def batch_of_rank(rank: int) -> list[list[int]]:
    inputs_BS, targets_BS = random_batch(SMALL_TRAIN, on_rank(rank, 2))
    return torch.stack([inputs_BS, targets_BS], 1).flatten(1).tolist()


def test_the_ranks_share_the_batch() -> None:
    inputs_BS, targets_BS = random_batch(SMALL_TRAIN, ONE)
    assert inputs_BS.shape == (4, 8)
    assert torch.equal(inputs_BS[:, 1:], targets_BS[:, :-1])
    whole = torch.stack([inputs_BS, targets_BS], 1).flatten(1).tolist()
    first, second = run_ranks(2, batch_of_rank)
    assert first + second == whole


def train_on_rank(rank: int, world_size: int) -> list[float]:
    task = TrainTask(shape=SMALL_TRAIN, rounds=1, peers=("transformers model",))
    result = bench_train(task, on_rank(rank, world_size))
    assert "MixtralForCausalLM" in format_train_result(result)
    for row in result.rows:
        assert row.times is not None, row.why
        flops = 32 * our_config(task, row.activation, world_size).model.flops_per_token(8)
        assert row.mfu == flops / world_size / row.times.median * 1000 / result.product_rate
        assert row.tokens_per_second == 32 / row.times.median * 1000
    assert [row.name for row in result.rows] == ["ours", "ours, swiglu", "transformers model"]
    return [row.loss or 0.0 for row in result.rows]


def test_training_on_two_ranks_is_training_on_one() -> None:
    """Ours, and a peer whose gradients are summed: after the same steps the same loss, which has fallen."""
    (alone,) = run_ranks(1, train_on_rank, 1)
    first, second = run_ranks(2, train_on_rank, 2)
    assert first == second
    assert first == pytest.approx(alone, rel=1e-3)
    assert all(loss < 3.5 for loss in alone), "below log 32"


# ---------------------------------------------------------------------------------------------------------------------
# The commands


REFUSED = {
    "an unknown shape": (["layer", "--shape", "huge"], "--shape is 'huge', it must be one of "),
    "an unknown peer": (
        ["layer", "--peers", "mask loop,megablocks"],
        "--peers: 'megablocks' is not one of ours with capacity, ",
    ),
    "more ranks than experts": (["layer", "--ranks", "9"], "9 ranks are more than the 8 experts of --shape base"),
    "no folder": (["layer", "--json", "/no/such/folder/x.json"], "--json: there is no folder /no/such/folder"),
    "MPI without mpirun": (
        ["layer", "--ranks", "2", "--transport", "mpi"],
        "--transport mpi: ranks started by --ranks use gloo; use a launcher instead",
    ),
    "a scale that is none": (["layer", "--scale", "inf"], "--scale is inf, it must be a number"),
    "a folder for a file": (["layer", "--json", "/"], "--json: / is a folder"),
    "more ranks than sequences": (
        ["train", "--ranks", "8", "tokens=512"],
        "8 ranks are more than --shape base has experts and sequences for: 2",
    ),
    "a decoder that is none": (["train", "--shape", "qwen"], "--shape is 'qwen', it must be one of base, 3b"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_measured_is_refused(case: str) -> None:
    arguments, what = REFUSED[case]
    assert_refused(invoke(*arguments), what)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_nccl_needs_a_gpu() -> None:
    result = invoke("machine", "--transport", "nccl")
    assert result.exit_code == 2
    assert "runtime.backend is 'nccl' but there is no GPU to use" in result.stderr


def test_ranks_are_started_and_figures_written(tmp_path: Path) -> None:
    path = tmp_path / "layer.json"
    sizes = ["tokens=64", "d_model=32", "hidden=16"]
    result = invoke("layer", "--ranks", "2", "--rounds", "2", "--peers", "one-hot einsum", "--json", path, *sizes)
    assert result.exit_code == 0, result.stderr
    assert "one-hot einsum            not measured: on one rank only" in result.stdout
    written = LayerResult.model_validate(json.loads(path.read_text()), strict=False)
    assert (written.facts.ranks, written.facts.threads, written.rounds) == (2, 1, 2)
    assert written.facts.allocator in result.stdout
    ours = written.rows[0].times
    assert ours is not None
    assert ours.median == statistics.mean([ours.smallest, ours.largest])


def test_the_readme_names_every_field() -> None:
    """Of the JSON files, which others read."""
    page = (ROOT / "expert_parallel/bench/README.md").read_text()
    from expert_parallel.bench import layer, machine, train

    for kind in (
        timing.Environment,
        layer.LayerResult,
        layer.LayerRow,
        layer.OutputMatch,
        timing.Times,
        timing.PeakMemory,
        train.TrainResult,
        train.TrainRow,
        machine.MachineProfile,
        machine.MatmulMeasurement,
        machine.AllToAllMeasurement,
    ):
        for field in kind.model_fields:
            assert f"`{field}`" in page, f"{kind.__name__}.{field}"
    for name in [*SHAPES, *TRAIN_SHAPES, *peers_module.PEERS, "transformers model"]:
        assert f"`{name}`" in page, name
