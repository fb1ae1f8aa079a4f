"""The whole model on real ranks against transformers' MixtralForCausalLM on one: its weights, given to ours by logical
name, lead to the same logits, cross entropy, balance loss, choices and gradients, in float64 and float32.
"""

from datetime import timedelta
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from expert_parallel.data.batch import MicroBatch, shard_bounds
from expert_parallel.model.parallelize import build_model
from expert_parallel.model.tensor_parallel import gather_logits
from expert_parallel.model.transformer import ModelConfig, Transformer
from expert_parallel.moe.parameters import logical_parameters
from expert_parallel.parallel.mesh import ParallelDegrees, ParallelMesh, build_mesh
from expert_parallel.training.config import DTYPES, TrainingConfig
from expert_parallel.training.engines.native import NativeEngine
from expert_parallel.training.optim import build_optimizer
from expert_parallel.training.step import train_step
from tests.peers import peers_in_float64
from tests.ranks import run_ranks

NUM_LAYERS, NUM_EXPERTS, TOP_K = 3, 4, 2
NUM_SEQUENCES, LENGTH = 6, 8  # on 4 data ranks 2, 2, 1 and 1 sequences

MIXTRAL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "num_local_experts": NUM_EXPERTS,
    "num_experts_per_tok": TOP_K,
    "rms_norm_eps": 1e-3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    "tie_word_embeddings": False,
}
MOE = {"num_experts": NUM_EXPERTS, "router": {"k": TOP_K}, "experts": {"hidden": 12}}
OURS = {
    "vocab_size": 32,
    "num_layers": NUM_LAYERS,
    "d_model": 16,
    "attention": {"num_heads": 4, "num_kv_heads": 2, "head_size": 6},
    "norm": {"eps": 1e-3},
    "position": {"kind": "rope", "theta": 500.0},
    "tied_embeddings": False,
}

LAYOUTS = [  # the world size, and the degrees of parallelism
    {"world": 1, "ep": 1},
    {"world": 2, "ep": 2},
    {"world": 4, "ep": 4},
    {"world": 4, "ep": 2},
    {"world": 2, "tp": 2, "ep": 2},
    {"world": 4, "tp": 2, "ep": 4},
    {"world": 2, "cp": 2, "ep": 1},
    {"world": 2, "ep": 1, "etp": 2},
]
TOLERANCE = {"float64": 1e-10, "float32": 1e-5}  # of the largest number of a tensor


