"""Builds a Transformer or a pipeline stage on a mesh, and applies tensor, context and data parallelism to it."""

import math
import warnings
from functools import partial

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from expert_parallel.model.context_parallel import apply_cp_to_attention
from expert_parallel.model.latent_attention import LatentAttention
from expert_parallel.model.tensor_parallel import (
    GatherTokens,
    VocabularyParallelEmbedding,
    apply_tp_to_attention,
    apply_tp_to_ffn,
    apply_tp_to_latent_attention,
)
from expert_parallel.model.transformer import ModelConfig, Recompute, StageSpec, Transformer
from expert_parallel.moe.experts.grouped import GroupedExperts
from expert_parallel.moe.parameters import init_parameters
from expert_parallel.moe.routers.base import TopKRouter
from expert_parallel.nn.norms import RMSNorm
from expert_parallel.parallel.degrees import ParallelDegrees, ShardedConfig
from expert_parallel.parallel.mesh import ParallelMesh
from expert_parallel.parallel.sharding import get_tensor_shards, name_shards_in_state_dict, shard_parameter


def build_model(
    config: ModelConfig,
    mesh: ParallelMesh | None = None,
    *,
    sharding: ShardedConfig | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    recompute: Recompute = "none",
    seed: int | None = 0,
    stage_spec: StageSpec | None = None,
    model_class: type[Transformer] = Transformer,
) -> Transformer:
    """Builds a model whose initial weights depend on `seed` alone, not on the layout.

    mesh: the process groups; None builds the whole model on this rank. sharding: applies FSDP2 over mesh.dense_mesh,
    and over mesh.expert_mesh to experts; None does not shard. dtype: the dtype of computation; weights are kept in
    promote_types(float32, dtype). device: `meta` builds shapes without values. seed: None leaves weights uninitialised,
    for a checkpoint to fill. `stage_spec`, model_class: the pipeline stage to build and its class; by default the whole
    model. No rank ever allocates more than its own shard of the weights.
    """
    with torch.device("meta"):  # so that whole parameters are never allocated before they are sharded
        model = model_class(config, dtype, mesh, recompute, stage_spec)
        if mesh is not None:
            apply_tp_and_cp(model, mesh)
        model.to(torch.promote_types(torch.float32, dtype))
    if sharding is not None:
        assert mesh is not None
        apply_fsdp(model, mesh, sharding)
    device = device or torch.device("cpu")
    if device.type != "meta":
        model.to_empty(device=device)
        if seed is not None:
            init_weights(model, seed)
    return model


