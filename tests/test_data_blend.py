"""Blends of token files: which sample comes from where, document boundaries, what is held out, what does not fit."""

import json
import shutil
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from expert_parallel.data.batch import MicroBatch, held_out_batch, micro_batch
from expert_parallel.data.blend import PERIOD, BlendSampler, CorpusSplit, blend_pattern, blended_held_out, permute_index
from expert_parallel.data.config import DataConfig, FilesData, TokensData
from expert_parallel.data.documents import DocumentBoundaries, number_documents, starts_after_end_tokens
from expert_parallel.data.indexed import IndexedDataset, open_indexed_dataset, write_index
from expert_parallel.data.open import DataRequirements, RunData, load_tokenizer, open_data, save_tokenizer
from expert_parallel.data.tokenizer import (
    ByteTokenizer,
    FileTokenizer,
    Sources,
    TokensInfo,
    file_sha256,
    read_info,
    train_tokenizer,
)

END = 0


def part(
    tokens: np.ndarray[Any, Any], weight: float = 1.0, number: int = 0, boundaries: DocumentBoundaries | None = None
) -> CorpusSplit:
    return CorpusSplit(f"data.corpora[{number}].path", Path(f"c{number}.bin"), 0, tokens, weight, boundaries)


def blend(windows: list[int], weights: list[float], length: int = 4, seed: int = 0) -> BlendSampler:
    """Corpora whose tokens say which corpus and place they are: 1,000,000 * corpus + place."""
    splits = [
        part(np.arange(number * length + 1) + 1_000_000 * corpus, weight, corpus)
        for corpus, (number, weight) in enumerate(zip(windows, weights, strict=True))
    ]
    return BlendSampler(splits, length, seed, vocab_size=10**9)


# ---------------------------------------------------------------------------------------------------------------------
# Orders


@pytest.mark.parametrize("size", [*range(1, 34), 255, 256, 257, 1000])
def test_shuffled_is_a_permutation(size: int) -> None:
    for key in (0, 1, 2**62 + 5):
        assert sorted(permute_index(position, size, key) for position in range(size)) == list(range(size))


