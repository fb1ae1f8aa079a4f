"""Holds the settings of the decoder (sizes, attention, which blocks are mixtures of experts), and counts its parameters
and FLOPs from the settings alone."""

from dataclasses import dataclass
from typing import Literal

from pydantic import Field, model_validator

from expert_parallel.model.attention import HeadsConfig
from expert_parallel.model.attention_kinds import AttentionConfig, refuse_positions
from expert_parallel.model.block_patterns import AllBlocks, Blocks, check_blocks
from expert_parallel.model.multi_token import MTPConfig
from expert_parallel.model.rotary import LearnedPositionConfig, PositionConfig, RopeConfig
from expert_parallel.model.window_overrides import WindowOverrides
from expert_parallel.moe.config import MoEConfig
from expert_parallel.moe.routers.across_tokens import ExpertChoiceConfig
from expert_parallel.moe.routers.registry import router_settings
from expert_parallel.nn.ffn import FFNConfig
from expert_parallel.nn.norms import NormConfig
from expert_parallel.settings import Settings

Recompute = Literal["none", "moe", "block"]


@dataclass(frozen=True)
class ParameterCounts:
    """Holds the number of parameters of a model or of a part of it: those of routed experts, and all others (dense)."""

    dense: int
    experts: int

    @property
    def total(self) -> int:
        return self.dense + self.experts


