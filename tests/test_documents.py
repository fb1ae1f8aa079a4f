"""Rows packed with documents that are kept apart: each is what it is in a row to itself. Logits, gradients and balance
losses, on one rank and where ranks divide rows, heads and experts."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from expert_parallel.data.batch import MicroBatch, make_micro_batch, shard_bounds
from expert_parallel.data.config import TokensData
from expert_parallel.data.indexed import write_index
from expert_parallel.data.open import DataRequirements, RunData, open_data
from expert_parallel.data.sampler import concatenate
from expert_parallel.model.attention_mask import AttentionContext
from expert_parallel.model.parallelize import build_model
from expert_parallel.model.transformer import ModelConfig, Transformer
from expert_parallel.moe.context import StepContext
from expert_parallel.moe.parameters import logical_parameters
from expert_parallel.parallel.sequence import SequenceShard
from expert_parallel.training.config import TrainingConfig
from expert_parallel.training.engines.native import NativeEngine
from expert_parallel.training.optim import build_optimizer
from expert_parallel.training.step import train_step
from tests.layouts import build_on
from tests.ranks import run_ranks

SEED, WORDS, LENGTH = 1, 11, 8
DOCUMENTS = [[3, 4, 1], [8], [2, 6]]  # lengths, by row; one is as long as its row
NUM_DOCUMENTS = sum(map(len, DOCUMENTS))

HEADS: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2, "head_size": 4}
MODEL: dict[str, Any] = {
    "vocab_size": WORDS,
    "num_layers": 2,
    "d_model": 8,
    "attention": HEADS,
    "moe": {
        "num_experts": 4,
        "router": {"k": 2},
        "losses": [{"kind": "balance", "scope": "sequence", "coefficient": 0.5}],
        "experts": {"hidden": 6},
    },
    "init_std": 0.4,
}
POOLED = {**MODEL["moe"], "losses": [{**MODEL["moe"]["losses"][0], "layers": "pooled"}]}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "learned positions, chunks": {
        "position": {"kind": "learned", "max_length": LENGTH},
        "attention": {**HEADS, "chunk": 2},
    },
    "norm of all heads, window, scaled queries": {
        "attention": {**HEADS, "qk_norm": {"kind": "whole"}, "window": 3, "length_scaling": {"beta": 0.5, "length": 2}}
    },
    "sinks, window of one block, LongRoPE": {
        "position": {
            "kind": "rope",
            "scaling": {
                "kind": "longrope",
                "original_length": 3,  # some documents are longer, others not
                "short_factors": [1.0, 1.2],
                "long_factors": [3.0, 2.0],
                "long_attention_factor": 1.5,
            },
        },
        "attention": {**HEADS, "sinks": True, "window": 2},
        "window_blocks": {"kind": "list", "indices": [1]},
    },
    "losses pooled over layers": {"moe": POOLED},
}


def packed() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, targets and documents, (3, LENGTH) each."""
    generator = torch.Generator().manual_seed(2)
    tokens, targets = (torch.randint(0, WORDS, (len(DOCUMENTS), LENGTH), generator=generator) for _ in range(2))
    numbers = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in DOCUMENTS]
    return tokens, targets, torch.stack(numbers)


def alone(model: Transformer) -> tuple[list[list[Tensor]], dict[str, Tensor], dict[int, float]]:
    """Each document in a row of its own, one after the other: logits by row; gradients, summed as of one batch; balance
    losses by block, means over documents, times the coefficient."""
    tokens, targets, _ = packed()
    logits, balance = [], dict.fromkeys(model.config.moe_layers, 0.0)
    for row, lengths in enumerate(DOCUMENTS):
        logits.append([])
        for words, wanted in zip(tokens[row].split(lengths), targets[row].split(lengths), strict=True):
            output = model(words[None], StepContext())
            logits[-1].append(output.logits.detach()[0])
            entropy = F.cross_entropy(output.logits[0], wanted, reduction="sum") / tokens.numel()
            losses = {layer: sum(found.values()) / NUM_DOCUMENTS for layer, found in output.losses.items()}
            (entropy + sum(losses.values())).backward()
            for layer, loss in losses.items():
                balance[layer] += float(loss.detach())
    return logits, gradients(model), balance


