"""The data's promises: which bytes are the corpus, which sequences a step sees, and what is refused in which words."""

import dataclasses
import gzip
import json
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from expert_parallel.data.batch import MicroBatch, micro_batch, shard_bounds
from expert_parallel.data.config import DataConfig, FilesData, StdlibData
from expert_parallel.data.sampler import Sampler, TokenSampler, epoch_order, held_out_sequences
from expert_parallel.data.text import SOURCES, Corpus, held_out_start, load_corpus

RANKS = [1, 2, 3, 4, 8]


def distinct_tokens(length: int) -> torch.Tensor:
    """Tokens that say where they came from (the sampler asks nothing of their dtype)."""
    return torch.arange(length)


def files(*paths: Path | str, **more: object) -> FilesData:
    return FilesData(kind="files", paths=[str(path) for path in paths], **more)  # type: ignore[arg-type]


def text_of(tokens: torch.Tensor) -> bytes:
    return tokens.to(torch.uint8).numpy().tobytes()


def write_texts(folder: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.fixture(scope="module")
def stdlib() -> Corpus:
    return load_corpus(StdlibData(kind="stdlib"))


# ---------------------------------------------------------------------------------------------------------------------
# Config


def test_config_is_chosen_by_kind() -> None:
    parse = TypeAdapter(DataConfig).validate_python
    assert parse({"kind": "stdlib"}) == StdlibData(kind="stdlib", held_out=0.05)
    one = parse({"kind": "files", "paths": "a.txt"})
    assert isinstance(one, FilesData)
    assert one.paths == ["a.txt"]
    assert one.format == "auto"
    assert one.field == "text"
    assert parse({"kind": "files", "paths": ["a.txt", "b.txt"]}) == files("a.txt", "b.txt")
    assert {"stdlib", "files"} == set(SOURCES)


@pytest.mark.parametrize(
    "block",
    [
        {"kind": "web"},
        {"kind": "stdlib", "paths": "a.txt"},
        {"kind": "files"},
        {"kind": "files", "paths": []},
        {"kind": "files", "paths": ""},
        {"kind": "files", "paths": ["a.txt", ""]},
        {"kind": "files", "paths": [1]},
        {"kind": "files", "paths": "a.txt", "format": "csv"},
        *({"kind": "stdlib", "held_out": wrong} for wrong in (0.0, 0.5, -0.1, float("nan"), "0.1")),
    ],
)
def test_config_refuses(block: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(DataConfig).validate_python(block)


# ---------------------------------------------------------------------------------------------------------------------
# The corpus


def test_stdlib_is_the_sources(stdlib: Corpus) -> None:
    root = Path(sysconfig.get_paths()["stdlib"])
    both_parts = text_of(stdlib.train) + text_of(stdlib.held_out)
    assert len(both_parts) > 5_000_000
    assert stdlib.train.dtype == stdlib.held_out.dtype == torch.uint8
    for name in ["argparse.py", "json/decoder.py", "xml/dom/minidom.py"]:
        assert (root / name).read_bytes() in both_parts
    assert both_parts.count(b"\0") == stdlib.num_documents - 1 + text_of(stdlib.held_out[:1]).count(b"\0")
    assert 0.05 <= len(stdlib.held_out) / len(both_parts) < 0.1
    # As found on their own: every .py file outside the folders left out, the empty ones aside.
    out = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "_bundled"}
    kept = [file for file in root.rglob("*.py") if not out & set(file.relative_to(root).parts[:-1])]
    sizes = [size for file in kept if (size := file.stat().st_size)]
    assert stdlib.num_documents == len(sizes)
    assert len(both_parts) == sum(sizes) + len(sizes) - 1


def test_stdlib_is_deterministic(stdlib: Corpus) -> None:
    again = load_corpus(StdlibData(kind="stdlib"))
    assert again.sha256 == stdlib.sha256
    assert again.description == stdlib.description
    assert torch.equal(again.train, stdlib.train)
    assert torch.equal(again.held_out, stdlib.held_out)
    assert stdlib.sha256[:12] in stdlib.description
    assert "\n" not in stdlib.description


def test_stdlib_takes_bytes_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_texts(tmp_path, {"b.py": "b", "json/a.py": "ja", "empty.py": "", "c.txt": "no"})
    for left_out in ["test/t.py", "x/tests/t.py", "site-packages/t.py", "idlelib/idle_test/t.py", "__pycache__/t.py"]:
        write_texts(tmp_path, {left_out: "no"})
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert [tuple(document) for document in SOURCES["stdlib"](StdlibData(kind="stdlib"))] == [
        ("b.py", b"b"),
        ("json/a.py", b"ja"),
        ("latin.py", b"# caf\xe9"),
    ]
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "nowhere")})
    with pytest.raises(ValueError, match=r"data\.kind.* 0 \.py files below .*nowhere"):
        load_corpus(StdlibData(kind="stdlib"))


