"""Counts the bytes of activations of each part of a model on one rank, from the settings alone.

A part's count is the sum of the tensors that autograd saves in its forward pass, and of those that exist at the highest
moments of its forward and backward passes; each comes from the code that the part runs. tests/test_memory.py compares
the sums with torch's record of allocations.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from expert_parallel.model.attention import HeadsConfig
from expert_parallel.model.attention_kinds import AttentionConfig
from expert_parallel.model.config import ModelConfig
from expert_parallel.moe.capacity.policies import DroplessConfig, block_capacities
from expert_parallel.moe.config import MoEConfig
from expert_parallel.moe.experts.grouped import ExpertsConfig
from expert_parallel.moe.experts.grouped_gemm import has_bfloat16_gemm
from expert_parallel.moe.routers.across_tokens import SinkhornConfig
from expert_parallel.moe.routers.base import TopKRouterConfig
from expert_parallel.moe.routers.noisy import NoisyTopKConfig
from expert_parallel.moe.routers.registry import router_settings
from expert_parallel.moe.routers.sparse_mixer import SparseMixerConfig
from expert_parallel.nn.ffn import FFNConfig, w_in_columns
from expert_parallel.nn.norms import NormConfig
from expert_parallel.parallel.degrees import ParallelDegrees

Device = Literal["cpu", "cuda"]
INDEX = 8  # bytes of an int64

# Activation -> (values per hidden column that a network saves under autograd, values at the highest moment of its
# backward pass). A gated one saves [gate | up], the activated gate and the product; its backward pass adds the
# gradients of gate, of up and of [gate | up], and the zeros that the gradient of `chunk` fills in.
FFN_VALUES = {"swiglu": (4, 7), "geglu": (4, 7), "gelu": (2, 3), "relu": (1, 3), "gpt_oss": (7, 9)}


@dataclass(frozen=True)
class PassSizes:
    """Holds what the activations of one micro-step on one rank depend on, beside the model.

    sequences: the sequences of this rank's share of the data. length: the tokens of a whole sequence. micro_batch: the
    sequences of all ranks. width: the bytes of a number in the compute dtype. wide: those in promote_types(float32,
    compute dtype). casts_weights: True if each use of a weight makes a copy in the compute dtype; FSDP2 gathers weights
    in this dtype. device: norms, attention and experts save other tensors on the CPU than on a GPU.
    """

    sequences: int
    length: int
    micro_batch: int
    width: int
    wide: int
    casts_weights: bool
    device: Device
    degrees: ParallelDegrees

    @property
    def gathered(self) -> int:
        """Returns the number of tokens of which this rank computes some heads and hidden columns."""
        return self.sequences * self.length // self.degrees.cp

    @property
    def tokens(self) -> int:
        """Returns the number of tokens of the residual stream on this rank."""
        return self.gathered // self.degrees.tp

    def copies(self, num_params: float) -> float:
        """Returns the bytes of the copies of weights that autograd saves."""
        return num_params * self.width if self.casts_weights else 0


@dataclass(frozen=True)
class PartMemory:
    """Holds bytes of a part of the model in one micro-step on one rank, without its weights.

    kept: from its forward to its backward pass. forward, backward: the most that exist at one moment of the pass,
    those kept included; in `backward` also finished gradients of its weights. exchanged: how much of `kept` are rows
    that other ranks sent. weights: the number of the part's weights on this rank, before FSDP2 shards them.
    """

    kept: float
    forward: float
    backward: float
    exchanged: float = 0
    weights: float = 0


def block_memory(model: ModelConfig, block: int, sizes: PassSizes) -> Iterator[PartMemory]:
    """Yields the two halves of a transformer block: attention with its norms, then the feed-forward network with its
    norms. A block of multi-token prediction has the projection in the first half, and its final norm in the second."""
    norm_kept, norm_most = _norm(model.norm, model.d_model, sizes, sizes.tokens)
    masks = sizes.tokens * model.d_model if model.dropout > 0 else 0  # bool
    is_moe = model.moe is not None and block in model.moe_layers
    further = _mtp_projection(model, sizes, norm_kept) if block in model.mtp_layers else ((0.0, 0.0), (0.0, 0.0))
    halves = (
        (_attention(model, model.attention_of(block), sizes), model.has_output_norms),
        (_moe(model, sizes) if is_moe else _ffn(model, sizes), model.has_ffn_output_norm(block)),
    )
    for (part, has_output_norm), (kept, weights) in zip(halves, further, strict=True):
        own = (model.has_input_norms + has_output_norm) * norm_kept + masks + kept
        most = max(own + part.backward, norm_most)
        yield PartMemory(own + part.kept, own + part.forward, most, part.exchanged, part.weights + weights)


def _mtp_projection(
    model: ModelConfig, sizes: PassSizes, norm_kept: float
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Returns (bytes kept, number of weights) that multi-token prediction adds to the two halves of its block: two
    norms and the projection of [embedding | hidden], with its input before and after the norms; and the final norm."""
    weights = 2 * model.d_model * model.d_model
    rows = 4 * sizes.tokens * model.d_model * sizes.width
    return (2 * norm_kept + rows + sizes.copies(weights), weights), (model.has_final_norm * norm_kept, 0)


