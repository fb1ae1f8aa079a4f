"""Generation: the same text on every layout, alone or in a batch, with the cache or without; how tokens are drawn."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from expert_parallel.model.generation import Sampling, draw, generate
from expert_parallel.model.parallelize import build_model
from expert_parallel.model.transformer import ModelConfig
from tests.layouts import build_on
from tests.ranks import run_ranks

PROMPTS = [[5, 9, 3, 3, 7, 1, 20, 30, 2], [4], [11, 12, 13, 14], [40, 1, 1], [8, 8]]
WINDOW, NUM_TOKENS = 12, 9  # the first prompt fills the window on the way


def model_tree(**changes: Any) -> dict[str, Any]:
    """Of a sharp model: the likeliest token leads by more than rounding. Its capacity is tight in evaluation."""
    moe = {
        "num_experts": 4,
        "router": {"k": 2},
        "capacity": {"kind": "factor", "eval": 0.6, "minimum": 0, "scope": "global"},
        "experts": {"hidden": 8},
        **changes.pop("moe", {}),
    }
    return {
        "vocab_size": 41,
        "num_layers": 2,
        "d_model": 16,
        "attention": {"num_heads": 4, "num_kv_heads": 2, "head_size": 8},
        "moe": moe,
        "init_std": 0.5,
        **changes,
    }


def greedy_by_hand(tree: dict[str, Any], prompt: list[int]) -> list[int]:
    """One sequence alone on one rank, without a cache and without capacity: the whole window for each token."""
    from expert_parallel.moe.context import StepContext

    model = build_model(ModelConfig.model_validate(tree), dtype=torch.float64, seed=3).eval()
    tokens, start = list(prompt), 0
    for _ in range(NUM_TOKENS):
        if len(tokens) - start > WINDOW:
            start = len(tokens) - WINDOW // 2
        logits = model(torch.tensor([tokens[start:]]), StepContext(dropless=True)).logits[0, -1]
        best, second = logits.topk(2).values
        assert best - second > 1e-6
        tokens.append(int(logits.argmax()))
    return tokens


@cache
def texts_by_hand() -> list[list[int]]:
    """What every layout must write for PROMPTS."""
    return [greedy_by_hand(model_tree(), prompt) for prompt in PROMPTS]


def generate_on(
    rank: int, layout: dict[str, Any], tree: dict[str, Any], prompts: list[list[int]], **settings: Any
) -> list[list[int]]:
    mesh, model = build_on(layout, tree, seed=3)
    return generate(model, prompts, num_tokens=NUM_TOKENS, window=WINDOW, mesh=mesh, **settings)


def on_ranks(
    layout: dict[str, Any], tree: dict[str, Any], prompts: list[list[int]], **settings: Any
) -> list[list[int]]:
    results = run_ranks(layout["world"], call, layout, tree, prompts, settings)
    assert all(result == results[0] for result in results), "all ranks return the same"
    found: list[list[int]] = results[0]
    return found


def call(rank: int, layout: dict[str, Any], tree: dict[str, Any], prompts: Any, settings: dict[str, Any]) -> Any:
    return generate_on(rank, layout, tree, prompts, **settings)


LAYOUTS = [
    {"world": 1},
    {"world": 2, "ep": 2},
    {"world": 2, "tp": 2, "ep": 2},
    {"world": 4, "tp": 2, "ep": 2},
    {"world": 4, "tp": 4, "ep": 2, "etp": 2},
    {"world": 4, "pp": 2, "ep": 2},
    {"world": 2, "cp": 2},
    {"world": 4, "ep": 2, "data": "sharded"},
]


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_writes_what_one_rank_writes_alone(layout: dict[str, Any], use_cache: bool) -> None:
    """Five prompts of unlike lengths; on 4 data ranks one rank has two of them."""
    expected = texts_by_hand()
    assert len({tuple(text[-4:]) for text in expected}) > 1, "a model that says different things"
    assert on_ranks(layout, model_tree(), PROMPTS, use_cache=use_cache) == expected


def in_float32(rank: int, layout: dict[str, Any], use_cache: bool) -> list[list[int]]:
    mesh, model = build_on(layout, model_tree(), seed=3, dtype=torch.float32)
    return generate(model, PROMPTS, num_tokens=NUM_TOKENS, window=WINDOW, mesh=mesh, use_cache=use_cache)


@pytest.mark.parametrize("use_cache", [True, False])
def test_float32_writes_the_same(use_cache: bool) -> None:
    expected = texts_by_hand()
    assert run_ranks(4, in_float32, {"world": 4, "tp": 2, "ep": 4}, use_cache) == [expected] * 4


def test_logits_that_are_no_numbers_are_refused() -> None:
    model = build_model(ModelConfig.model_validate(model_tree()), seed=3)
    model.embedding.weight.data[7] = torch.nan
    with pytest.raises(ValueError, match="logits are not finite"):
        generate(model, [[7]], num_tokens=2, window=16, sampling=Sampling(temperature=1.0))


@pytest.mark.parametrize("use_cache", [True, False])
def test_fewer_sequences_than_data_ranks(use_cache: bool) -> None:
    expected = [greedy_by_hand(model_tree(), PROMPTS[0])]
    assert on_ranks({"world": 4, "ep": 4}, model_tree(), PROMPTS[:1], use_cache=use_cache) == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"position": {"kind": "learned", "max_length": WINDOW}},
        {
            "position": {
                "kind": "rope",
                "scaling": {  # each text becomes longer than 6 tokens, at another step than the others
                    "kind": "longrope",
                    "original_length": 6,
                    "short_factors": [1.0, 1.1, 1.2, 1.3],
                    "long_factors": [4.0, 3.0, 2.0, 5.0],
                    "short_attention_factor": 1.4,
                    "long_attention_factor": 0.7,
                },
            }
        },
        {"norm_placement": "post", "norm": {"kind": "layer_norm"}},
        {"moe": {"router": {"kind": "hash", "k": 1}}},
        {"moe": {"router": {"kind": "gshard"}}},
        {"moe": {"capacity": {"kind": "dropless", "receive_bound": 1.0}}},
        {"moe": {"router": {"kind": "expert_choice", "accept_future_tokens": True}, "capacity": {"kind": "dropless"}}},
    ],
    ids=str,
)
def test_the_cache_changes_nothing(changes: dict[str, Any]) -> None:
    """Nor do other settings of the model. Expert choice looks across tokens: one text is all that can be compared."""
    looks_across = "expert_choice" in str(changes)
    prompts = PROMPTS[:1] if looks_across else PROMPTS
    tree = model_tree(**changes)
    model = build_model(ModelConfig.model_validate(tree), dtype=torch.float64, seed=3)
    settings = {"num_tokens": NUM_TOKENS, "window": WINDOW}
    texts = [generate(model, prompts, use_cache=use_cache, **settings) for use_cache in (True, False)]  # type: ignore[arg-type]
    assert texts[0] == texts[1]
    if not looks_across:
        assert texts[0] == [greedy_by_hand(tree, prompt) for prompt in prompts]


def test_the_cache_runs_each_token_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes get the prompt once, then a token each; after the window is full, the newer half once more."""
    model = build_model(ModelConfig.model_validate(model_tree()), dtype=torch.float64, seed=3)
    lengths: list[int] = []
    model.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    generate(model, [PROMPTS[0]], num_tokens=8, window=WINDOW)
    assert lengths == [9, 1, 1, 1, WINDOW // 2, 1, 1, 1]


def test_a_draw_depends_on_the_sequence_and_not_on_the_batch() -> None:
    sampling = Sampling(temperature=1.0)
    together = on_ranks({"world": 2, "ep": 2}, model_tree(), [[3, 4]] * 3, sampling=sampling, seed=5)
    assert len({tuple(text) for text in together}) == 3, "equal prompts go different ways"
    alone = on_ranks({"world": 1}, model_tree(), [[3, 4]], sampling=sampling, seed=5)
    assert alone == together[:1]


def test_a_sequence_ends_with_any_end_token() -> None:
    free = on_ranks({"world": 1}, model_tree(), PROMPTS)
    end_ids = [free[0][len(PROMPTS[0]) + 2], free[1][len(PROMPTS[1]) + 3]]
    ended = on_ranks({"world": 1}, model_tree(), PROMPTS, end_ids=end_ids)
    for prompt, text, whole in zip(PROMPTS, ended, free, strict=True):
        new = whole[len(prompt) :]
        length = next((place for place, token in enumerate(new, 1) if token in end_ids), len(new))
        assert text == prompt + new[:length]
    assert len(ended[0]) <= len(PROMPTS[0]) + 3
    assert len(ended[1]) <= len(PROMPTS[1]) + 4


# --------------------------------------------------------------------------------------------------------------- draws


def shares(logits: Tensor, sampling: Sampling) -> list[float]:
    drawn = torch.stack([draw(logits, sampling, 1, index) for index in range(2000)])
    return [float(share) for share in torch.bincount(drawn, minlength=len(logits)) / len(drawn)]


def test_draws_by_hand() -> None:
    """Probabilities 0.1, 0.2, 0.3, 0.4; kept and renormalised as top_k and top_p say."""
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log()
    assert int(draw(logits, Sampling(), 0, 0)) == 3
    assert shares(logits, Sampling(temperature=1.0)) == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.04)
    assert shares(logits, Sampling(temperature=1.0, top_k=2)) == pytest.approx([0, 0, 3 / 7, 4 / 7], abs=0.04)
    assert shares(logits, Sampling(temperature=1.0, top_p=0.69)) == pytest.approx([0, 0, 3 / 7, 4 / 7], abs=0.04)
    assert shares(logits, Sampling(temperature=1.0, top_p=0.71)) == pytest.approx([0, 2 / 9, 3 / 9, 4 / 9], abs=0.04)
    assert shares(logits, Sampling(temperature=1.0, top_p=1e-9)) == [0, 0, 0, 1]
    squares = [share / 0.30 for share in (0.01, 0.04, 0.09, 0.16)]
    assert shares(logits, Sampling(temperature=0.5)) == pytest.approx(squares, abs=0.04)


