"""`checkpoint.start_from: {kind: hf}`: a Hugging Face folder straight into a run, in layouts and on real ranks."""

import contextlib
import math
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from expert_parallel.checkpoint.load import load_checkpoint
from expert_parallel.checkpoint.state import balance_biases
from expert_parallel.interop.families.registry import FAMILIES
from expert_parallel.interop.folder import FolderWriter
from expert_parallel.interop.hf_model import HuggingFaceModel, logical_shapes, match_model_tensors, read_model_config
from expert_parallel.interop.importing import import_folder
from expert_parallel.interop.set_aside import SHARD_BYTES
from expert_parallel.interop.start import HuggingFaceStart, describe_other_tokens, quantized_dtype
from expert_parallel.interop.tensor_map import (
    GATE_UP_COLUMNS,
    GATE_UP_ROWS,
    IDENTITY,
    MXFP4,
    MXFP4_INTERLEAVED,
    SINGLE_ROW,
    STACKED,
    STACKED_INTERLEAVED,
    STACKED_TRANSPOSED,
    TRANSPOSED,
    Transform,
    half_split_rows,
)
from expert_parallel.moe.parameters import logical_parameters
from expert_parallel.runtime.process import CPU, Launch, Runtime, UserError
from expert_parallel.training.config import Config, load_config
from expert_parallel.training.loop import train
from expert_parallel.training.setup import build, check_world_size
from tests.interop_models import LATENT
from tests.quantized_folders import quantize_fp8
from tests.ranks import run_ranks
from tests.test_interop import SHARD, make_peer, same_bits, tensors_of
from tests.test_interop_command import done, refusal
from tests.test_interop_set_aside import extra_tensors, with_extra

PAIR = [(6, 4), (6, 4)]
COVERED: dict[str, tuple[Transform, list[tuple[int, ...]]]] = {
    "identity": (IDENTITY, [(6, 4)]),
    "transposed": (TRANSPOSED, [(6, 4)]),
    "gate and up rows": (GATE_UP_ROWS, PAIR),
    "gate and up columns": (GATE_UP_COLUMNS, PAIR),
    "gate and up biases": (GATE_UP_ROWS, [(6,), (6,)]),
    "stacked": (STACKED, [(3, 4, 6)]),
    "stacked, transposed": (STACKED_TRANSPOSED, [(3, 4, 6)]),
    "one row": (SINGLE_ROW, [(1, 6)]),
    "stacked, interleaved": (STACKED_INTERLEAVED, [(3, 4, 6)]),
    "rotary rows": (half_split_rows(6, 4), [(12, 3)]),
    "4 bits": (MXFP4, [(3, 4, 2, 16), (3, 4, 2)]),
    "4 bits, interleaved": (MXFP4_INTERLEAVED, [(3, 4, 2, 16), (3, 4, 2)]),
    "of another kind": (Transform(lambda t: [t[0] + t[1]], list), PAIR),
}
EXACT = (
    "identity",
    "transposed",
    "gate and up rows",
    "gate and up columns",
    "stacked",
    "stacked, transposed",
    "one row",
)


@pytest.mark.parametrize("name", COVERED)
def test_a_part_is_what_the_whole_has_there(name: str) -> None:
    """Every rectangle of whole rows and of some columns, from views of theirs that are no larger than they need be."""
    transform, shapes = COVERED[name]
    theirs = [torch.randint(0, 120, shape, dtype=torch.uint8) for shape in shapes]
    if "bits" not in name:
        theirs = [tensor.double() + number / 2 for number, tensor in enumerate(theirs)]
    for number, ours in enumerate(transform.to_ours(theirs)):
        for first in range(0, len(ours), 5 if "bits" in name else 1):
            for end in range(first + 1, len(ours) + 1, 7 if "bits" in name else 1):
                rest = tuple(slice(1, size) for size in ours.shape[1:])
                part, num_bytes = transform.read_part(theirs, number, (slice(first, end), *rest))
                assert torch.equal(part, ours[(slice(first, end), *rest)])
                if name in EXACT:
                    assert num_bytes == part.nbytes
                elif "stacked" in name or "bits" in name:
                    assert num_bytes == sum(tensor[0].nbytes for tensor in theirs)