def apply_tp_and_cp(model: Transformer, mesh: ParallelMesh) -> None:
    """Applies tensor, sequence and context parallelism to the blocks, the embedding and the output projection, in
    place."""
    tp_group, cp_group = mesh.tp_group, mesh.cp_group
    for layer, block in model.local_blocks():
        if cp_group is not None:
            apply_cp_to_attention(block.attention, model.place, cp_group)
        if tp_group is not None:
            if isinstance(block.attention, LatentAttention):
                apply_tp_to_latent_attention(block.attention, tp_group)
            else:
                copies = max(1, mesh.degrees.tp // model.config.attention_of(layer).kv_heads)
                apply_tp_to_attention(block.attention, tp_group, copies)
            for ffn in (block.ffn, block.moe.shared_experts if block.moe is not None else None):
                if ffn is not None:
                    apply_tp_to_ffn(ffn, tp_group)
    if tp_group is not None:
        for name in ("embedding", "unembedding"):
            table = getattr(model, name)
            if table is not None:
                setattr(model, name, VocabularyParallelEmbedding(table, tp_group, model.compute_dtype))
        if model.unembedding_bias is not None:
            shard_parameter(model, "unembedding_bias", -1, tp_group)
        model.gather_for_logits = partial(_gather_for_logits, group=tp_group)
    for module in model.modules():
        if get_tensor_shards(module) and not isinstance(module, GroupedExperts):  # experts name their own shards
            name_shards_in_state_dict(module)


def _gather_for_logits(x: torch.Tensor, group: torch.distributed.ProcessGroup) -> torch.Tensor:
    """All-gathers the tokens of all tp ranks, as each computes the logits of all tokens for its vocabulary shard."""
    return GatherTokens.apply(x, group)


def kv_copies(config: ModelConfig, degrees: ParallelDegrees) -> int:
    """Returns the number of tensor parallel ranks that hold the same key and value heads: above 1 if there are fewer
    heads than ranks. If blocks differ (`window_overrides.num_kv_heads`), it is that of the blocks with fewer heads; in
    the others each rank has heads of its own, see `validate_degrees`."""
    return max(1, *(degrees.tp // attention.kv_heads for attention, _ in config.attention_counts()))


def split_into_stages(config: ModelConfig, num_stages: int) -> list[StageSpec]:
    """Splits the transformer blocks into stages of equal size, in order; if they do not divide evenly, the first stages
    have one block more. The last stage has all blocks of multi-token prediction, of which each counts as one block."""
    blocks = torch.arange(config.num_blocks).tensor_split(num_stages)
    if len(blocks[-1]) < len(config.mtp_layers):  # it has no others, then
        first = torch.arange(config.num_layers).tensor_split(num_stages - 1)
        blocks = (*first, torch.tensor(config.mtp_layers))
    return [StageSpec(range(int(b[0]), int(b[-1]) + 1), number, num_stages) for number, b in enumerate(blocks)]


def validate_degrees(config: ModelConfig, degrees: ParallelDegrees, stages_per_rank: int) -> None:
    """Raises ValueError, which names both numbers, if a size of the model is not a multiple of the degree that divides
    it."""
    attention, moe = config.attention, config.moe
    tp, etp = degrees.tp, degrees.etp
    divided = [("model.attention.num_heads", attention.num_heads, "parallel.tp", tp)]
    kv_heads = {"model.attention.num_kv_heads": attention.kv_heads}
    if config.window_overrides is not None and config.window_overrides.num_kv_heads is not None:
        kv_heads["model.window_overrides.num_kv_heads"] = config.window_overrides.num_kv_heads
    divided += [(name, heads, "parallel.tp", tp) for name, heads in kv_heads.items() if tp < heads]
    if config.ffn is not None:
        divided.append(("model.ffn.hidden", config.ffn.hidden, "parallel.tp", tp))
    if moe is not None and moe.shared_experts is not None:
        divided.append(("model.moe.shared_experts.hidden", moe.shared_experts.hidden, "parallel.tp", tp))
    if moe is not None:
        divided.append(("model.moe.experts.hidden", moe.experts.hidden, "parallel.etp", etp))
    for name, size, degree, number in divided:
        if size % number:
            raise ValueError(f"{name} ({size}) is not a multiple of {degree} ({number})")
    for name, heads in kv_heads.items():
        if tp > heads and tp % heads:
            raise ValueError(
                f"parallel.tp ({tp}) is not a multiple of {name} ({heads}): each head is held by equally many ranks"
            )
    if len(set(kv_heads.values())) > 1 and all(heads < tp for heads in kv_heads.values()):
        numbers = " and ".join(f"{name} ({heads})" for name, heads in kv_heads.items())
        raise ValueError(f"parallel.tp ({tp}) is larger than both {numbers}: it must be at most the larger of the two")
    if config.vocab_size < tp:
        raise ValueError(f"model.vocab_size ({config.vocab_size}) is smaller than parallel.tp ({tp})")
    stages = degrees.pp * stages_per_rank
    if config.num_layers < stages:
        per_rank = f" * parallel.pipeline.stages_per_rank ({stages_per_rank})" if stages_per_rank > 1 else ""
        raise ValueError(
            f"model.num_layers ({config.num_layers}) is smaller than parallel.pp ({degrees.pp}){per_rank}: each stage "
            "takes a block or more"
        )


def apply_fsdp(model: Transformer, mesh: ParallelMesh, config: ShardedConfig) -> None:
    """Applies FSDP2 in place, to inner modules first: to the experts of each MoE layer over mesh.expert_mesh, to all
    other modules over mesh.dense_mesh.

    Matrices are gathered in the compute dtype; norms and routers, which compute in float32, in float32. Gradients are
    summed in float32 and never averaged: the loss is divided once, by the global token count.
    """
    assert mesh.dense_mesh is not None
    assert mesh.expert_mesh is not None
    # FSDP2 warns of every linear layer with a bias; nothing in this model modifies a module's output in place.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(\w+\) returned a view tensor")
    weight_dtype = torch.promote_types(torch.float32, model.compute_dtype)
    low = MixedPrecisionPolicy(param_dtype=model.compute_dtype, reduce_dtype=weight_dtype, cast_forward_inputs=False)
    full = MixedPrecisionPolicy(cast_forward_inputs=False)  # as stored, in float32 or wider

    def wrap(module: nn.Module | None, device_mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
        if module is not None:
            fully_shard(module, mesh=device_mesh, mp_policy=policy, reshard_after_forward=config.reshard_after_forward)

    for _, block in model.local_blocks():
        if block.moe is not None:
            wrap(block.moe.experts, mesh.expert_mesh, low)
            wrap(block.moe.shared_experts, mesh.dense_mesh, low)
        wrap(block.ffn, mesh.dense_mesh, low)
        for module in block.attention.modules():
            wrap(module if isinstance(module, RMSNorm) else None, mesh.dense_mesh, full)
        wrap(block.attention, mesh.dense_mesh, low)
        if block.mtp is not None:
            wrap(block.mtp.projection, mesh.dense_mesh, low)
        wrap(block, mesh.dense_mesh, full)  # its norms and the router
    wrap(model.final_norm, mesh.dense_mesh, full)
    # The root is not resharded: its tables are needed first in the backward pass.
    fully_shard(model, mesh=mesh.dense_mesh, mp_policy=low, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Sum gradients: FSDP2 divides them by the number of ranks by default.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def init_weights(model: nn.Module, seed: int) -> None:
    """Initialises weights from a normal distribution with standard deviation `init_std`, balance biases with 0.

    Matrices that write to the residual stream use init_std / sqrt(2 * num_layers) (GPT-2, Megatron-LM).
    """
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
