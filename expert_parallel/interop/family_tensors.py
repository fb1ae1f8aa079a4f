"""Builds the tensor maps of the families: which logical tensor has which names in a Hugging Face folder.

Mappings of tensors that a model lacks are ignored, so families that differ by a bias or a norm share a map.
"""

from expert_parallel.interop.hf_config import Tree
from expert_parallel.interop.tensor_map import (
    GATE_UP_COLUMNS,
    GATE_UP_ROWS,
    IDENTITY,
    MXFP4,
    MXFP4_INTERLEAVED,
    STACKED,
    STACKED_INTERLEAVED,
    TRANSPOSED,
    TensorMapping,
)


def outside_blocks() -> list[TensorMapping]:
    """Returns the mappings of embedding, unembedding and residual norms."""
    return [
        TensorMapping("embedding.weight", ("model.embed_tokens.weight",), IDENTITY),
        TensorMapping("final_norm.weight", ("model.norm.weight",), IDENTITY),
        TensorMapping("unembedding.weight", ("lm_head.weight",), IDENTITY),
        TensorMapping("blocks.{L}.attention_norm.weight", ("model.layers.{L}.input_layernorm.weight",), IDENTITY),
        TensorMapping("blocks.{L}.ffn_norm.weight", ("model.layers.{L}.post_attention_layernorm.weight",), IDENTITY),
    ]


def attention() -> list[TensorMapping]:
    """Returns the mappings of attention, including the biases, norms and sinks that only some families have."""
    matrices = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}
    names = {f"{own}.{leaf}": f"{their}.{leaf}" for own, their in matrices.items() for leaf in ("weight", "bias")}
    names |= {"query_norm.weight": "q_norm.weight", "key_norm.weight": "k_norm.weight", "sinks": "sinks"}
    here, there = "blocks.{L}.attention.", "model.layers.{L}.self_attn."
    return [TensorMapping(here + own, (there + their,), IDENTITY) for own, their in names.items()]


def dense(ours: str, theirs: str) -> list[TensorMapping]:
    """Returns the mappings of a dense SwiGLU network, {gate,up,down}_proj. ours, theirs: the module's name in our model
    and in the Hugging Face model."""
    tensor_map = []
    for leaf in ("weight", "bias"):
        tensor_map += [
            TensorMapping(
                f"{ours}.w_in.{leaf}", (f"{theirs}.gate_proj.{leaf}", f"{theirs}.up_proj.{leaf}"), GATE_UP_ROWS
            ),
            TensorMapping(f"{ours}.w_out.{leaf}", (f"{theirs}.down_proj.{leaf}",), IDENTITY),
        ]
    return tensor_map


def experts(theirs: str, gate: str, up: str, down: str) -> list[TensorMapping]:
    """Returns the mappings of a router and its SwiGLU experts, each a module of its own.

    theirs: the name of the MoE module in the Hugging Face model. gate, up, down: the names of an expert's matrices
    there.
    """
    here, there = "blocks.{L}.moe.experts.{E}", f"{theirs}.experts.{{E}}"
    return [
        TensorMapping("blocks.{L}.moe.router.weight", (f"{theirs}.gate.weight",), IDENTITY),
        TensorMapping(f"{here}.w_in", (f"{there}.{gate}.weight", f"{there}.{up}.weight"), GATE_UP_COLUMNS),
        TensorMapping(f"{here}.w_out", (f"{there}.{down}.weight",), TRANSPOSED),
    ]


DENSE = dense("blocks.{L}.ffn", "model.layers.{L}.mlp")
EXPERTS = experts("model.layers.{L}.mlp", "gate_proj", "up_proj", "down_proj")


def llama_tensor_map(config: Tree) -> list[TensorMapping]:
    """Returns the map of dense models: Llama, Qwen2 and Qwen3."""
    return [*outside_blocks(), *attention(), *DENSE]


def mixtral_tensor_map(config: Tree) -> list[TensorMapping]:
    """Returns the map of Mixtral."""
    return [*outside_blocks(), *attention(), *experts("model.layers.{L}.block_sparse_moe", "w1", "w3", "w2")]


def qwen3_moe_tensor_map(config: Tree) -> list[TensorMapping]:
    """Returns the map of Qwen3-MoE and OLMoE."""
    return [*outside_blocks(), *attention(), *DENSE, *EXPERTS]


def gpt_oss_tensor_map(config: Tree) -> list[TensorMapping]:
    """Returns the map of gpt-oss.

    Experts are stacks (E, in, out) with alternating gate and up columns; OpenAI's own files hold them as MXFP4.
    """
    here, there = "blocks.{L}.moe.experts.{E}", "model.layers.{L}.mlp.experts"
    tensor_map = [
        *outside_blocks(),
        *attention(),
        TensorMapping("blocks.{L}.moe.router.weight", ("model.layers.{L}.mlp.router.weight",), IDENTITY),
        TensorMapping("blocks.{L}.moe.router.bias", ("model.layers.{L}.mlp.router.bias",), IDENTITY),
        TensorMapping(f"{here}.b_in", (f"{there}.gate_up_proj_bias",), STACKED_INTERLEAVED),
        TensorMapping(f"{here}.b_out", (f"{there}.down_proj_bias",), STACKED),
    ]
    if config.get("quantization_config"):
        packed = {name: (f"{there}.{name}_blocks", f"{there}.{name}_scales") for name in ("gate_up_proj", "down_proj")}
        return [
            *tensor_map,
            TensorMapping(f"{here}.w_in", packed["gate_up_proj"], MXFP4_INTERLEAVED),
            TensorMapping(f"{here}.w_out", packed["down_proj"], MXFP4),
        ]
    return [
        *tensor_map,
        TensorMapping(f"{here}.w_in", (f"{there}.gate_up_proj",), STACKED_INTERLEAVED),
        TensorMapping(f"{here}.w_out", (f"{there}.down_proj",), STACKED),
    ]
