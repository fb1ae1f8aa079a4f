"""The parts of attention that families of models need, on one rank: norms of queries and keys, sinks, windows, scaled
rotary positions, each against transformers' own layers, values and gradients in float64; and through a cache."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Glm4MoeConfig,
    GptOssConfig,
    HunYuanMoEV1Config,
    Llama4TextConfig,
    LlamaConfig,
    MiMoV2FlashConfig,
    MistralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen3Config,
)
from transformers.masking_utils import (
    create_causal_mask,
    create_chunked_causal_mask,
    create_sliding_window_causal_mask,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.glm4_moe import modeling_glm4_moe
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.hunyuan_v1_moe import modeling_hunyuan_v1_moe
from transformers.models.llama4 import modeling_llama4
from transformers.models.mimo_v2_flash import modeling_mimo_v2_flash
from transformers.models.mistral import modeling_mistral
from transformers.models.olmoe import modeling_olmoe
from transformers.models.qwen3 import modeling_qwen3

from expert_parallel.interop.tensor_map import half_split_rows
from expert_parallel.model.attention import Attention, HeadsConfig, causal_attention
from expert_parallel.model.attention_mask import AttentionContext
from expert_parallel.model.kv_cache import KVCache
from expert_parallel.model.parallelize import build_model
from expert_parallel.model.rotary import RopeConfig, rope_cos_sin, rotary_frequencies
from expert_parallel.model.transformer import ModelConfig, Transformer
from expert_parallel.moe.config import MoEConfig
from expert_parallel.moe.context import StepContext
from expert_parallel.moe.layer import MoELayer
from expert_parallel.parallel.sequence import SequenceShard
from expert_parallel.verify.reference_attention import _attention_factor, _rope_frequency
from tests.peers import peers_in_float64

LENGTH, D = 9, 12


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(actual: Any, expected: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def sight_of(length: int, cache: KVCache | None = None) -> AttentionContext:
    return AttentionContext.of(SequenceShard(), length, torch.device("cpu"), cache=cache)


# ---------------------------------------------------------------------------------------------------- rotary positions

SCALINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "none": ({}, {"rope_type": "default"}),
    "linear": ({"kind": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    "llama 3.1": (
        {
            "kind": "llama3",
            "factor": 8.0,
            "low_frequency_factor": 1.0,
            "high_frequency_factor": 4.0,
            "original_length": 8192,
        },
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "llama 4 scout": (
        {
            "kind": "llama3",
            "factor": 16.0,
            "low_frequency_factor": 1.0,
            "high_frequency_factor": 1.0,
            "original_length": 8192,
        },
        {
            "rope_type": "llama3",
            "factor": 16.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "yarn": (
        {"kind": "yarn", "factor": 4.0, "original_length": 32768},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    ),
    "gpt-oss": (
        {"kind": "yarn", "factor": 32.0, "original_length": 4096, "truncate": False},
        {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False},
    ),
    "deepseek-v3": (
        {"kind": "yarn", "factor": 40.0, "original_length": 4096, "mscale": 1.0, "mscale_all_dim": 1.0},
        {
            "rope_type": "yarn",
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    ),
    "yarn, scales that differ": (
        {
            "kind": "yarn",
            "factor": 40.0,
            "original_length": 512,
            "mscale": 0.7,
            "mscale_all_dim": 1.3,
            "beta_fast": 8.0,
            "beta_slow": 2.0,
        },
        {
            "rope_type": "yarn",
            "factor": 40.0,
            "original_max_position_embeddings": 512,
            "mscale": 0.7,
            "mscale_all_dim": 1.3,
            "beta_fast": 8.0,
            "beta_slow": 2.0,
        },
    ),
    "yarn, short": (
        {"kind": "yarn", "factor": 2.0, "original_length": 16, "attention_factor": 1.25},
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16, "attention_factor": 1.25},
    ),
}


def rope_of(name: str, theta: float = 150000.0) -> RopeConfig:
    return RopeConfig.model_validate({"theta": theta, "scaling": SCALINGS[name][0] or None})


def their_frequencies(name: str, size: int, theta: float) -> tuple[Tensor, float]:
    parameters = {**SCALINGS[name][1], "rope_theta": theta}
    with peers_in_float64():
        config = LlamaConfig(
            head_dim=size,
            hidden_size=size,
            num_attention_heads=1,
            max_position_embeddings=1,
            rope_parameters=parameters,
        )
        if parameters["rope_type"] == "default":
            return modeling_mistral.MistralRotaryEmbedding.compute_default_rope_parameters(config)
        return ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config)


@pytest.mark.parametrize("size", [4, 64, 128])
@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("theta", [10000.0, 150000.0])
def test_frequencies_are_transformers(name: str, size: int, theta: float) -> None:
    """And verify's reference has the same, by itself."""
    expected, their_factor = their_frequencies(name, size, theta)
    rope = rope_of(name, theta)
    actual, factor = rotary_frequencies(rope, size)
    close(actual, expected)
    assert factor == pytest.approx(their_factor, rel=1e-14)
    close([_rope_frequency(rope, i, size // 2) for i in range(size // 2)], expected.tolist())
    assert _attention_factor(rope.scaling) == pytest.approx(their_factor, rel=1e-14)


@pytest.mark.parametrize("length", [31, 32, 33])
def test_the_factors_of_longrope_are_transformers(length: int) -> None:
    """The short ones up to the original length, the long ones beyond it."""
    short, long = [1.0, 1.5, 2.0, 3.0], [1.25, 2.5, 5.0, 40.0]
    theirs = {"rope_type": "longrope", "rope_theta": 500.0, "short_factor": short, "long_factor": long}
    theirs |= {"original_max_position_embeddings": 32, "factor": 4.0}
    with peers_in_float64():
        config = LlamaConfig(head_dim=8, hidden_size=8, num_attention_heads=1, rope_parameters=theirs)
        expected, their_factor = ROPE_INIT_FUNCTIONS["longrope"](config, seq_len=length)
    both = {"short_attention_factor": their_factor, "long_attention_factor": their_factor}
    scaling = {"kind": "longrope", "original_length": 32, "short_factors": short, "long_factors": long, **both}
    rope = RopeConfig.model_validate({"theta": 500.0, "scaling": scaling})
    frequency_BSh, factor_BS = rotary_frequencies(rope, 8, length_BS=torch.tensor([[length, 1]]))
    close(frequency_BSh[0, 0], expected)
    close(factor_BS, torch.full((1, 2), their_factor, dtype=torch.float64))
    assert torch.equal(frequency_BSh[0, 0], frequency_BSh[0, 1]) is (length <= 32)
    close([_rope_frequency(rope, i, 4, length) for i in range(4)], expected.tolist())


def test_scalings_change_something() -> None:
    plain, _ = rotary_frequencies(rope_of("none"), 64)
    for name in [name for name in SCALINGS if name != "none"]:
        scaled, _ = rotary_frequencies(rope_of(name), 64)
        divided = plain / scaled
        assert float(divided.max()) == pytest.approx(rope_of(name).scaling.factor), name  # type: ignore[union-attr]
        if name != "linear":
            assert float(divided.min()) == pytest.approx(1.0), name
    assert rotary_frequencies(rope_of("yarn"), 64)[1] > 1


def test_the_factor_multiplies_cos_and_sin() -> None:
    cos, sin = rope_cos_sin(rope_of("yarn, short"), 8, torch.arange(5)[None], torch.float64)
    close(cos.square() + sin.square(), torch.full_like(cos, 1.25**2))


def test_angles_are_computed_once_a_pass() -> None:
    attention_context, rope = sight_of(5), rope_of("yarn")
    assert (
        attention_context.rope_cos_sin(rope, 8, torch.float64)[0]
        is attention_context.rope_cos_sin(rope_of("yarn"), 8, torch.float64)[0]
    )
    assert attention_context.rope_cos_sin(rope, 8, torch.float32)[0].dtype == torch.float32
    assert attention_context.rope_cos_sin(rope, 16, torch.float64)[0].shape == (1, 1, 5, 8)
    assert not torch.equal(
        attention_context.rope_cos_sin(rope_of("none"), 8, torch.float64)[0],
        attention_context.rope_cos_sin(rope, 8, torch.float64)[0],
    )


# ------------------------------------------------------------------------------------------------- families' attention

ROPE = {"rope_type": "default", "rope_theta": 100.0}
SIZES = {"hidden_size": D, "num_attention_heads": 4, "rope_parameters": ROPE, "attn_implementation": "eager"}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "truncate": False,
}
OUR_ROPE = {"theta": 100.0}
OUR_YARN = {"theta": 100.0, "scaling": {"kind": "yarn", "factor": 4.0, "original_length": 16, "truncate": False}}


def qwen3(kv_heads: int) -> tuple[PreTrainedConfig, Any, dict[str, Any], dict[str, Any]]:
    config = Qwen3Config(**SIZES, num_key_value_heads=kv_heads, head_dim=6, rms_norm_eps=1e-3)
    ours = {"num_kv_heads": kv_heads, "head_size": 6, "qk_norm": {"kind": "per_head", "eps": 1e-3}}
    return config, modeling_qwen3, ours, OUR_ROPE


def olmoe(kv_heads: int) -> tuple[PreTrainedConfig, Any, dict[str, Any], dict[str, Any]]:
    config = OlmoeConfig(**{**SIZES, "hidden_size": 24}, num_key_value_heads=kv_heads, rms_norm_eps=1e-3)
    ours = {"num_kv_heads": kv_heads, "head_size": 6, "qk_norm": {"kind": "whole", "eps": 1e-3}}
    return config, modeling_olmoe, ours, OUR_ROPE


def mistral(kv_heads: int) -> tuple[PreTrainedConfig, Any, dict[str, Any], dict[str, Any]]:
    config = MistralConfig(**SIZES, num_key_value_heads=kv_heads, head_dim=6, sliding_window=4)
    return config, modeling_mistral, {"num_kv_heads": kv_heads, "head_size": 6, "window": 4}, OUR_ROPE


def glm4_moe(kv_heads: int) -> tuple[PreTrainedConfig, Any, dict[str, Any], dict[str, Any]]:
    rope = {**YARN, "partial_rotary_factor": 0.5}
    config = Glm4MoeConfig(
        **{**SIZES, "rope_parameters": rope}, num_key_value_heads=kv_heads, head_dim=8, use_qk_norm=True
    )
    ours = {"num_kv_heads": kv_heads, "head_size": 8, "rope_size": 4, "qk_norm": {"kind": "per_head", "eps": 1e-5}}
    return config, modeling_glm4_moe, ours, OUR_YARN


def gpt_oss(kv_heads: int, window: int | None) -> tuple[PreTrainedConfig, Any, dict[str, Any], dict[str, Any]]:
    config = GptOssConfig(
        **{**SIZES, "rope_parameters": YARN},
        num_key_value_heads=kv_heads,
        head_dim=6,
        attention_bias=True,
        sliding_window=window or 128,
        num_hidden_layers=1,
        layer_types=["full_attention" if window is None else "sliding_attention"],
    )
    ours = {"num_kv_heads": kv_heads, "head_size": 6, "bias": True, "sinks": True, "window": window}
    return config, modeling_gpt_oss, ours, OUR_YARN


def mimo(kv_heads: int, kind: str) -> tuple[PreTrainedConfig, Any, dict[str, Any], dict[str, Any]]:
    """Values narrower than keys, and scaled; the class doubles the key heads of blocks with a window."""
    config = MiMoV2FlashConfig(
        **{**SIZES, "rope_parameters": {kind: {**ROPE, "partial_rotary_factor": 1.0}}},
        num_key_value_heads=kv_heads,
        head_dim=6,
        v_head_dim=5,
        sliding_window=4,
        num_hidden_layers=1,
        layer_types=[kind],
    )
    ours = {"num_kv_heads": kv_heads, "head_size": 6, "value_size": 5, "value_scale": 0.707}
    if kind == "sliding_attention":
        ours |= {"num_kv_heads": 2 * kv_heads, "window": 4, "sinks": True}
    return config, modeling_mimo_v2_flash, ours, OUR_ROPE


def hunyuan(kv_heads: int) -> tuple[PreTrainedConfig, Any, dict[str, Any], dict[str, Any]]:
    config = HunYuanMoEV1Config(**SIZES, num_key_value_heads=kv_heads, head_dim=6, rms_norm_eps=1e-3)
    norm = {"kind": "per_head", "eps": 1e-3, "after_rope": True}
    return config, modeling_hunyuan_v1_moe, {"num_kv_heads": kv_heads, "head_size": 6, "qk_norm": norm}, OUR_ROPE


def llama4(has_rope: bool) -> tuple[PreTrainedConfig, Any, dict[str, Any], dict[str, Any] | None]:
    """A block with rotary positions and norms, or one with neither and scaled queries."""
    config = Llama4TextConfig(
        **SIZES,
        num_hidden_layers=1,
        num_key_value_heads=2,
        head_dim=6,
        rms_norm_eps=1e-3,
        no_rope_layers=[int(has_rope)],
        floor_scale=3,
        attn_scale=0.4,
    )
    ours: dict[str, Any] = {"num_kv_heads": 2, "head_size": 6}
    if has_rope:
        return config, modeling_llama4, {**ours, "qk_norm": {"kind": "l2", "eps": 1e-3, "after_rope": True}}, OUR_ROPE
    return config, modeling_llama4, {**ours, "length_scaling": {"beta": 0.4, "length": 3, "offset": 1}}, None


FAMILIES = {
    "qwen3": lambda: qwen3(2),
    "qwen3, one key head": lambda: qwen3(1),
    "olmoe": lambda: olmoe(4),
    "olmoe, grouped": lambda: olmoe(2),
    "mistral": lambda: mistral(2),
    "glm4-moe, partly rotary": lambda: glm4_moe(2),
    "gpt-oss": lambda: gpt_oss(2, None),
    "gpt-oss, window": lambda: gpt_oss(2, 3),
    "gpt-oss, window of one": lambda: gpt_oss(4, 1),
    "hunyuan, norm after rotary positions": lambda: hunyuan(2),
    "llama4, norm without weights": lambda: llama4(has_rope=True),
    "llama4, scaled queries": lambda: llama4(has_rope=False),
    "mimo": lambda: mimo(2, "full_attention"),
    "mimo, window, sinks": lambda: mimo(1, "sliding_attention"),
}
NAMES = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "out", "q_norm": "query_norm"}
NAMES |= {"k_norm": "key_norm", "query_layernorm": "query_norm", "key_layernorm": "key_norm"}


def class_of(module: Any, ending: str) -> Any:
    (found,) = [name for name in dir(module) if name.endswith(ending) and name != ending and "Vision" not in name]
    return getattr(module, found)


def our_rows(config: PreTrainedConfig, name: str, theirs: Tensor) -> Tensor:
    """Llama 4 turns neighbouring columns of a head, so that its rows of queries and keys have another order."""
    if config.model_type != "llama4_text" or not name.startswith(("query", "key")):
        return theirs
    (rows,) = half_split_rows(6, 6).to_ours([theirs])
    return rows


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_is_the_family_s(name: str) -> None:
    """Output and every gradient."""
    config, module, settings, position = FAMILIES[name]()
    width, x = config.hidden_size, draw(2, LENGTH, config.hidden_size).requires_grad_()
    with peers_in_float64():
        theirs = class_of(module, "Attention")(config, layer_idx=0).double()
        rotary = class_of(module, "RotaryEmbedding")(config)
    for parameter, seed in zip(theirs.parameters(), range(99), strict=False):
        parameter.data = draw(*parameter.shape, seed=seed) * 0.5
    rope = None if position is None else RopeConfig.model_validate(position)
    ours = Attention(HeadsConfig.model_validate({"num_heads": 4, **settings}), width, rope).double()
    pairs = {}
    for their_name, parameter in theirs.named_parameters():
        stem, _, leaf = their_name.rpartition(".")
        pairs[f"{NAMES[stem]}.{leaf}" if stem else leaf] = parameter
    ours.load_state_dict({name: our_rows(config, name, parameter.detach()) for name, parameter in pairs.items()})

    their_x = x.detach().clone().requires_grad_()
    make_mask = create_causal_mask if settings.get("window") is None else create_sliding_window_causal_mask
    with peers_in_float64():
        order = torch.arange(LENGTH)[None]
        mask = make_mask(config, their_x, None, None, position_ids=order)
        kind = config.layer_types[:1] if config.model_type == "mimo_v2_flash" else []
        expected = theirs(their_x, position_embeddings=rotary(their_x, order, *kind), attention_mask=mask)[0]
    actual = ours(x, sight_of(LENGTH))
    close(actual, expected)
    upstream = draw(2, LENGTH, width, seed=3)
    actual.backward(upstream)
    expected.backward(upstream)
    close(x.grad, their_x.grad)
    assert dict(ours.named_parameters()).keys() == pairs.keys()
    for name, parameter in ours.named_parameters():
        close(parameter.grad, our_rows(config, name, pairs[name].grad))


def test_windows_are_masked_as_mistral_s() -> None:
    """The own key is one of the window's."""
    x = draw(1, LENGTH, D)
    for window in (1, 2, LENGTH - 1, LENGTH, LENGTH + 1):
        config = MistralConfig(**SIZES, sliding_window=window)
        theirs = create_sliding_window_causal_mask(config, x, None, None, position_ids=torch.arange(LENGTH)[None])
        ours = sight_of(LENGTH).mask(window)
        if ours is None:
            assert window >= LENGTH
            ours = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
        assert torch.equal(ours, theirs == 0), window
        assert int(ours[0, 0, -1].sum()) == min(window, LENGTH)


def test_chunks_are_masked_as_llama_4_s() -> None:
    x = draw(1, LENGTH, D)
    for chunk in (1, 2, LENGTH - 1, LENGTH, LENGTH + 1):
        config = Llama4TextConfig(attention_chunk_size=chunk, attn_implementation="eager")
        theirs = create_chunked_causal_mask(config, x, None, None, position_ids=torch.arange(LENGTH)[None])
        ours = sight_of(LENGTH).mask(chunk=chunk)
        if ours is None:
            assert chunk >= LENGTH
            ours = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
        assert torch.equal(ours, theirs == 0), chunk


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_sink_is_a_key_without_value(kv_heads: int) -> None:
    """Far below all logits it does nothing; far above it takes all; at the logit of a key, as if that came twice."""
    query, key, value = draw(2, 4, 5, 6), draw(2, kv_heads, 5, 6, seed=1), draw(2, kv_heads, 5, 6, seed=2)
    plain = causal_attention(query, key, value)
    close(causal_attention(query, key, value, sinks_H=torch.full((4,), -1e4)), plain)
    assert not causal_attention(query, key, value, sinks_H=torch.full((4,), 1e4)).any()
    zero = causal_attention(query * 0, key, value, sinks_H=torch.zeros(4))  # all logits 0: the mean over one key more
    counts = torch.arange(1, 6)[:, None]
    close(zero, causal_attention(query * 0, key, value) * counts / (counts + 1))
    one = torch.tensor([0.0, -1e4, -1e4, -1e4])  # of the first head alone
    alone = causal_attention(query, key, value, sinks_H=one)
    close(alone[:, 1:], plain[:, 1:])
    assert not torch.allclose(alone[:, 0], plain[:, 0])


@pytest.mark.parametrize("queries", [1, 3, 5])
def test_queries_that_are_the_last_see_up_to_their_own_key(queries: int) -> None:
    """With sinks and without, with the mask written out and without."""
    query, key, value = draw(2, 4, 5, 6), draw(2, 2, 5, 6, seed=1), draw(2, 2, 5, 6, seed=2)
    sees = torch.ones(5, 5, dtype=torch.bool).tril()
    for sinks in (None, draw(4, seed=3)):
        whole = causal_attention(query, key, value, sinks_H=sinks)
        close(causal_attention(query, key, value, sees, sinks), whole)
        close(causal_attention(query[:, :, -queries:], key, value, None, sinks), whole[:, :, -queries:])


def test_sinks_of_bfloat16_are_taken_in_float32() -> None:
    """A softmax over 2000 equal logits and the sink: bfloat16 sums would stop at 256."""
    key = torch.zeros(1, 1, 2000, 4, dtype=torch.bfloat16)
    ones = torch.ones(1, 1, 2000, 4, dtype=torch.bfloat16)
    y = causal_attention(key, key, ones, sinks_H=torch.zeros(1))
    assert y.dtype == torch.bfloat16
    assert float(y[0, 0, -1, 0]) == pytest.approx(2000 / 2001, rel=1e-2)
    assert float(
        causal_attention(key, key, ones, sinks_H=torch.full((1,), 2000.0).log())[0, 0, -1, 0]
    ) == pytest.approx(0.5, rel=1e-2)


# ----------------------------------------------------------------------------------------------------- gpt-oss's layer


def test_the_gpt_oss_layer() -> None:
    """Router with bias, softmax over the chosen; experts with biases and clamps at work. Values and gradients."""
    with peers_in_float64():
        config = GptOssConfig(hidden_size=8, intermediate_size=10, num_local_experts=6, num_experts_per_tok=3)
        config._experts_implementation = "eager"
        theirs = modeling_gpt_oss.GptOssMLP(config).double()
    for parameter, seed in zip(theirs.parameters(), range(99), strict=False):
        parameter.data = draw(*parameter.shape, seed=seed) * (3 if parameter.dim() == 3 else 1)
    ours = MoELayer(
        MoEConfig.model_validate(
            {
                "d_model": 8,
                "num_experts": 6,
                "router": {"k": 3, "bias": True, "normalise": True},
                "experts": {"hidden": 10, "activation": "gpt_oss", "bias": True, "backend": "loop"},
            }
        )
    ).double()
    joined = {"w_in": theirs.experts.gate_up_proj, "b_in": theirs.experts.gate_up_proj_bias}
    ours.load_state_dict(
        {
            "router.weight": theirs.router.weight.detach(),
            "router.bias": theirs.router.bias.detach(),
            **{f"experts.{name}": torch.cat([p[..., ::2], p[..., 1::2]], -1).detach() for name, p in joined.items()},
            "experts.w_out": theirs.experts.down_proj.detach(),
            "experts.b_out": theirs.experts.down_proj_bias.detach(),
        }
    )
    x, their_x = draw(2, 7, 8).requires_grad_(), draw(2, 7, 8).requires_grad_()
    actual, (expected, _) = ours(x, StepContext()).y, theirs(their_x)
    close(actual, expected)
    hidden = x.detach() @ theirs.experts.gate_up_proj[0]
    assert bool((hidden[..., ::2] > 7).any()), "the gate's clamp must be at work"
    assert bool((hidden[..., 1::2].abs() > 7).any()), "the other one too"
    actual.backward(draw(2, 7, 8, seed=1))
    expected.backward(draw(2, 7, 8, seed=1))
    close(x.grad, their_x.grad)
    close(ours.router.weight.grad, theirs.router.weight.grad)
    close(ours.router.bias.grad, theirs.router.bias.grad)
    for name, parameter in joined.items():
        grad = parameter.grad
        assert grad is not None
        close(getattr(ours.experts, name).grad, torch.cat([grad[..., ::2], grad[..., 1::2]], -1))
    close(ours.experts.w_out.grad, theirs.experts.down_proj.grad)
    close(ours.experts.b_out.grad, theirs.experts.down_proj_bias.grad)


# ------------------------------------------------------------------------------------------------------ whole models

HEADS: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2, "head_size": 6}
GPT_OSS: dict[str, Any] = {**HEADS, "bias": True, "sinks": True, "window": 3}
FIRST = {"kind": "list", "indices": [0]}
LENGTHS = {"beta": 0.5, "length": 2, "offset": 1}
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "norm of each head": {"attention": {**HEADS, "qk_norm": {"kind": "per_head"}}},
    "norm after rotary positions": {"attention": {**HEADS, "qk_norm": {"kind": "per_head", "after_rope": True}}},
    "norm without weights, scaled queries": {
        "attention": {**HEADS, "qk_norm": {"kind": "l2"}, "length_scaling": {**LENGTHS, "blocks": "without_rope"}},
        "rope_blocks": {"kind": "list", "indices": [1]},
    },
    "norm of all heads": {"attention": {**HEADS, "qk_norm": {"kind": "whole"}}},
    "window": {"attention": {**HEADS, "window": 4}},
    "narrow scaled values": {"attention": {**HEADS, "value_size": 5, "value_scale": 0.7}},
    "sinks, window of one block, yarn": {
        "attention": GPT_OSS,
        "window_blocks": FIRST,
        "position": {"kind": "rope", **OUR_YARN},
    },
    "rotary positions in one block": {"rope_blocks": FIRST},
    "positions and sinks of the block with a window": {
        "attention": {**HEADS, "window": 3},
        "window_blocks": FIRST,
        "window_overrides": {"position": {"theta": 50.0}, "sinks": True},
    },
    "chunks of one block": {"attention": {**HEADS, "chunk": 3}, "window_blocks": FIRST},
    "no bias of the last matrix": {"attention": {**HEADS, "bias": True, "out_bias": False}},
    "learned positions, sinks": {
        "attention": {**HEADS, "sinks": True},
        "position": {"kind": "learned", "max_length": LENGTH + 2},
    },
}


