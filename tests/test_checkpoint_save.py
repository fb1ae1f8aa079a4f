"""Saving and loading on real ranks: the same bits in every layout, in the background, against full disks and kills."""

import errno
import json
import multiprocessing
import os
import random as random_numbers
import resource
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from expert_parallel.checkpoint import save as saving
from expert_parallel.checkpoint import shards as parts
from expert_parallel.checkpoint.config import CheckpointConfig
from expert_parallel.checkpoint.files import Checkpoint, list_checkpoints, open_checkpoint
from expert_parallel.checkpoint.load import load_checkpoint
from expert_parallel.checkpoint.manifest import MOMENTS
from expert_parallel.checkpoint.report import compare_checkpoints, find_problems
from expert_parallel.checkpoint.save import CheckpointSaver
from expert_parallel.checkpoint.state import TorchState, balance_biases
from expert_parallel.model.config import ModelConfig
from expert_parallel.model.parallelize import build_model
from expert_parallel.moe.parameters import local_tensor, logical_parameters
from expert_parallel.parallel.degrees import ParallelDegrees
from expert_parallel.parallel.mesh import NodeGroups, ParallelMesh
from expert_parallel.runtime.process import Launch, Runtime, UserError
from tests.layouts import build_on
from tests.ranks import _server, run_ranks
from tests.test_checkpoint import run_training, settings

MODEL: dict[str, Any] = {
    "vocab_size": 259,  # divides over no ranks evenly
    "num_layers": 2,
    "d_model": 16,
    "attention": {"num_heads": 4, "num_kv_heads": 2, "head_size": 4},
    "ffn": {"hidden": 16},
    "moe_blocks": {"kind": "every_nth", "n": 2},
    "moe": {
        "num_experts": 6,  # nor over 4
        "router": {"k": 2, "score": "sigmoid", "balance_bias_rate": 0.01},
        "experts": {"hidden": 8, "bias": True},
    },
}
LAYOUTS: list[dict[str, Any]] = [
    {"world": 1},
    {"world": 3},
    {"world": 2, "ep": 2},
    {"world": 4, "ep": 4},
    {"world": 2, "tp": 2},
    {"world": 4, "tp": 4, "ep": 2},  # two ranks share a key head
    {"world": 2, "etp": 2},
    {"world": 2, "pp": 2},
    {"world": 3, "data": "sharded"},  # uneven shards, some of them empty
    {"world": 4, "ep": 2, "data": {"kind": "sharded", "shards": 2}},
    {"world": 4, "tp": 2, "pp": 2, "ep": 2, "data": "sharded"},
    {"world": 4, "cp": 2, "ep": 2, "etp": 2},
    {"world": 4, "pp": 2, "pipeline": {"kind": "1f1b"}},
]


def drawn(name: str, shape: Any) -> Tensor:
    """A function of the full name alone."""
    generator = torch.Generator().manual_seed(int.from_bytes(name.encode()[-7:], "little") + len(name))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def build(rank: int, layout: dict[str, Any]) -> tuple[Runtime, Any, Any, torch.optim.Optimizer]:
    """runtime, mesh, model and optimizer; all values NaN."""
    world = layout["world"]
    runtime = Runtime(Launch("test", rank, world, rank, world), torch.device("cpu"), "gloo", timedelta(seconds=120))
    mesh, model = build_on(layout, MODEL, seed=1)
    optimizer = torch.optim.AdamW(model.parameters())
    with torch.no_grad():
        for tensor in [*model.parameters(), *(buffer for _, buffer in balance_biases(model))]:
            local_tensor(tensor).fill_(float("nan"))
    return runtime, mesh, model, optimizer


@torch.no_grad()
def fill(model: Any, optimizer: torch.optim.Optimizer) -> None:
    """By LogicalParameter.fill, which the checkpoint room does not use."""
    for logical in logical_parameters(model):
        state = optimizer.state[logical.parameter]
        state["step"] = torch.tensor(5.0)
        logical.fill(logical.parameter, [drawn(f"weights/{name}", logical.shape) for name in logical.names])
        for moment in MOMENTS:
            state[moment] = torch.zeros_like(logical.parameter, requires_grad=False)
            logical.fill(state[moment], [drawn(f"{moment}/{name}", logical.shape) for name in logical.names])
    for name, buffer in balance_biases(model):
        buffer.copy_(drawn(name, buffer.shape))


