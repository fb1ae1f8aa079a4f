"""Switch's MoE layers, in and out, against transformers' own."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

from expert_parallel.interop.folder import HuggingFaceFolder
from expert_parallel.interop.switch_layers import (
    from_switch,
    read_switch_layer,
    switch_config,
    switch_prefixes,
    to_switch,
)
from tests.peers import peers_in_float64

SMALL = {"d_model": 8, "d_ff": 6, "num_experts": 4, "expert_capacity": 5, "dropout_rate": 0.0}


def make_layer(dtype: torch.dtype, **settings: object) -> tuple[nn.Module, SwitchTransformersConfig]:
    config = SwitchTransformersConfig(**SMALL, **settings)
    theirs = SwitchTransformersSparseMLP(config).to(dtype).eval()
    for seed, parameter in enumerate(theirs.parameters()):
        drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        parameter.data = drawn.to(dtype)
    return theirs, config


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"router_bias": True, "dense_act_fn": "gelu"}], ids=["plain", "other parts"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layer_computes_the_same_and_goes_back(dtype: torch.dtype, settings: dict[str, object]) -> None:
    """3 sequences of 12 tokens; an expert takes 5 of each, some are dropped."""
    x = torch.randn(3, 12, 8, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(dtype)
    with peers_in_float64() if dtype == torch.float64 else nullcontext():
        theirs, config = make_layer(dtype, **settings)
        expected = theirs(x)
    ours = from_switch(switch_config(config.to_dict()), theirs.state_dict()).eval()
    actual = ours(x)
    assert 0 < int(actual.stats.kept_E.sum()) < 36
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(actual.y, expected, rtol=tolerance, atol=tolerance)
    state = theirs.state_dict()
    back = to_switch(ours)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


@torch.no_grad()
def test_layers_of_a_folder(tmp_path: Path) -> None:
    layers = {"num_layers": 2, "num_decoder_layers": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
    config = SwitchTransformersConfig(**SMALL, **layers, vocab_size=16, num_heads=2, d_kv=4)
    model = SwitchTransformersForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "theirs")
    folder = HuggingFaceFolder(tmp_path / "theirs")
    prefixes = switch_prefixes(folder)
    assert prefixes == [f"{part}.block.1.layer.{place}.mlp." for part, place in (("decoder", 2), ("encoder", 1))]
    x = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(9))
    for prefix in prefixes:
        theirs = model.get_submodule(prefix.removesuffix("."))
        ours = read_switch_layer(folder, prefix).eval()
        torch.testing.assert_close(ours(x).y, theirs(x), rtol=1e-5, atol=1e-6)


def test_refused() -> None:
    theirs, config = make_layer(torch.float32)
    values, state = config.to_dict(), theirs.state_dict()
    first = "experts.expert_0.wi.weight"
    with pytest.raises(ValueError, match=f"{first} is missing"):
        from_switch(switch_config(values), {name: tensor for name, tensor in state.items() if name != first})
    with pytest.raises(ValueError, match=r"experts.expert_4.wi.weight is left over"):
        from_switch(switch_config(values), {**state, "experts.expert_4.wi.weight": state[first]})
    with pytest.raises(ValueError, match=r"experts.0.w_in of the Switch layer has shape \[8, 5\], expected \[8, 6\]"):
        from_switch(switch_config(values), {**state, first: state[first][:5]})
    for key, value in (("dense_act_fn", "silu"), ("router_ignore_padding_tokens", True)):
        with pytest.raises(ValueError, match=f"config.json: {key} is {value!r}"):
            switch_config({**values, key: value})
