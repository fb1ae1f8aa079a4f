"""Operations that a model needs for a token, from its sizes."""

from expert_parallel.config import Config
from expert_parallel.model.attention import HeadsConfig
from expert_parallel.model.rotary import LearnedPositionConfig
from expert_parallel.training.check import count_parameters


def training_flops_per_token(config: Config) -> int:
    """Forward and backward: 6 for each weight that a token is multiplied with (Kaplan et al. 2020), routers and logits
    among them, tables that are only looked up not; and its attention to the half of the sequence that it sees on
    average (bench/shapes.py). Dropped choices count as if they had been computed, windows as if they were
    whole, and norms as if they were products (their weights are few)."""
    model, length = config.model, config.training.sequence_length
    active = count_parameters(config).active
    if not model.tied_embeddings:
        active -= model.vocab_size * model.d_model
    if isinstance(model.position, LearnedPositionConfig):
        active -= model.position.max_length * model.d_model
    attention = model.attention
    if isinstance(attention, HeadsConfig):
        seen = 2 * attention.head_size
    else:
        seen = attention.nope_size + attention.rope_size + attention.value_size
    return 6 * active + 3 * model.num_layers * length * attention.num_heads * seen
