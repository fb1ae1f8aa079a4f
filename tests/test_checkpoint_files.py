"""The format of checkpoints, without ranks: digests, pieces, manifests, folders, and what is told of a damaged one."""

import itertools
import json
import math
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from typer.testing import CliRunner

from expert_parallel.checkpoint import digest as digests
from expert_parallel.checkpoint.digest import MODULUS, digest, format_digest
from expert_parallel.checkpoint.files import Checkpoint, CheckpointWriter, expected_shapes, open_checkpoint
from expert_parallel.checkpoint.folders import (
    complete_checkpoints,
    list_checkpoints,
    make_partial_folder,
    prune,
    publish,
    remove_partial_folders,
    update_latest_link,
)
from expert_parallel.checkpoint.load import load_checkpoint
from expert_parallel.checkpoint.manifest import Manifest, ShardMetadata, TensorMetadata, add_checksum, check_shards
from expert_parallel.checkpoint.report import find_problems
from expert_parallel.checkpoint.state import TorchState
from expert_parallel.checkpoint.tensor_files import write_tensors
from expert_parallel.cli.app import app
from expert_parallel.model.config import ModelConfig
from expert_parallel.model.parallelize import build_model
from expert_parallel.moe.parameters import LogicalParameter, pieces
from expert_parallel.parallel.sharding import TensorShard

MODEL: dict[str, Any] = {
    "vocab_size": 300,
    "num_layers": 2,
    "d_model": 16,
    "attention": {"num_heads": 2, "head_size": 8},
    "ffn": {"hidden": 16},
    "moe_blocks": {"kind": "every_nth", "n": 2},
    "moe": {
        "num_experts": 3,
        "router": {"k": 2, "score": "sigmoid", "balance_bias_rate": 0.01},
        "experts": {"hidden": 8},
    },
}
CONFIG = ModelConfig.model_validate(MODEL)
COUNT = len(expected_shapes(CONFIG, moments=False))
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def random(shape: Any, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# ------------------------------------------------------------------------------------------------------------- digests


def slow_digest(part: Tensor, start: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """By the formula, in Python's integers, element by element."""
    word = (1 << 64) - 1
    total, size = 0, part.element_size()
    for place in itertools.product(*map(range, part.shape)):
        index = 0
        for first, step, extent in zip(start, place, shape, strict=True):
            index = index * extent + first + step
        raw = bytes(part[place].clone().view(1).view(torch.uint8).tolist())
        words = [raw[:4], raw[4:]] if size == 8 else [raw]
        for number, bits in enumerate(words):
            x = ((index * len(words) + number) * digests._SPREAD + int.from_bytes(bits, "little")) & word
            x ^= x >> 32
            x = x * 0xBF58476D1CE4E5B9 & word
            x ^= x >> 29
            x = x * 0x94D049BB133111EB & word
            x ^= x >> 32
            y = x * 0xD6E8FEB86659FD93 & word
            total += x + ((y ^ (y >> 31)) << 64)
    return total % (1 << 128)


@st.composite
def rectangles(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[slice, ...]]:
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    bounds = [sorted(draw(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)))) for n in shape]
    return shape, tuple(slice(low, high + 1) for low, high in bounds)


@given(rectangles(), st.sampled_from(DTYPES), st.integers(0, 9))
def test_digest_of_a_rectangle_is_the_formulas(case: Any, dtype: torch.dtype, seed: int) -> None:
    shape, where = case
    whole = random(shape, seed, dtype)
    start = tuple(part.start for part in where)
    assert digest(whole[where], start, shape) == slow_digest(whole[where], start, shape)


@given(st.integers(0, 2**16), st.sampled_from(DTYPES), st.integers(1, 40))
def test_digests_add_over_parts(seed: int, dtype: torch.dtype, chunk: int) -> None:
    whole = random((7, 6, 5), seed, dtype)
    expected = digest(whole, (0, 0, 0), whole.shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digests, "CHUNK", chunk)  # sums are those of any chunks
        for dim, sizes in ((0, (3, 4)), (1, (1, 0, 5)), (2, (2, 3))):
            total, first = 0, 0
            for part in whole.split(sizes, dim):
                start = [0, 0, 0]
                start[dim] = first
                total += digest(part, start, whole.shape)
                first += part.shape[dim]
            assert total % MODULUS == expected