@pytest.mark.parametrize(("temperature", "expected"), [(1e-320, {2}), (1e308, {0, 1, 2})])
def test_no_temperature_is_too_small_or_large(temperature: float, expected: set[int]) -> None:
    logits, sampling = torch.tensor([-5.0, 1.0, 7.0]), Sampling(temperature=temperature)
    assert {int(draw(logits, sampling, 1, index)) for index in range(50)} == expected


def test_draws_are_those_of_transformers() -> None:
    """The tokens that top-k and top-p leave, and their shares, as its warpers have them."""
    from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    warped = TopPLogitsWarper(0.7)(None, TopKLogitsWarper(20)(None, logits[None] / 0.8))[0].softmax(0)  # type: ignore[arg-type]
    seen = shares(logits, Sampling(temperature=0.8, top_k=20, top_p=0.7))
    assert {i for i, share in enumerate(seen) if share} <= set(warped.nonzero().flatten().tolist())
    assert seen == pytest.approx(warped.tolist(), abs=0.04)


@pytest.mark.parametrize(
    ("prompts", "window", "words"),
    [([], 8, "empty"), ([[1], []], 8, "empty"), ([[1, 41]], 8, "41, model.vocab_size is 41"), ([[1]], 1, "window")],
)
def test_what_cannot_work_is_refused(prompts: list[list[int]], window: int, words: str) -> None:
    model = build_model(ModelConfig.model_validate(model_tree()), seed=3)
    with pytest.raises(ValueError, match=words):
        generate(model, prompts, num_tokens=2, window=window)


def test_only_the_tokenizers_tokens_are_drawn() -> None:
    """Of a vocabulary that is larger than it."""
    model = build_model(ModelConfig.model_validate(model_tree()), seed=3)
    (text,) = generate(
        model, [[1]], num_tokens=50, window=16, sampling=Sampling(temperature=5.0), tokenizer_vocab_size=10
    )
    assert len(text) == 51
    assert max(text) == 9
