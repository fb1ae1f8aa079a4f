"""Computes attention for reference.py in float64, slow and simple: head by head, with explicit masks and angles,
without any code of model/."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Parameters = dict[str, Tensor]


def attention(model: Any, layer: int, weights: Parameters, x_BSD: Tensor, document_BS: Tensor | None = None) -> Tensor:
    """Applies the attention of one block, (B, S, D) -> (B, S, D). weights: those of this block's attention.

    document_BS: int64, index of each token's document within its row; None: each row is one document. A token attends
    only to tokens of its own document, and positions count from the document's beginning."""
    if document_BS is None:
        document_BS = torch.zeros(x_BSD.shape[:2], dtype=torch.int64)
    return ATTENTION[model.attention.kind](model, layer, weights, x_BSD, document_BS)


def heads_attention(model: Any, layer: int, weights: Parameters, x_BSD: Tensor, document_BS: Tensor) -> Tensor:
    """Computes multi-head attention with grouped keys, sliding window or chunks, QK norm, rotary positions, scale and
    sinks, as configured."""
    config, size = model.attention, model.attention.head_size
    value_size = size if config.value_size is None else config.value_size
    layer = min(layer, model.num_layers - 1)  # multi-token prediction: as the last block
    is_limited = layer in model.window_blocks.blocks(model.num_layers)
    window, chunk = (config.window, config.chunk) if is_limited else (None, None)
    kv_heads = _of_block(model, layer, "num_kv_heads", config.kv_heads)
    sinks = _of_block(model, layer, "sinks", config.sinks)
    position = _of_block(model, layer, "position", model.position)
    mask_BSS, position_BS = attention_mask(document_BS, window, chunk), document_positions(document_BS)
    query, key, value = (linear(weights, name, x_BSD) for name in ("query", "key", "value"))
    has_rope = model.position.kind == "rope" and layer in model.rope_blocks.blocks(model.num_layers)
    has_norm = config.qk_norm is not None and (has_rope or config.qk_norm.kind != "l2")
    query_weight, key_weight = (weights.get(f"{name}_norm.weight", torch.ones(())) for name in ("query", "key"))
    if has_norm and not config.qk_norm.after_rope:
        query, key = _norm(config.qk_norm, size, query_weight, query), _norm(config.qk_norm, size, key_weight, key)
    heads = []
    for head in range(config.num_heads):
        shared = head // (config.num_heads // kv_heads)
        q, k = query[..., head * size : (head + 1) * size], key[..., shared * size : (shared + 1) * size]
        v = config.value_scale * value[..., shared * value_size : (shared + 1) * value_size]
        if has_rope:
            rotary = size if config.rope_size is None else config.rope_size
            q, k = (
                torch.cat([apply_rope(t[..., :rotary], position, position_BS), t[..., rotary:]], -1) for t in (q, k)
            )
        if has_norm and config.qk_norm.after_rope:
            q, k = rms_norm(q, query_weight, config.qk_norm.eps), rms_norm(k, key_weight, config.qk_norm.eps)
        if config.length_scaling is not None and not (has_rope and config.length_scaling.blocks == "without_rope"):
            q = length_factor(config.length_scaling, position_BS)[..., None] * q
        scores = (q @ k.transpose(1, 2)) * (1 / math.sqrt(size) if config.scale is None else config.scale)
        scores = torch.where(mask_BSS, scores, torch.full_like(scores, -math.inf))
        if sinks:
            sink = weights["sinks"][head] * torch.ones_like(scores[..., :1])
            heads.append(softmax(torch.cat([sink, scores], -1))[..., 1:] @ v)
        else:
            heads.append(softmax(scores) @ v)
    return linear(weights, "out", torch.cat(heads, -1))


def _of_block(model: Any, layer: int, name: str, usual: Any) -> Any:
    """Returns a setting of one block: that of `window_overrides`, if it is given there and the block has a window, else
    `usual`."""
    overrides = model.window_overrides
    if overrides is None or layer not in model.window_blocks.blocks(model.num_layers):
        return usual
    value = getattr(overrides, name)
    return usual if value is None else value