def config_of(**changes: Any) -> ModelConfig:
    tree = {"vocab_size": 11, "num_layers": 2, "d_model": D, "attention": HEADS, "ffn": {"hidden": 10}, "init_std": 0.4}
    return ModelConfig.model_validate({**tree, **changes})


def model_of(**changes: Any) -> Transformer:
    """With vectors that are not 0 or 1."""
    model = build_model(config_of(**changes), dtype=torch.float64, seed=1)
    for seed, parameter in enumerate(model.parameters()):
        if parameter.dim() == 1:
            parameter.data += draw(*parameter.shape, seed=seed) * 0.5
    return model


def tokens_of(rows: int) -> Tensor:
    return torch.randint(0, 11, (rows, LENGTH), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("name", FEATURES)
def test_pieces_through_a_cache_are_one_pass(name: str) -> None:
    """4 tokens, one, the rest; and rows of unequal length, of which one is a token ahead."""
    model, tokens = model_of(**FEATURES[name]), tokens_of(2)
    expected = model(tokens, StepContext()).logits
    cache = KVCache(2, LENGTH + 2)
    for part in tokens.split([4, 1, LENGTH - 5], 1):
        first = int(cache.length_B[0])
        actual = model(part, StepContext(), cache=cache).logits
        cache.length_B += part.shape[1]
        close(actual, expected[:, first : first + part.shape[1]])

    cache, ahead = KVCache(2, LENGTH + 2), torch.tensor([3, 2])
    model(tokens[:, :3], StepContext(), cache=cache)
    cache.length_B += ahead
    ragged = torch.stack([row[start : start + 4] for row, start in zip(tokens, ahead.tolist(), strict=True)])
    actual = model(ragged, StepContext(), cache=cache).logits
    for row, start in enumerate(ahead.tolist()):
        close(actual[row], expected[row, start : start + 4])


@pytest.mark.parametrize("name", [name for name in FEATURES if name not in ("plain", "narrow scaled values")])
def test_each_part_changes_what_comes_out(name: str) -> None:
    """Else the tests above would compare nothing."""
    changed, plain = model_of(**FEATURES[name]), model_of()
    changed.load_state_dict({**changed.state_dict(), **plain.state_dict()}, strict=False)
    tokens = tokens_of(2)
    assert not torch.allclose(changed(tokens, StepContext()).logits, plain(tokens, StepContext()).logits, atol=1e-3)


MATRICES = {"query.weight": (24, D), "key.weight": (12, D), "value.weight": (12, D), "out.weight": (D, 24)}
BIASES = {"query.bias": (24,), "key.bias": (12,), "value.bias": (12,)}


@pytest.mark.parametrize(
    ("settings", "more"),
    [
        ({}, {}),
        ({"kind": "heads", "bias": True}, {**BIASES, "out.bias": (D,)}),
        ({"bias": True, "out_bias": False}, BIASES),
        ({"out_bias": True}, {"out.bias": (D,)}),
        ({"qk_norm": {"kind": "per_head"}}, {"query_norm.weight": (6,), "key_norm.weight": (6,)}),
        ({"qk_norm": {"kind": "whole"}}, {"query_norm.weight": (24,), "key_norm.weight": (12,)}),
        ({"qk_norm": {"kind": "l2", "after_rope": True}, "length_scaling": LENGTHS}, {}),
        ({"sinks": True, "window": 3}, {"sinks": (4,)}),
        (
            {"value_size": 5, "bias": True},
            {"value.weight": (10, D), "out.weight": (D, 20), **BIASES, "value.bias": (10,), "out.bias": (D,)},
        ),
    ],
)
def test_parameters_by_name(settings: dict[str, Any], more: dict[str, tuple[int, ...]]) -> None:
    block = next(iter(model_of(attention={**HEADS, **settings}).blocks))
    shapes = {name: tuple(p.shape) for name, p in block.named_parameters() if name.startswith("attention.")}
    assert shapes == {f"attention.{name}": shape for name, shape in (MATRICES | more).items()}


def test_windows_are_of_the_blocks_that_are_named() -> None:
    blocks = model_of(num_layers=4, attention=GPT_OSS, window_blocks={"kind": "every_nth", "n": 2}).blocks
    assert [block.attention.window for block in blocks if isinstance(block, nn.Module)] == [None, 3, None, 3]
    blocks = model_of(num_layers=2, attention=GPT_OSS).blocks
    assert [block.attention.window for block in blocks if isinstance(block, nn.Module)] == [3, 3]


def test_a_window_ends_what_a_token_can_change() -> None:
    """Two blocks of window 3: a token reaches 4 beyond itself, no further."""
    model, tokens = model_of(attention={**HEADS, "window": 3}), tokens_of(1)
    before, changed = model(tokens, StepContext()).logits, tokens.clone()
    changed[0, 1] = (changed[0, 1] + 1) % 11
    difference = (model(changed, StepContext()).logits - before).abs().amax(-1)[0] > 1e-12
    assert difference.tolist() == [False, True, True, True, True, True, False, False, False]


LATENT = {"kind": "latent", "num_heads": 2, "kv_rank": 4, "nope_size": 4, "rope_size": 2, "value_size": 4}
YARN_SETTINGS = {"kind": "yarn", "factor": 2.0, "original_length": 16}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"window_blocks": FIRST}, "window_blocks is given without attention.window"),
        (
            {"attention": GPT_OSS, "window_blocks": {"kind": "list", "indices": [2]}},
            "window_blocks names block 2, but num_layers is 2",
        ),
        (
            {"attention": GPT_OSS, "window_blocks": {"kind": "every_nth", "n": 3}},
            "attention.window is given, but window_blocks selects none of the 2 blocks",
        ),
        (
            {"rope_blocks": FIRST, "position": {"kind": "learned", "max_length": 9}},
            "rope_blocks is given, but position.kind is 'learned'",
        ),
        ({"rope_blocks": FIRST, "attention": LATENT}, "attention.kind 'latent' needs rotary positions in all blocks"),
        ({"rope_blocks": {"kind": "all_but_first", "k": 2}}, "rope_blocks selects none of the 2 blocks"),
        (
            {"attention": {**HEADS, "chunk": 3}, "window_blocks": {"kind": "every_nth", "n": 3}},
            "attention.chunk is given, but window_blocks selects none of the 2 blocks",
        ),
        ({"window_overrides": {"sinks": True}}, "window_overrides is given, but 0 of the 2 blocks have a window"),
        ({"window_overrides": {}}, "window_overrides sets nothing"),
        (
            {"window_overrides": {"num_kv_heads": 3}, "attention": GPT_OSS, "window_blocks": FIRST},
            r"attention.num_heads \(4\) is not a multiple of window_overrides.num_kv_heads \(3\)",
        ),
        (
            {
                "window_overrides": {"position": {"theta": 50.0}},
                "attention": GPT_OSS,
                "window_blocks": FIRST,
                "rope_blocks": {"kind": "list", "indices": [1]},
            },
            "window_overrides.position is given, but no block with a window has rotary positions",
        ),
        ({"attention": {**HEADS, "window": 3, "chunk": 4}}, "attention.window is 3 and attention.chunk is 4"),
        ({"attention": {**HEADS, "window": 0}}, "attention.window: input should be"),
        ({"attention": {**HEADS, "head_size": 7}}, r"attention.head_size \(7\) must be even for position.kind rope"),
        ({"attention": {**HEADS, "kind": "tails"}}, "'tails'"),
        ({"attention": {**HEADS, "qk_norm": {"kind": "none"}}}, "qk_norm"),
        (
            {"attention": {**HEADS, "qk_norm": {"kind": "whole", "after_rope": True}}},
            "qk_norm.after_rope is true, but kind 'whole' normalizes before heads are split",
        ),
        (
            {"attention": {**HEADS, "qk_norm": {"kind": "l2"}}, "position": {"kind": "learned", "max_length": 9}},
            "attention.qk_norm.kind is 'l2', but position.kind is 'learned': no block has rotary positions",
        ),
        (
            {"attention": {**HEADS, "length_scaling": {**LENGTHS, "blocks": "without_rope"}}},
            "attention.length_scaling.blocks is 'without_rope', but all 2 blocks have rotary positions",
        ),
        ({"position": {"kind": "rope", "scaling": {"kind": "linear", "factor": 0.5}}}, "factor"),
        ({"position": {"kind": "rope", "scaling": {**YARN_SETTINGS, "factor": 0.5}}}, "factor"),
        (
            {"position": {"kind": "rope", "scaling": {**YARN_SETTINGS, "beta_fast": 0.5}}},
            r"scaling\.beta_fast \(0\.5\) must be at least position\.scaling\.beta_slow \(1\)",
        ),
        (
            {
                "position": {
                    "kind": "rope",
                    "scaling": {
                        "kind": "llama3",
                        "factor": 2.0,
                        "low_frequency_factor": 4.0,
                        "high_frequency_factor": 1.0,
                        "original_length": 16,
                    },
                }
            },
            r"high_frequency_factor \(1\) must be at least position\.scaling\.low_frequency_factor \(4\)",
        ),
        (
            {"position": {"kind": "learned", "max_length": 9}, "attention": LATENT},
            "position.kind is 'learned', but attention.kind 'latent' supports only rotary positions",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(**wrong)