def test_digest_sees_what_has_moved() -> None:
    whole = random((4, 4))
    expected = digest(whole, (0, 0), (4, 4))
    changed = whole.clone()
    changed[2, 3] = -changed[2, 3]
    swapped = whole[[1, 0, 2, 3]]
    assert len({expected, *(digest(x, (0, 0), (4, 4)) for x in (changed, swapped, whole.mT))}) == 4
    zeros = torch.zeros(2, 2)
    assert digest(zeros, (0, 0), (2, 2)) != digest(zeros.where(torch.eye(2) == 0, -0.0), (0, 0), (2, 2)), "bits count"
    assert len(format_digest(1)) == 32


# -------------------------------------------------------------------------------------------------------------- pieces


@dataclass(frozen=True)
class PartOf(TensorShard):
    """A slice that needs no ranks."""

    number: int = 0
    of: int = 1

    @property
    def parts(self) -> int:
        return self.of

    @property
    def index(self) -> int:
        return self.number


@st.composite
def layouts(draw: st.DrawFn) -> dict[str, Any]:
    is_expert = draw(st.booleans())
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    divided = draw(st.booleans())
    dim = draw(st.integers(-len(shape), -1))
    blocks, parts = draw(st.integers(1, 2)), draw(st.integers(1, 4))
    if divided:
        shape[dim] = blocks * draw(st.integers(parts, 7))
    experts = draw(st.integers(1, 4)) if is_expert else None
    return {
        "shape": shape,
        "experts": experts,
        "slice": (dim, blocks, parts) if divided else None,
        "shards": draw(st.integers(1, 5)),
    }


@given(layouts())
def test_pieces_cover_each_logical_tensor_once(layout: dict[str, Any]) -> None:
    """The parts of all ranks, put back where `pieces` says, against the tensor they were cut from by other code."""
    shape, experts = tuple(layout["shape"]), layout["experts"]
    names = tuple(f"e{number}" for number in range(experts or 1))
    whole = {name: random(shape, seed) for seed, name in enumerate(names)}
    stack = torch.stack(list(whole.values())) if experts else whole[names[0]]
    found = {name: torch.full(shape, math.nan) for name in names}
    written = {name: torch.zeros(shape) for name in names}
    dim, blocks, parts = layout["slice"] or (-1, 1, 1)
    for number in range(parts):
        # [block 0 | block 1 | ...], each divided alike: cut here by tensor_split, there by shard_segments
        local = torch.cat([block.tensor_split(parts, dim)[number] for block in stack.chunk(blocks, dim)], dim)
        held = PartOf(dim, shape[dim], None, blocks, number=number, of=parts) if layout["slice"] else None  # type: ignore[arg-type]
        logical = LogicalParameter(nn.Parameter(local), names, experts is not None, held)
        first = 0
        for shard in local.chunk(layout["shards"]):  # FSDP2 shards dimension 0
            for name, start, view in pieces(logical, shard, first):
                where = tuple(slice(s, s + n) for s, n in zip(start, view.shape, strict=True))
                found[name][where] = view
                written[name][where] += 1
            first += len(shard)
    for name in names:
        assert torch.equal(found[name], whole[name]), name
        assert (written[name] == 1).all(), name


def test_a_shard_without_rows_has_no_pieces() -> None:
    logical = LogicalParameter(nn.Parameter(torch.zeros(3, 2)), ("a",), False)
    assert list(pieces(logical, torch.zeros(0, 2), 0)) == []


# ------------------------------------------------------------------------------------------------ reading and writing


def tensors(seed: int = 0, moments: bool = False) -> dict[str, Tensor]:
    """Each in a dtype of its own."""
    shapes = expected_shapes(CONFIG, moments)
    return {name: random(shape, seed + i, DTYPES[i % 4]) for i, (name, shape) in enumerate(shapes.items())}


def write(folder: Path, content: dict[str, Tensor], step: int = 0, **settings: Any) -> Path:
    final = folder / f"step_{step:08d}"
    with CheckpointWriter(final, step=step, config={"model": MODEL, "seed": 3}, **settings) as writer:
        for name, tensor in content.items():
            writer.add(name, tensor)
        return writer.finish()


def cut_up(path: Path, name: str, cuts: list[list[int]]) -> Path:
    """Writes one tensor of a checkpoint anew, in several pieces: sizes along each dimension."""
    opened = open_checkpoint(path)
    entry, whole = opened.tensors[name], opened.read(name).clone()
    bounds = [list(itertools.pairwise(itertools.accumulate(sizes, initial=0))) for sizes in cuts]
    parts, cut = [], []
    for number, box in enumerate(itertools.product(*bounds)):
        part = whole[tuple(slice(low, high) for low, high in box)]
        start, shape = tuple(low for low, _ in box), tuple(part.shape)
        parts.append((f"{name}@{number}", part))
        cut.append(ShardMetadata(file="cut.safetensors", key=f"{name}@{number}", start=start, shape=shape))
    record = write_tensors(path / "cut.safetensors", parts)
    entries = {**opened.tensors, name: entry.model_copy(update={"pieces": tuple(cut)})}
    files = {**opened.manifest.files, "cut.safetensors": record}
    changed = opened.manifest.model_copy(update={"tensors": entries, "files": files})
    (path / "manifest.json").write_text(changed.to_json())
    return path