def test_shuffled_shuffles() -> None:
    size = 2000
    table = np.array([[permute_index(position, size, key) for position in range(size)] for key in range(10)])
    assert len({tuple(order) for order in table}) == 10
    # As of random permutations: about one in all stays, or is followed by its neighbour, and there is no trend.
    assert (table == np.arange(size)).sum() < 30
    assert (np.diff(table, axis=1) == 1).sum() < 30
    for order in table:
        assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 0.09
    first = np.array([permute_index(0, size, key) for key in range(2000)])
    counts = np.bincount(first * 10 // size, minlength=10)
    assert ((counts - 200) ** 2 / 200).sum() < 30  # chi-squared of 9 degrees: 28 has probability 0.001
    # Frozen, so that a change of the order, which breaks resumption, is a decision.
    assert [permute_index(position, 10, 7) for position in range(10)] == [2, 8, 7, 3, 9, 5, 6, 4, 0, 1]


@pytest.mark.parametrize(
    "weights", [(1.0,), (0.7, 0.3), (1.0, 1.0, 1.0), (5.0, 1e-5), (0.5, 0.25, 0.125, 0.0625, 1e-4), (3.0, 2.0, 2.0)]
)
def test_every_stretch_is_in_proportion(weights: tuple[float, ...]) -> None:
    pattern, total = blend_pattern(weights), sum(map(Fraction, weights))
    assert sum(pattern.counts) == PERIOD
    for number, weight in enumerate(weights):
        exact = Fraction(weight) / total * PERIOD
        assert abs(pattern.counts[number] - exact) < 1
        here = pattern.corpus == number
        assert pattern.before[here].tolist() == list(range(pattern.counts[number]))
        seen, place = np.cumsum(here), np.arange(1, PERIOD + 1)
        assert np.abs(seen - place * pattern.counts[number] / PERIOD).max() <= 1 + len(weights) / 2


def test_a_pattern_by_hand() -> None:
    """In the middle of equal stretches: A at 1/8, 3/8, 5/8, 7/8 of four samples, B at 1/2."""
    corpus = blend_pattern((4.0, 1.0)).corpus[:10].tolist()
    assert corpus == [0, 0, 1, 0, 0, 0, 0, 1, 0, 0]


@settings(max_examples=25)
@given(
    windows=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    weights=st.lists(st.floats(0.05, 1), min_size=4, max_size=4),
    seed=st.integers(0, 2**40),
)
def test_every_corpus_goes_through_whole_epochs(windows: list[int], weights: list[float], seed: int) -> None:
    sampler = blend(windows, weights[: len(windows)], seed=seed)
    seen: dict[int, list[int]] = {}
    for sample in range(300):
        corpus, epoch, window = sampler.locate(sample)
        assert epoch == len(seen.setdefault(corpus, [])) // windows[corpus]
        seen[corpus].append(window)
    for corpus, order in seen.items():
        size = windows[corpus]
        for first in range(0, len(order) - size + 1, size):
            assert sorted(order[first : first + size]) == list(range(size)), "each window once an epoch"
    rows = sampler.sequences(0, 300).tokens
    for row, sample in zip(rows.tolist(), range(300), strict=True):
        corpus, _, window = sampler.locate(sample)
        assert row == [1_000_000 * corpus + window * 4 + column for column in range(5)]


def test_epochs_corpora_and_seeds_have_orders_of_their_own() -> None:
    orders = set()
    for seed in (0, 1):
        sampler = blend([30, 30], [1.0, 1.0], seed=seed)
        places = [sampler.locate(sample) for sample in range(180)]
        for corpus in (0, 1):
            for epoch in (0, 1, 2):
                orders.add(tuple(window for *where, window in places if where == [corpus, epoch]))
    assert len(orders) == 12
    assert {len(order) for order in orders} == {30}


def test_no_sample_is_lost_at_a_period_and_far_ones_are_cheap() -> None:
    sampler = blend([7, 1000], [1.0, 3.0])
    counts = Counter(sampler.locate(sample)[0] for sample in range(PERIOD - 4000, PERIOD + 4000))
    assert abs(counts[0] - 2000) <= 2
    # Far out: the count of all before it, by formula, and the same row however it is asked for.
    far = 10**9 * PERIOD + 12345
    corpus, epoch, window = sampler.locate(far)
    before = 10**9 * sampler.pattern.counts[corpus] + int((sampler.pattern.corpus[:12345] == corpus).sum())
    assert epoch == before // [7, 1000][corpus]
    assert sampler.sequences(far - 1, 3).tokens[1].tolist() == sampler.sequences(far, 1).tokens[0].tolist()
    assert sampler.sequences(far, 1).tokens[0, 0] == corpus * 1_000_000 + window * 4


def test_epochs_by_hand() -> None:
    assert blend([10, 30], [1.0, 3.0]).epochs(80) == pytest.approx([2.0, 2.0])


# ---------------------------------------------------------------------------------------------------------------------
# Ranks: a run that stops and goes on with other data ranks


def seen_by_all(sampler: Any, steps: range, num_ranks: int, num_micro_steps: int) -> list[list[int]]:
    """The sequences that all ranks get, step by step, as (step, row) -> tokens."""
    rows = []
    for step in steps:
        for micro_step in range(num_micro_steps):
            for rank in range(num_ranks):
                batch = micro_batch(
                    sampler,
                    step=step,
                    global_batch=8,
                    num_micro_steps=num_micro_steps,
                    micro_step=micro_step,
                    num_ranks=num_ranks,
                    rank=rank,
                )
                rows += torch.cat([batch.inputs_BS, batch.targets_BS[:, -1:]], dim=1).tolist()
    return rows


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 3), (3, 8), (2, 1), (8, 5)])
@pytest.mark.parametrize("micro_steps", [(1, 1), (2, 4)])
def test_a_resume_on_other_ranks_loses_nothing(before: int, after: int, micro_steps: tuple[int, int]) -> None:
    """Ranks that do not divide the batch of 8, too. Two epochs: every window of every corpus exactly twice."""
    sampler, steps = blend([8, 24], [1.0, 3.0], seed=5), 8
    whole = seen_by_all(sampler, range(steps), 1, 1)
    rows = seen_by_all(sampler, range(3), before, micro_steps[0])
    resumed = blend([8, 24], [1.0, 3.0], seed=5)
    rows += seen_by_all(resumed, range(3, steps), after, micro_steps[1])
    assert rows == whole
    begins = Counter(row[0] for row in rows)
    expected = [window * 4 for window in range(8)] + [1_000_000 + window * 4 for window in range(24)]
    assert begins == dict.fromkeys(expected, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Documents


def test_documents_by_hand() -> None:
    inputs_BS = torch.tensor([[5, 5, 0, 6, 0], [0, 0, 7, 7, 7], [1, 2, 3, 4, 5]])
    starts_BS = starts_after_end_tokens(inputs_BS, 0)
    assert number_documents(starts_BS).tolist() == [[0, 0, 0, 1, 1], [0, 1, 2, 2, 2], [0] * 5]
    assert number_documents(starts_BS[:0]).shape == (0, 5)


def test_documents_travel_with_a_batch() -> None:
    tokens = np.array([9, 9, 0, 8, 8, 8, 0, 7, 7])
    joined = BlendSampler([part(tokens)], 8, 0, 10)
    one_document = indexed(tokens, [9], [0, 1])
    separate = BlendSampler([part(tokens, boundaries=DocumentBoundaries(one_document, end_id=0))], 8, 0, 10)
    ask: Any = {"step": 0, "global_batch": 2, "num_micro_steps": 1, "micro_step": 0, "num_ranks": 1, "rank": 0}
    assert micro_batch(joined, **ask).documents_BS is None
    batch = micro_batch(separate, **ask)
    assert batch.documents_BS is not None
    assert batch.documents_BS.dtype == torch.int64
    assert batch.documents_BS.tolist() == [[0, 0, 0, 1, 1, 1, 1, 2]] * 2
    assert batch.targets_BS[0].tolist() == [9, 0, 8, 8, 8, 0, 7, 7]
    some = batch.select_positions(torch.tensor([1, 3, 7])).to(torch.device("cpu"))
    assert some.documents_BS is not None
    assert some.documents_BS.tolist() == [[0, 1, 2]] * 2
    assert MicroBatch(*[batch.inputs_BS] * 3).select_positions(torch.tensor([0])).documents_BS is None
    shares = [held_out_batch(separate.sequences(0, 2), 3, rank) for rank in range(3)]
    assert [share.sequence_index_B.tolist() for share in shares] == [[0], [1], []]
    assert torch.equal(torch.cat([s.documents_BS for s in shares if s.documents_BS is not None]), batch.documents_BS)


def indexed(tokens: Any, lengths: list[int], documents: list[int]) -> IndexedDataset:
    """A corpus in memory. lengths: of its sequences. documents: the first sequence of each, then their number."""
    begins = np.cumsum([0, *lengths[:-1]]) * tokens.itemsize
    return IndexedDataset(Path("c"), tokens, np.array(lengths), begins, np.array(documents))


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=12),
    ends=st.lists(st.booleans(), min_size=200, max_size=200),
    length=st.integers(1, 9),
    end_id=st.sampled_from([None, END]),
    skipped=st.integers(0, 10),
)
def test_document_numbers_are_those_of_a_plain_loop(
    sizes: list[list[int]], ends: list[bool], length: int, end_id: int | None, skipped: int
) -> None:
    """Documents of no sequence, of no token and of several sequences, end tokens within them, windows that begin and
    end at every place; the held-out part begins in the middle of the file."""
    total = sum(map(sum, sizes))
    if total - skipped < length + 1:
        return
    tokens = np.array([END if ends[place] else 1 for place in range(total)], np.uint16)
    owner = [number for number, document in enumerate(sizes) for _ in range(sum(document))]
    corpus = indexed(
        tokens, [size for document in sizes for size in document], np.cumsum([0, *map(len, sizes)]).tolist()
    )
    boundaries = DocumentBoundaries(corpus, end_id)
    held = CorpusSplit("s", Path("c.bin"), skipped, tokens[skipped:], 1.0, boundaries)
    order = list(reversed(range(held.num_windows(length, "evaluation"))))
    found = held.read_windows(length, order, vocab_size=2)
    for row, numbers, window in zip(found.tokens.tolist(), found.documents.tolist(), order, strict=True):  # type: ignore[union-attr]
        begin, number, expected = skipped + window * length, 0, [0]
        for place in range(1, length + 1):
            number += owner[begin + place] != owner[begin + place - 1] or row[place - 1] == end_id
            expected.append(number)
        assert numbers == expected
    assert corpus.is_one_document == (len(set(owner)) == 1)