class CountingModel(HuggingFaceModel):
    """Also counts the bytes of experts."""

    expert_bytes = 0

    def read_slice(self, name: str, start: Sequence[int], shape: Sequence[int]) -> Tensor:
        before = self.bytes_read
        part = super().read_slice(name, start, shape)
        self.expert_bytes += (self.bytes_read - before) * (".experts." in name)
        return part


def started(rank: int, world: int, folder: Path, layouts: list[list[str]]) -> list[tuple[bool, int]]:
    """For each layout: whether this rank has the same weights from the folder as from the imported run, and the bytes
    of experts that it read."""
    runtime, results = Runtime(Launch("test", rank, world, rank, world), CPU, "gloo", timedelta(seconds=60)), []
    for layout in layouts:
        config = load_config(folder / "run", ["training.global_batch=8", *layout])
        mesh, model, engine = build(config, runtime, check_world_size(config, runtime), initialize=False)
        held = [engine.state.tensor("weights", logical.parameter) for logical in logical_parameters(model)]
        held += [bias for _, bias in balance_biases(model)]
        load_checkpoint(folder / "run", model, engine.state, runtime, mesh, model_only=True)
        expected = [tensor.clone() for tensor in held]
        for tensor in held:
            tensor.fill_(-1)
        start = HuggingFaceStart(folder / "theirs", config)
        start.source = CountingModel(folder / "theirs", quantized_dtype(folder / "theirs", config))
        start.load(model, engine.state, runtime, mesh)
        results.append((all(map(torch.equal, held, expected)), start.source.expert_bytes))
    return results


def imported(name: str, folder: Path, prepare: Callable[[Path], Any] | None = None) -> int:
    """Writes `theirs` and `run`. prepare: changes `theirs` first. Returns the bytes of experts in the files."""
    make_peer(name, torch.bfloat16).save_pretrained(folder / "theirs")
    if prepare is not None:
        prepare(folder / "theirs")
    import_folder(folder / "theirs", folder / "run", SHARD, lambda note: None)
    return sum(tensor.nbytes for key, tensor in tensors_of(folder / "theirs").items() if ".experts." in key)


