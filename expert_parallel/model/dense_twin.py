"""Compares a mixture of experts with dense models: one of equal operations a token, and one of equal parameters."""

from dataclasses import dataclass

from expert_parallel.model.activation_memory import rows_per_token
from expert_parallel.model.config import ModelConfig
from expert_parallel.nn.ffn import ffn_params


@dataclass(frozen=True)
class ModelSize:
    """Holds the numbers of a model that a comparison shows.

    hidden: the hidden columns that the feed-forward networks of a MoE block have, over all experts, or those of the
    dense network in its place. used: how many of them a token uses. parameters, active: of the whole model, in all and
    for a token. operations: floating-point operations a token in a training step, as `ModelConfig.flops_per_token`
    counts them.
    """

    hidden: int
    used: float
    parameters: int
    active: int
    operations: int


@dataclass(frozen=True)
class DenseTwins:
    """Holds the size of a mixture of experts and of its two dense twins: the same model, but with one dense network, of
    the experts' activation, in each MoE block."""

    mixture: ModelSize
    equal_operations: ModelSize
    equal_parameters: ModelSize

    @property
    def active_share(self) -> float:
        """Returns the share of the mixture's parameters that a token uses."""
        return self.mixture.active / self.mixture.parameters

    @property
    def memory_ratio(self) -> float:
        """Returns how many times the parameters, and so the memory of the weights, the mixture has of the dense model
        of equal operations."""
        return self.mixture.parameters / self.equal_operations.parameters

    @property
    def operations_ratio(self) -> float:
        """Returns how many times the operations the dense model of equal parameters takes of the mixture."""
        return self.equal_parameters.operations / self.mixture.operations


def dense_twins(model: ModelConfig, sequence_length: int) -> DenseTwins:
    """Returns a mixture and its dense twins, whose router is gone. sequence_length: of training, for the operations of
    attention."""
    moe, d_model = model.moe, model.d_model
    assert moe is not None
    activation, blocks = moe.experts.activation, len(model.moe_layers)
    chosen = moe.router.experts_per_token(moe.num_experts)
    shared = moe.shared_experts
    shared_hidden, shared_params = (0, 0) if shared is None else (shared.hidden, shared.num_params(d_model))
    column = ffn_params(d_model, 1, activation, bias=False)
    expert = moe.experts.num_params(d_model)
    routing = moe.num_dense_params(d_model) - shared_params
    parameters, active = model.num_params(), model.num_active_params()
    operations = model.flops_per_token(sequence_length)

    def twin(feed_forward: float) -> ModelSize:
        """Returns the model with dense networks of this many parameters in its MoE blocks."""
        hidden = round(feed_forward / column)
        size = parameters + blocks * (hidden * column - routing - shared_params - moe.num_expert_params(d_model))
        return ModelSize(hidden, hidden, size, size, operations + 6 * (size - active))

    all_hidden = moe.num_experts * moe.experts.hidden + shared_hidden
    used = chosen * moe.experts.hidden + shared_hidden
    return DenseTwins(
        ModelSize(all_hidden, used, parameters, active, operations),
        twin(chosen * expert + shared_params),
        twin(moe.num_experts * expert + shared_params),
    )


def exchanged_bytes_per_token(model: ModelConfig, ep: int, width: int) -> float:
    """Returns the bytes of rows that a token sends to other ranks in a training step: in each MoE block to its experts
    and back, forward and backward. width: the bytes of a number in transit. Choices are taken to be balanced."""
    assert model.moe is not None
    away = rows_per_token(model.moe, ep) * (ep - 1) / ep
    return 4 * len(model.moe_layers) * away * model.d_model * width
