"""Text generation in every layout: several sequences at once, greedy or drawn, with a cache of keys and values or
without.

What a sequence becomes depends neither on the layout, nor on the other sequences, nor on the cache: the model runs
without capacity limits, and each token is drawn by a function of (seed, sequence, position). Shape letters: B the
sequences of this rank, S the tokens that a pass feeds to each, V the vocabulary.
"""

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor

from expert_parallel.model.kv_cache import KeyValueCache
from expert_parallel.model.tensor_parallel import gather_logits
from expert_parallel.model.transformer import LanguageModel
from expert_parallel.moe.context import StepContext
from expert_parallel.moe.routers.across_tokens import ExpertChoiceConfig
from expert_parallel.nn import random
from expert_parallel.parallel.collectives import all_reduce_sum, group_rank
from expert_parallel.parallel.mesh import ParallelMesh
from expert_parallel.parallel.sequence import SequencePlace, length_unit
from expert_parallel.settings import Settings


class Sampling(Settings):
    """temperature 0: the likeliest token each time. top_k: of the so many likeliest alone. top_p: of the fewest
    likeliest that together have this probability (nucleus sampling, Holtzman et al. 2019). In this order."""

    temperature: float = Field(default=0.0, ge=0)
    top_k: int | None = Field(default=None, ge=1)
    top_p: float = Field(default=1.0, gt=0, le=1)


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompts: list[list[int]],
    *,
    num_tokens: int,
    window: int,
    sampling: Sampling = Sampling(),  # noqa: B008 - frozen
    seed: int = 0,
    num_words: int | None = None,
    end_id: int | None = None,
    mesh: ParallelMesh | None = None,
    use_cache: bool = True,
) -> list[list[int]]:
    """Each prompt and up to `num_tokens` more; `end_id` ends a sequence and is its last token.

    window: tokens that the model sees at most; when they are full, the older half is forgotten. num_words: token ids
    that are drawn, the first of the model's vocabulary; default: all. Every rank of the mesh calls it with the same
    arguments and gets the same. Data ranks divide the sequences; whoever has a sequence's last position draws its next
    token. Sequences that ranks divide are padded to a length that divides. The cache is not used where a sequence is
    divided over context parallel ranks, or where routers look across tokens (expert choice): the whole window runs
    again for each token.
    """
    _refuse(model, prompts, window)
    model.eval()
    dp, dp_rank = (1, 0) if mesh is None else (mesh.degrees.dp, mesh.dp_rank)
    mine = [int(number) for number in torch.arange(len(prompts)).tensor_split(dp)[dp_rank]]
    texts = [_Text(list(prompt)) for prompt in prompts]
    longest = min(window, max(map(len, prompts)) + num_tokens)
    decoder = _Decoder(model, mesh, mine, longest, use_cache, seed)
    for step in range(num_tokens):
        for text in texts:
            text.make_room(window)
        logits = decoder.logits([texts[number] for number in mine], step)
        choice_B = torch.zeros(len(texts), dtype=torch.int64)  # of each sequence, from the one rank that knows it
        for number, logits_V in logits.items():
            choice_B[number] = draw(logits_V[:num_words], sampling, seed, (number << 32) + step)
        choice_B = all_reduce_sum(choice_B.to(decoder.device), dist.group.WORLD if mesh else None)
        if bool((choice_B < 0).any()):
            raise ValueError("the model's logits are not finite numbers: there is nothing to draw from")
        for text, choice in zip(texts, choice_B.tolist(), strict=True):
            text.add(choice, end_id)
        if all(text.is_finished for text in texts):
            break
    return [text.tokens for text in texts]


def _refuse(model: LanguageModel, prompts: list[list[int]], window: int) -> None:
    if not prompts or not all(prompts):
        raise ValueError("the prompt is empty, at least one token is needed (--prompt)")
    words = model.config.vocab_size
    for prompt in prompts:
        if not 0 <= min(prompt) <= max(prompt) < words:
            raise ValueError(f"the prompt has the token {max(prompt)}, model.vocab_size is {words}")
    if window < 2:
        raise ValueError(f"the window ({window}) must be 2 tokens or more: the older half is forgotten when it is full")


class _Text:
    """A sequence that grows. The model sees tokens[start:], of which the cache holds `cached`."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens, self.start, self.cached, self.is_finished = tokens, 0, 0, False

    def make_room(self, window: int) -> None:
        if len(self.tokens) - self.start > window:
            self.start, self.cached = len(self.tokens) - max(1, window // 2), 0

    @property
    def fed(self) -> list[int]:
        """What the next pass is given."""
        return [] if self.is_finished else self.tokens[self.start + self.cached :]

    def add(self, token: int, end_id: int | None) -> None:
        if not self.is_finished:
            self.tokens.append(token)
            self.is_finished = token == end_id


class _Decoder:
    """Passes of the model over the sequences `mine`."""

    def __init__(
        self,
        model: LanguageModel,
        mesh: ParallelMesh | None,
        mine: list[int],
        longest: int,
        use_cache: bool,
        seed: int,
    ) -> None:
        """longest: tokens that the model may see."""
        self.model, self.mine, self.seed = model, mine, seed
        self.place, self.tp_group = SequencePlace.of(mesh), None if mesh is None else mesh.tp_group
        self.device = next(model.parameters()).device
        moe = model.config.moe
        looks_across = moe is not None and isinstance(moe.router, ExpertChoiceConfig)
        use_cache = use_cache and self.place.cp == 1 and not looks_across
        self.cache = KeyValueCache(len(mine), longest, self.device) if use_cache else None

    def logits(self, texts: list[_Text], step: int) -> dict[int, Tensor]:
        """Those after each sequence's last token, (V), on the CPU, by the number of the sequence; of the sequences
        whose last token is here. texts: of `mine`. A pass; every rank makes it."""
        fed = [text.fed for text in texts]
        unit = length_unit(self.place.cp, self.place.tp)
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
        here = {int(position): row for row, position in enumerate(self.place.context(length))}
        rows = [(b, here[len(row) - 1]) for b, row in enumerate(fed) if len(row) - 1 in here]
        if not rows:
            return {}
        found = torch.stack([logits_BSV[b, s] for b, s in rows])
        found = gather_logits(found, self.tp_group, self.model.config.vocab_size).cpu()
        if group_rank(self.tp_group) > 0:
            return {}
        return {self.mine[b]: logits_V for (b, _), logits_V in zip(rows, found, strict=True)}


def draw(logits_V: Tensor, sampling: Sampling, seed: int, index: int) -> Tensor:
    """A token id, int64, on the CPU: a function of (seed, index). Of equals, the smaller id is the likelier. -1 where
    logits are NaN or infinite."""
    logits_V = logits_V.double().cpu()
    if not bool(logits_V.isfinite().all()):
        return torch.tensor(-1)
    if sampling.temperature == 0:
        return logits_V.argmax()
    sorted_V, id_V = (logits_V / sampling.temperature).sort(descending=True, stable=True)
    sorted_V, id_V = sorted_V[: sampling.top_k], id_V[: sampling.top_k]
    share_V = sorted_V.softmax(0)
    share_V = share_V * (share_V.cumsum(0) - share_V < sampling.top_p)
    drawn = random.uniform(seed, torch.tensor([index]), 1)[0, 0] * share_V.sum()
    place = torch.searchsorted(share_V.cumsum(0), drawn, right=True)
    return id_V[place.clamp(max=int((share_V > 0).sum()) - 1)]