def state_of(model: Any, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    found = [buffer for _, buffer in balance_biases(model)]
    for parameter in model.parameters():
        found += [local_tensor(parameter.detach())]
        found += [local_tensor(optimizer.state[parameter][moment]) for moment in MOMENTS]
    return [tensor.clone() for tensor in found]


def make_saver(folder: Path, built: Any, said: list[str] | None = None, **changes: Any) -> CheckpointSaver:
    runtime, mesh, model, optimizer = built
    print_rank_0 = (lambda text: None) if said is None else said.append
    config = {"model": MODEL}
    settings = CheckpointConfig(**changes)
    return CheckpointSaver(
        folder,
        model,
        TorchState(optimizer),
        mesh,
        runtime,
        settings,
        config=config,
        layout="a test",
        print_rank_0=print_rank_0,
    )


# ---------------------------------------------------------------------------------------------------------- any layout


def save_from(rank: int, layout: dict[str, Any], folder: Path) -> int:
    """The bytes that this rank wrote."""
    built = build(rank, layout)
    fill(*built[2:])
    with make_saver(folder, built) as saver:
        saver.save(5, is_last=True)
    dist.barrier()
    file = folder / "step_00000005" / f"rank_{rank:05d}.safetensors"
    return file.stat().st_size if file.exists() else 0


def load_into(rank: int, layout: dict[str, Any], folder: Path) -> tuple[int, int, int]:
    """Bytes held, bytes read, bytes of the largest single reading."""
    runtime, mesh, model, optimizer = build(rank, layout)
    seen: list[int] = []
    original = Checkpoint.read_slice

    def read_slice(checkpoint: Checkpoint, name: str, start: Any, shape: Any) -> Tensor:
        values = original(checkpoint, name, start, shape)
        seen.append(values.nbytes)
        return values

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "read_slice", read_slice)
        loaded = load_checkpoint(folder, model, TorchState(optimizer), runtime, mesh)
    assert loaded.step == 5
    found = state_of(model, optimizer)
    assert all(float(optimizer.state[parameter]["step"]) == 5 for parameter in model.parameters())
    fill(model, optimizer)
    for actual, expected in zip(found, state_of(model, optimizer), strict=True):
        assert torch.equal(actual, expected)
    return sum(tensor.nbytes for tensor in found), sum(seen), max(seen)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    run_ranks(1, save_from, {"world": 1}, folder)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_writes_the_same_and_reads_any(layout: dict[str, Any], saved: Path, tmp_path: Path) -> None:
    world = layout["world"]
    sizes = run_ranks(world, save_from, layout, tmp_path)
    opened, reference = open_checkpoint(tmp_path), open_checkpoint(saved)
    assert list(find_problems(opened)) == []
    assert list(compare_checkpoints(opened, reference)) == [], "every digest is that of one rank alone"
    assert {n: e.digest for n, e in opened.tensors.items()} == {n: e.digest for n, e in reference.tensors.items()}
    name = "exp_avg/blocks.1.moe.experts.4.w_in"
    assert torch.equal(opened.read(name), drawn(name, (16, 16)))
    # Each element is written once, and all ranks write.
    assert sum(sizes) < 1.15 * (saved / "step_00000005" / "rank_00000.safetensors").stat().st_size
    assert min(sizes) > 0.4 * max(sizes), sizes
    # What this layout wrote is read by another, and what another wrote by this one.
    for there, source in ((LAYOUTS[10], tmp_path), (layout, saved)):
        for held, read, largest in run_ranks(there["world"], load_into, there, source):
            assert read == held, "its own part and no more"
            assert largest <= 259 * 16 * 8, "one tensor at a time"


