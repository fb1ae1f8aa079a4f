"""Formats the output of `data inspect`, which describes token files."""

import numpy as np

from expert_parallel.data.indexed import CHUNK, IndexedDataset, open_indexed_dataset, with_suffix
from expert_parallel.data.tokenizer import (
    TokensInfo,
    check_info,
    file_sha256,
    open_tokenizer,
    read_info,
    recorded_tokenizer,
)


def format_corpus(prefix: str, num_shown: int, verify: bool) -> str:
    """Returns a text with the counts, document lengths and first `num_shown` tokens of the corpus PREFIX. verify: reads
    and checks all tokens. Raises ValueError if a file is damaged."""
    corpus, info = open_indexed_dataset(prefix), read_info(prefix)
    begins = np.array([corpus.document_begin(number) for number in sample_documents(corpus.num_documents)])
    ends = np.array([corpus.document_begin(number + 1) for number in sample_documents(corpus.num_documents)])
    lengths = np.sort(ends - begins)
    shown = corpus.tokens[:num_shown].tolist()
    of = "" if len(lengths) == corpus.num_documents else f" (of {len(lengths):,} of them, evenly spread)"
    lines = [
        f"documents   {corpus.num_documents:,}" + _sequences(corpus),
        f"tokens      {corpus.num_tokens:,} as {corpus.tokens.dtype.name}, {corpus.tokens.nbytes:,} bytes",
        f"lengths     {lengths[0]:,} to {lengths[-1]:,} tokens, median {np.median(lengths):,.0f}, "
        f"mean {corpus.num_tokens / corpus.num_documents:,.1f}{of}",
    ]
    if info is not None:
        check_info(prefix, corpus, info)
        lines += _format_info(info)
    lines += [f"begins      {' '.join(map(str, shown))}"] if shown else []
    if info is not None and shown:
        lines.append(f"            {open_tokenizer(*recorded_tokenizer(prefix, info)).decode(shown)!r}")
    if verify:
        lines.append(f"verified    {verify_tokens(prefix, corpus, info)}")
    return "\n".join(lines)


def sample_documents(number: int, most: int = 100_000) -> list[int]:
    """Returns the numbers of at most `most` of `number` documents, evenly spaced, so that a median does not need the
    whole index of a large corpus."""
    count = min(number, most)
    return [place * number // count for place in range(count)]


def verify_tokens(prefix: str, corpus: IndexedDataset, info: TokensInfo | None) -> str:
    """Reads all tokens, checks their range, their SHA-256 and the end of each document, and returns a text that says
    what was checked. Raises ValueError if a check fails."""
    low, high = 0, 0
    for first in range(0, corpus.num_tokens, CHUNK):
        chunk = corpus.tokens[first : first + CHUNK]
        low, high = min(low, int(chunk.min())), max(high, int(chunk.max()))
    if info is None:
        return f"ids from {low} to {high}; there is no {with_suffix(prefix, '.json').name} to compare with"
    file = with_suffix(prefix, ".bin")
    if low < 0 or high >= info.vocab_size:
        raise ValueError(f"{file} holds ids from {low} to {high}, its vocabulary is of {info.vocab_size} tokens")
    if (found := file_sha256(file)) != info.sha256:
        raise ValueError(f"{file} has sha256 {found}, {with_suffix(prefix, '.json')} says {info.sha256}")
    for document in range(corpus.num_documents):
        if corpus.tokens[corpus.document_begin(document + 1) - 1] != info.end_id:
            raise ValueError(f"{file}: document {document} does not end with token {info.end_id}")
    return f"sha256, ids up to {high}, and the end of each document"


def _sequences(corpus: IndexedDataset) -> str:
    return "" if len(corpus.lengths) == corpus.num_documents else f" of {len(corpus.lengths):,} sequences"


def _format_info(info: TokensInfo) -> list[str]:
    return [
        f"tokenizer   {info.tokenizer}, {info.vocab_size:,} tokens; {info.end_id} ends a document",
        f"sha256      {info.sha256}",
        f"from        {info.sources.files:,} files, {info.sources.bytes:,} bytes, sha256 {info.sources.sha256}"
        + info.describe_left_out(),
    ]
