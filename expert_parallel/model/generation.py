"""Generates text in every layout: several sequences at once, greedily or by sampling, with a KV cache or without.

The result for a sequence depends neither on the layout, nor on the other sequences, nor on the cache: the model runs
without capacity limits, and each token is sampled with a function of (seed, sequence, number of the new token). Shape
letters: B sequences of this rank, S tokens that a pass feeds to each, V vocabulary.
"""

from collections.abc import Collection

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor

from expert_parallel.model.kv_cache import KVCache
from expert_parallel.model.rotary import LongRopeScaling
from expert_parallel.model.tensor_parallel import gather_logits
from expert_parallel.model.transformer import LanguageModel
from expert_parallel.moe.context import StepContext
from expert_parallel.moe.routers.across_tokens import ExpertChoiceConfig
from expert_parallel.nn import random
from expert_parallel.parallel.collectives import all_reduce_sum, group_rank
from expert_parallel.parallel.mesh import ParallelMesh
from expert_parallel.parallel.sequence import SequenceShard, sequence_length_multiple
from expert_parallel.settings import Settings


class Sampling(Settings):
    """Sets how tokens are drawn: temperature first, then `top_k`, then `top_p`."""

    temperature: float = Field(default=0.0, ge=0)
    """Divides the logits by this number before tokens are drawn; 0 always takes the most probable token."""
    top_k: int | None = Field(default=None, ge=1)
    """Draws from this many most probable tokens only; null draws from all."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draws from the fewest most probable tokens whose probabilities sum to this number (nucleus sampling, Holtzman et
    al. 2019)."""


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompts: list[list[int]],
    *,
    num_tokens: int,
    window: int,
    sampling: Sampling = Sampling(),  # noqa: B008 - frozen
    seed: int = 0,
    tokenizer_vocab_size: int | None = None,
    end_ids: Collection[int] = (),
    mesh: ParallelMesh | None = None,
    use_cache: bool = True,
) -> list[list[int]]:
    """Returns each prompt followed by up to `num_tokens` new tokens; any of `end_ids` ends a sequence, as its last one.

    window: the largest number of tokens of a sequence that the model is given; when a sequence is longer, its older
    half is dropped. `tokenizer_vocab_size`: only token ids below this number are generated; None: all of the model's
    vocabulary. Every rank of the mesh must call it with the same arguments and gets the same result. Data parallel
    ranks split the sequences; the rank that holds the last position of a sequence samples its next token. Sequences are
    padded to a length that context and tensor parallel ranks divide. The cache is not used with context parallelism,
    nor with routers whose choices depend on other tokens (expert choice): then the whole window runs again for each
    token.

    Raises ValueError for empty prompts, unknown tokens, a window below 2, and logits that are not finite.
    """
    _refuse(model, prompts, window)
    model.eval()
    dp, dp_rank = (1, 0) if mesh is None else (mesh.degrees.dp, mesh.dp_rank)
    mine = [int(number) for number in torch.arange(len(prompts)).tensor_split(dp)[dp_rank]]
    texts = [_Sequence(list(prompt)) for prompt in prompts]
    longest = min(window, max(map(len, prompts)) + num_tokens)
    decoder = _Decoder(model, mesh, mine, longest, use_cache, seed)
    for step in range(num_tokens):
        for text in texts:
            text.drop_oldest(window)
        logits = decoder.logits([texts[number] for number in mine], step)
        # Each sequence's token is known to one rank; the others add 0.
        choice_B = torch.zeros(len(texts), dtype=torch.int64)
        for number, logits_V in logits.items():
            choice_B[number] = draw(logits_V[:tokenizer_vocab_size], sampling, seed, (number << 32) + step)
        choice_B = all_reduce_sum(choice_B.to(decoder.device), dist.group.WORLD if mesh else None)
        choices = choice_B.tolist()  # device synchronisation: the next pass needs the tokens
        if min(choices) < 0:
            raise ValueError("the model's logits are not finite numbers: no token can be sampled from them")
        for text, choice in zip(texts, choices, strict=True):
            text.add(choice, end_ids)
        if all(text.is_finished for text in texts):
            break
    return [text.tokens for text in texts]


def _refuse(model: LanguageModel, prompts: list[list[int]], window: int) -> None:
    """Raises ValueError for prompts or a window that the model cannot take."""
    if not prompts or not all(prompts):
        raise ValueError("the prompt is empty, at least one token is needed (--prompt)")
    words = model.config.vocab_size
    for prompt in prompts:
        if not 0 <= min(prompt) <= max(prompt) < words:
            raise ValueError(f"the prompt has the token {max(prompt)}, model.vocab_size is {words}")
    if window < 2:
        raise ValueError(f"the window ({window}) must be 2 tokens or more: the older half is dropped when it is full")


