"""Defines the inputs of a forward pass other than its hidden states (`StepContext`), what a layer derives from them
(`TokenBatch`), and the recording and replay of the router's choices."""

from dataclasses import dataclass, field, replace
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor

from expert_parallel.moe.types import Outcome, RoutingPlan
from expert_parallel.nn.random import Stream, mix
from expert_parallel.parallel.collectives import group_size


@dataclass(frozen=True)
class RecordedChoices:
    """Records the experts chosen for each token in one pass of one layer, before and after capacity was applied.

    index_T: int64, the place of each token in the global order (see TokenBatch). routed_ids_TK, routed_outcome_TK: as
    the router chose. ids_TK, outcome_TK: after capacity. Ids are expert ids, int64; outcomes are uint8, values of
    `Outcome`. `rows_per_expert`: see RoutingPlan.
    """

    index_T: Tensor
    routed_ids_TK: Tensor
    routed_outcome_TK: Tensor
    ids_TK: Tensor
    outcome_TK: Tensor
    rows_per_expert: int | None = None

    @property
    def routed(self) -> tuple[Tensor, Tensor]:
        """Returns the expert ids and outcomes before capacity, which the router takes instead of choosing."""
        return self.routed_ids_TK, self.routed_outcome_TK

    @classmethod
    def of(cls, index_T: Tensor, routed: RoutingPlan, plan: RoutingPlan) -> Self:
        """Builds the record from `routed`, the plan before capacity, and `plan`, the plan after it."""
        before, after = (routed.expert_ids_TK, routed.outcome_TK), (plan.expert_ids_TK, plan.outcome_TK)
        return cls(index_T, *before, *after, plan.rows_per_expert)

    def apply_to(self, routed: RoutingPlan) -> RoutingPlan:
        """Returns the plan `routed` with the recorded choices after capacity instead of its own. Padding tokens are
        those of `routed`, not the recorded ones."""
        outcome_TK = self.outcome_TK.masked_fill(~routed.routed_TK, Outcome.NOT_ROUTED)
        return replace(routed, expert_ids_TK=self.ids_TK, outcome_TK=outcome_TK, rows_per_expert=self.rows_per_expert)


@dataclass
class RouterReplay:
    """Records the router's choices in each pass of each layer, and replays them: a pass whose (step, micro-step, layer)
    has been recorded takes the recorded choices, any other records its own.

    Pass the same object as `StepContext.replay` in a first pass and again in a second. Activation recomputation does
    this by itself, so that rounding cannot break ties differently. The weights of the choices are recomputed, with
    gradients.
    """

    recorded: dict[tuple[int, int, int], RecordedChoices] = field(default_factory=dict)

    def find(self, context: "StepContext") -> RecordedChoices | None:
        """Returns the recorded choices of the pass, or None."""
        return self.recorded.get((context.step, context.micro_step, context.layer))

    def record(self, context: "StepContext", choices: RecordedChoices) -> None:
        """Stores the choices of the pass and replaces earlier ones."""
        self.recorded[context.step, context.micro_step, context.layer] = choices


