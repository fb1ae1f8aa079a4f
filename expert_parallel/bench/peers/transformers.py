"""Wraps Hugging Face transformers: Mixtral's MoE block, with a loop over experts or torch's grouped product, and a
whole Mixtral model."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from expert_parallel.bench.peers.decoder import TrainableModel, fixed_seed
from expert_parallel.bench.peers.implementation import Case, Implementation, NotMeasured, installed_version
from expert_parallel.bench.shapes import TrainShape

PACKAGE = "transformers"


class MixtralBlock(Implementation):
    """Runs Mixtral's block."""

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.module(x_TD[None])[0]  # transformers' layout is (B, S, D)


def build_mixtral(case: Case, kind: str) -> Implementation:
    """Builds Mixtral's block with the case's weights. kind: its `experts_implementation`."""
    version = installed_version(PACKAGE)
    case.require_one_rank()
    if case.activation != "swiglu":
        raise NotMeasured("its experts are SwiGLU")
    if case.shape.k == 1:
        raise NotMeasured("with top-1 its weights are always 1, which is not what is compared")
    from transformers.models.mixtral.configuration_mixtral import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    shape, weights = case.shape, case.weights
    config = MixtralConfig(
        hidden_size=shape.d_model,
        intermediate_size=shape.hidden,
        num_local_experts=shape.num_experts,
        num_experts_per_tok=shape.k,
    )
    config._experts_implementation = kind  # private: a whole model sets it from its config
    with torch.device(case.device):
        block = MixtralSparseMoeBlock(config).to(case.dtype)
    with torch.no_grad():
        block.gate.weight.copy_(weights.router_ED)
        block.experts.gate_up_proj.copy_(weights.w_in_eDF.transpose(1, 2))
        block.experts.down_proj.copy_(weights.w_out_eFD.transpose(1, 2))
    return MixtralBlock(block, "dropless, swiglu", version)


build_eager = partial(build_mixtral, kind="eager")
build_grouped_mm = partial(build_mixtral, kind="grouped_mm")


def build_model(shape: TrainShape, case: Case) -> TrainableModel:
    """Builds a MixtralForCausalLM with all experts on every rank, so data parallel only."""
    version = installed_version(PACKAGE)
    if case.activation != "swiglu":
        raise NotMeasured("its experts are SwiGLU")
    from transformers.models.mixtral.configuration_mixtral import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralForCausalLM

    layer = shape.layer
    config = MixtralConfig(
        vocab_size=shape.vocab_size,
        hidden_size=layer.d_model,
        intermediate_size=layer.hidden,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_heads,
        head_dim=shape.head_size,
        num_local_experts=layer.num_experts,
        num_experts_per_tok=layer.k,
        max_position_embeddings=shape.sequence_length,
        tie_word_embeddings=True,
        use_cache=False,
    )
    config._attn_implementation, config._experts_implementation = "sdpa", "grouped_mm"
    with fixed_seed(), torch.device(case.device):
        model: Any = MixtralForCausalLM(config)
    model.to(case.dtype)
    parameters = list(model.parameters())
    computes = f"MixtralForCausalLM{', data parallel' if case.ranks > 1 else ''}, dropless, swiglu"
    return TrainableModel(
        model, lambda inputs_BS: model(input_ids=inputs_BS).logits, parameters, case, computes, version
    )