# ---------------------------------------------------------------------------------------------------------------------
# Token files


def write_corpus(
    prefix: Path, documents: list[list[int]], info: dict[str, Any] | None = None, dtype: Any = np.uint16
) -> str:
    """Each document gets its end token. info: None for a corpus of Megatron's."""
    tokens = [token for document in documents for token in [*document, END]]
    prefix.parent.mkdir(parents=True, exist_ok=True)
    lengths = np.array([len(document) + 1 for document in documents], np.int32)
    write_index(prefix.with_name(prefix.name + ".idx"), dtype, lengths)
    prefix.with_name(prefix.name + ".bin").write_bytes(np.array(tokens, dtype).tobytes())
    if info is not None:
        fields: dict[str, Any] = {
            "tokenizer": "bytes",
            "tokenizer_sha256": None,
            "vocab_size": 256,
            "end_id": END,
            "num_documents": len(documents),
            "num_tokens": len(tokens),
            "empty_documents_left_out": 0,
            "sha256": f"{len(tokens):064x}",
            "sources": Sources(files=1, bytes=1, sha256="s"),
        }
        text = TokensInfo(**{**fields, **info}).model_dump_json()
        prefix.with_name(prefix.name + ".json").write_text(text)
    return str(prefix)


def numbered(count: int, first: int = 1, length: int = 9) -> list[list[int]]:
    return [[first + number] * length for number in range(count)]