@dataclass(frozen=True)
class StepContext:
    """Tells a forward pass which step of the run it belongs to, and describes its tokens.

    seed, step, micro_step, layer: the key of all random numbers, so that no generator state is stored. coordinate: a
    number that differs between ranks with different tokens, so that they draw different dropout masks.

    `sequence_index_B` (int64): each sequence's index in the global batch of the micro-step; None: this rank's sequences
    count from 0. `positions_S` (int64): the positions of this rank's tokens in their sequences, equal for all
    sequences, in any order; None: 0, 1, ... If sequences are divided over ranks, each rank gives its own positions, and
    all give the same sequences in the same order. `token_ids_BS` (int64): ids of the vocabulary, for hash routing.
    `mask_BS` (bool): False marks padding, which is not routed, takes no capacity and is in no loss. `document_BS`
    (int64, from 0): the number of each token's document in its sequence, if sequences are packed with up to
    `documents_per_row` documents each; losses of scope `sequence` then treat each document as a sequence. `dropless`:
    True ignores capacity (in generation, a token's output must not depend on the others). `replay`: see RouterReplay.
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
    """Counts the bytes that this rank sends in one pass to gather the tokens of scopes wider than one rank;
    capacity/token_scope.py adds to it."""

    sent: int = 0


@dataclass(frozen=True)
class TokenBatch:
    """Describes the T tokens of a layer's input.

    index_T: int64, the token's place in the global order: its sequence's index * 2^32 + its position. is_global: True
    if the caller gave `sequence_index_B`; otherwise the sequences of every rank have the indices 0, 1, ... sequence_T:
    int64, the index of the token's sequence among this rank's sequences. real_T: bool, False for padding; None: no
    padding. ids_T: int64, token ids. group: the ranks whose tokens make up the micro-step. sequence_group: the ranks
    over which each of these sequences is divided; None: this rank holds whole sequences. document_T: int64, the index
    of the token's document among the num_documents = B * documents_per_row that this rank's sequences may hold; None:
    sequences are not packed. scope_bytes: counts the bytes sent to gather the tokens of scopes wider than this rank.
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
    """Builds the TokenBatch that describes the tokens of x_BSD.

    group, sequence_group: see TokenBatch. Raises a ValueError if a tensor of the context does not have the shape or
    dtype that these tokens need, or if sequences are divided over ranks and `positions_S` is None.
    """
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
                f"StepContext.{name} is {given.dtype} of shape {tuple(given.shape)}, the layer's input needs "
                f"{dtype} of shape {shape}"
            )
    if context.positions_S is None and group_size(sequence_group) > 1:
        raise ValueError(
            f"StepContext.positions_S is not set: each sequence is divided over {group_size(sequence_group)} ranks, so "
            f"the positions of this rank's {length} tokens in it are needed"
        )
    numbers_B = torch.arange(num_sequences, device=x_BSD.device)
    sequence_B = numbers_B if context.sequence_index_B is None else context.sequence_index_B
    document_T = None
    per_row = context.documents_per_row
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
    """Returns the place of each token in the global order, sequence index * 2^32 + position; int64 (B * length).

    All sequences have the same length. positions_S: the positions of the tokens in their sequences; None: 0, 1, ...
    """
    if positions_S is None:
        positions_S = torch.arange(length, device=sequence_index_B.device)
    return ((sequence_index_B[:, None] << 32) + positions_S).flatten()


def find_recorded(batch: TokenBatch, num_choices: int) -> RecordedChoices | None:
    """Returns the choices that `StepContext.replay` has recorded for this pass, or None if there are none.

    num_choices: K of the router. Raises a ValueError if the recorded choices belong to other tokens, or to a router
    with another K.
    """
    replay = batch.context.replay
    recorded = None if replay is None else replay.find(batch.context)
    if recorded is None:
        return None
    if recorded.ids_TK.shape[1] != num_choices:
        raise ValueError(
            f"StepContext.replay holds {recorded.ids_TK.shape[1]} choices a token, the router makes {num_choices} "
            "(router.k)"
        )
    if not torch.equal(recorded.index_T, batch.index_T):  # the host waits for the comparison
        raise ValueError(
            f"StepContext.replay was recorded for other tokens: it has {len(recorded.index_T)}, this pass has "
            f"{len(batch.index_T)}, or their sequence indices or positions differ"
        )
    return recorded


def pass_seed(context: StepContext, stream: Stream) -> int:
    """Returns the seed of one stream of random numbers in one pass of one layer; equal on every rank, unlike
    `dropout_seed`."""
    return mix(context.seed, context.step, context.micro_step, context.layer, stream)


def dropout_seed(context: StepContext) -> int:
    """Returns the seed of dropout in one pass of one layer; it differs between ranks with different tokens."""
    return mix(context.seed, context.step, context.micro_step, context.layer, Stream.DROPOUT, context.coordinate)
