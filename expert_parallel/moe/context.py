"""What a pass is told beside its input (`StepContext`), what a layer makes of it (`TokenBatch`), and the choices
that a pass records for another one to take."""

from dataclasses import dataclass, field, replace
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor

from expert_parallel.moe.types import Reason, RoutingPlan
from expert_parallel.nn.random import Stream, mix
from expert_parallel.parallel.collectives import group_size


@dataclass(frozen=True)
class Choices:
    """Where a layer's tokens went: as the router chose, and as they stood after capacity. ids int64, reasons uint8.
    index_T: whose choices (see TokenBatch). padded_rows: what each expert computes, if padded to capacity."""

    index_T: Tensor
    routed_ids_TK: Tensor
    routed_reason_TK: Tensor
    ids_TK: Tensor
    reason_TK: Tensor
    padded_rows: int | None = None

    @property
    def routed(self) -> tuple[Tensor, Tensor]:
        """What the router takes instead of choosing."""
        return self.routed_ids_TK, self.routed_reason_TK

    @classmethod
    def of(cls, index_T: Tensor, routed: RoutingPlan, plan: RoutingPlan) -> Self:
        """Takes the choices out of the plan as it was routed, and out of what capacity left of it."""
        before, after = (routed.expert_ids_TK, routed.reason_TK), (plan.expert_ids_TK, plan.reason_TK)
        return cls(index_T, *before, *after, plan.padded_rows)

    def put_into(self, routed: RoutingPlan) -> RoutingPlan:
        """Returns the routed plan with these choices in place of its own. Padding may be other now than it was."""
        reason_TK = self.reason_TK.masked_fill(~routed.routed_TK, Reason.NOT_ROUTED)
        return replace(routed, expert_ids_TK=self.ids_TK, reason_TK=reason_TK, padded_rows=self.padded_rows)


@dataclass
class RouterReplay:
    """Records each pass's choices, by (step, micro-step, layer), and plays them back: a pass that is recorded here
    takes those, any other records its own.

    Give one to `StepContext.replay` in a first pass and again in a second. Recomputation does so by itself, so that
    rounding cannot break ties differently. Weights are computed anew, with gradients.
    """

    recorded: dict[tuple[int, int, int], Choices] = field(default_factory=dict)

    def find(self, context: "StepContext") -> Choices | None:
        """Returns what was recorded of the pass, or None."""
        return self.recorded.get((context.step, context.micro_step, context.layer))

    def record(self, context: "StepContext", choices: Choices) -> None:
        """Keeps the choices of the pass, in place of earlier ones."""
        self.recorded[context.step, context.micro_step, context.layer] = choices


@dataclass(frozen=True)
class StepContext:
    """What a forward pass is told beside its input: where in the run it stands, the key of all randomness (so that no
    generator state is stored), and what the tokens are.

    `sequence_index_B` (int64) is each sequence's index in the global batch of the micro-step; None counts this
    rank's own sequences from 0. `positions_S` (int64): where this rank's tokens stand in their sequences, the same in
    all of them, in any order; None: at 0, 1, ... Where sequences are divided over ranks, each rank gives its own, and
    all of them the same sequences in the same order. `coordinate` tells apart, for dropout, the ranks that have tokens
    of their own. `token_ids_BS` (int64): for hash routing. `mask_BS` (bool): False marks padding, which is not routed,
    takes no capacity and is in no loss. `document_BS` (int64, from 0): which document of its row a token belongs to,
    where rows are packed with several, at most `documents_per_row`; losses of scope `sequence` then look at each
    document as they else do at each row. `dropless`: no capacity limits (generation: what a token becomes must not
    depend on what else is in the pass).
    """

    seed: int = 0
    step: int = 0
    micro_step: int = 0
    layer: int = 0
    coordinate: int = 0
    sequence_index_B: Tensor | None = None
    positions_S: Tensor | None = None
    token_ids_BS: Tensor | None = None
    mask_BS: Tensor | None = None
    document_BS: Tensor | None = None
    documents_per_row: int = 1
    dropless: bool = False
    replay: RouterReplay | None = None


@dataclass
class ScopeBytes:
    """Counts the bytes that this rank sends in one pass for decisions across ranks (capacity/token_scope.py adds to
    it)."""

    sent: int = 0