def config_of(*paths: str, **more: Any) -> TokensData:
    corpora = [{"path": path} for path in paths]
    return TokensData.model_validate({"kind": "tokens", "corpora": corpora, **more})


DEMAND = DataRequirements(sequence_length=8, vocab_size=256, held_out_sequences=6, num_samples=100, seed=1)


def opened(config: Any, **changes: Any) -> RunData:
    return open_data(config, DataRequirements(**{**vars(DEMAND), **changes}))


def refused(config: Any, *words: str, **changes: Any) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are looked at
        opened(config, **changes)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"


def test_config() -> None:
    parse = TypeAdapter(DataConfig).validate_python
    config = parse({"kind": "tokens", "corpora": [{"path": "a"}, {"path": "b", "weight": 0.3}]})
    assert isinstance(config, TokensData)
    assert [corpus.weight for corpus in config.corpora] == [1.0, 0.3]
    assert config.documents == parse({"kind": "stdlib"}).documents == "joined"
    for wrong in (
        {"kind": "tokens", "corpora": [{"path": "a", "weight": 0.0}]},
        {"kind": "tokens", "corpora": [{"weight": 1.0}]},
        {"kind": "tokens", "corpora": "a"},
        {"kind": "tokens", "corpora": [{"path": "a"}], "documents": "apart"},
        {"kind": "tokens", "corpora": [{"path": "a"}], "end_id": -1},
        {"kind": "tokens", "corpora": [{"path": "a"}], "paths": "a"},
        {"kind": "stdlib", "sha256": "abc"},
    ):
        with pytest.raises(ValidationError):
            parse(wrong)


def test_training_and_held_out_are_disjoint(tmp_path: Path) -> None:
    one = write_corpus(tmp_path / "one", numbered(40, 1), {})
    two = write_corpus(tmp_path / "v1.2" / "two.x", numbered(60, 101), {}, np.uint8)
    data = opened(config_of(one, two, held_out=0.1))
    assert data.held_out.documents is None
    assert data.held_out.tokens.shape == (6, 9)
    trained = set(data.sampler.sequences(0, 400).tokens.flatten().tolist())
    assert set(data.held_out.tokens.flatten().tolist()) - {END} <= {*range(37, 41), *range(155, 161)}
    assert trained == {END, *range(1, 37), *range(101, 155)}
    assert "40 documents, 360 tokens for training, 40 held out; 50.0% of the sequences, 1.14 epochs" in data.description
    assert data.config.sha256[:12] in data.description