def test_text_and_jsonl_documents(tmp_path: Path) -> None:
    write_texts(tmp_path, {"a.txt": "alpha", "b.txt": "béta", "sub/c.txt": "gamma"})
    (tmp_path / "d.jsonl").write_text('{"text": "one\\nline"}\r\n{"text": "zwei \u2028 ü", "id": 7}')
    config = files(tmp_path / "d.jsonl", tmp_path / "**" / "*.txt")
    assert [tuple(document) for document in SOURCES["files"](config)] == [
        ("0:1", b"one\nline"),
        ("0:2", "zwei \u2028 ü".encode()),
        ("1", b"alpha"),
        ("2", "béta".encode()),
        ("3", b"gamma"),
    ]
    whole = load_corpus(files(tmp_path / "d.jsonl", format="text"))
    assert text_of(whole.train) + text_of(whole.held_out) == (tmp_path / "d.jsonl").read_bytes()
    (tmp_path / "e.data").write_text('{"body": "hello there"}\n')
    named = load_corpus(files(tmp_path / "e.data", format="jsonl", field="body"))
    assert text_of(named.train) + text_of(named.held_out) == b"hello there"


def test_a_name_with_glob_letters_is_a_name(tmp_path: Path) -> None:
    write_texts(tmp_path, {"a[1].txt": "the one meant", "a1.txt": "the glob's match"})
    assert [document.content for document in SOURCES["files"](files(tmp_path / "a[1].txt"))] == [b"the one meant"]


def test_order_and_digest_stay_when_the_folder_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_texts(tmp_path / "here", {f"{i}/{i}.txt": f"document {i} " * (i + 1) for i in range(20)})
    write_texts(tmp_path / "here", {"z.jsonl": "".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(20))})
    shutil.copytree(tmp_path / "here", tmp_path / "a" / "there")
    corpora = [
        load_corpus(files(root / "*" / "*.txt", root / "*.jsonl"))
        for root in (tmp_path / "here", tmp_path / "a" / "there")
    ]
    monkeypatch.chdir(tmp_path / "here")
    corpora.append(load_corpus(files("*/*.txt", "*.jsonl")))
    assert len({corpus.sha256 for corpus in corpora}) == 1
    for corpus in corpora[1:]:
        assert torch.equal(corpus.train, corpora[0].train)
        assert torch.equal(corpus.held_out, corpora[0].held_out)
    # Neighbours in the folder are not neighbours in the corpus.
    in_corpus = (text_of(corpora[0].train) + text_of(corpora[0].held_out)).split(b"\0")
    as_found = [document.content for document in SOURCES["files"](files("*/*.txt", "*.jsonl"))]
    assert in_corpus != as_found
    assert sorted(in_corpus) == sorted(as_found)

    (tmp_path / "here" / "0" / "0.txt").write_text("another")
    assert load_corpus(files("*/*.txt", "*.jsonl")).sha256 != corpora[0].sha256


