"""The rows of a pass under way, in chunks of its tokens: one chunk's exchange lies beneath the experts of another.

With two chunks, one hop, D to the experts, C the experts, M back (in small letters: waiting for it):

    forward     D1 d1 D2 C1 M1 d2 C2 M2 m1 m2     D2 travels under C1, M1 under C2
    backward    m2 m1 M2 C2 d2 M1 C1 d1 D2 D1     the same the other way round: autograd runs what is ready in the
                                                  reverse order of its making, and each starts or waits for the other's
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from expert_parallel.moe.hop import Hop, Leg
from expert_parallel.moe.ledger import Ledger


def chunk_sizes(num_tokens: int, num_chunks: int) -> list[int]:
    """Of successive tokens, as equal as they can be; 0 where there are more chunks than tokens."""
    ends = [num_tokens * (chunk + 1) // num_chunks for chunk in range(num_chunks)]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def split(x: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    return [x] if len(sizes) == 1 else x.split(list(sizes))


class Passage:
    """One chunk's rows to their experts and back. It may begin when its first leg is known; `legs` and `serve` (from
    arrived rows to what the experts make of them) are set as they become known."""

    def __init__(self, x_LD: Tensor, hops: Sequence[Hop], ledger: Ledger) -> None:
        self.x_LD, self.hops, self.ledger, self.dtype = x_LD, hops, ledger, x_LD.dtype
        self.legs: list[Leg] = []
        self.serve: Callable[[Tensor], Tensor] | None = None
        self.y_LD = x_LD[:0]  # until it has ended
        self.steps = self._steps()

    def _steps(self) -> Iterator[None]:
        """Yields where others should go on: with their rows before this one computes, computing before it waits."""
        x = self.x_LD
        for number, hop in enumerate(self.hops):
            trip = hop.start(x, self.legs[number], self.ledger)
            yield
            x = trip.finish().to(self.dtype)
        yield
        assert self.serve is not None
        y = self.serve(x)
        for number, hop in reversed(list(enumerate(self.hops))):
            trip = hop.start_back(y, self.legs[number], self.ledger)
            yield
            if hop is self.hops[-1]:  # what the experts made travels under the experts of the next chunk
                yield
            y = hop.added_up(trip.finish().to(self.dtype), self.legs[number])
        self.y_LD = y


def finish(passages: Sequence[Passage]) -> Tensor:
    """The outputs of all chunks, in order. The first has begun. In turn each goes one step on, the oldest first, and
    then the next one begins."""
    under_way, waiting = [passages[0]], list(passages[1:])
    while under_way:
        under_way = [passage for passage in under_way if _goes_on(passage)]
        if waiting:
            next(waiting[0].steps)
            under_way.append(waiting.pop(0))
    outputs = [passage.y_LD for passage in passages]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _goes_on(passage: Passage) -> bool:
    return next(passage.steps, passage) is None