def test_held_out_sequences_follow_the_weights(tmp_path: Path) -> None:
    tokens = [np.full(1000, 1), np.full(1000, 2), np.full(1000, 3)]
    splits = [part(tokens[number], weight, number) for number, weight in enumerate((6.0, 3.0, 1.0))]
    held_out = blended_held_out(splits, 9, 20, vocab_size=4)
    assert Counter(held_out.tokens[:, 0].tolist()) == {1: 12, 2: 6, 3: 2}
    few = blended_held_out([part(np.arange(31), 1.0), part(np.arange(1000), 1.0)], 10, 20, 1000)
    assert len(few) == 3 + 10, "a corpus that has fewer gives what it has"


def test_documents_of_token_files(tmp_path: Path) -> None:
    """A document of 10 tokens spans two windows of 8; it ends where the index says, and after an end token."""
    prefix = write_corpus(tmp_path / "c", numbered(40), {})
    megatron = write_corpus(tmp_path / "m", numbered(40))
    joined = opened(config_of(megatron))
    assert joined.sampler.sequences(0, 3).documents is None
    assert joined.held_out.documents is None
    by_ends = opened(config_of(prefix, documents="separate"))
    for config in (
        config_of(megatron, documents="separate"),  # by the index alone
        config_of(megatron, documents="separate", end_id=END),
        config_of(megatron, documents="separate", end_id=99),  # occurs nowhere
        config_of(megatron, documents="separate", tokenizer="bytes"),
    ):
        data = opened(config)
        for found, expected in (
            (data.held_out, by_ends.held_out),
            (data.sampler.sequences(0, 80), by_ends.sampler.sequences(0, 80)),
        ):
            numbers = [[row[:place].count(END) for place in range(9)] for row in expected.tokens.tolist()]
            assert torch.equal(found.tokens, expected.tokens)
            assert found.documents is not None
            assert found.documents.tolist() == numbers
    assert opened(config_of(megatron, end_id=7)).config.end_id == 7  # type: ignore[union-attr]
    assert opened(config_of(prefix)).config.end_id == END, "for generation"  # type: ignore[union-attr]


def test_one_document_without_end_tokens_cannot_be_separated(tmp_path: Path) -> None:
    whole = write_corpus(tmp_path / "w", [[5] * 398])
    assert opened(config_of(whole, documents="separate", end_id=END)).held_out.documents is not None, "it has its end"
    refused(
        config_of(whole, documents="separate"),
        f"data.corpora[0].path: data.documents is 'separate', but {whole}.idx lists 1 document and data.end_id is not",
    )
    refused(config_of(whole, documents="separate", end_id=6), "the end token 6 (data.end_id) was not found in it")
    content = np.fromfile(f"{whole}.bin", np.uint16)
    content[150] = 7
    content.tofile(f"{whole}.bin")
    ends_inside = opened(config_of(whole, documents="separate", end_id=7)).sampler.sequences(0, 40).documents
    assert ends_inside is not None
    assert int(ends_inside.sum()) == 2, "tokens 151 and 152 of the window that begins with 144"
    write_index(tmp_path / "w.idx", np.uint16, np.array([0, 399, 0, 0], np.int32))
    refused(config_of(whole, documents="separate"), "w.idx lists 1 document")
    good = write_corpus(tmp_path / "g", numbered(40))
    refused(config_of(good, whole, documents="separate"), "data.corpora[1].path")


def test_finding_documents_reads_little_of_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 100_000
    write_index(tmp_path / "c.idx", np.uint8, np.full(count, 3, np.int32))
    (tmp_path / "c.bin").write_bytes(bytes(3 * count))
    corpus, asked = open_indexed_dataset(str(tmp_path / "c")), []
    begin_of = IndexedDataset.document_begin
    monkeypatch.setattr(IndexedDataset, "document_begin", lambda s, number: asked.append(number) or begin_of(s, number))
    assert corpus.document_begins(150_000, 150_009).tolist() == [150_000, 150_003, 150_006]
    assert len(asked) < 40