def test_two_experts_swapped_in_reading_are_found(saved: Path) -> None:
    """A defect of our own loading, which neither SHA-256 nor names could tell."""
    messages = run_ranks(2, load_with_defect, {"world": 2, "ep": 2}, saved)
    assert messages[0] == messages[1]
    assert "weights/blocks.1.moe.experts.4.w_out is not what was saved" in messages[0]


def load_with_defect(rank: int, layout: dict[str, Any], folder: Path) -> str:
    runtime, mesh, model, optimizer = build(rank, layout)
    original = Checkpoint.read_slice

    def wrong(checkpoint: Checkpoint, name: str, start: Any, shape: Any) -> Tensor:
        name = name.replace("weights/blocks.1.moe.experts.4.w_out", "weights/blocks.1.moe.experts.5.w_out")
        return original(checkpoint, name, start, shape)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "read_slice", wrong)
        try:
            load_checkpoint(folder, model, TorchState(optimizer), runtime, mesh)
        except UserError as error:
            return str(error)
    return ""


# ------------------------------------------------------------------------------------------------------- in background


def save_and_train_on(rank: int, folder: Path, background: bool) -> tuple[bool, list[str]]:
    """Writing is held up until the weights have changed. Returns whether save() came back before."""
    built = build(rank, {"world": 2, "ep": 2})
    model, optimizer = built[2:]
    fill(model, optimizer)
    may_write, came_back, said = threading.Event(), False, []
    original = saving.write_rank_file

    def late(*arguments: Any) -> Any:
        assert may_write.wait(20 if background else 0.2) is background
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "write_rank_file", late)
        with make_saver(folder, built, said, background=background) as saver:
            saver.save(5)
            came_back = not list_checkpoints(folder)
            for tensor in [*model.parameters(), *(s[m] for s in optimizer.state.values() for m in MOMENTS)]:
                local_tensor(tensor.detach()).zero_()
            assert not said or not background
            may_write.set()
    return came_back, said


@pytest.mark.parametrize("background", [True, False])
def test_what_is_saved_is_what_was_there(background: bool, saved: Path, tmp_path: Path) -> None:
    """pytorch#144657: a background save that reads weights which training has changed since."""
    results = run_ranks(2, save_and_train_on, tmp_path, background)
    assert [came_back for came_back, _ in results] == [background, background]
    assert results[0][1] == [f"saved {tmp_path}/step_00000005"]
    assert list(compare_checkpoints(open_checkpoint(tmp_path), open_checkpoint(saved))) == []


def save_after_others(rank: int, folder: Path) -> None:
    with make_saver(folder, built := build(rank, {"world": 2, "ep": 2}), keep=2, keep_every=4) as saver:
        fill(*built[2:])
        buffers = [buffer.data_ptr() for buffer in saver.buffers]
        for step in range(2, 12, 2):
            saver.save(step)
        saver.finish()
        assert buffers == [buffer.data_ptr() for buffer in saver.buffers], "host memory is used again"


def test_leftovers_do_not_get_in_and_the_right_ones_stay(tmp_path: Path) -> None:
    """Of an earlier attempt at the same step: a rank's file and marker, complete."""
    run_ranks(2, save_from, {"world": 2, "ep": 2}, tmp_path / "other")
    stale = tmp_path / "partial_step_00000002_00000000"
    shutil.copytree(tmp_path / "other" / "step_00000005", stale)
    (stale / "rank_00001.json").write_text("{}")
    shutil.rmtree(tmp_path / "other")
    run_ranks(2, save_after_others, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "latest",
        "step_00000004",
        "step_00000008",
        "step_00000010",
    ]
    assert (tmp_path / "latest").readlink() == Path("step_00000010")
    for path in list_checkpoints(tmp_path):
        assert list(find_problems(open_checkpoint(path))) == []
        assert sorted(file.name for file in path.iterdir()) == [
            "manifest.json",
            "rank_00000.safetensors",
            "rank_00001.safetensors",
        ]


def save_over_others(rank: int, folder: Path) -> list[str]:
    """Returns what is said of three saves."""
    said: list[str] = []
    with make_saver(folder, built := build(rank, {"world": 2, "ep": 2}), said) as saver:
        fill(*built[2:])
        for step in (2, 4, 6):
            saver.save(step)
    return said