def test_digest_sees_a_moved_boundary(tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text('{"text": "aa"}\n{"text": "a"}\n')
    (tmp_path / "two.jsonl").write_text('{"text": "a"}\n{"text": "aa"}\n')
    assert load_corpus(files(tmp_path / "one.jsonl")).sha256 != load_corpus(files(tmp_path / "two.jsonl")).sha256


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=30),
    held_out=st.floats(0.001, 0.499),
)
def test_no_document_is_in_both_parts(sizes: list[int], held_out: float) -> None:
    start, total = held_out_start(sizes, held_out), sum(sizes) + len(sizes) - 1
    starts = [sum(sizes[:i]) + i for i in range(len(sizes))]
    assert total - start >= held_out * total
    if start in starts[1:]:  # whole documents, and one fewer would not do
        assert 2 * (total - start) <= total or total - start == -(-held_out * total // 1)
        later = starts[starts.index(start) + 1] if start != starts[-1] else total
        assert total - later < held_out * total
    else:  # at the byte: only where whole documents would take more than half
        fewest = max(s for s in starts if total - s >= held_out * total)
        assert 2 * (total - fewest) > total
        assert total - start < held_out * total + 1


def test_split_with_hand_written_numbers() -> None:
    assert held_out_start([10, 10, 10, 10], 0.1) == 33  # 43 bytes; the last document begins at 33
    assert held_out_start([10, 10, 10, 10], 0.3) == 22  # 21 held out
    assert held_out_start([100], 0.05) == 95  # a lone document
    assert held_out_start([1, 98], 0.05) == 95  # the last document would be nearly everything
    assert held_out_start([98, 1], 0.005) == 99


def test_train_and_held_out_are_disjoint(tmp_path: Path) -> None:
    lines = [f"document {i:03}" for i in range(200)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    corpus = load_corpus(files(tmp_path / "d.jsonl", held_out=0.1))
    held_out = text_of(corpus.held_out).decode().split("\0")
    train = text_of(corpus.train).decode().removesuffix("\0").split("\0")
    assert sorted(train + held_out) == lines
    assert corpus.num_documents == 200
    assert len(held_out) == 21  # 20 would be 259 of the 2,599 bytes


# ---------------------------------------------------------------------------------------------------------------------
# What is refused, in which words


def refused(config: FilesData, *words: str) -> None:
    with pytest.raises(ValueError, match=r"^data\.paths\[") as caught:
        load_corpus(config)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"


def test_paths_that_are_no_files_are_refused(tmp_path: Path) -> None:
    write_texts(tmp_path, {"good.txt": "good", "folder/a.txt": "a"})
    good = tmp_path / "good.txt"
    refused(files(good, tmp_path / "missing.txt"), "data.paths[1]", "missing.txt", "matches 0 files")
    refused(files(good, tmp_path / "*.md"), "data.paths[1]", "*.md", "matches 0 files")
    refused(files(tmp_path / "fold*"), "data.paths[0]", "matches 0 files")
    refused(files(good, tmp_path / "folder"), "data.paths[1]", "is a folder", str(tmp_path / "folder" / "**" / "*.txt"))
    refused(files(good, tmp_path / "*.txt"), "data.paths[1]", "good.txt", "already matched by data.paths[0]")
    (tmp_path / "broken.txt").symlink_to(tmp_path / "nowhere")
    refused(files(good, tmp_path / "broken.txt"), "data.paths[1]", "broken.txt", "cannot be read", "No such file")


def test_an_unreadable_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(file: Path, mode: str) -> bytes:
        raise PermissionError(13, "Permission denied", str(file))

    write_texts(tmp_path, {"a.txt": "a"})
    monkeypatch.setattr(Path, "open", deny)  # a chmod would not stop root
    refused(files(tmp_path / "a.txt"), "data.paths[0]", "a.txt", "cannot be read: Permission denied")


def test_an_empty_file_is_left_out_of_a_glob_and_refused_by_name(tmp_path: Path) -> None:
    write_texts(tmp_path, {"a.txt": "", "b.jsonl": "", "c.txt": "full", "d.jsonl": '{"text": "line"}'})
    (tmp_path / "e.txt.gz").write_bytes(gzip.compress(b""))
    for name, why in (("a.txt", "0 bytes"), ("b.jsonl", "0 bytes"), ("e.txt.gz", "0 bytes, decompressed")):
        refused(files(tmp_path / "c.txt", tmp_path / name), "data.paths[1]", name, f"is empty ({why})")
    corpus = load_corpus(files(tmp_path / "*"))
    assert text_of(corpus.train) + text_of(corpus.held_out) in (b"full\0line", b"line\0full")
    assert corpus.description.endswith("; 3 empty files or missing texts left out")
    with pytest.raises(ValueError, match=r"data\.paths: each of the 1 files that match is empty"):
        load_corpus(files(tmp_path / "a.*"))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{'text': 1}", ["is not valid JSON"]),
        (b" ", ["is blank"]),
        (b"[" * 200_000, ["is not valid JSON"]),
        (b'["text"]', ["is a JSON list, not an object", "data.field", "'text'"]),
        (b'{"body": "x", "id": 1}', ["has no field 'text'", "data.field", "body", "id"]),
        (b'{"text": 5}', ["field 'text'", "data.field", "is of type int, not a string"]),
        (b'{"text": null}', ["field 'text'", "is of type NoneType, not a string"]),
        (b'{"text": ""}', ["field 'text'", "is an empty string"]),
        (b'{"text": "\\ud800"}', ["field 'text'", "is not Unicode text"]),
        (b'{"text": "caf\xe9"}', ["is not UTF-8", "byte 0xe9 at offset 30"]),
    ],
)
def test_a_wrong_jsonl_line_is_refused(tmp_path: Path, line: bytes, words: list[str]) -> None:
    (tmp_path / "d.jsonl").write_bytes(b'{"text": "good"}\n' + line + b'\n{"text": "good"}\n')
    refused(files(tmp_path / "d.jsonl"), "data.paths[0]", "d.jsonl, line 2", *words)


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("un café".encode("latin-1"))
    refused(files(tmp_path / "latin.txt"), "data.paths[0]", "latin.txt", "is not UTF-8", "byte 0xe9 at offset 6")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_byte_order_mark_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + b'{"text": "good"}\n')
    refused(files(tmp_path / name), "data.paths[0]", name, "begins with a byte order mark: save", "without BOM")