def gradients(model: Any) -> dict[str, Tensor]:
    """Whole, by logical name. Collectives where they are divided."""
    found: dict[str, Tensor] = {}
    for logical in logical_parameters(model):
        assert logical.parameter.grad is not None
        found |= logical.whole(logical.parameter.grad.clone())
    return found


def close(actual: Any, expected: Any, name: str = "") -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("name", MODELS)
def test_packed_documents_are_what_they_are_alone(name: str) -> None:
    config = ModelConfig.model_validate({**MODEL, **MODELS[name]})
    model = build_model(config, dtype=torch.float64, seed=SEED)
    expected, expected_grads, expected_balance = alone(model)
    model.zero_grad()

    tokens, targets, documents = packed()
    context = StepContext(document_BS=documents, documents_per_row=3)
    output = model(tokens, context)
    for row, lengths in enumerate(DOCUMENTS):
        for number, part in enumerate(output.logits[row].split(lengths)):
            close(part.detach(), expected[row][number], f"row {row}, document {number}")
    balance = {layer: sum(losses.values()) for layer, losses in output.losses.items()}
    entropy = F.cross_entropy(output.logits.flatten(0, 1), targets.flatten())
    (entropy + sum(balance.values())).backward()  # type: ignore[operator]
    assert {layer: float(torch.as_tensor(loss).detach()) for layer, loss in balance.items()} == pytest.approx(
        expected_balance, rel=1e-11
    )
    for parameter, grad in gradients(model).items():
        close(grad, expected_grads[parameter], parameter)

    joined = model(tokens, StepContext()).logits
    if "LongRoPE" not in name:  # whose positions depend on the length of the text
        close(joined[0, :3].detach(), expected[0][0])  # the first of a row sees nothing before it, either way
    assert not torch.allclose(joined[0, 3:7], expected[0][1])


def step_on_ranks(rank: int, layout: dict[str, Any], changes: dict[str, Any]) -> tuple[float, dict[int, float], Any]:
    """Cross entropy, balance losses and whole gradients of a step of training."""
    mesh, model = build_on(layout, {**MODEL, **changes}, SEED)
    training = TrainingConfig.model_validate(
        {
            "steps": 2,
            "global_batch": len(DOCUMENTS),
            "sequence_length": LENGTH,
            "dtype": "float64",
            "clip_norm": None,
            "recompute": layout.get("recompute", "none"),
        }
    )
    tokens, targets, documents = packed()
    first, count = shard_bounds(len(tokens), mesh.degrees.dp, mesh.dp_rank)
    mine = slice(first, first + count)
    batch = MicroBatch(tokens[mine], targets[mine], torch.arange(first, first + count), documents[mine])
    optimizer, found = build_optimizer(training.optimizer, model), {}
    optimizer.register_step_pre_hook(lambda *_: found.update(gradients(model)))
    engine = NativeEngine(model, optimizer, mesh, training.clip_norm)
    report = train_step(model, engine, [batch], training, mesh, step=0, seed=0)
    return report.loss, {layer: sum(totals.losses.values()) for layer, totals in report.layers.items()}, found


@pytest.mark.parametrize(
    "layout",
    [
        {"world": 2, "tp": 2},
        {"world": 2, "cp": 2, "ep": 2, "recompute": "block"},
        {"world": 2, "ep": 2},  # 2 rows and 1
        {"world": 4, "cp": 2, "tp": 2, "ep": 4},
    ],
    ids=lambda layout: "-".join(f"{name}{degree}" for name, degree in layout.items()),
)
@pytest.mark.parametrize("name", MODELS)
def test_packed_documents_are_what_they_are_alone_in_every_layout(name: str, layout: dict[str, Any]) -> None:
    model = build_model(ModelConfig.model_validate({**MODEL, **MODELS[name]}), dtype=torch.float64, seed=SEED)
    logits, expected_grads, expected_balance = alone(model)
    _, targets, _ = packed()
    wanted = [row.split(lengths) for row, lengths in zip(targets, DOCUMENTS, strict=True)]
    pairs = [(x, y) for row, words in zip(logits, wanted, strict=True) for x, y in zip(row, words, strict=True)]
    entropy = sum(float(F.cross_entropy(x, y, reduction="sum")) for x, y in pairs) / targets.numel()
    seen = set()
    for loss, balance, grads in run_ranks(layout["world"], step_on_ranks, layout, MODELS[name]):
        assert loss == pytest.approx(entropy, rel=1e-11)
        assert {layer: 0.5 * value for layer, value in balance.items()} == pytest.approx(expected_balance, rel=1e-11)
        for parameter, grad in grads.items():
            close(grad, expected_grads[parameter], parameter)
        seen |= grads.keys()
    assert seen == expected_grads.keys()