def test_a_name_that_is_taken_is_not_overwritten(tmp_path: Path) -> None:
    """By a folder whose manifest is lost, by another run's. It is said, on all ranks, and training goes on."""
    for name in ("step_00000002", "step_00000004"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_00000004" / "manifest.json").write_text("{}")
    said, other = run_ranks(2, save_over_others, tmp_path)
    taken = [
        f"step 2 is not saved: {tmp_path}/step_00000002 exists already; the last checkpoint is step_00000004; "
        "training continues",
        f"step 4 is not saved: {tmp_path}/step_00000004 exists already; the last checkpoint is step_00000004; "
        "training continues",
    ]
    assert other == taken
    assert said == [*taken, f"saved {tmp_path}/step_00000006"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "latest",
        "step_00000002",
        "step_00000004",
        "step_00000006",
    ]
    assert list((tmp_path / "step_00000002").iterdir()) == []


def test_a_run_does_not_start_beside_a_checkpoint_without_its_manifest(tmp_path: Path) -> None:
    """Not from the older one, in silence."""
    assert run_ranks(2, run_training, 2, settings(tmp_path, ep=2, steps=2, every=1)) == ["", ""]
    lost = tmp_path / "checkpoints" / "step_00000002"
    (lost / "manifest.json").unlink()
    errors = run_ranks(2, run_training, 2, settings(tmp_path, ep=2, steps=3, every=1))
    assert errors == [f"{lost} has no manifest.json: restore it or remove the folder"] * 2
    shutil.rmtree(lost)
    (tmp_path / "checkpoints" / "step_00000001").rename(tmp_path / "checkpoints" / "step_00000020")
    for error in run_ranks(2, run_training, 2, settings(tmp_path, ep=2, steps=3, every=1)):
        assert "step_00000020 has the name of step 20, its manifest.json is of step 1" in error


def save_with_a_doubled_part(rank: int, folder: Path) -> str:
    """Both replicas think that a tensor is theirs to write."""
    built = build(rank, {"world": 2})
    fill(*built[2:])
    with make_saver(folder, built) as saver:
        if rank == 1:
            saver.local_tensors = list(parts.assign_writers(built[2], fake_mesh()))
        saver.buffers = list(saver._allocate_buffers())
        try:
            saver.save(5, is_last=True)
            saver.finish()
        except UserError as error:
            return str(error)
    return ""


def fake_mesh() -> ParallelMesh:
    """Of one rank alone, without torch.distributed."""
    names = ["pp", "dp", "cp", "tp", "stage", "dense", "sequence", "kv_replica", "tied_embedding", "ep", "etp", "edp"]
    groups: dict[str, Any] = {f"{name}_group": None for name in names}
    nodes = NodeGroups(1, None, None)
    return ParallelMesh(degrees=ParallelDegrees(1), rank=0, **groups, nodes=nodes, dense_mesh=None, expert_mesh=None)


def test_ranks_that_write_the_same_twice_are_refused(tmp_path: Path) -> None:
    messages = run_ranks(2, save_with_a_doubled_part, tmp_path)
    assert messages[0] == messages[1]
    assert "is covered twice: the shards at" in messages[0]
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------------------- a full disk


def fill_disk(rank: int, tree: dict[str, Any], failing: list[int]) -> tuple[str, str]:
    """Trains; on rank 1 the saves with these numbers meet a full disk. Returns the error and what rank 0 said."""
    import contextlib
    import io

    original, count = saving.write_rank_file, [0]

    def write_rank_file(folder: Path, rank: int, content: Any) -> Any:
        count[0] += 1
        if rank == 1 and count[0] in failing:
            path = folder / "rank_00001.safetensors"
            path.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return original(folder, rank, content)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.setattr(saving, "write_rank_file", write_rank_file)
        error = run_training(rank, 2, tree)
    return error, said.getvalue()


@pytest.mark.parametrize("background", [True, False])
def test_training_goes_on_when_the_disk_is_full(background: bool, tmp_path: Path) -> None:
    tree = settings(tmp_path, ep=2, steps=6, every=2, checkpoint={"background": background})
    (error, said), (other_error, _) = run_ranks(2, fill_disk, tree, [2])
    assert (error, other_error) == ("", "")
    folder = tmp_path / "checkpoints"
    assert f"saved {folder}/step_00000002\n" in said
    assert f"saved {folder}/step_00000006\n" in said
    (line,) = [line for line in said.splitlines() if "not saved" in line]
    assert line.startswith(f"step 4 is not saved: cannot write {folder}/partial_step_00000004_")
    assert line.endswith(
        "/rank_00001.safetensors: No space left on device; the last checkpoint is step_00000002; training continues"
    )
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step_00000002", "step_00000006"]
    assert list(find_problems(open_checkpoint(folder))) == []


@pytest.mark.parametrize("background", [True, False])
def test_the_last_save_must_succeed(background: bool, tmp_path: Path) -> None:
    tree = settings(tmp_path, ep=2, steps=4, every=2, checkpoint={"background": background})
    (error, said), (other_error, _) = run_ranks(2, fill_disk, tree, [2])
    assert error == other_error
    assert error.startswith("step 4 is not saved: cannot write ")
    assert error.endswith("No space left on device; the last checkpoint is step_00000002")
    assert "done:" not in said
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step_00000002"]
    assert open_checkpoint(tmp_path).step == 2


def small_child(folder: Path, megabytes_of_files: float, connection: Any) -> None:
    """Saves, under a limit on the size of files: the third save fails."""
    torch.set_num_threads(1)
    saver, said = lone_saver(folder), []
    saver.print_rank_0 = said.append
    saver.save(1)
    saver.finish()
    if megabytes_of_files:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(megabytes_of_files * 1e6), -1))
    saver.save(2)
    saver.save(3)
    connection.send(said)