@dataclass(frozen=True)
class TokenBatch:
    """What a layer knows of its T tokens beside their values.

    index_T: int64, the token's place in the global order: its sequence's index * 2^32 + its position. is_global: the
    caller gave the sequences' indices. sequence_T: int64, the sequence's number on this rank. real_T: bool, False for
    padding; None: all are real. ids_T: int64, the tokens themselves. group: the ranks whose tokens make up the
    micro-step. sequence_group: those among which the tokens of these sequences are divided; None: all are here.
    document_T: int64, the token's document among the num_documents that these sequences may hold; None: rows are not
    packed.
    scope_bytes: what scopes beyond this rank send to others, counted as it happens.
    """

    index_T: Tensor
    sequence_T: Tensor
    num_sequences: int
    context: StepContext
    group: dist.ProcessGroup | None = None
    sequence_group: dist.ProcessGroup | None = None
    is_global: bool = False
    real_T: Tensor | None = None
    ids_T: Tensor | None = None
    document_T: Tensor | None = None
    num_documents: int = 0
    scope_bytes: ScopeBytes = field(default_factory=ScopeBytes)


def token_batch(
    x_BSD: Tensor,
    context: StepContext,
    group: dist.ProcessGroup | None,
    sequence_group: dist.ProcessGroup | None = None,
) -> TokenBatch:
    """ValueError where what the context says of the tokens does not have their shape, or does not say where they
    stand."""
    num_sequences, length, _ = x_BSD.shape
    for name, shape, dtype in (
        ("sequence_index_B", (num_sequences,), torch.int64),
        ("positions_S", (length,), torch.int64),
        ("token_ids_BS", (num_sequences, length), torch.int64),
        ("mask_BS", (num_sequences, length), torch.bool),
        ("document_BS", (num_sequences, length), torch.int64),
    ):
        given = getattr(context, name)
        if given is not None and (tuple(given.shape) != shape or given.dtype != dtype):
            raise ValueError(
                f"StepContext.{name} is {given.dtype} of shape {tuple(given.shape)}, the layer's input asks for "
                f"{dtype} of shape {shape}"
            )
    if context.positions_S is None and group_size(sequence_group) > 1:
        raise ValueError(
            f"StepContext.positions_S is not set: sequences are divided over {group_size(sequence_group)} ranks, and "
            f"it says where this one's {length} tokens of each stand in it"
        )
    numbers_B = torch.arange(num_sequences, device=x_BSD.device)
    sequence_B = numbers_B if context.sequence_index_B is None else context.sequence_index_B
    document_T, per_row = None, context.documents_per_row
    if context.document_BS is not None:
        document_T = (numbers_B[:, None] * per_row + context.document_BS).flatten()
    return TokenBatch(
        index_T=global_index(sequence_B, length, context.positions_S),
        sequence_T=numbers_B.repeat_interleave(length),
        num_sequences=num_sequences,
        context=context,
        group=group,
        sequence_group=sequence_group,
        is_global=context.sequence_index_B is not None,
        real_T=None if context.mask_BS is None else context.mask_BS.flatten(),
        ids_T=None if context.token_ids_BS is None else context.token_ids_BS.flatten(),
        document_T=document_T,
        num_documents=num_sequences * per_row,
    )


def global_index(sequence_index_B: Tensor, length: int, positions_S: Tensor | None = None) -> Tensor:
    """The place of each token of sequences of one length in the global order, int64 (B * length); see TokenBatch.
    positions_S: where the tokens stand in their sequences; None: at 0, 1, ..."""
    if positions_S is None:
        positions_S = torch.arange(length, device=sequence_index_B.device)
    return ((sequence_index_B[:, None] << 32) + positions_S).flatten()


def find_recorded(batch: TokenBatch, num_choices: int) -> Choices | None:
    """Returns the choices that the context's replay has recorded of this pass; None where there are none. ValueError
    where they are not those of these tokens, or of a router like this one."""
    replay = batch.context.replay
    recorded = None if replay is None else replay.find(batch.context)
    if recorded is None:
        return None
    if recorded.ids_TK.shape[1] != num_choices:
        raise ValueError(
            f"StepContext.replay holds {recorded.ids_TK.shape[1]} choices a token, the router makes {num_choices} "
            "(router.k)"
        )
    if not torch.equal(recorded.index_T, batch.index_T):
        raise ValueError(
            f"StepContext.replay was recorded of other tokens: {len(recorded.index_T)} of them, here are "
            f"{len(batch.index_T)}; or their sequences have other indices, or they stand elsewhere in them"
        )
    return recorded


def pass_seed(context: StepContext, stream: Stream) -> int:
    """The seed of one use in one pass of one layer: the same on every rank, unlike dropout's."""
    return mix(context.seed, context.step, context.micro_step, context.layer, stream)


def dropout_seed(context: StepContext) -> int:
    return mix(context.seed, context.step, context.micro_step, context.layer, Stream.DROPOUT, context.coordinate)