def test_each_rank_reads_its_part_in_every_layout(tmp_path: Path) -> None:
    """Bit for bit as from an import on disk, and of the experts exactly its share; FSDP2 divides them by rows."""
    whole = imported("deepseek_v3", tmp_path)
    shares = {
        2: {
            ("parallel.cp=2", "parallel.ep=2"): 2,
            ("parallel.data={kind: sharded}",): 2,
            ("training.engine={kind: deepspeed, zero_stage: 2}", "parallel.ep=2"): 2,
        },
        4: {
            ("parallel.tp=2", "parallel.ep=2", "parallel.etp=2"): 4,
            ("parallel.pp=2", "parallel.ep=2", "training.micro_steps=2"): 4,
        },
    }
    for world, layouts in shares.items():
        ranks = run_ranks(world, started, world, tmp_path, [list(layout) for layout in layouts])
        for layout, share, results in zip(layouts, layouts.values(), zip(*ranks, strict=True), strict=True):
            assert list(results) == [(True, whole // share)] * world, layout


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3"])
def test_stacks_and_quantized_experts_are_divided(name: str, tmp_path: Path) -> None:
    """gpt-oss has one tensor for all experts of a block; the other folder is in fp8."""
    prepare = (lambda folder: quantize_fp8(folder, (4, 4), torch.float32)) if name == "deepseek_v3" else None
    whole = imported(name, tmp_path, prepare)
    for result in [result for rank in run_ranks(2, started, 2, tmp_path, [["parallel.ep=2"]]) for result in rank]:
        assert result == (True, whole // 2)


SIZES = ["training.steps=1", "training.global_batch=2", "training.sequence_length=16", "evaluation.sequences=4"]


def test_a_run_starts_resumes_and_is_exported_without_a_conversion(tmp_path: Path) -> None:
    """Its first loss is that of the imported model, and a second start does not read the folder."""
    theirs, config, run = tmp_path / "theirs", tmp_path / "ours.yaml", tmp_path / "run"
    with_extra(theirs, extra_tensors())
    done("convert", "import", "--config-only", theirs, config)
    done("convert", "import", theirs, tmp_path / "imported")
    sizes = [*SIZES, "data={kind: stdlib}"]
    from_import = done(
        "train", config, *sizes, f"run.folder={tmp_path}/b", f"checkpoint.start_from={tmp_path}/imported"
    )
    start = f"checkpoint.start_from={{kind: hf, path: {theirs}}}"
    text = done("train", config, *sizes, f"run.folder={run}", start)
    assert re.search(rf"started from the weights of {theirs}: a rank read at most 4\d\.\d KB of 5\d\.\d KB\n", text)
    assert "kept 4 tensors (model.layers.3.eh_proj.weight, ...) for export" in text
    losses = [line for line in text.splitlines() if "loss" in line and "tokens/s" not in line]
    assert losses == [line for line in from_import.splitlines() if "loss" in line and "tokens/s" not in line]
    for folder in (tmp_path / "b", run):
        done("convert", "export", folder, tmp_path / f"back_{folder.name}", "--dtype", "bfloat16")
    same_bits(tensors_of(tmp_path / "back_run"), tensors_of(tmp_path / "back_b"))
    shutil.rmtree(theirs)
    assert "resumed from" in done("train", config, *sizes, f"run.folder={run}", start, "training.steps=2")


def test_a_folder_that_does_not_fit_leaves_nothing_behind(tmp_path: Path) -> None:
    theirs, config, run = tmp_path / "theirs", tmp_path / "ours.yaml", tmp_path / "run"
    make_peer("mixtral").save_pretrained(theirs)
    done("convert", "import", "--config-only", theirs, config)
    start = [*SIZES, "data={kind: stdlib}", f"run.folder={run}", f"checkpoint.start_from={{kind: hf, path: {theirs}}}"]
    other = refusal("train", config, *start, "model.norm.eps=0.5")
    assert f"checkpoint.start_from: {theirs} holds another model: model.norm.eps is 0.001 there and 0.5 here" in other
    plain = f"checkpoint.start_from={theirs}"
    assert f"start_from: {theirs} is a Hugging Face folder, not a run: {{kind: hf, path" in refusal(
        "train", config, *start, plain
    )
    quantize_fp8(theirs, (4, 4), torch.float32)
    tensors = load_file(theirs / "model.safetensors")
    scale = "model.layers.0.self_attn.q_proj.weight_scale_inv"
    save_file(tensors | {scale: tensors[scale] * math.nan}, theirs / "model.safetensors")
    assert f"checkpoint.start_from: {theirs}: {scale} holds the scale nan" in refusal("train", config, *start)
    save_file({name: tensor for name, tensor in tensors.items() if "norm" not in name}, theirs / "model.safetensors")
    assert f"checkpoint.start_from: {theirs}: model.norm.weight is missing" in refusal("train", config, *start)
    (theirs / "config.json").unlink()
    assert "it has no config.json" in refusal("train", config, *start)
    train_alone = Runtime(Launch("test", 0, 1, 0, 1), CPU, "gloo", timedelta(seconds=60))
    with pytest.raises(UserError, match=r"kind is 'hf', and `train` was given run: pass starts=expert_parallel.START"):
        train(load_config(config, start), train_alone)
    assert not run.exists()


# ------------------------------------------------------------------------------------------------------- bounded memory

LARGE = {
    **LATENT,
    "model_type": "deepseek_v3",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "moe_intermediate_size": 1024,
    "num_hidden_layers": 4,
    "n_routed_experts": 96,
    "n_group": 4,
    "topk_group": 2,
    "num_nextn_predict_layers": 1,
    "vocab_size": 4096,
}
MIB = 2**20


def write_large(folder: Path) -> None:
    """Writes a DeepSeek-V3 of random bits in bfloat16, 2 GB in files of 0.5 GB, with a layer of multi-token
    prediction."""
    model = read_model_config(FAMILIES["deepseek_v3"], LARGE)
    generator = torch.Generator().manual_seed(0)
    with FolderWriter(folder, 2**29) as writer:
        shapes = logical_shapes(model)
        for pair in match_model_tensors(FAMILIES["deepseek_v3"], LARGE, model):
            ours = [torch.empty(shapes[name], dtype=torch.bfloat16).normal_(generator=generator) for name in pair.ours]
            for name, tensor in zip(pair.theirs, pair.transform.to_theirs(ours), strict=True):
                writer.add(name, tensor)
        for number in range(64):
            writer.add(f"model.layers.4.mlp.experts.{number}.up_proj.weight", torch.ones(1024, 1024).bfloat16())
        writer.write_json("config.json", LARGE)
        writer.finish()


@contextlib.contextmanager
def measured(peaks: list[int]) -> Iterator[None]:
    """Adds the most memory in bytes that this process took inside the context beyond what it had: without the pages of
    mapped files, which the kernel takes back."""

    def anonymous() -> int:
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
        return 1024 * int(line.split()[1])

    done, before, found = threading.Event(), anonymous(), [0]

    def watch() -> None:
        while not done.wait(0.002):
            found.append(anonymous() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    peaks.append(max(found))


def started_large(rank: int, world: int, folder: Path) -> tuple[list[int], int]:
    """The memory that files kept beside the run, and loading, took at most; and the bytes of experts that were read."""
    overrides = ["parallel.ep=4", "training.global_batch=8", f"run.folder={folder}/run"]
    config = load_config(folder / "ours.yaml", overrides)
    runtime, peaks = Runtime(Launch("test", rank, world, rank, world), CPU, "gloo", timedelta(seconds=60)), list[int]()
    mesh, model, engine = build(config, runtime, check_world_size(config, runtime), initialize=False)
    for parameter in model.parameters():
        parameter.detach().fill_(-1)  # so that its memory is there before
    start = HuggingFaceStart(folder / "theirs", config)
    start.source = source = CountingModel(folder / "theirs")
    with measured(peaks):
        if rank == 0:
            start.keep_files(folder)
    with measured(peaks):
        start.load(model, engine.state, runtime, mesh)
    for logical in logical_parameters(model):
        if logical.is_expert:
            expected = source.read_slice(logical.names[-1], (0, 0), logical.shape)
            assert torch.equal(logical.parameter[-1], expected.float())
            break
    return peaks, source.expert_bytes


@pytest.mark.full
def test_a_folder_of_2_gb_on_4_ranks_in_bounded_memory(tmp_path: Path) -> None:
    write_large(tmp_path / "theirs")
    done("convert", "import", "--config-only", tmp_path / "theirs", tmp_path / "ours.yaml")
    whole = 3 * 96 * 3 * 1024 * 1024 * 2
    for peaks, read in run_ranks(4, started_large, 4, tmp_path):
        assert peaks[0] < SHARD_BYTES + 64 * MIB
        assert peaks[1] < 32 * MIB, "a tensor of an expert has 4 MiB, the embedding 8"
        assert read == whole // 4 + 4 * MIB
    assert sum(file.stat().st_size for file in (tmp_path / "huggingface").glob("set_aside*.safetensors")) > 128 * MIB


def test_bytes_are_not_the_tokens_of_a_published_model() -> None:
    model = {"num_layers": 1, "d_model": 8, "attention": {"num_heads": 1, "head_size": 8}, "ffn": {"hidden": 8}}
    sizes = {"steps": 1, "global_batch": 1, "sequence_length": 8}
    kinds = {"tokens": {"corpora": []}, "files": {"paths": ["a"]}, "stdlib": {}}
    for kind, values in kinds.items():
        tree = {"run": {"folder": "r"}, "model": model, "training": sizes, "data": {"kind": kind, **values}}
        config = Config.model_validate(tree)
        found = [f"data.kind is '{kind}', whose tokens are bytes"] if kind != "tokens" else []
        assert [sentence.split(";")[0] for sentence in describe_other_tokens(config)] == found