@pytest.mark.parametrize("moments", [False, True])
def test_what_is_written_is_read(moments: bool, tmp_path: Path) -> None:
    content = tensors(moments=moments)
    path = write(tmp_path, content, shard_bytes=3000)
    assert len(list(path.glob("*.safetensors"))) > 3
    for place in (path, tmp_path, tmp_path / "latest"):
        opened = open_checkpoint(place)
        assert (opened.path.name, opened.step, opened.config["seed"]) == ("step_00000000", 0, 3)
        assert opened.has_moments is moments
        assert opened.tensors.keys() == content.keys()
        for name, tensor in content.items():
            entry, found = opened.tensors[name], opened.read(name)
            assert (entry.shape, entry.dtype) == (tuple(tensor.shape), tensor.dtype)
            assert found.dtype == tensor.dtype
            assert torch.equal(found, tensor), name
            assert entry.digest == format_digest(digest(tensor, [0] * tensor.dim(), tensor.shape))
    assert list(find_problems(open_checkpoint(path))) == []


def test_the_library_reads_our_files(tmp_path: Path) -> None:
    content = tensors()
    path = write(tmp_path, content)
    found = load_file(path / "shard_00000.safetensors")
    assert found.keys() == content.keys()
    assert all(torch.equal(found[name], content[name]) for name in content)


@hypothesis.settings(max_examples=30)
@given(st.data())
def test_any_rectangle_is_read_from_any_pieces(data: st.DataObject) -> None:
    """And no more than it: what is read of all pieces together has its size."""
    name = "weights/blocks.1.moe.experts.2.w_in"  # (16, 16)
    sizes = st.lists(st.integers(1, 8), min_size=1, max_size=4).map(lambda s: [*s, 16 - sum(s)])
    cuts = [data.draw(sizes.filter(lambda s: s[-1] > 0)) for _ in range(2)]
    (top, bottom), (left, right) = (sorted(data.draw(st.tuples(*[st.integers(0, 15)] * 2))) for _ in range(2))
    with tempfile.TemporaryDirectory() as folder:
        content = tensors()
        opened = open_checkpoint(cut_up(write(Path(folder), content), name, cuts))
        seen: list[int] = []
        original = type(opened._file("cut.safetensors")).read

        def read(file: Any, key: str, start: Any, shape: Any) -> Tensor:
            seen.append(math.prod(shape))
            return original(file, key, start, shape)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("expert_parallel.checkpoint.tensor_files.TensorFile.read", read)
            part = opened.read_slice(name, (top, left), (bottom - top + 1, right - left + 1))
        assert torch.equal(part, content[name][top : bottom + 1, left : right + 1])
        assert sum(seen) == part.numel()
        stray = f"{folder}/step_00000000/shard_00000.safetensors holds {name}, which the manifest does not name"
        assert list(find_problems(opened)) == [stray]


def test_the_writer_holds_one_shard(tmp_path: Path) -> None:
    content = tensors()
    largest = max(tensor.nbytes for tensor in content.values())
    with CheckpointWriter(tmp_path / "step_00000001", step=1, config={"model": MODEL}, shard_bytes=3000) as writer:
        for name, tensor in content.items():
            writer.add(name, tensor)
            assert sum(part.nbytes for _, part in writer._shard) <= max(3000, largest)
            tensor.zero_()  # the writer has its own
        path = writer.finish()
    assert list(find_problems(open_checkpoint(path))) == []
    assert open_checkpoint(path).read("weights/embedding.weight").abs().sum() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("weights/final_norm.weight"), "weights/final_norm.weight is missing"),
        (lambda c: c.update({"weights/other": torch.zeros(1)}), "weights/other is left over"),
        (
            lambda c: c.update({"weights/final_norm.weight": torch.zeros(15)}),
            "weights/final_norm.weight has shape [15], expected [16]",
        ),
        (
            lambda c: c.update({"weights/final_norm.weight": torch.zeros(16, dtype=torch.int64)}),
            "weights/final_norm.weight is torch.int64",
        ),
        (
            lambda c: c.update({"exp_avg/final_norm.weight": torch.zeros(16)}),
            "exp_avg/embedding.weight is missing",  # moments: all or none
        ),
    ],
    ids=["missing", "left over", "shape", "dtype", "some moments"],
)
def test_the_writer_refuses_by_name(change: Callable[[Any], Any], message: str, tmp_path: Path) -> None:
    content = tensors()
    change(content)
    with pytest.raises(ValueError, match="step_00000000") as error:
        write(tmp_path, content)
    assert message in str(error.value)
    assert list(tmp_path.iterdir()) == [], "nothing partial stays"