def head_memory(model: ModelConfig, sizes: PassSizes) -> tuple[PartMemory, float]:
    """Returns the bytes of the final norm, the logits and the loss, and those of the logits alone, which exist until
    the backward pass has ended; multi-token prediction has as many again for each depth.

    The loss keeps log probabilities in float32 or wider; its gradient takes two tensors more of their size. With tensor
    parallelism its forward pass has a fourth one.
    """
    rows, vocabulary, wide = sizes.gathered, model.vocab_size / sizes.degrees.tp, sizes.wide
    norm_kept = _norm(model.norm, model.d_model, sizes, sizes.tokens)[0] if model.norm_placement != "post" else 0
    kept = norm_kept + rows * model.d_model * sizes.width + sizes.copies(model.d_model * vocabulary)
    logits = rows * vocabulary * sizes.width
    numbers = 4 if sizes.degrees.tp > 1 and sizes.width < wide else 3
    each, further = kept + logits + rows * vocabulary * wide, len(model.mtp_layers)
    most = further * each + kept + logits + numbers * rows * vocabulary * wide
    return PartMemory((1 + further) * each, most, most), (1 + further) * logits


def _norm(config: NormConfig | None, columns: float, sizes: PassSizes, rows: int) -> tuple[float, float]:
    """Returns the bytes that a norm keeps, and the most in its backward pass.

    It keeps its input in float32 or wider. RMSNorm runs in several steps on the CPU, and keeps normalized rows too.
    config: None for the RMSNorm of queries, keys and latents.
    """
    in_steps = sizes.device == "cpu" and (config is None or config.kind == "rms_norm")
    values = rows * columns
    kept = values * sizes.wide * (2 if in_steps else 1)
    return kept, kept + values * (sizes.wide * (4 if in_steps else 2) + sizes.width)


def _attention(model: ModelConfig, attention: AttentionConfig, sizes: PassSizes) -> PartMemory:
    """Counts the input, queries, keys, values, the heads' outputs and their copy side by side, and the gradients of
    queries, keys and values."""
    tp, cp = sizes.degrees.tp, sizes.degrees.cp
    rows, width, wide = sizes.gathered, sizes.width, sizes.wide
    heads = attention.num_heads / tp
    if isinstance(attention, HeadsConfig):
        kv_heads = max(1, attention.kv_heads / tp)
        key, value, inputs = attention.head_size, attention.value_columns, model.d_model
        projected = gradients = heads * key + kv_heads * (key + value) * cp  # cp: keys of whole sequences
        normed = (heads + kv_heads) * key if attention.qk_norm else 0
        in_steps = attention.sinks or (sizes.device == "cpu" and value != key)
    else:
        key, value = attention.key_size, attention.value_size
        inputs = model.d_model + (attention.query_rank or model.d_model)
        inputs += (attention.kv_rank + attention.rope_size) * (1 + cp)
        projected = heads * (key + cp * (key + attention.nope_size + value))
        gradients = heads * (key + cp * (key + value))
        normed = attention.kv_rank + (attention.query_rank or 0)
        in_steps = sizes.device == "cpu" and value != key  # there torch fuses attention of equally wide values alone
    kept = rows * (width * (inputs + 2 * heads * value) + wide * heads)
    if in_steps and not isinstance(attention, HeadsConfig):  # scaled copies, in float32 or wider, and one output
        kept += rows * (wide * gradients - width * heads * value)
    else:
        kept += rows * width * projected
    kept += _norm(None, normed, sizes, rows)[0] + sizes.copies(attention.num_params(model.d_model) / tp)
    temporary = rows * width * gradients
    if in_steps:  # the weights of all pairs of tokens exist, and in the backward pass two gradients of their size
        pairs = rows * heads * sizes.length * wide
        kept, temporary = kept + pairs, temporary + 2 * pairs
    backward = kept + temporary + sizes.tokens * width * model.d_model
    return PartMemory(kept, kept, backward, weights=attention.num_params(model.d_model) / tp)


def _ffn(model: ModelConfig, sizes: PassSizes) -> PartMemory:
    assert model.ffn is not None
    own = sizes.tokens * sizes.width * model.d_model  # the gradient of the output
    kept, most = _ffn_values(model.ffn, model.d_model, sizes)
    return PartMemory(kept, kept, most + own, weights=model.ffn.num_params(model.d_model) / sizes.degrees.tp)


