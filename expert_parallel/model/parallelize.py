"""Builds a Transformer, or a stage of it, on a mesh: all that the single-device code of transformer.py leaves out."""

import math
import warnings
from functools import partial

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from expert_parallel.model.context_parallel import spread_attention
from expert_parallel.model.latent_attention import LatentAttention
from expert_parallel.model.tensor_parallel import (
    GatherTokens,
    VocabularyParallelEmbedding,
    divide_attention,
    divide_ffn,
    divide_latent_attention,
)
from expert_parallel.model.transformer import ModelConfig, Part, Recompute, Transformer
from expert_parallel.moe.parameters import init_parameters
from expert_parallel.moe.routers.base import TopKRouter
from expert_parallel.nn.norms import RMSNorm
from expert_parallel.parallel.degrees import ParallelDegrees, ShardedConfig
from expert_parallel.parallel.mesh import ParallelMesh


def build_model(
    config: ModelConfig,
    mesh: ParallelMesh | None = None,
    *,
    sharding: ShardedConfig | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    recompute: Recompute = "none",
    seed: int | None = 0,
    part: Part | None = None,
    model_class: type[Transformer] = Transformer,
) -> Transformer:
    """A model with initial weights that depend on `seed` alone. mesh None: the whole model on this rank.

    seed None: weights are left as memory has them, for a checkpoint to fill. device: `meta` gives shapes alone. dtype:
    compute dtype; weights are kept in promote_types(float32, dtype). sharding: FSDP2 over mesh.dense_mesh, and over
    mesh.expert_mesh for experts. part, model_class: of a pipeline; default: the whole.
    No rank ever holds more than its own part of the weights.
    """
    with torch.device("meta"):
        model = model_class(config, dtype, mesh, recompute, part)
        if mesh is not None:
            divide_model(model, mesh)
        model.to(torch.promote_types(torch.float32, dtype))
    if sharding is not None:
        assert mesh is not None
        shard(model, mesh, sharding)
    device = device or torch.device("cpu")
    if device.type != "meta":
        model.to_empty(device=device)
        if seed is not None:
            init_weights(model, seed)
    return model


def divide_model(model: Transformer, mesh: ParallelMesh) -> None:
    """Tensor, sequence and context parallelism."""
    tp_group, cp_group = mesh.tp_group, mesh.cp_group
    for _, block in model.local_blocks():
        if cp_group is not None:
            spread_attention(block.attention, model.place, cp_group)
        if tp_group is not None:
            if isinstance(block.attention, LatentAttention):
                divide_latent_attention(block.attention, tp_group)
            else:
                divide_attention(block.attention, tp_group, kv_copies(model.config, mesh.degrees))
            for ffn in (block.ffn, block.moe.shared_experts if block.moe is not None else None):
                if ffn is not None:
                    divide_ffn(ffn, tp_group)
    if tp_group is not None:
        for name in ("embedding", "unembedding"):
            table = getattr(model, name)
            if table is not None:
                setattr(model, name, VocabularyParallelEmbedding(table, tp_group, model.compute_dtype))
        model.before_logits = partial(_gather_for_logits, group=tp_group)


def _gather_for_logits(x: torch.Tensor, group: torch.distributed.ProcessGroup) -> torch.Tensor:
    return GatherTokens.apply(x, group)


