"""Builds a Transformer on a mesh: experts divided over ep, weights replicated or sharded over the data ranks."""

import math

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from expert_parallel.mesh import ParallelMesh
from expert_parallel.model.transformer import Block, ModelConfig, Recompute, Transformer
from expert_parallel.moe.parameters import init_parameters
from expert_parallel.moe.routing import TopKRouter


def build_model(
    config: ModelConfig,
    mesh: ParallelMesh | None = None,
    *,
    sharded: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    recompute: Recompute = "none",
    seed: int = 0,
) -> Transformer:
    """A model with initial weights that depend on `seed` alone. mesh None: the whole model on this rank.

    device: `meta` gives shapes alone. dtype: compute dtype; weights are kept in promote_types(float32, dtype).
    sharded: FSDP2 over mesh.dp_mesh, and over mesh.edp_mesh for experts; built without ever holding the whole model.
    """
    ep_group, dp_group, nodes = (None, None, None) if mesh is None else (mesh.ep_group, mesh.dp_group, mesh.nodes)
    with torch.device("meta"):
        model = Transformer(config, dtype, ep_group, dp_group, recompute, nodes)
        model.to(torch.promote_types(torch.float32, dtype))
    if sharded:
        assert mesh is not None
        shard(model, mesh)
    device = device or torch.device("cpu")
    if device.type != "meta":
        model.to_empty(device=device)
        init_weights(model, seed)
    return model


def shard(model: Transformer, mesh: ParallelMesh) -> None:
    """FSDP2, innermost first: each MoE layer's experts over edp, then each block and the rest over dp.

    Every reduction is a sum: the loss is divided once, by the global token count.
    """
    for block in model.blocks:
        assert isinstance(block, Block)
        if block.moe is not None:
            fully_shard(block.moe.experts, mesh=mesh.edp_mesh)
        fully_shard(block, mesh=mesh.dp_mesh)
    fully_shard(model, mesh=mesh.dp_mesh)
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