def _ffn_values(config: FFNConfig, d_model: int, sizes: PassSizes) -> tuple[float, float]:
    """Returns the bytes that a dense network keeps, its input included, and the most in its backward pass."""
    saved, most = FFN_VALUES[config.activation]
    rows, hidden = sizes.gathered * sizes.width, config.hidden / sizes.degrees.tp
    copies = sizes.copies(config.num_params(d_model) / sizes.degrees.tp)
    return rows * (d_model + saved * hidden) + copies, rows * (d_model + most * hidden) + copies


def _moe(model: ModelConfig, sizes: PassSizes) -> PartMemory:
    """Counts an MoE layer: its router, the rows that other ranks sent, its experts and shared experts."""
    moe, d_model, width = model.moe, model.d_model, sizes.width
    assert moe is not None
    tokens = sizes.tokens
    kept = _router_bytes(moe, d_model, sizes)
    received = tokens * rows_per_token(moe, sizes.degrees.ep)
    exchanged = received * d_model * width if sizes.degrees.ep > 1 else 0
    kept += tokens * d_model * width + exchanged
    shared_most = 0.0
    if moe.shared_experts is not None:
        shared_kept, shared_most = _ffn_values(moe.shared_experts, d_model, sizes)
        kept, shared_most = kept + shared_kept, shared_most - shared_kept
        kept += tokens * (d_model + 1) * width if moe.shared_expert_gate else 0  # the gate, and what it multiplies
    rows, experts = expert_rows(moe, sizes), experts_of_fullest_rank(moe, sizes.degrees.ep)
    expert_kept, expert_most = _experts(moe.experts, d_model, rows, experts, sizes)
    upstream = (tokens + (received if exchanged else 0)) * d_model * width
    forward = kept + max(expert_kept, _router_noise(moe, d_model, tokens))
    backward = kept + upstream + max(expert_most, expert_kept + shared_most)
    weights = moe.num_dense_params(d_model) / sizes.degrees.tp
    weights += experts * moe.experts.num_params(d_model) / sizes.degrees.etp
    return PartMemory(kept + expert_kept, forward, backward, exchanged, weights)


def _router_bytes(moe: MoEConfig, d_model: int, sizes: PassSizes) -> float:
    """Returns the bytes that a router keeps: its input in float32 or wider, logits and scores of all experts, and the
    indices and weights of the choices."""
    router, wide, tokens = router_settings(moe.router), sizes.wide, sizes.tokens
    scores = 4 if getattr(router, "score", "softmax") == "sigmoid" else 2
    columns = d_model if wide > sizes.width else 0
    if isinstance(router, TopKRouterConfig):
        columns += 2 * d_model if router.jitter else 0  # the factors, and the product
        scores += 1 if router.balance_bias_rate or router.group_limit else 0
    if isinstance(router, NoisyTopKConfig):
        scores += 3 if router.noise == "learned" else 1
    scores += 6 if isinstance(router, SparseMixerConfig) else 0  # logits and softmaxes of both choices, and their masks
    choices = router.num_choices(moe.num_experts)
    return tokens * (wide * (columns + scores * moe.num_experts) + choices * (3 * INDEX + 2 * wide))


def _router_noise(moe: MoEConfig, d_model: int, tokens: int) -> float:
    """Returns the bytes of the int64 hashes from which a router's random numbers are made; four exist at a time."""
    router = router_settings(moe.router)
    if isinstance(router, TopKRouterConfig) and router.jitter:
        return 4 * INDEX * tokens * d_model
    if isinstance(router, SparseMixerConfig):
        return 4 * INDEX * tokens * 2 * moe.num_experts
    return 4 * INDEX * tokens * moe.num_experts if isinstance(router, NoisyTopKConfig | SinkhornConfig) else 0


