"""Encodes prompts and decodes generated texts, as a run's own tokenizer does, or transformers for an imported model."""

from collections.abc import Sequence

from expert_parallel.data.imported import TOKENIZER_CONFIG, ImportedGeneration
from expert_parallel.data.tokenizer import FileTokenizer, Tokenizer


class PromptTokenizer:
    """Encodes prompts and decodes generated texts.

    tokenizer: the run's. imported: what the imported model's files say; None for a run with a tokenizer of its own,
    whose prompts begin like its documents, without added tokens. special_tokens: special tokens in prompts, such as
    `<|im_start|>`, are encoded as such and not as ordinary text, and those of a text are shown. trains: the run has
    data to train on, whose end token ends texts, too.

    vocab_size: only token ids below this number are generated; None: all of the model's, as in transformers. end_ids:
    token ids that end a text. Raises ValueError for special tokens of bytes, which have none, and for tokens in the
    imported model's files that its tokenizer.json lacks.
    """

    def __init__(
        self, tokenizer: Tokenizer, imported: ImportedGeneration | None, *, special_tokens: bool, trains: bool
    ) -> None:
        if special_tokens and not isinstance(tokenizer, FileTokenizer):
            raise ValueError("--special-tokens needs a tokenizer.json, but this run's tokens are bytes")
        self.tokenizer, self.imported, self.special_tokens = tokenizer, imported, special_tokens
        self.vocab_size = tokenizer.vocab_size if imported is None else None
        self.end_ids = frozenset() if imported is None else imported.end_ids
        if tokenizer.end_id is not None and (imported is None or trains):
            self.end_ids |= {tokenizer.end_id}
        self._before: list[int] = []
        self._after: list[int] = []
        if imported is not None and isinstance(tokenizer, FileTokenizer):
            tokenizer.mark_special(imported.special_tokens)
        if imported is not None and isinstance(tokenizer, FileTokenizer) and not tokenizer.adds_special_tokens:
            self._before = _ids_of(imported.bos_token, tokenizer)
            self._after = _ids_of(imported.eos_token, tokenizer)

    def encode(self, prompt: str) -> list[int]:
        """Encodes a prompt. An empty one becomes the imported model's first token, if there is one."""
        if not isinstance(self.tokenizer, FileTokenizer):
            return self.tokenizer.encode(prompt)
        ids = self.tokenizer.encode(
            prompt, add_special_tokens=self.imported is not None, split_special_tokens=not self.special_tokens
        )
        ids = [*self._before, *ids, *self._after]
        if not ids and self.imported is not None and self.imported.bos_id is not None:
            return [self.imported.bos_id]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Decodes a text, with or without its special tokens."""
        if not isinstance(self.tokenizer, FileTokenizer):
            return self.tokenizer.decode(ids)
        return self.tokenizer.decode(ids, skip_special_tokens=not self.special_tokens)


def _ids_of(token: str | None, tokenizer: FileTokenizer) -> list[int]:
    """Returns the id of a token in a list, empty for None. Raises ValueError if the tokenizer lacks it."""
    if token is None:
        return []
    if (found := tokenizer.find_id(token)) is None:
        raise ValueError(f"{TOKENIZER_CONFIG} adds {token!r} to prompts, but tokenizer.json has no such token")
    return [found]