def test_a_zero_byte_is_refused_where_it_would_end_a_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\0two")
    (tmp_path / "b.jsonl").write_text('{"text": "good"}\n{"text": "one\\u0000two"}\n')
    text, lines = files(tmp_path / "a.txt", documents="separate"), files(tmp_path / "b.jsonl", documents="separate")
    refused(text, "data.paths[0]", "a.txt holds a zero byte at offset 3", "ends a document")
    refused(lines, "data.paths[0]", "b.jsonl, line 2", "field 'text' (data.field) holds a zero byte (character 3")
    contents = [document.content for document in SOURCES["files"](files(tmp_path / "*"))]
    assert contents == [b"one\0two", b"good", b"one\0two"], "joined: as it is"


def test_a_corpus_too_short_for_one_sequence_is_refused(tmp_path: Path) -> None:
    write_texts(tmp_path, {"a.txt": "0123456789" * 10})
    corpus = load_corpus(files(tmp_path / "a.txt", held_out=0.1))
    assert TokenSampler(corpus.train, 89, seed=0).num_windows == 1
    with pytest.raises(ValueError, match="for training") as caught:
        TokenSampler(corpus.train, 90, seed=0)
    assert str(caught.value) == (
        "data holds 90 bytes for training, a sequence needs sequence_length + 1 = 91 (training.sequence_length)"
    )
    assert held_out_sequences(corpus.held_out, 9, None).tokens.shape == (1, 10)
    with pytest.raises(ValueError, match="for evaluation") as caught:
        held_out_sequences(corpus.held_out, 10, None)
    assert str(caught.value) == (
        "data.held_out leaves 10 bytes for evaluation, "
        "a sequence needs sequence_length + 1 = 11 (training.sequence_length)"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


@settings(deadline=None, max_examples=80)
@given(
    length=st.integers(2, 200),
    sequence_length=st.integers(1, 40),
    seed=st.integers(-5, 2**70),
    epoch=st.integers(0, 50),
)
def test_an_epoch_sees_every_window_once(length: int, sequence_length: int, seed: int, epoch: int) -> None:
    if length <= sequence_length:
        length += sequence_length
    sampler = TokenSampler(distinct_tokens(length), sequence_length, seed)
    num_windows = (length - 1) // sequence_length
    sequences = sampler.sequences(epoch * num_windows, num_windows).tokens
    assert sequences.dtype == torch.int64
    assert sequences.shape == (num_windows, sequence_length + 1)
    starts = sorted(sequences[:, 0].tolist())
    assert starts == [window * sequence_length for window in range(num_windows)]
    assert torch.equal(sequences, sequences[:, :1] + torch.arange(sequence_length + 1))
    # Every token but the first, and what is left of the last window, is a target once.
    assert sorted(sequences[:, 1:].flatten().tolist()) == list(range(1, num_windows * sequence_length + 1))


@settings(deadline=None, max_examples=60)
@given(length=st.integers(11, 80), first=st.integers(0, 100), counts=st.lists(st.integers(0, 20), max_size=6))
def test_samples_do_not_depend_on_how_they_are_asked_for(length: int, first: int, counts: list[int]) -> None:
    sampler = TokenSampler(distinct_tokens(length), 5, seed=3)
    at_once = sampler.sequences(first, sum(counts)).tokens
    assert at_once.shape == (sum(counts), 6)
    starts = [first + sum(counts[:i]) for i in range(len(counts))]
    pieces = [sampler.sequences(start, count).tokens for start, count in zip(starts, counts, strict=True)]
    epoch_order.cache_clear()
    singles = [sampler.sequences(i, 1).tokens for i in reversed(range(first, first + sum(counts)))]
    assert torch.equal(torch.cat([at_once[:0], *pieces]), at_once)
    assert torch.equal(torch.cat([at_once[:0], *reversed(singles)]), at_once)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {tuple(epoch_order(seed, epoch, 30).tolist()) for seed in (1, 2, 12) for epoch in (0, 1, 2, 21)}
    assert len(orders) == 12
    # Frozen, so that a change of the order, which breaks resumption, is a decision.
    assert epoch_order(0, 0, 8).tolist() == [4, 5, 0, 6, 7, 3, 1, 2]
    before = torch.random.get_rng_state()
    epoch_order(5, 5, 8)
    assert torch.equal(before, torch.random.get_rng_state())


def test_held_out_sequences_are_spread_evenly() -> None:
    tokens = distinct_tokens(103).to(torch.uint8)
    every = held_out_sequences(tokens, 10, None).tokens
    assert every.dtype == torch.int64
    assert every[:, 0].tolist() == list(range(0, 100, 10))
    assert every[3, -1] == 40
    assert held_out_sequences(tokens, 10, 4).tokens[:, 0].tolist() == [0, 20, 50, 70]
    assert torch.equal(held_out_sequences(tokens, 10, 10).tokens, every)
    assert torch.equal(held_out_sequences(tokens, 10, 1000).tokens, every)


# ---------------------------------------------------------------------------------------------------------------------
# Sharding


@settings(deadline=None, max_examples=60)
@given(total=st.integers(0, 200), num_ranks=st.integers(1, 20))
def test_shards_are_contiguous_and_even(total: int, num_ranks: int) -> None:
    bounds = [shard_bounds(total, num_ranks, rank) for rank in range(num_ranks)]
    assert [i for first, count in bounds for i in range(first, first + count)] == list(range(total))
    counts = [count for _, count in bounds]
    assert max(counts) - min(counts) <= 1
    assert counts == [len(c) for c in torch.arange(total).tensor_split(num_ranks)]


def whole_step(sampler: Sampler, step: int, global_batch: int, num_micro_steps: int, num_ranks: int) -> MicroBatch:
    """What all ranks see in a step, in the order (micro-step, rank)."""
    parts = [
        micro_batch(
            sampler,
            step=step,
            global_batch=global_batch,
            num_micro_steps=num_micro_steps,
            micro_step=micro_step,
            num_ranks=num_ranks,
            rank=rank,
        )
        for micro_step in range(num_micro_steps)
        for rank in range(num_ranks)
    ]
    fields = [field.name for field in dataclasses.fields(MicroBatch)]
    assert all(part.documents_BS is None for part in parts)
    fields.remove("documents_BS")
    return MicroBatch(**{name: torch.cat([getattr(part, name) for part in parts]) for name in fields})


@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize("num_micro_steps", [1, 2, 3, 4, 12])
def test_every_layout_sees_the_same_step(num_ranks: int, num_micro_steps: int) -> None:
    sampler = TokenSampler(distinct_tokens(500), 7, seed=1)  # 71 windows: the steps below cross an epoch
    for step in (0, 5, 6):
        expected = sampler.sequences(step * 12, 12).tokens
        seen = whole_step(sampler, step, 12, num_micro_steps, num_ranks)
        assert torch.equal(seen.inputs_BS, expected[:, :-1])
        assert torch.equal(seen.targets_BS, expected[:, 1:])
        assert seen.sequence_index_B.tolist() == list(range(12 // num_micro_steps)) * num_micro_steps


@pytest.mark.parametrize("num_ranks", RANKS)
def test_resuming_at_a_step_equals_running_on(num_ranks: int) -> None:
    tokens = distinct_tokens(300)
    one_run = TokenSampler(tokens, 9, seed=4)
    steps = [whole_step(one_run, step, 10, 2, num_ranks) for step in range(12)]
    seen = torch.cat([step.inputs_BS for step in steps])
    assert torch.equal(seen, one_run.sequences(0, 120).tokens[:, :-1])  # no sample left out between steps, none doubled
    epoch_order.cache_clear()
    resumed = TokenSampler(tokens.clone(), 9, seed=4)
    for step in range(7, 12):
        again = whole_step(resumed, step, 10, 2, num_ranks)
        assert torch.equal(again.inputs_BS, steps[step].inputs_BS)
        assert torch.equal(again.targets_BS, steps[step].targets_BS)


def test_micro_batch_of_real_bytes(stdlib: Corpus) -> None:
    sampler = TokenSampler(stdlib.train, 64, seed=0)
    batch = micro_batch(sampler, step=3, global_batch=10, num_micro_steps=2, micro_step=1, num_ranks=3, rank=1)
    assert batch.inputs_BS.shape == batch.targets_BS.shape == (2, 64)
    assert batch.sequence_index_B.tolist() == [2, 3]
    for tensor in (batch.inputs_BS, batch.targets_BS, batch.sequence_index_B):
        assert tensor.dtype == torch.int64
        assert tensor.is_contiguous()
    assert torch.equal(batch.inputs_BS[:, 1:], batch.targets_BS[:, :-1])
    assert text_of(batch.inputs_BS[0]) in text_of(stdlib.train)
    none = micro_batch(sampler, step=0, global_batch=2, num_micro_steps=1, micro_step=0, num_ranks=3, rank=2)
    assert none.inputs_BS.shape == none.targets_BS.shape == (0, 64)
    assert none.sequence_index_B.shape == (0,)


def test_a_batch_that_does_not_divide_is_our_mistake() -> None:
    sampler = TokenSampler(distinct_tokens(100), 5, seed=0)
    with pytest.raises(AssertionError, match=r"global_batch 10, num_micro_steps 3"):
        micro_batch(sampler, step=0, global_batch=10, num_micro_steps=3, micro_step=0, num_ranks=1, rank=0)
