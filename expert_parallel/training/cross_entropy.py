"""Computes the cross entropy of this rank's targets: of the next tokens, and of the further tokens that multi-token
prediction predicts, each depth with a mean of its own."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expert_parallel.data.batch import MicroBatch
from expert_parallel.model.multi_token import IGNORED, has_target, targets_ahead
from expert_parallel.model.outputs import ModelOutput
from expert_parallel.model.tensor_parallel import cross_entropy_sum
from expert_parallel.model.transformer import LanguageModel
from expert_parallel.parallel.collectives import all_reduce_sum, group_rank
from expert_parallel.parallel.mesh import ParallelMesh


@dataclass(frozen=True)
class StepTargets:
    """Holds what divides the cross entropies of a step.

    num_targets: the number of targets of the step on all ranks. mtp_factors: by depth, model.mtp.weight / depths / the
    number of targets of the depth in the step on all ranks; as a tensor of one element if it depends on the documents.
    """

    num_targets: int
    mtp_factors: Sequence[float | Tensor] = ()


@dataclass(frozen=True)
class CrossEntropy:
    """Holds the cross entropy of this rank's targets in one micro-step, in nats.

    next_token: the sum over the targets, a scalar. further: the sum of each depth of multi-token prediction. counted:
    float64 (1 + depths, 2), of the next token and of each depth, the sum and the number of targets that this rank
    reports.
    """

    next_token: Tensor
    further: tuple[Tensor, ...]
    counted: Tensor

    def loss(self, targets: StepTargets) -> Tensor:
        """Returns this rank's summand of the loss of the step, a scalar, without auxiliary losses."""
        loss = self.next_token / targets.num_targets
        for cross_entropy, factor in zip(self.further, targets.mtp_factors, strict=True):
            loss = loss + (cross_entropy * factor).to(loss.dtype)  # a factor that was counted is float64
        return loss


def local_cross_entropy(
    model: LanguageModel, output: ModelOutput, batch: MicroBatch, mesh: ParallelMesh
) -> CrossEntropy:
    """Returns the cross entropy of this rank's targets.

    All TP ranks compute the same sums; only TP rank 0 reports them, the others report 0.
    """
    positions_S = model.place.context(batch.targets_BS.shape[1]).to(batch.targets_BS.device)
    sums, counts = [], []
    for depth, logits in enumerate((output.logits, *output.mtp_logits)):
        targets_BS = batch.targets_BS
        if depth > 0:
            targets_BS = targets_ahead(targets_BS, depth, batch.documents_BS)
        targets_BS = targets_BS[:, positions_S]
        sums.append(cross_entropy_sum(logits, targets_BS, mesh.tp_group, model.config.vocab_size))
        counts.append((targets_BS != IGNORED).sum())
    # float64 holds counts exactly, up to 2**53.
    counted = torch.stack([torch.stack(sums).detach().double(), torch.stack(counts).double()], 1)
    if group_rank(mesh.tp_group) > 0:
        counted = torch.zeros_like(counted)
    return CrossEntropy(sums[0], tuple(sums[1:]), counted)


def no_cross_entropy(model: LanguageModel, device: torch.device) -> Tensor:
    """Returns what a rank without logits reports: zeros of the shape of `CrossEntropy.counted`."""
    return torch.zeros(1 + len(model.config.mtp_layers), 2, dtype=torch.float64, device=device)


def count_targets(
    model: LanguageModel, batches: Sequence[MicroBatch], num_sequences: int, length: int, mesh: ParallelMesh
) -> StepTargets:
    """Returns the numbers of targets of a step, `num_sequences` sequences of `length` tokens on all ranks.

    batches: this rank's, of all micro-steps. With multi-token prediction and documents it is a collective over
    mesh.stage_group, on the ranks that compute logits: how many further tokens a document has depends on its length.
    """
    num_targets, depths = num_sequences * length, range(1, 1 + len(model.config.mtp_layers))
    if model.config.mtp is None or not model.has_logits:
        return StepTargets(num_targets)
    weight = model.config.mtp.weight / len(depths)
    if batches[0].documents_BS is None:
        return StepTargets(num_targets, [weight / (num_sequences * (length - depth)) for depth in depths])
    own_S = model.place.own(length).to(batches[0].targets_BS.device)
    found = [[has_target(b.inputs_BS, depth, b.documents_BS)[:, own_S].sum() for b in batches] for depth in depths]
    total = all_reduce_sum(torch.stack([torch.stack(counts).sum() for counts in found]), mesh.stage_group)
    # A step in which every document is shorter than the depth has no such target: its sum is 0, too.
    return StepTargets(num_targets, list((weight / total.clamp(min=1).double()).unbind()))