def kv_copies(config: ModelConfig, degrees: ParallelDegrees) -> int:
    """Tensor parallel ranks that hold the same key and value heads: where there are fewer heads than ranks."""
    return max(1, degrees.tp // config.attention.kv_heads)


def split_model(config: ModelConfig, num_stages: int) -> list[Part]:
    """The blocks in equal parts, in order; the first parts have one more where they do not divide evenly."""
    parts = torch.arange(config.num_layers).tensor_split(num_stages)
    return [Part(range(int(p[0]), int(p[-1]) + 1), number, num_stages) for number, p in enumerate(parts)]


def refuse_degrees(config: ModelConfig, degrees: ParallelDegrees, stages_per_rank: int) -> None:
    """ValueError where the model's sizes do not divide over the ranks."""
    attention, moe, tp, etp = config.attention, config.moe, degrees.tp, degrees.etp
    divided = [("model.attention.num_heads", attention.num_heads, "parallel.tp", tp)]
    if tp < attention.kv_heads:
        divided.append(("model.attention.num_kv_heads", attention.kv_heads, "parallel.tp", tp))
    if config.ffn is not None:
        divided.append(("model.ffn.hidden", config.ffn.hidden, "parallel.tp", tp))
    if moe is not None and moe.shared_experts is not None:
        divided.append(("model.moe.shared_experts.hidden", moe.shared_experts.hidden, "parallel.tp", tp))
    if moe is not None:
        divided.append(("model.moe.experts.hidden", moe.experts.hidden, "parallel.etp", etp))
    for name, size, degree, number in divided:
        if size % number:
            raise ValueError(f"{name} ({size}) is not a multiple of {degree} ({number})")
    if tp > attention.kv_heads and tp % attention.kv_heads:
        raise ValueError(
            f"parallel.tp ({tp}) is not a multiple of model.attention.num_kv_heads ({attention.kv_heads}): each head "
            "is held by equally many ranks"
        )
    if config.vocab_size < tp:
        raise ValueError(f"model.vocab_size ({config.vocab_size}) is smaller than parallel.tp ({tp})")
    stages = degrees.pp * stages_per_rank
    if config.num_layers < stages:
        per_rank = f" * parallel.pipeline.stages_per_rank ({stages_per_rank})" if stages_per_rank > 1 else ""
        raise ValueError(
            f"model.num_layers ({config.num_layers}) is smaller than parallel.pp ({degrees.pp}){per_rank}: each stage "
            "takes a block or more"
        )


def shard(model: Transformer, mesh: ParallelMesh, config: ShardedConfig) -> None:
    """FSDP2, innermost first: each MoE layer's experts over expert_mesh, all else over dense_mesh. Matrices travel in
    the compute dtype; norms and routers, which compute in float32, in float32. Gradients are summed in float32, never
    averaged: the loss is divided once, by the global token count.
    """
    assert mesh.dense_mesh is not None
    assert mesh.expert_mesh is not None
    # Said of every matrix with a bias; nothing here works in place on what a module returns.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(\w+\) returned a view tensor")
    kept = torch.promote_types(torch.float32, model.compute_dtype)
    lean = MixedPrecisionPolicy(param_dtype=model.compute_dtype, reduce_dtype=kept, cast_forward_inputs=False)
    wide = MixedPrecisionPolicy(cast_forward_inputs=False)

    def wrap(module: nn.Module | None, over: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
        if module is not None:
            fully_shard(module, mesh=over, mp_policy=policy, reshard_after_forward=config.reshard_after_forward)

    for _, block in model.local_blocks():
        if block.moe is not None:
            wrap(block.moe.experts, mesh.expert_mesh, lean)
            wrap(block.moe.shared_experts, mesh.dense_mesh, lean)
        wrap(block.ffn, mesh.dense_mesh, lean)
        for module in block.attention.modules():
            wrap(module if isinstance(module, RMSNorm) else None, mesh.dense_mesh, wide)
        wrap(block.attention, mesh.dense_mesh, lean)
        wrap(block, mesh.dense_mesh, wide)
    wrap(model.final_norm, mesh.dense_mesh, wide)
    fully_shard(model, mesh=mesh.dense_mesh, mp_policy=lean, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def init_weights(model: nn.Module, seed: int) -> None:
    """Normal with `init_std`; the matrices that write to the residual stream divided by sqrt(2 * num_layers)
    (GPT-2, Megatron-LM). Balance biases start at 0."""
    config = model.config
    assert isinstance(config, ModelConfig)
    scaled = config.init_std / math.sqrt(2 * config.num_layers)

    def std(name: str) -> float:
        writes_to_residual = name.endswith(("attention.out.weight", "w_out", "w_out.weight"))
        return scaled if writes_to_residual else config.init_std

    init_parameters(model, seed, std)
    for module in model.modules():
        if isinstance(module, TopKRouter) and module.balance_bias_E is not None:
            module.balance_bias_E.zero_()