def test_the_writer_refuses_what_comes_twice_and_what_exists(tmp_path: Path) -> None:
    content = tensors()
    path = write(tmp_path, content)
    with pytest.raises(ValueError, match="step_00000000 exists already"):
        write(tmp_path, content)
    with CheckpointWriter(tmp_path / "step_00000001", step=1, config={"model": MODEL}) as writer:
        writer.add("weights/final_norm.weight", torch.zeros(16))
        with pytest.raises(ValueError, match=r"weights/final_norm\.weight is given twice"):
            writer.add("weights/final_norm.weight", torch.zeros(16))
    assert open_checkpoint(tmp_path).path == path
    with pytest.raises(AssertionError, match="step_1"):
        CheckpointWriter(tmp_path / "step_1", step=1, config={"model": MODEL})


# ------------------------------------------------------------------------------------------------------------- damage


def edit(path: Path, change: Callable[[dict[str, Any]], Any], *, seal: bool = True) -> None:
    """seal: with a SHA-256 that fits, so that all else is looked at."""
    file = path / "manifest.json"
    tree = json.loads(file.read_text())
    change(tree)
    file.write_text(json.dumps(add_checksum(tree) if seal else tree))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


W_IN, OTHER = (f"weights/blocks.1.moe.experts.{expert}.w_in" for expert in (1, 2))
SHARD = "shard_00000.safetensors"
SEAL = "manifest.json is damaged: the SHA-256 of its content is"