def latent_attention(model: Any, layer: int, weights: Parameters, x_BSD: Tensor, document_BS: Tensor) -> Tensor:
    """Computes multi-head latent attention: DeepSeek-V2 (2405.04434), equations 9 to 13 and 37 to 47."""
    config = model.attention
    position_BS, mask_BSS = document_positions(document_BS), attention_mask(document_BS)
    nope, rope = config.nope_size, config.rope_size
    value_size = config.value_size
    if config.query_rank is None:
        query = linear(weights, "query", x_BSD)
    else:
        latent = rms_norm(linear(weights, "query_down", x_BSD), weights["query_norm.weight"], config.norm_eps)
        query = linear(weights, "query_up", latent)
    down = linear(weights, "kv_down", x_BSD)
    keys_and_values = linear(
        weights, "kv_up", rms_norm(down[..., : config.kv_rank], weights["kv_norm.weight"], config.norm_eps)
    )
    shared_key = apply_rope(down[..., config.kv_rank :], model.position, position_BS)
    scale, scaling = 1 / math.sqrt(nope + rope), model.position.scaling
    if scaling is not None and scaling.kind == "yarn" and scaling.mscale_all_dim is not None:
        scale *= (0.1 * scaling.mscale_all_dim * math.log(scaling.factor) + 1) ** 2
    if config.length_scaling is not None:
        query = length_factor(config.length_scaling, position_BS)[..., None] * query
    heads = []
    for head in range(config.num_heads):
        q = query[..., head * (nope + rope) : (head + 1) * (nope + rope)]
        k_v = keys_and_values[..., head * (nope + value_size) : (head + 1) * (nope + value_size)]
        turned = apply_rope(q[..., nope:], model.position, position_BS)
        scores = scale * (q[..., :nope] @ k_v[..., :nope].transpose(1, 2) + turned @ shared_key.transpose(1, 2))
        scores = torch.where(mask_BSS, scores, torch.full_like(scores, -math.inf))
        heads.append(softmax(scores) @ k_v[..., nope:])
    return linear(weights, "out", torch.cat(heads, -1))


# kind -> function of (model, block, its weights, x (B, S, D), documents (B, S)) that returns (B, S, D)
ATTENTION: dict[str, Callable[[Any, int, Parameters, Tensor, Tensor], Tensor]] = {
    "heads": heads_attention,
    "latent": latent_attention,
}


def attention_mask(document_BS: Tensor, window: int | None = None, chunk: int | None = None) -> Tensor:
    """Returns a bool mask (B, S, S): True where the query (dim 1) may attend to the key (dim 2), causal and within a
    document.

    window: number of latest positions that a query attends to, its own included; None: no limit. chunk: number of
    positions in each chunk of a document, outside of which a query does not attend; None: no limit."""
    num_rows, length = document_BS.shape
    position_BS = document_positions(document_BS)
    found = torch.zeros(num_rows, length, length, dtype=torch.bool)
    for b in range(num_rows):
        for one in range(length):
            first = 0 if window is None else max(0, one - window + 1)
            for other in range(first, one + 1):
                same_chunk = chunk is None or position_BS[b, one] // chunk == position_BS[b, other] // chunk
                found[b, one, other] = document_BS[b, one] == document_BS[b, other] and same_chunk
    return found


def document_positions(document_BS: Tensor) -> Tensor:
    """Returns each token's position within its document, int64 (B, S)."""
    found = torch.zeros_like(document_BS)
    for b, row in enumerate(document_BS.tolist()):
        for s in range(1, len(row)):
            found[b, s] = found[b, s - 1] + 1 if row[s] == row[s - 1] else 0
    return found


def length_factor(config: Any, position_BS: Tensor) -> Tensor:
    """Returns the factor of each token's query, 1 + beta ln(1 + floor((p + offset) / length)), float64 (B, S)."""
    factors = [
        [1 + config.beta * math.log(1 + math.floor((p + config.offset) / config.length)) for p in row]
        for row in position_BS.tolist()
    ]
    return torch.tensor(factors, dtype=torch.float64)