def child_says(target: Any, *arguments: Any) -> Any:
    ours, theirs = multiprocessing.Pipe()
    process = _server.Process(target=target, args=(*arguments, theirs), daemon=True)
    process.start()
    assert ours.poll(120)
    answer = ours.recv()
    process.kill()
    process.join()
    return answer


def test_a_file_that_the_system_refuses_to_grow(tmp_path: Path) -> None:
    """A real failure of write(), half way."""
    said = child_says(small_child, tmp_path, 0.3)
    assert said[0] == f"saved {tmp_path}/step_00000001"
    assert said[1].startswith(f"step 2 is not saved: cannot write {tmp_path}/partial_step_00000002_")
    assert said[1].endswith("File too large; the last checkpoint is step_00000001; training continues")
    assert list(find_problems(open_checkpoint(tmp_path))) == []


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """1.5 files of a checkpoint fit on it. Where mounting is not allowed, RLIMIT_FSIZE (above) is the proof."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.xfail("this process may not mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_full(tiny_disk: Path) -> None:
    said = child_says(small_child, tiny_disk, 0)
    assert said[0] == f"saved {tiny_disk}/step_00000001"
    assert said[1].endswith("No space left on device; the last checkpoint is step_00000001; training continues")
    assert list(find_problems(open_checkpoint(tiny_disk))) == []


# ---------------------------------------------------------------------------------------------------------------- kills


def lone_saver(folder: Path) -> CheckpointSaver:
    """One process, no torch.distributed: about 0.6 MB."""
    tree = {**MODEL, "vocab_size": 1000, "d_model": 32}
    model = build_model(ModelConfig.model_validate(tree), dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        optimizer.state[parameter] = {moment: torch.zeros_like(parameter) for moment in MOMENTS}
    runtime = Runtime(Launch("test"), torch.device("cpu"), "gloo", timedelta(seconds=60))
    settings, config = CheckpointConfig(keep=2), {"model": tree}
    state = TorchState(optimizer)
    return CheckpointSaver(
        folder,
        model,
        state,
        fake_mesh(),
        runtime,
        settings,
        config=config,
        layout="a test",
        print_rank_0=lambda text: None,
    )


def save_until_killed(folder: Path, connection: Any) -> None:
    torch.set_num_threads(1)
    saver = lone_saver(folder)
    step = list_checkpoints(folder)[-1] if list_checkpoints(folder) else None
    first = 1 + (0 if step is None else int(step.name.removeprefix("step_")))
    connection.send("ready")
    for number in range(first, first + 1000):
        with torch.no_grad():
            for parameter in saver.model.parameters():
                parameter.fill_(number)
        saver.save(number)


def test_killed_at_any_moment_of_saving(tmp_path: Path) -> None:
    """50 times, each after the leftovers of the one before. Whatever has a checkpoint's name is whole, the newest is
    never older than before, and `latest` leads to one."""
    generator, newest, in_the_middle = random_numbers.Random(0), 0, 0
    for number in range(50):
        ours, theirs = multiprocessing.Pipe()
        process = _server.Process(target=save_until_killed, args=(tmp_path, theirs), daemon=True)
        process.start()
        assert ours.poll(120)
        assert ours.recv() == "ready"
        while not list_checkpoints(tmp_path):
            time.sleep(0.005)
        time.sleep(generator.uniform(0, 0.15))
        process.kill()
        process.join()
        in_the_middle += bool(list(tmp_path.glob("partial_*")))
        for path in list_checkpoints(tmp_path):
            assert list(find_problems(opened := open_checkpoint(path))) == [], number
            assert (opened.read("weights/final_norm.weight") == opened.step).all()
        assert open_checkpoint(tmp_path).step >= newest
        newest = open_checkpoint(tmp_path).step
        assert open_checkpoint(tmp_path / "latest").step >= newest - 1
    assert in_the_middle >= 10, "the kills must meet saves under way"


# ----------------------------------------------------------------------------------------------------- start_from, keep


def test_a_run_starts_from_the_weights_of_another(tmp_path: Path) -> None:
    """Its first loss is that of the other's end, its step 0; a second start goes on from its own checkpoint."""
    exact = {"dropout": 0.0, "jitter": 0.0, "steps": 2, "every": 2}
    first, then = tmp_path / "first", tmp_path / "then"
    assert run_ranks(2, run_training, 2, settings(first, ep=2, **exact)) == ["", ""]
    start = {"start_from": str(first)}
    tree = settings(then, ep=1, checkpoint=start, **exact)
    tree["model"]["moe"]["losses"] = []  # changes no weight's meaning
    assert run_ranks(1, run_training, 1, tree) == [""]
    records = {
        name: [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("first", "then")
    }
    assert records["then"][0]["step"] == 0
    assert records["then"][0]["eval/loss"] == pytest.approx(records["first"][-1]["eval/loss"], rel=1e-12)
    shutil.rmtree(first)  # not looked at again
    tree["training"]["steps"] = 3
    assert run_ranks(1, run_training, 1, tree) == [""]
    assert open_checkpoint(then).step == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["moe"].update(num_experts=8), "model.moe.num_experts is 6 there and 8 here"),
        (lambda m: m["moe"]["router"].update(scale=2.0), "model.moe.router.scale is 1.0 there and 2.0 here"),
        (lambda m: m.update(norm={"kind": "layer_norm"}), "model.norm.kind is 'rms_norm' there and 'layer_norm' here"),
    ],
    ids=["experts", "scale", "norm"],
)
def test_weights_of_another_model_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    first = settings(tmp_path / "first", ep=1, steps=1)
    assert run_ranks(1, run_training, 1, first) == [""]
    tree = settings(tmp_path / "then", ep=1, steps=1, checkpoint={"start_from": str(tmp_path / "first")})
    change(tree["model"])
    (error,) = run_ranks(1, run_training, 1, tree)
    assert error.startswith("checkpoint.start_from: ")
    assert message in error
    assert not (tmp_path / "then").exists()


def test_weights_that_are_not_there_are_refused(tmp_path: Path) -> None:
    tree = settings(tmp_path / "then", ep=1, checkpoint={"start_from": str(tmp_path / "absent")})
    assert run_ranks(1, run_training, 1, tree) == [f"checkpoint.start_from: there is no checkpoint {tmp_path}/absent"]