class ModelConfig(Settings):
    """Describes a decoder-only transformer, dense without `moe`, and with it a mixture of experts."""

    vocab_size: int = Field(default=256, ge=1)
    """Sets the number of token ids, at least 256 for data that is read as bytes."""
    num_layers: int = Field(ge=1, le=100_000)
    """Sets the number of transformer blocks."""
    d_model: int = Field(ge=1)
    """Sets the width of the residual stream (the hidden size)."""
    attention: AttentionConfig
    """Describes the self-attention of every block."""
    ffn: FFNConfig | None = None
    """Describes the feed-forward network of the dense blocks; it must be null if every block is a MoE block."""
    moe: MoEConfig | None = None
    """Describes the MoE layer; null makes the model dense."""
    moe_blocks: Blocks = AllBlocks()
    """Selects the blocks whose feed-forward network is a MoE layer."""
    window_blocks: Blocks = AllBlocks()
    """Selects the blocks in which `attention.window` or `attention.chunk` applies; the others attend to all earlier
    tokens."""
    window_overrides: WindowOverrides | None = None
    """Sets what else differs in the blocks that `window_blocks` selects; null: nothing."""
    norm: NormConfig = NormConfig()
    """Describes the norms of the residual stream."""
    norm_placement: Literal["pre", "post", "branch", "sandwich"] = "pre"
    """Normalizes the input of each branch (`pre`), each sum of residual stream and branch (`post`), the output of each
    branch (`branch`), or its input and its output (`sandwich`); the output of the last block, too, except in `post`."""
    moe_output_norm: bool = False
    """Normalizes the output of each MoE layer, shared experts included, with `norm_placement: pre` (A.X-K1)."""
    position: PositionConfig = RopeConfig()
    """Describes how positions are encoded."""
    rope_blocks: Blocks = AllBlocks()
    """Selects the blocks with rotary positions; the others have no positions (NoPE: Kazemnejad et al. 2023)."""
    mtp: MTPConfig | None = None
    """Adds blocks that predict further tokens in training; null predicts the next token alone."""
    tied_embeddings: bool = True
    """Shares one weight between the embedding and the output projection."""
    unembedding_bias: bool = False
    """Adds a bias to the logits, one number for each token id."""
    embedding_multiplier: float = Field(default=1.0, gt=0)
    """Multiplies the rows of the embedding, before learned positions are added."""
    residual_multiplier: float = Field(default=1.0, gt=0)
    """Multiplies the output of each branch, before it is added to the residual stream."""
    logits_divisor: float = Field(default=1.0, gt=0)
    """Divides the logits, their bias included."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Sets the dropout probability of the embedding and of each block's two branches."""
    init_std: float = Field(default=0.02, gt=0)
    """Sets the standard deviation of initial weights; matrices that write to the residual stream start with it divided
    by sqrt(2 * num_layers)."""

    @property
    def mtp_layers(self) -> range:
        """Returns the numbers of the blocks of multi-token prediction, which follow those of the model."""
        return range(self.num_layers, self.num_layers + (0 if self.mtp is None else self.mtp.depth))

    @property
    def num_blocks(self) -> int:
        """Returns the number of transformer blocks, including those of multi-token prediction."""
        return self.num_layers + len(self.mtp_layers)

    @property
    def moe_layers(self) -> list[int]:
        """Returns the numbers of the blocks whose feed-forward network is a MoE layer."""
        return self._selected(self.moe_blocks) if self.moe is not None else []

    @property
    def embeds_on_last_stage(self) -> bool:
        """Returns True if the last pipeline stage has a copy of the embedding: as its output projection, or for the
        tokens of multi-token prediction."""
        return self.tied_embeddings or self.mtp is not None

    @property
    def has_input_norms(self) -> bool:
        """Returns True if blocks have a norm before each branch or, in `post`, behind each sum."""
        return self.norm_placement != "branch"

    @property
    def has_final_norm(self) -> bool:
        """Returns True if a norm follows the last block, and each block of multi-token prediction."""
        return self.norm_placement != "post"

    @property
    def has_output_norms(self) -> bool:
        """Returns True if blocks have a norm of each branch's output."""
        return self.norm_placement in ("branch", "sandwich")

    def has_ffn_output_norm(self, layer: int) -> bool:
        """Returns True if block number `layer` has a norm of its feed-forward network's output."""
        return self.has_output_norms or (self.moe_output_norm and layer in self.moe_layers)

    @property
    def window_layers(self) -> list[int]:
        """Returns the numbers of the blocks whose attention has a window or chunks."""
        attention = self.attention
        if isinstance(attention, HeadsConfig) and (attention.window is not None or attention.chunk is not None):
            return self._selected(self.window_blocks)
        return []

    @property
    def rope_layers(self) -> list[int]:
        """Returns the numbers of the blocks with rotary positions."""
        return self._selected(self.rope_blocks) if isinstance(self.position, RopeConfig) else []

    def _selected(self, pattern: Blocks) -> list[int]:
        """Returns the numbers of the blocks that a pattern selects. Blocks of multi-token prediction are like the last
        block before them."""
        blocks = pattern.blocks(self.num_layers)
        return [*blocks, *self.mtp_layers] if self.num_layers - 1 in blocks else blocks

    def attention_of(self, layer: int) -> AttentionConfig:
        """Returns the attention settings of block number `layer`: with those of window_overrides if window_blocks
        selects it, else without window and chunks; and without what applies only in blocks with, or only in those
        without, rotary positions."""
        attention, has_rope = self._attention(layer in self.window_layers), layer in self.rope_layers
        absent = []
        if attention.qk_norm is not None and attention.qk_norm.kind == "l2" and not has_rope:
            absent.append("qk_norm")
        if attention.length_scaling is not None and attention.length_scaling.blocks == "without_rope" and has_rope:
            absent.append("length_scaling")
        return attention.model_copy(update=dict.fromkeys(absent)) if absent else attention

    def _attention(self, has_window: bool) -> AttentionConfig:
        attention = self.attention
        if not isinstance(attention, HeadsConfig):
            return attention
        if not has_window:
            return attention.model_copy(update={"window": None, "chunk": None})
        return attention if self.window_overrides is None else self.window_overrides.apply(attention)

    def attention_counts(self, blocks: range | None = None) -> list[tuple[AttentionConfig, int]]:
        """Returns the different attention settings of the blocks numbered `blocks`, by default of all, and how many
        blocks have each."""
        blocks = range(self.num_blocks) if blocks is None else blocks
        with_window = sum(layer in blocks for layer in self.window_layers)
        counts = [(self._attention(True), with_window), (self._attention(False), len(blocks) - with_window)]
        return [(attention, count) for attention, count in counts if count]

    def rope_of(self, layer: int) -> RopeConfig | None:
        """Returns the rotary positions of block number `layer`, or None if rope_blocks does not select it or positions
        are learned."""
        if not isinstance(self.position, RopeConfig) or layer not in self.rope_layers:
            return None
        overrides = self.window_overrides if layer in self.window_layers else None
        return self.position if overrides is None or overrides.position is None else overrides.position

    def num_params(self) -> int:
        """Counts all parameters, exactly those that `Transformer` has, without building it.

        These are the embedding and the output projection (one weight with `tied_embeddings`, counted once), its bias,
        learned positions, the final norm, and in each block its norms, attention, and feed-forward network: a dense
        one, or router, shared and routed experts; blocks of multi-token prediction count like the others, with their
        projections and norms. Biases, norms of queries and keys, and sinks count wherever they are set. Buffers, such
        as a router's balance bias, are no parameters.
        """
        return self.parameter_counts().total

    def num_active_params(self) -> int:
        """Counts the parameters that one token uses: all but routed experts, and of these as many as its router gives
        it.

        That is `k` experts for routers with a k, and otherwise the mean number in training (`experts_per_token`), both
        before drops. Embedding and output projection count in full, as in published numbers of active parameters
        (Mixtral 8x7B: 12.9 B), though a token looks up one row of the embedding.
        """
        return self.count_active(self.parameter_counts())

    def count_active(self, counts: ParameterCounts) -> int:
        """Returns how many of the counted parameters one token uses; see `num_active_params`."""
        if self.moe is None:
            return counts.dense
        share = self.moe.router.experts_per_token(self.moe.num_experts)
        return counts.dense + round(counts.experts * share / self.moe.num_experts)

    def flops_per_token(self, sequence_length: int) -> int:
        """Counts the floating-point operations that a training step takes per token, forward and backward; the forward
        pass is a third of them. A multiplication with its addition counts as 2.

        These are 6 for each active parameter, except tables that are only looked up (an untied embedding, learned
        positions), and those of attention to half of `sequence_length` tokens, as many as a token attends to on
        average. Each depth of multi-token prediction computes logits of its own. Norms, biases and sinks, which are
        few, count like matrices, windowed attention like full attention, and dropped choices as if they were computed.
        Recomputation and the optimizer are not counted.

        Sources: Kaplan et al. 2020, section 2.1 (6 N); Chowdhery et al. 2022, appendix B (attention, there to the whole
        sequence).
        """
        looked_up = 0 if self.tied_embeddings else self.vocab_size * self.d_model
        if isinstance(self.position, LearnedPositionConfig):
            looked_up += self.position.max_length * self.d_model
        more_logits = len(self.mtp_layers) * self.vocab_size * self.d_model
        attention = self.num_blocks * sequence_length * self.attention.multiplications_per_key
        multiplied = self.num_active_params() - looked_up + more_logits
        return 6 * multiplied + 3 * attention  # 3 = 6 / 2: half of the sequence

    def parameter_counts(
        self, blocks: range | None = None, *, is_first: bool = True, is_last: bool = True
    ) -> ParameterCounts:
        """Counts the parameters of a pipeline stage that has the blocks numbered `blocks`; by default of the whole
        model.

        is_first: True if the stage has the embedding and learned positions. is_last: True if it has the final norm and
        the output projection; a last stage that is not the first counts its copy of the embedding
        (`embeds_on_last_stage`).
        """
        d_model, moe = self.d_model, self.moe
        blocks = range(self.num_blocks) if blocks is None else blocks
        num_moe = len(set(self.moe_layers).intersection(blocks))
        norm = self.norm.num_params(d_model)

        dense = sum(count * attention.num_params(d_model) for attention, count in self.attention_counts(blocks))
        dense += 2 * len(blocks) * (self.has_input_norms + self.has_output_norms) * norm
        dense += num_moe * norm if self.moe_output_norm else 0
        num_mtp = len(set(self.mtp_layers).intersection(blocks))
        dense += num_mtp * (2 * d_model * d_model + (2 + self.has_final_norm) * norm)
        experts = 0
        if self.ffn is not None:
            dense += (len(blocks) - num_moe) * self.ffn.num_params(d_model)
        if moe is not None:
            dense += num_moe * moe.num_dense_params(d_model)
            experts += num_moe * moe.num_expert_params(d_model)

        num_tables = int(is_first or (is_last and self.embeds_on_last_stage))
        num_tables += is_last and not self.tied_embeddings
        dense += num_tables * self.vocab_size * d_model
        dense += self.vocab_size if is_last and self.unembedding_bias else 0
        if is_first and isinstance(self.position, LearnedPositionConfig):
            dense += self.position.max_length * d_model
        dense += norm if is_last and self.has_final_norm else 0
        return ParameterCounts(dense, experts)

    @model_validator(mode="after")
    def _check_attention(self) -> "ModelConfig":
        attention, layers = self.attention, self.rope_layers
        refuse_positions(attention, self.position, with_rope=len(layers), without_rope=self.num_blocks - len(layers))
        if isinstance(self.window_blocks, AllBlocks):
            return self
        if not isinstance(attention, HeadsConfig) or (attention.window is None and attention.chunk is None):
            raise ValueError("window_blocks is given without attention.window or attention.chunk, which it is for")
        limit = "attention.chunk" if attention.window is None else "attention.window"
        check_blocks("window_blocks", self.window_blocks, self.num_layers, limit)
        return self

    @model_validator(mode="after")
    def _check_rope_blocks(self) -> "ModelConfig":
        if isinstance(self.rope_blocks, AllBlocks):
            return self
        if not isinstance(self.position, RopeConfig):
            raise ValueError(f"rope_blocks is given, but position.kind is {self.position.kind!r}, not 'rope'")
        if not isinstance(self.attention, HeadsConfig):
            raise ValueError("rope_blocks is given, but attention.kind 'latent' needs rotary positions in all blocks")
        check_blocks("rope_blocks", self.rope_blocks, self.num_layers, "position.kind 'rope'")
        return self

    @model_validator(mode="after")
    def _check_window_overrides(self) -> "ModelConfig":
        if self.window_overrides is not None:
            self.window_overrides.check(self.attention, self.num_blocks, self.window_layers, self.rope_layers)
        return self

    @model_validator(mode="after")
    def _fit_together(self) -> "ModelConfig":
        if self.moe is not None and self.moe.d_model not in (None, self.d_model):
            raise ValueError(f"moe.d_model ({self.moe.d_model}) differs from d_model ({self.d_model})")
        if self.moe is None and not isinstance(self.moe_blocks, AllBlocks):
            raise ValueError("moe_blocks is given without moe: there are no experts to put into these blocks")
        if self.moe is not None:
            check_blocks("moe_blocks", self.moe_blocks, self.num_layers, "moe")
        if self.moe_output_norm and self.moe is None:
            raise ValueError("moe_output_norm is true without moe: there are no outputs of experts to normalize")
        if self.moe_output_norm and self.norm_placement != "pre":
            raise ValueError(
                f"moe_output_norm is true, but norm_placement is {self.norm_placement!r}: it goes with 'pre' alone"
            )
        dense = self.num_blocks - len(self.moe_layers)
        if dense and self.ffn is None:
            raise ValueError(f"ffn is missing: {dense} of the {self.num_blocks} blocks are dense")
        if not dense and self.ffn is not None:
            raise ValueError(f"ffn is given, but all {self.num_blocks} blocks are MoE: it would do nothing")
        router = None if self.moe is None else router_settings(self.moe.router)
        if isinstance(router, ExpertChoiceConfig) and not router.accept_future_tokens:
            raise ValueError(
                "moe.router.kind is 'expert_choice' in a causal model: whether an expert takes a token depends on the "
                "tokens after it, so training sees the future and generation differs; set "
                "moe.router.accept_future_tokens to true to have it all the same"
            )
        return self