class _Sequence:
    """Holds a growing sequence. The model is given tokens[start:]; the first `cached` of these are in the KV cache."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens
        self.start = 0
        self.cached = 0
        self.is_finished = False

    def drop_oldest(self, window: int) -> None:
        """Drops the older half of the tokens if there are more than `window`; the cache then starts anew."""
        if len(self.tokens) - self.start > window:
            self.start, self.cached = len(self.tokens) - max(1, window // 2), 0

    def restart_beyond(self, lengths: list[int]) -> None:
        """Empties the cache once the sequence has become longer than one of the lengths, as keys then have other rotary
        positions."""
        if any(self.cached <= length < len(self.tokens) - self.start for length in lengths):
            self.cached = 0

    @property
    def fed(self) -> list[int]:
        """Returns the tokens that the next pass must be given."""
        return [] if self.is_finished else self.tokens[self.start + self.cached :]

    def add(self, token: int, end_ids: Collection[int]) -> None:
        """Appends a token, unless the sequence has ended."""
        if not self.is_finished:
            self.tokens.append(token)
            self.is_finished = token in end_ids


class _Decoder:
    """Runs passes of the model over this rank's sequences, whose numbers are `mine`."""

    def __init__(
        self,
        model: LanguageModel,
        mesh: ParallelMesh | None,
        mine: list[int],
        longest: int,
        use_cache: bool,
        seed: int,
    ) -> None:
        """Allocates the KV cache if it can be used. longest: the most tokens of a sequence that the model is given."""
        self.model = model
        self.mine = mine
        self.seed = seed
        self.place, self.tp_group = SequenceShard.of(mesh), None if mesh is None else mesh.tp_group
        self.device = next(model.parameters()).device
        moe = model.config.moe
        looks_across = moe is not None and isinstance(moe.router, ExpertChoiceConfig)
        use_cache = use_cache and self.place.cp == 1 and not looks_across
        self.cache = KVCache(len(mine), longest, self.device) if use_cache else None
        ropes = {model.config.rope_of(layer) for layer in range(model.config.num_layers)}
        scalings = [rope.scaling for rope in ropes if rope is not None]
        self.switch_lengths = [scaling.original_length for scaling in scalings if isinstance(scaling, LongRopeScaling)]

    def logits(self, texts: list[_Sequence], step: int) -> dict[int, Tensor]:
        """Runs a forward pass and returns, by number of the sequence, the logits (V) after its last token, on the CPU.

        Only sequences whose last position this rank holds are returned. texts: the sequences `mine`. A collective:
        every rank must call it.
        """
        for text in texts:
            text.restart_beyond(self.switch_lengths)
        fed = [text.fed for text in texts]
        unit = sequence_length_multiple(self.place.cp, self.place.tp)
        longest = max([len(tokens) for tokens in fed], default=0)
        length = max(1, -(-longest // unit)) * unit
        padded = [row + [0] * (length - len(row)) for row in fed]
        tokens_BS = torch.tensor(padded, dtype=torch.int64, device=self.device).view(len(fed), length)
        count_B = torch.tensor([len(row) for row in fed], dtype=torch.int64, device=self.device)
        context = StepContext(
            seed=self.seed,
            step=step,
            sequence_index_B=torch.tensor(self.mine, dtype=torch.int64, device=self.device),
            mask_BS=torch.arange(length, device=self.device) < count_B[:, None],
            dropless=True,
        )
        if self.cache is not None:
            cached = [text.cached for text in texts]
            self.cache.length_B = torch.tensor(cached, dtype=torch.int64, device=self.device)
            for text, row in zip(texts, fed, strict=True):
                text.cached += len(row)
        output = self.model(tokens_BS, context, cache=self.cache)
        if not self.model.has_logits:
            return {}
        return self._last(output.logits, fed, length)

    def _last(self, logits_BSV: Tensor, fed: list[list[int]], length: int) -> dict[int, Tensor]:
        """Selects the logits at each sequence's last position, if this rank holds it."""
        index_of_position = {position: s for s, position in enumerate(self.place.context(length).tolist())}
        rows = [(b, index_of_position[len(row) - 1]) for b, row in enumerate(fed) if len(row) - 1 in index_of_position]
        if not rows:
            return {}
        found = torch.stack([logits_BSV[b, s] for b, s in rows])
        found = gather_logits(found, self.tp_group, self.model.config.vocab_size).cpu()  # sampled on the CPU, see draw
        if group_rank(self.tp_group) > 0:  # or the token would be added once per rank
            return {}
        return {self.mine[b]: logits_V for (b, _), logits_V in zip(rows, found, strict=True)}


def draw(logits_V: Tensor, sampling: Sampling, seed: int, index: int) -> Tensor:
    """Returns a token id drawn from logits (V), a function of (seed, index): int64, on the CPU; -1 if a logit is not
    finite.

    Computed on the CPU in float64, so that all devices give the same token. Equal logits are ordered by token id.
    """
    logits_V = logits_V.double().cpu()
    if not bool(logits_V.isfinite().all()):
        return torch.tensor(-1)
    if sampling.temperature == 0:
        return logits_V.argmax()
    sorted_V, id_V = logits_V.sort(descending=True, stable=True)
    sorted_V, id_V = sorted_V[: sampling.top_k], id_V[: sampling.top_k]
    share_V = ((sorted_V - sorted_V[0]) / sampling.temperature).softmax(0)  # largest is 0: no temperature overflows it
    share_V = share_V * (share_V.cumsum(0) - share_V < sampling.top_p)
    drawn = random.uniform(seed, torch.tensor([index]), 1)[0, 0] * share_V.sum()
    place = torch.searchsorted(share_V.cumsum(0), drawn, right=True)
    return id_V[place.clamp(max=int((share_V > 0).sum()) - 1)]