def logical_tensors(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Mixtral's weights, or their gradients, under our logical names.

    transformers stacks the experts, as (E, out, in) and with [gate | up] in one; ours are each (in, out), [gate | up].
    """
    ours = {
        "embedding.weight": theirs["model.embed_tokens.weight"],
        "final_norm.weight": theirs["model.norm.weight"],
        "unembedding.weight": theirs["lm_head.weight"],
    }
    for layer in range(NUM_LAYERS):
        here, there = f"blocks.{layer}", f"model.layers.{layer}"
        ours |= {
            f"{here}.attention_norm.weight": theirs[f"{there}.input_layernorm.weight"],
            f"{here}.attention.query.weight": theirs[f"{there}.self_attn.q_proj.weight"],
            f"{here}.attention.key.weight": theirs[f"{there}.self_attn.k_proj.weight"],
            f"{here}.attention.value.weight": theirs[f"{there}.self_attn.v_proj.weight"],
            f"{here}.attention.out.weight": theirs[f"{there}.self_attn.o_proj.weight"],
            f"{here}.ffn_norm.weight": theirs[f"{there}.post_attention_layernorm.weight"],
            f"{here}.moe.router.weight": theirs[f"{there}.mlp.gate.weight"],
        }
        for expert in range(NUM_EXPERTS):
            ours[f"{here}.moe.experts.{expert}.w_in"] = theirs[f"{there}.mlp.experts.gate_up_proj"][expert].mT
            ours[f"{here}.moe.experts.{expert}.w_out"] = theirs[f"{there}.mlp.experts.down_proj"][expert].mT
    assert sum(tensor.numel() for tensor in ours.values()) == sum(tensor.numel() for tensor in theirs.values())
    return ours


def random_tokens() -> tuple[Tensor, Tensor]:
    """Inputs and targets of all sequences, each (B, S): a position's target is the next one's token."""
    tokens = torch.randint(0, 32, (NUM_SEQUENCES, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


@cache
def mixtral(dtype: str, coefficient: float) -> dict[str, Any]:
    """transformers' model with random weights: forward and backward over all sequences at once."""
    if dtype == "float32":
        return run_mixtral(torch.float32, coefficient)
    with peers_in_float64():
        return run_mixtral(torch.float64, coefficient)


def run_mixtral(dtype: torch.dtype, coefficient: float) -> dict[str, Any]:
    from transformers import MixtralConfig, MixtralForCausalLM  # here, so that the ranks need not import it

    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    auxiliary = {"output_router_logits": True, "router_aux_loss_coef": coefficient}
    model = MixtralForCausalLM(MixtralConfig(**MIXTRAL, **auxiliary, **eager)).to(dtype)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():  # norms around 1, matrices around 0
        drawn = torch.empty(parameter.shape, dtype=torch.float64).normal_(0.0, 0.3, generator=generator)
        parameter.data = (drawn + float(parameter.dim() == 1)).to(dtype)

    inputs_BS, targets_BS = random_tokens()
    output = model(inputs_BS, labels=targets_BS, shift_labels=targets_BS)
    output.loss.backward()

    # L layers. No near tie between the last expert chosen and the next, which rounding could turn round.
    sorted_LTE, experts_LTE = torch.stack(output.router_logits).detach().sort(-1, descending=True)
    gap_LT = sorted_LTE[..., TOP_K - 1] - sorted_LTE[..., TOP_K]
    assert bool((gap_LT > 1e-4).all())
    chosen = [chosen_TK.flatten().bincount(minlength=NUM_EXPERTS).tolist() for chosen_TK in experts_LTE[..., :TOP_K]]
    return {
        "weights": logical_tensors({name: parameter.detach() for name, parameter in model.named_parameters()}),
        "logits": output.logits.detach(),
        "cross_entropy": (output.loss - coefficient * output.aux_loss).item(),
        "balance_loss": output.aux_loss.item(),
        "chosen": chosen,
        "grads": logical_tensors({name: parameter.grad for name, parameter in model.named_parameters()}),
    }


# ------------------------------------------------------------------------------------------------------- on real ranks

cached_mesh = cache(build_mesh)


def mesh_of(layout: dict[str, int]) -> ParallelMesh:
    degrees = {axis: degree for axis, degree in layout.items() if axis != "world"}
    return cached_mesh(ParallelDegrees(layout["world"], **degrees), "cpu", timedelta(seconds=120))


def model_of(layout: dict[str, int], dtype: str, coefficient: float, weights: dict[str, Tensor]) -> Transformer:
    """Ours on this rank, with these weights. transformers' balance loss is pooled over layers and not divided by k."""
    tree = {**OURS, "moe": {**MOE, "losses": []}}
    if coefficient:
        tree["moe"]["losses"] = [{"kind": "balance", "layers": "pooled", "coefficient": coefficient * TOP_K}]
    model = build_model(ModelConfig.model_validate(tree), mesh_of(layout), dtype=DTYPES[dtype])
    for logical in logical_parameters(model):
        logical.fill(logical.parameter, [weights[name] for name in logical.names])
    return model


def full_gradients(model: Transformer) -> dict[str, Tensor]:
    """By logical name: those of the dense parameters, and of the experts of this rank."""
    grads: dict[str, Tensor] = {}
    for logical in logical_parameters(model):
        assert logical.parameter.grad is not None
        grads.update(logical.whole(logical.parameter.grad.clone()))
    return grads


def train(rank: int, layout: dict[str, int], dtype: str, coefficient: float, weights: dict[str, Tensor]) -> Any:
    """One training step: the logits of this rank's sequences and positions, what is reported, and the gradients of the
    whole step."""
    mesh, model = mesh_of(layout), model_of(layout, dtype, coefficient, weights)
    config = TrainingConfig(steps=1, global_batch=NUM_SEQUENCES, sequence_length=LENGTH, dtype=dtype, clip_norm=None)
    optimizer = build_optimizer(config.optimizer, model)
    logits: list[Tensor] = []
    grads: dict[str, Tensor] = {}
    model.register_forward_hook(lambda _model, _inputs, output: logits.append(output.logits.detach()))
    optimizer.register_step_pre_hook(lambda *_: grads.update(full_gradients(model)))

    first, count = shard_bounds(NUM_SEQUENCES, mesh.degrees.dp, mesh.dp_rank)
    mine = slice(first, first + count)
    inputs_BS, targets_BS = random_tokens()
    batch = MicroBatch(inputs_BS[mine], targets_BS[mine], torch.arange(first, first + count))
    engine = NativeEngine(model, optimizer, mesh, config.clip_norm)
    report = train_step(model, engine, [batch], config, mesh, step=0, seed=0)
    layers = report.layers.values()
    return {
        "sequences": range(first, first + count),
        "positions_S": model.place.context(LENGTH),
        "logits": gather_logits(logits[0], mesh.tp_group, model.config.vocab_size),
        "cross_entropy": report.loss,
        "balance_loss": sum(loss for layer in layers for loss in layer.losses.values()),
        "kept": [layer.kept_E.tolist() for layer in layers],
        "grads": grads,
    }


def close(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """No number is further off than `tolerance` times the largest of the tensor, which is not near 0."""
    largest = float(expected.abs().max())
    assert largest > 1e-4, f"{what}: nothing to compare"
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * largest, msg=lambda text: f"{what}: {text}")


@pytest.mark.parametrize("coefficient", [0.0, 0.5], ids=["no auxiliary loss", "auxiliary loss"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "layout", LAYOUTS, ids=lambda layout: "-".join(f"{axis}{degree}" for axis, degree in layout.items())
)
def test_every_layout_is_mixtral(layout: dict[str, int], dtype: str, coefficient: float) -> None:
    expected, tolerance = mixtral(dtype, coefficient), TOLERANCE[dtype]
    names, seen_BS = set(), torch.zeros(NUM_SEQUENCES, LENGTH)
    for result in run_ranks(layout["world"], train, layout, dtype, coefficient, expected["weights"]):
        where = torch.tensor(result["sequences"])[:, None], result["positions_S"]
        close(result["logits"], expected["logits"][where], tolerance, "logits")
        assert result["cross_entropy"] == pytest.approx(expected["cross_entropy"], rel=tolerance)
        assert result["kept"] == expected["chosen"], "no choice is dropped"
        if coefficient:
            assert TOP_K * result["balance_loss"] == pytest.approx(expected["balance_loss"], rel=tolerance)
        for name, grad in result["grads"].items():
            close(grad, expected["grads"][name], tolerance, name)
        names |= result["grads"].keys()
        seen_BS[where] = 1
    assert names == expected["grads"].keys()
    assert bool(seen_BS.all())