def test_the_digest_is_recorded_and_refused(tmp_path: Path) -> None:
    one, two = (write_corpus(tmp_path / name, numbered(40 + n), {}) for n, name in enumerate("ab"))
    data = opened(config_of(one))
    assert data.config.sha256 == f"{400:064x}", "of one corpus: what its JSON says"
    assert opened(config_of(one, sha256=data.config.sha256)).config.sha256 == data.config.sha256
    refused(config_of(two, sha256=data.config.sha256), f"data.sha256 is {data.config.sha256}", f"{410:064x}")
    assert len({opened(config_of(*order)).config.sha256 for order in ((one,), (two,), (one, two), (two, one))}) == 4
    megatron = write_corpus(tmp_path / "m", numbered(40))
    before = opened(config_of(megatron)).config.sha256
    write_corpus(tmp_path / "m", numbered(41))
    assert opened(config_of(megatron)).config.sha256 != before


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    good = write_corpus(tmp_path / "good", numbered(40), {})
    refused(config_of(), "data.corpora is empty")
    refused(config_of(good, str(tmp_path / "none")), "data.corpora[1].path: there is no file", "none.idx")
    refused(config_of(good), "good has a vocabulary of 256 tokens, model.vocab_size is 200", vocab_size=200)
    refused(
        config_of(good), "data.corpora[0].path", "good.bin holds 380 tokens for training", "401", sequence_length=400
    )
    refused(config_of(good), "holds 20 tokens for evaluation (data.held_out)", "31", sequence_length=30)
    tiny = {"kind": "tokens", "corpora": [{"path": good}, {"path": good, "weight": 1e-9}]}
    refused(TokensData.model_validate(tiny), "data.corpora[1].path: its weight is 1e-09 of a sum of 1", str(PERIOD))
    other = write_corpus(tmp_path / "other", numbered(40), {"vocab_size": 255})
    refused(
        config_of(good, other), "data.corpora[1].path has another tokenizer than data.corpora[0].path", "255", "256"
    )
    refused(config_of(good, end_id=3), "data.end_id is 3", "data.corpora[0].path end with 0")
    missing = write_corpus(tmp_path / "missing", numbered(40), {"tokenizer": "t.json", "tokenizer_sha256": "a"})
    refused(config_of(missing), "t.json is missing")
    refused(config_of(good, tokenizer=str(tmp_path / "no.json")), "data.tokenizer", "no.json", "No such file")
    changed = write_corpus(tmp_path / "changed", numbered(40), {"num_tokens": 399})
    refused(config_of(changed), "data.corpora[0].path", "changed.json says 399 tokens", "lists 400")
    described = (tmp_path / "good.json").read_text()
    for text, words in (
        ("{", "not valid JSON"),
        ("{}", "does not describe token files: tokenizer"),
        ("[]", "does not"),
        (described.replace("tokens 1", "tokens 2"), "the format is 2, newer than 1, the newest that this installation"),
        (described.replace('"bytes"', '"../t.json"', 1), "tokenizer: '../t.json' is not a plain file name"),
        (described.replace('"bytes"', '"/t.json"', 1), "tokenizer: '/t.json' is not a plain file name"),
        (described.replace('"bytes"', '".."', 1), "tokenizer: '..' is not a plain file name"),
    ):
        (tmp_path / "good.json").write_text(text)
        refused(config_of(good), "data.corpora[0].path", "good.json", words)


def test_a_token_beyond_the_vocabulary_is_refused_when_it_is_met(tmp_path: Path) -> None:
    documents = numbered(40)
    documents[20][4] = 300  # token 204
    corpus = write_corpus(tmp_path / "m", documents)
    sampler = opened(config_of(corpus)).sampler
    words = r"data\.corpora\[0\]\.path: .*m\.bin holds 300 as token 204, model\.vocab_size is 256"
    with pytest.raises(ValueError, match=words):
        sampler.sequences(0, 47)
    documents[20][4], documents[39][2] = 1, -1  # token 392, held out
    negative = write_corpus(tmp_path / "n", documents, dtype=np.int32)
    refused(config_of(negative), "n.bin holds -1 as token 392, model.vocab_size is 256")


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers of a run