def _experts(config: ExpertsConfig, d_model: int, rows: float, experts: int, sizes: PassSizes) -> tuple[float, float]:
    """Returns the bytes that the routed experts keep beside the rows that they were given, and the most in their
    backward pass. rows: of this rank's own tokens or those that it received, one for each choice."""
    width = sizes.width
    stored = sizes.wide if sizes.casts_weights or width == sizes.wide else width  # a number of the weights
    product = sizes.wide if multiplies_in_float32(config, sizes) else width  # a number that is multiplied
    indices = rows * (2 * INDEX + sizes.wide)
    if config.is_plain and sizes.degrees.etp == 1:
        kept, most = _fused_experts(config, d_model, rows, experts, sizes.device, (width, stored, product))
        return kept + indices, most + indices
    saved, peak = FFN_VALUES[config.activation]
    etp, hidden = sizes.degrees.etp, config.hidden / sizes.degrees.etp
    columns = w_in_columns(config.activation, config.hidden) / etp
    w_in, w_out = experts * d_model * columns, experts * hidden * d_model
    masks = rows * ((config.hidden if config.hidden_dropout else 0) + (d_model if config.output_dropout else 0))
    copies = (w_in + w_out) * product if sizes.casts_weights else 0
    # Every rank of etp computes the rows of all of them. Outputs are kept for the gradients of their weights.
    kept = rows * (etp * ((d_model + hidden) * product + (saved - 1) * hidden * width) + d_model * width)
    kept += masks + copies + indices
    inside = rows * etp * (d_model * product + peak * hidden * width) + w_out * stored
    last = rows * etp * (d_model + columns) * (width + product) + (w_in + w_out) * stored
    return kept, max(kept + rows * d_model * width, indices + copies + max(inside, last))


def _fused_experts(
    config: ExpertsConfig, d_model: int, rows: float, experts: int, device: Device, sizes: tuple[int, int, int]
) -> tuple[float, float]:
    """Returns what `_experts` does, without indices, for the experts of moe/experts/fused.py. sizes: the bytes of a
    number in the compute dtype, of one of the weights, and of one that is multiplied."""
    width, stored, product = sizes
    hidden, columns = config.hidden, w_in_columns(config.activation, config.hidden)
    w_in, w_out = experts * d_model * columns, experts * hidden * d_model
    is_gated = columns > hidden
    kept: float = columns  # numbers of a row
    if device == "cpu" and hidden >= d_model and not config.weight_input:  # see fused.saves_outputs
        kept += hidden + d_model
        most = kept + d_model + columns + (hidden if is_gated else 0)
    else:
        most = kept + d_model + hidden + (columns if is_gated or device == "cuda" else 0)
        most += hidden if device == "cpu" else 0
    # Later both gradients of the weights are made, from the rows and the gradient of the hidden values.
    last = rows * width * (kept + columns + d_model) + (w_in + w_out) * stored
    last += rows * width * d_model if config.weight_input else 0  # the rows before and after they are weighted
    last += w_in * width if width < stored else 0
    last += (rows * (columns + d_model) + w_in) * product if product > width else 0
    return kept * rows * width, max(rows * width * most, last)


def multiplies_in_float32(config: ExpertsConfig, sizes: PassSizes) -> bool:
    """Returns True if bfloat16 rows and weights are cast to float32 to be multiplied (see grouped_gemm._as_dtype)."""
    if sizes.device == "cuda" or sizes.width == sizes.wide:
        return False
    return config.backend in ("auto", "grouped_mm") and not has_bfloat16_gemm()


def experts_of_fullest_rank(moe: MoEConfig, ep: int) -> int:
    """Returns the number of experts on the rank that holds the most."""
    return -(-moe.num_experts // ep)


def rows_per_token(moe: MoEConfig, ep: int) -> float:
    """Returns how many rows are sent for a token, its own rank's included: one for each of the ranks that hold its k
    experts, if each set of k experts is equally likely, or one for each choice."""
    chosen = moe.router.experts_per_token(moe.num_experts)
    if moe.dispatcher.one_row_per == "choice" or moe.num_experts % ep:
        return min(chosen, ep) if moe.dispatcher.one_row_per == "rank" else chosen
    k, of_rank = round(chosen), moe.num_experts // ep
    return ep * (1 - math.comb(moe.num_experts - of_rank, k) / math.comb(moe.num_experts, k))


def expert_rows(moe: MoEConfig, sizes: PassSizes) -> float:
    """Returns the number of rows that the experts of the fullest rank compute in a micro-step, choices balanced: never
    more than their capacities, and exactly these with `capacity.pad`."""
    degrees, experts = sizes.degrees, experts_of_fullest_rank(moe, sizes.degrees.ep)
    choices = sizes.tokens * moe.router.experts_per_token(moe.num_experts) * degrees.ep
    balanced = choices * experts / moe.num_experts
    if isinstance(moe.capacity, DroplessConfig):
        return balanced
    tokens, blocks = {
        "rank": (sizes.tokens, degrees.ep),
        "sequence": (sizes.length, max(1, sizes.tokens * degrees.ep // sizes.length)),
        "global": (sizes.micro_batch * sizes.length, 1),
    }[moe.capacity.scope]
    num_choices = moe.router.num_choices(moe.num_experts)
    (capacity,) = block_capacities(moe.capacity, [tokens], num_choices, moe.num_experts, training=True)
    limit = experts * blocks * capacity
    return limit if moe.capacity.pad else min(balanced, limit)