def rewritten(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """The file with other content, and its SHA-256 in the manifest: only digests and names can tell."""
    content = {key: tensor.clone() for key, tensor in load_file(path / SHARD).items()}
    change(content)
    (path / SHARD).unlink()
    record = write_tensors(path / SHARD, list(content.items()))
    edit(path, lambda tree: tree["files"].update({SHARD: record.model_dump(mode="json")}))


def swap(content: dict[str, Tensor]) -> None:
    first, second = content[W_IN].clone(), content[OTHER].clone()
    content[W_IN], content[OTHER] = second.to(first.dtype), first.to(second.dtype)


def doubled_piece(tree: dict[str, Any]) -> None:
    """Half of it once more."""
    entry = tree["tensors"][W_IN]
    entry["pieces"].append({**entry["pieces"][0], "key": "again", "shape": [8, 16]})


def halved(tree: dict[str, Any]) -> None:
    tree["tensors"][W_IN]["pieces"][0]["shape"] = [8, 16]


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a bit of a file": (lambda p: flip(p / SHARD), f"{SHARD} is damaged: its SHA-256 differs from the manifest's"),
    "a file cut off": (
        lambda p: (p / SHARD).write_bytes((p / SHARD).read_bytes()[:-100]),
        f"{SHARD} is damaged: it has",
    ),
    "a file gone": (lambda p: (p / SHARD).unlink(), f"{SHARD} is missing, though the manifest names it"),
    "a value": (lambda p: rewritten(p, lambda c: c[W_IN].view(-1)[5:6].add_(1)), f"{W_IN} "),
    "two experts swapped": (lambda p: rewritten(p, swap), f"{W_IN} "),
    "a tensor gone from its file": (lambda p: rewritten(p, lambda c: c.pop(W_IN)), f"{W_IN} is missing"),
    "a tensor of another shape in its file": (
        lambda p: rewritten(p, lambda c: c.update({W_IN: c[W_IN][:8].clone()})),
        f"{W_IN} is",
    ),
    "a tensor that nobody named": (
        lambda p: rewritten(p, lambda c: c.update(stray=torch.zeros(1))),
        f"{SHARD} holds stray, which the manifest does not name",
    ),
    "a tensor gone from the manifest": (
        lambda p: (rewritten(p, lambda c: c.pop(W_IN)), edit(p, lambda t: t["tensors"].pop(W_IN))),
        f"{W_IN} is missing ({COUNT - 1} tensors found, {COUNT} expected)",
    ),
    "an expert too many": (
        lambda p: (
            rewritten(p, lambda c: c.update({W_IN.replace("1.w", "9.w"): c[W_IN].clone()})),
            edit(
                p,
                lambda t: t["tensors"].update(
                    {
                        W_IN.replace("1.w", "9.w"): {
                            **t["tensors"][W_IN],
                            "pieces": [{**t["tensors"][W_IN]["pieces"][0], "key": W_IN.replace("1.w", "9.w")}],
                        }
                    }
                ),
            ),
        ),
        "experts.9.w_in is left over",
    ),
    "a piece twice": (
        lambda p: edit(p, doubled_piece),
        f"{W_IN} is covered twice: the shards at [0, 0] and [0, 0] overlap",
    ),
    "half a tensor": (lambda p: edit(p, halved), f"{W_IN} is incomplete: its shards hold 128 of 256 elements"),
    "a piece beyond its tensor": (
        lambda p: edit(p, lambda t: t["tensors"][W_IN]["pieces"][0].update(start=[1, 0])),
        f"{W_IN}: a shard of shape [16, 16] at [1, 0] does not fit into [16, 16]",
    ),
    "a piece in no file": (
        lambda p: edit(p, lambda t: t["tensors"][W_IN]["pieces"][0].update(file="other.safetensors")),
        f"{W_IN} lies in other.safetensors, which is not among the manifest's files",
    ),
    "two names for one piece": (
        lambda p: edit(p, lambda t: t["tensors"][W_IN].update(pieces=t["tensors"][OTHER]["pieces"])),
        f"claim the same {OTHER} in {SHARD}",
    ),
    "a path out of the folder": (
        lambda p: edit(p, lambda t: t["tensors"][W_IN]["pieces"][0].update(file="../other.safetensors")),
        f"manifest.json is damaged at tensors.{W_IN}.pieces.0.file",
    ),
    "a digest cut off": (
        lambda p: edit(p, lambda t: t["tensors"][W_IN].update(digest="12")),
        f"manifest.json is damaged at tensors.{W_IN}.digest",
    ),
    "another digest": (lambda p: edit(p, lambda t: t["tensors"][W_IN].update(digest="0" * 32)), f"{W_IN} "),
    "an unknown dtype": (
        lambda p: edit(p, lambda t: t["tensors"][W_IN].update(dtype="I8")),
        "the dtype 'I8' is not one of F64, F32, F16, BF16",
    ),
    "a name twice in the manifest": (
        lambda p: (p / "manifest.json").write_text('{"format": 2, "format": 2}'),
        "manifest.json cannot be read (format appears twice)",
    ),
    "no JSON": (lambda p: (p / "manifest.json").write_text("{"), "manifest.json cannot be read"),
    "no mapping": (lambda p: (p / "manifest.json").write_text("[]"), "manifest.json is damaged: its format is None"),
    "the first format": (
        lambda p: edit(p, lambda t: t.update(format=1)),
        "the format of manifest.json is 1, older than 2, the oldest that this installation reads: use the "
        "expert-parallel that wrote it",
    ),
    "a newer format": (
        lambda p: edit(p, lambda t: t.update(format=3, seal="of a kind that is not known here")),
        "the format of manifest.json is 3, newer than 2, the newest that this installation reads: update "
        "expert-parallel",
    ),
    "a config of a newer version": (
        lambda p: edit(p, lambda t: t["config"].update(version=2)),
        "the version of the config in manifest.json is 2, newer than 1, the newest that this installation reads: "
        "update expert-parallel",
    ),
    "a setting of the future": (lambda p: edit(p, lambda t: t.update(more=1)), "manifest.json is damaged at more"),
    "another step": (lambda p: edit(p, lambda t: t.update(step=6), seal=False), SEAL),
    "another setting": (lambda p: edit(p, lambda t: t["config"].update(seed=4), seal=False), SEAL),
    "no SHA-256 of its own": (lambda p: edit(p, lambda t: t.pop("sha256"), seal=False), "it says None"),
    "the step of another name": (
        lambda p: edit(p, lambda t: t.update(step=6)),
        "has the name of step 0, its manifest.json is of step 6: rename the folder back",
    ),
    "nested without end": (
        lambda p: (p / "manifest.json").write_text("[" * 100_000 + "]" * 100_000),
        "manifest.json cannot be read (maximum recursion depth exceeded",
    ),
    "nested without end, in mappings": (
        lambda p: (p / "manifest.json").write_text('{"a": ' * 100_000 + "1" + "}" * 100_000),
        "manifest.json cannot be read (maximum recursion depth exceeded",
    ),
    "a config without a model": (
        lambda p: edit(p, lambda t: t["config"].pop("model")),
        "does not describe its model: its config has no mapping `model`",
    ),
    "a model that is no mapping": (
        lambda p: edit(p, lambda t: t["config"].update(model=None)),
        "does not describe its model: its config has no mapping `model`",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_by_name_before_anything_is_changed(damage: str, tmp_path: Path) -> None:
    path = write(tmp_path, tensors())
    model = build_model(CONFIG, seed=9)
    load_checkpoint(path, model)  # as it is, it loads
    do, message = DAMAGES[damage]
    do(path)
    model = build_model(CONFIG, seed=9)
    with pytest.raises(ValueError, match=r".") as error:
        load_checkpoint(path, model)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    is_seen_late = "what the model holds" in str(error.value)  # digests are of the model, after loading
    assert is_seen_late is (damage in ("a value", "two experts swapped", "another digest"))
    fresh = build_model(CONFIG, seed=9).state_dict()
    assert is_seen_late or all(torch.equal(tensor, fresh[name]) for name, tensor in model.state_dict().items())
    result = CliRunner().invoke(app, ["checkpoint", "verify", str(path)])
    of_another_version = damage in ("the first format", "a newer format", "a config of a newer version")
    assert result.exit_code == (2 if of_another_version else 1)
    assert message in result.stderr


def test_loaded_is_what_was_written(tmp_path: Path) -> None:
    content = tensors()
    model = build_model(CONFIG, dtype=torch.float64)
    load_checkpoint(write(tmp_path, content), model)
    state = model.state_dict()
    assert torch.equal(state["embedding.weight"], content["weights/embedding.weight"].double())
    for expert in range(3):
        found = state[f"blocks.1.moe.experts.{expert}.w_in"]
        assert torch.equal(found, content[f"weights/blocks.1.moe.experts.{expert}.w_in"].double())
    bias = "blocks.1.moe.router.balance_bias_E"
    assert torch.equal(state[bias], content[f"weights/{bias}"].to(state[bias].dtype))


class ExpertsExchanged(TorchState):
    """A defect after everything was read: two experts of the model change places."""

    def finish_loading(self) -> None:
        w_in = next(p for p in self.optimizer.param_groups[0]["params"] if p.dim() == 3)
        w_in.data[[0, 1]] = w_in.data[[1, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_what_lies_in_the_model_afterwards_is_compared(dtype: torch.dtype, tmp_path: Path) -> None:
    """Also in a dtype that is wider, or narrower, than the file's."""
    path = write(tmp_path, tensors())
    model = build_model(CONFIG, dtype=dtype)
    load_checkpoint(path, model, TorchState(torch.optim.AdamW(model.parameters())))
    defective = ExpertsExchanged(torch.optim.AdamW(model.parameters()))
    with pytest.raises(ValueError, match=r"weights/blocks.1.moe.experts.0.w_in is not what was saved: "):
        load_checkpoint(path, model, defective)


def test_a_manifest_that_covers_something_twice_or_not_at_all() -> None:
    """Three ways to four quarters, in two dimensions; sums of sizes alone would pass the last."""

    def manifest(*boxes: tuple[tuple[int, int], tuple[int, int]]) -> Manifest:
        held = tuple(
            ShardMetadata(file="a.safetensors", key=str(n), start=start, shape=shape)
            for n, (start, shape) in enumerate(boxes)
        )
        entry = TensorMetadata(dtype=torch.float32, shape=(4, 4), digest="0" * 32, pieces=held)
        files = {"a.safetensors": {"sha256": "0" * 64, "bytes": 1}}
        tree = {"format": 2, "step": 0, "config": {}, "layout": "", "files": files, "tensors": {"x": entry}}
        return Manifest.model_validate(tree)

    quarters = [((0, 0), (2, 2)), ((0, 2), (2, 2)), ((2, 0), (2, 2)), ((2, 2), (2, 2))]
    check_shards("it", manifest(*quarters))
    with pytest.raises(ValueError, match="it: x is incomplete: its shards hold 12 of 16 elements"):
        check_shards("it", manifest(*quarters[:3]))
    with pytest.raises(ValueError, match=r"it: x is covered twice: the shards at \[0, 0\] and \[1, 1\] overlap"):
        check_shards("it", manifest(*quarters[:3], ((1, 1), (2, 2))))


# ------------------------------------------------------------------------------------------------------------- folders


def test_old_ones_go_and_every_nth_stays(tmp_path: Path) -> None:
    content = tensors()
    for step in (2, 4, 6, 8, 10):
        write(tmp_path, content, step)
        prune(tmp_path, keep=1, keep_every=4)
        assert (tmp_path / "latest").readlink() == Path(f"step_{step:08d}")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "latest",
        "step_00000004",
        "step_00000008",
        "step_00000010",
    ]
    prune(tmp_path, keep=2, keep_every=None)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000008", "step_00000010"]


def test_other_names_are_no_checkpoints(tmp_path: Path) -> None:
    content = tensors()
    path = write(tmp_path, content, 3)
    (tmp_path / "step_x").mkdir()
    stale = make_partial_folder(tmp_path / "step_00000009")
    (stale / "manifest.json").write_text((path / "manifest.json").read_text())
    assert list_checkpoints(tmp_path) == [path]
    assert open_checkpoint(tmp_path / "latest").path == path
    publish(stale, tmp_path / "step_00000009")
    assert list_checkpoints(tmp_path) == [path, tmp_path / "step_00000009"]
    make_partial_folder(tmp_path / "step_00000009")
    remove_partial_folders(tmp_path)
    assert not list(tmp_path.glob("partial_*"))


@pytest.mark.parametrize("lost", ["newest", "oldest", "a link to nowhere"])
def test_a_checkpoint_without_its_manifest_is_refused(lost: str, tmp_path: Path) -> None:
    """By all who load. Who saves leaves it alone and goes on."""
    folder = tmp_path / "checkpoints"
    paths = [write(folder, tensors(), step) for step in (3, 6, 9)]
    if lost == "a link to nowhere":
        path = folder / "step_00000007"
        path.symlink_to("nowhere")
    else:
        path = paths[-1] if lost == "newest" else paths[0]
        (path / "manifest.json").unlink()
    message = f"{path} has no manifest.json: restore it or remove the folder"
    places = [tmp_path, folder, *([folder / "latest"] if lost == "newest" else []), *([path] if path.is_dir() else [])]
    for place in places:
        with pytest.raises(ValueError, match=r"has no manifest\.json") as error:
            open_checkpoint(place)
        assert str(error.value) == message
        for command in (["inspect", place], ["verify", place], ["diff", place, paths[1]]):
            result = invoke(*command)
            assert (result.exit_code, result.stderr) == (2, f"error: {message}\n"), command
    with pytest.raises(ValueError, match=r"has no manifest\.json"):
        list_checkpoints(folder)
    assert open_checkpoint(paths[1]).step == 6, "it was named, and is whole"
    assert complete_checkpoints(folder) == [other for other in paths if other != path]
    prune(folder, keep=1, keep_every=None)
    update_latest_link(folder)
    newest = paths[1] if lost == "newest" else paths[2]
    assert (folder / "latest").readlink() == Path(newest.name)
    assert sorted(p.name for p in folder.iterdir()) == sorted({"latest", newest.name, path.name})
    with pytest.raises(ValueError, match=f"{path.name} exists already"):
        publish(make_partial_folder(path), path)


def test_a_folder_under_another_steps_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run would go on from it, and remove newer ones."""
    path = write(tmp_path, tensors(), 6)
    renamed = path.rename(tmp_path / "step_00000020")
    message = r"step_00000020 has the name of step 20, its manifest\.json is of step 6"
    for place in (tmp_path, renamed):
        with pytest.raises(ValueError, match=message):
            open_checkpoint(place)
        assert invoke("verify", place).exit_code == 1
        assert invoke("inspect", place).exit_code == 2
    monkeypatch.chdir(renamed)
    with pytest.raises(ValueError, match="has the name of step 20"):
        open_checkpoint(Path())
    assert open_checkpoint(renamed.rename(tmp_path / "a name of its own")).step == 6


def test_one_that_is_being_removed_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was listed, then a run under way removed it: its manifest is gone, and so is its folder."""
    paths = [write(tmp_path, tensors(), step) for step in (1, 2)]
    original = Path.glob

    def glob(folder: Path, pattern: str) -> list[Path]:
        found = list(original(folder, pattern))
        if paths[0].exists():
            paths[0].rename(make_partial_folder(paths[0]) / "old")
        return found

    monkeypatch.setattr(Path, "glob", glob)
    assert list_checkpoints(tmp_path) == paths[1:]
    assert not paths[0].exists()


def test_latest_is_a_link_again_after_a_copy_that_followed_it(tmp_path: Path) -> None:
    write(tmp_path / "run", tensors(), 1)
    copied = Path(shutil.copytree(tmp_path / "run", tmp_path / "copy"))
    assert not (copied / "latest").is_symlink()
    write(copied, tensors(), 2)
    assert (copied / "latest").readlink() == Path("step_00000002")
    assert sorted(path.name for path in copied.iterdir()) == ["latest", "step_00000001", "step_00000002"]


def test_steps_are_sorted_by_number(tmp_path: Path) -> None:
    for step in (99999999, 100000000):
        write(tmp_path, tensors(), step)
    assert open_checkpoint(tmp_path).step == 100000000


def test_no_checkpoint_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no checkpoint"):
        open_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"there is no checkpoint .*/absent"):
        open_checkpoint(tmp_path / "absent")


# ------------------------------------------------------------------------------------------------------------ commands


def invoke(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["checkpoint", *map(str, arguments)])


def test_inspect(tmp_path: Path) -> None:
    path = write(tmp_path, tensors(moments=True), 7, layout="2 ranks, ep 2")
    text = invoke("inspect", tmp_path).stdout
    lines = {line.split("  ")[0]: line for line in text.splitlines()}
    assert lines[str(path)]
    assert lines["step"].endswith(" 7")
    assert lines["written by"].endswith(" 2 ranks, ep 2")
    numbers = sum(math.prod(s) for s in expected_shapes(CONFIG, moments=False).values())
    experts = 3 * (16 * 16 + 8 * 16)
    assert f"{numbers:,} in weights and balance biases, of which {experts:,} ({experts / numbers:.1%}) in" in text
    assert "3 in blocks 1" in lines["experts"]
    assert lines["blocks.*.moe.experts.*.w_in"].split()[1:] == ["3", "[16,", "16]", "768"]
    assert "weights (BF16, F16, F32, F64), exp_avg (BF16, F16, F32, F64), exp_avg_sq (" in lines["holds"]
    assert f"{(path / SHARD).stat().st_size:,}" in lines[SHARD]
    assert invoke("inspect", tmp_path / "absent").exit_code == 2


def test_verify_says_that_it_is_whole(tmp_path: Path) -> None:
    path = write(tmp_path, tensors())
    result = invoke("verify", tmp_path / "latest")
    assert (result.exit_code, result.stdout.startswith(f"{path}: whole, {COUNT} tensors, 1 files, ")) == (0, True)
    (path / "other.safetensors").write_bytes(b"")
    result = invoke("verify", tmp_path)
    assert (result.exit_code, "other.safetensors is not among the manifest's files" in result.stderr) == (1, True)
    assert invoke("verify", tmp_path / "absent").exit_code == 2


def test_verify_looks_at_the_config(tmp_path: Path) -> None:
    path = write(tmp_path, tensors())
    edit(path, lambda tree: tree["config"]["model"]["moe"].update(num_experts=4))
    assert "balance_bias_E has shape [3], expected [4]" in invoke("verify", path).stderr
    edit(path, lambda tree: tree["config"]["model"].update(num_layers=0))
    assert "its config has no model that this version knows" in invoke("verify", path).stderr


def test_diff(tmp_path: Path) -> None:
    content = tensors()
    first = write(tmp_path / "a", content, layout="one")
    second = write(tmp_path / "b", content, layout="one")
    flip(second / SHARD)  # not seen, and not claimed
    result = invoke("diff", first, second)
    assert result.exit_code == 0
    equal = f"all {COUNT} are equal according to the digests in the manifests (`checkpoint verify` reads the files)"
    assert f"tensors: {equal}\n" in result.stdout
    assert "bit for bit" not in result.stdout
    content[W_IN] = content[W_IN].clone()
    content[W_IN][3, 4] += 0.5
    name = "weights/embedding.weight"
    content[name] = content[name].double()
    result = invoke("diff", first, write(tmp_path / "c", content, 2, layout="two"))
    assert result.exit_code == 1
    assert f"tensors: 2 of {COUNT} differ" in result.stdout
    assert f"{W_IN}: largest absolute difference 0.5" in result.stdout
    assert f"{name}: F32 and F64, largest absolute difference 0" in result.stdout
    assert "layouts: different" in result.stdout
    result = invoke("diff", first, write(tmp_path / "d", tensors(moments=True)))
    assert "exp_avg/blocks.1.moe.experts.1.w_in: only in B" in result.stdout
    assert invoke("diff", first, tmp_path / "absent").exit_code == 2


def test_a_checkpoint_is_a_class_of_what_it_says(tmp_path: Path) -> None:
    """A part beyond the tensor is our own mistake."""
    opened: Checkpoint = open_checkpoint(write(tmp_path, tensors()))
    with pytest.raises(AssertionError):
        opened.read_slice(W_IN, (8, 0), (16, 16))