def test_a_corpus_without_end_tokens_has_the_loss_of_its_documents_alone(tmp_path: Path) -> None:
    """Only the index says where documents begin. Windows begin and end within documents; 17 of the 41 tokens are held
    out, from the middle of the fifth document on."""
    lengths, generator = [5, 1, 9, 2, 14, 3, 7], np.random.default_rng(3)
    tokens = generator.integers(0, WORDS, sum(lengths)).astype(np.uint8)
    tokens.tofile(tmp_path / "c.bin")
    write_index(tmp_path / "c.idx", np.uint8, np.array(lengths, np.int32))
    owner = np.repeat(np.arange(len(lengths)), lengths)
    settings = {"kind": "tokens", "corpora": [{"path": str(tmp_path / "c")}], "held_out": 0.4}
    requirements = DataRequirements(
        sequence_length=LENGTH, vocab_size=WORDS, held_out_sequences=2, num_samples=9, seed=0
    )
    model = build_model(ModelConfig.model_validate(MODEL), dtype=torch.float64, seed=SEED).eval()
    separate = open_data(TokensData.model_validate({**settings, "documents": "separate"}), requirements)
    joined = open_data(TokensData.model_validate(settings), requirements)

    def loss(data: RunData) -> Tensor:
        batch = make_micro_batch(concatenate([data.sampler.sequences(0, 2), data.held_out]), 0)
        logits = model(batch.inputs_BS, StepContext(document_BS=batch.documents_BS, documents_per_row=8)).logits
        return F.cross_entropy(logits.flatten(0, 1), batch.targets_BS.flatten(), reduction="sum").detach()

    stream, alone = torch.from_numpy(tokens).long(), torch.zeros((), dtype=torch.float64)
    for begin in (0, 8, 24, 32):
        for number in range(len(lengths)):
            places = [place for place in range(begin, begin + LENGTH) if owner[place] == number]
            if places:
                logits = model(stream[places][None], StepContext()).logits.detach()[0]
                alone += F.cross_entropy(logits, stream[[place + 1 for place in places]], reduction="sum")
    close(loss(separate), alone)
    assert abs(float(loss(joined) - alone)) > 1e-3


def test_documents_by_hand() -> None:
    """Positions begin anew, and so does what is seen; windows look no further than the document; chunks count from its
    beginning."""
    documents = torch.tensor([[0, 0, 0, 1, 1, 2]])
    attention_context = AttentionContext.of(SequenceShard(), 6, torch.device("cpu"), documents)
    assert attention_context.position_BS.tolist() == [[0, 1, 2, 0, 1, 0]]
    seen = attention_context.mask()
    assert seen is not None
    assert [row.nonzero().flatten().tolist() for row in seen[0, 0]] == [[0], [0, 1], [0, 1, 2], [3], [3, 4], [5]]
    seen = attention_context.mask(2)
    assert seen is not None
    assert [row.nonzero().flatten().tolist() for row in seen[0, 0]] == [[0], [0, 1], [1, 2], [3], [3, 4], [5]]
    seen = attention_context.mask(chunk=2)
    assert seen is not None
    assert [row.nonzero().flatten().tolist() for row in seen[0, 0]] == [[0], [0, 1], [2], [3], [3, 4], [5]]
    divided = AttentionContext.of(
        SequenceShard(cp=3, cp_rank=1), 6, torch.device("cpu"), documents
    )  # has positions 1 and 4
    assert divided.position_BS.tolist() == [[1, 1]]
    seen = divided.mask()
    assert seen is not None
    assert [row.nonzero().flatten().tolist() for row in seen[0, 0]] == [[0, 1], [3, 4]]