def test_the_tokenizer_of_a_run(tmp_path: Path) -> None:
    assert load_tokenizer(FilesData(kind="files", paths=["a"])).encode("é") == [195, 169]  # type: ignore[union-attr]
    megatron = write_corpus(tmp_path / "m", numbered(4))
    assert load_tokenizer(config_of(megatron)) is None
    train_tokenizer(["some text to learn from, some text"] * 20, 270, tmp_path / "t.json")
    given_file = config_of(megatron, tokenizer=str(tmp_path / "t.json"))
    tokenizer = load_tokenizer(given_file)
    assert tokenizer is not None
    assert tokenizer.decode(tokenizer.encode("some text é \u2028")) == "some text é \u2028"
    run = tmp_path / "run"
    run.mkdir()
    save_tokenizer(given_file, run)
    (tmp_path / "t.json").unlink()
    kept = load_tokenizer(given_file, run)
    assert kept is not None
    assert kept.encode("some text") == tokenizer.encode("some text")
    save_tokenizer(FilesData(kind="files", paths=["a"]), tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()
    assert json.loads((run / "tokenizer.json").read_text())["version"]


@pytest.fixture
def copied_run(tmp_path: Path) -> Path:
    """A folder that another run's tokenizer lies in."""
    run = tmp_path / "run"
    run.mkdir()
    train_tokenizer(["some text to learn from, some text"] * 20, 270, run / "tokenizer.json")
    return run


def test_a_tokenizer_left_in_a_run_of_bytes_is_not_its_own(tmp_path: Path, copied_run: Path) -> None:
    prepared = write_corpus(tmp_path / "p", numbered(4), {})
    megatron = write_corpus(tmp_path / "m", numbered(4))
    files = FilesData(kind="files", paths=["a"])
    for config in (config_of(prepared), config_of(megatron, tokenizer="bytes"), files):
        run = tmp_path / "copy"
        shutil.copytree(copied_run, run)
        assert isinstance(load_tokenizer(config, run), ByteTokenizer)
        save_tokenizer(config, run)
        assert not (run / "tokenizer.json").exists(), "nor is it exported"
        run.rmdir()


def test_the_tokenizer_of_an_imported_run(tmp_path: Path, copied_run: Path) -> None:
    """Its folder's file is the only one, until data say another."""
    own = str(copied_run / "tokenizer.json")
    before = Path(own).read_bytes()
    megatron = write_corpus(tmp_path / "m", numbered(4))
    for config in (config_of(end_id=7), config_of(megatron, end_id=7), config_of(megatron, tokenizer=own, end_id=7)):
        save_tokenizer(config, copied_run)
        assert Path(own).read_bytes() == before
        kept = load_tokenizer(config, copied_run)
        assert isinstance(kept, FileTokenizer)
        assert kept.end_id == 7


def test_the_kept_tokenizer_is_compared_with_the_corpus(tmp_path: Path, copied_run: Path) -> None:
    train_tokenizer(["other words altogether"] * 20, 270, tmp_path / "p.tokenizer.json")
    named = {"tokenizer": "p.tokenizer.json", "tokenizer_sha256": file_sha256(tmp_path / "p.tokenizer.json")}
    prefix = write_corpus(tmp_path / "p", numbered(4), {**named, "end_id": 3})
    info = read_info(prefix)
    assert info is not None
    with pytest.raises(ValueError, match="is not the tokenizer of") as caught:
        load_tokenizer(config_of(prefix), copied_run)
    for word in (f"{copied_run}/tokenizer.json", f"{prefix}.json says {info.tokenizer_sha256}"):
        assert word in str(caught.value)
    save_tokenizer(config_of(prefix), copied_run)
    (tmp_path / "p.tokenizer.json").unlink()
    kept = load_tokenizer(config_of(prefix), copied_run)
    assert isinstance(kept, FileTokenizer)
    assert kept.end_id == 3
    for path in tmp_path.glob("p.*"):
        path.unlink()
    assert isinstance(load_tokenizer(config_of(prefix), copied_run), FileTokenizer), "where its corpora are not"