def apply_rope(x_BSh: Tensor, position: Any, position_BS: Tensor) -> Tensor:
    """Rotates each pair (x_i, x_{i + h/2}) of a token by its position times the pair's frequency. position: a
    RopeConfig."""
    half = x_BSh.shape[-1] // 2
    columns: list[Tensor] = [x_BSh[..., i] for i in range(2 * half)]
    lengths = _document_lengths(position_BS.tolist())

    def each_token(value: Callable[[int], float]) -> Tensor:
        return torch.tensor([[value(length) for length in row] for row in lengths], dtype=x_BSh.dtype)

    stretch_BS = each_token(lambda length: _attention_factor(position.scaling, length))
    for i in range(half):
        frequency_BS = each_token(lambda length, i=i: _rope_frequency(position, i, half, length))  # type: ignore[misc]
        angle_BS = position_BS.to(x_BSh.dtype) * frequency_BS
        one, two = columns[i], columns[i + half]
        columns[i] = stretch_BS * (one * torch.cos(angle_BS) - two * torch.sin(angle_BS))
        columns[i + half] = stretch_BS * (one * torch.sin(angle_BS) + two * torch.cos(angle_BS))
    return torch.stack(columns, -1)


def _document_lengths(positions: list[list[int]]) -> list[list[int]]:
    """Returns, for each token of each row, the number of tokens of its document. positions: counted from 0 in each."""
    found = [list(row) for row in positions]
    for row, lengths in zip(positions, found, strict=True):
        for s in reversed(range(len(row))):
            is_last = s + 1 == len(row) or row[s + 1] == 0
            lengths[s] = row[s] + 1 if is_last else lengths[s + 1]
    return found


def _rope_frequency(position: Any, i: int, half: int, length: int = 1) -> float:
    """Returns the frequency of pair i, scaled as in the papers, in a document of `length` tokens. kept: the share that
    is not divided by the factor."""
    scaling, frequency = position.scaling, float(position.theta) ** (-i / half)
    if scaling is None:
        return frequency
    if scaling.kind == "linear":
        return frequency / scaling.factor
    if scaling.kind == "longrope":
        is_long = length > scaling.original_length and scaling.uses_long_factors
        return frequency / float((scaling.long_factors if is_long else scaling.short_factors)[i])
    wavelength = 2 * math.pi / frequency
    turns = scaling.original_length / wavelength
    if scaling.kind == "llama3":
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        kept = 0.0 if turns < low else 1.0 if turns >= high else (turns - low) / (high - low)
    else:
        first, last = (
            half * math.log(scaling.original_length / (2 * math.pi * beta)) / math.log(position.theta)
            for beta in (scaling.beta_fast, scaling.beta_slow)
        )
        if scaling.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(0, first), min(last, 2 * half - 1)
        if first == last:
            last += 0.001
        kept = 1 - min(1.0, max(0.0, (i - first) / (last - first)))
    return kept * frequency + (1 - kept) * frequency / scaling.factor


def _attention_factor(scaling: Any, length: int = 1) -> float:
    """Returns the factor of YaRN (2309.00071) or LongRoPE (2402.13753) on queries and keys; 1 for other scalings."""
    if scaling is not None and scaling.kind == "longrope":
        is_long = length > scaling.original_length
        return float(scaling.long_attention_factor if is_long else scaling.short_attention_factor)
    if scaling is None or scaling.kind != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return float(scaling.attention_factor)
    logarithm = 0.1 * math.log(scaling.factor)
    if scaling.mscale and scaling.mscale_all_dim:
        return (scaling.mscale * logarithm + 1) / (scaling.mscale_all_dim * logarithm + 1)
    return logarithm + 1


def _norm(config: Any, size: int, weight: Tensor, x: Tensor) -> Tensor:
    """Applies RMSNorm to each head with shared weights (`per_head`) or none (`l2`), or to all columns together
    (`whole`)."""
    if config.kind == "whole":
        return rms_norm(x, weight, config.eps)
    return torch.cat([rms_norm(head, weight, config.eps) for head in x.split(size, -1)], -1)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Computes RMSNorm (1910.07467) over the last dimension."""
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps) * weight


def softmax(x: Tensor) -> Tensor:
    exponentials = torch.exp(x - x.detach().amax(-1, keepdim=True))
    return exponentials / exponentials.sum(-1, keepdim=True)


def linear(weights: Parameters, name: str, x: Tensor) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)
