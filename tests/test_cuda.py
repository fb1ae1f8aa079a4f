"""On a GPU, where there is one: the layer against the CPU in float64, the backends against each other, a short run."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from expert_parallel.moe.config import MoEConfig
from expert_parallel.moe.experts.grouped_gemm import GROUPED_GEMMS
from expert_parallel.moe.layer import MoELayer
from expert_parallel.training.config import load_config

pytestmark = pytest.mark.cuda
ROOT = Path(__file__).parent.parent


def layer(**experts: Any) -> MoELayer:
    tree = {
        "d_model": 64,
        "num_experts": 8,
        "router": {"k": 2},
        "capacity": {"kind": "factor", "train": 1.0},
        "losses": [{"kind": "balance"}, {"kind": "z_loss"}],
        "experts": {"hidden": 128, "bias": True, **experts},
        "dispatcher": {"kind": "local"},
    }
    return MoELayer(MoEConfig.model_validate(tree))


def test_layer_equals_the_cpu_in_float64() -> None:
    results = []
    for device in ("cpu", "cuda"):
        module = layer(backend="loop").double().to(device)
        x = torch.randn(3, 50, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
        output = module(x.requires_grad_())
        (output.y.square().sum() + sum(output.losses.values())).backward()
        assert x.grad is not None
        results.append(
            [t.cpu() for t in (output.y, x.grad, *(p.grad for p in module.parameters() if p.grad is not None))]
        )
    for on_cpu, on_gpu in zip(*results, strict=True):
        torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-9, atol=1e-10)


def test_backends_agree_in_bfloat16() -> None:
    counts_e = torch.tensor([0, 40, 0, 17, 71, 0], device="cuda")
    rows = torch.randn(128, 64, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(6, 64, 96, device="cuda", dtype=torch.bfloat16)
    grads = []
    for products in GROUPED_GEMMS.values():
        x, w = rows.clone().requires_grad_(), weight.clone().requires_grad_()
        y = products.rows(x, w, products.groups(counts_e))
        (y.float() * torch.arange(96, device="cuda")).sum().backward()
        grads.append((y, x.grad, w.grad))
    for first, second in zip(*grads, strict=True):
        torch.testing.assert_close(first, second, rtol=2e-2, atol=2e-2)


def test_a_short_bfloat16_run(tmp_path: Path) -> None:
    from expert_parallel.runtime.process import RuntimeConfig, distributed
    from expert_parallel.training.loop import train

    overrides = ["training.steps=3", "training.dtype=bfloat16", "parallel.ep=1", "run.sample.length=5"]
    config = load_config(ROOT / "configs/quickstart.yaml", [*overrides, f"run.folder={tmp_path}"])
    with distributed(RuntimeConfig(device="cuda")) as runtime:
        assert runtime.timeout == timedelta(seconds=600)
        train(config, runtime)
    assert (tmp_path / "checkpoints" / "step_00000003" / "manifest.json").exists()
