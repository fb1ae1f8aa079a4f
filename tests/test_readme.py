"""What the README prints works: its Python example, on 2 ranks, as it stands there; and the paths it names exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def python_block(page: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    return code


def test_the_layer_in_your_own_model(tmp_path: Path) -> None:
    """As it stands, on 2 ranks; afterwards every dense gradient is the same on both, and every expert's own."""
    code = python_block("README.md")
    assert len(code.splitlines()) <= 25
    example = tmp_path / "example.py"
    example.write_text(
        code
        + """
dense = [p.grad.norm().item() for n, p in model.named_parameters() if not n.startswith("moe.experts.")]
print(f"rank {dist.get_rank()}:", y.shape, min(dense) > 0, sum(dense))
print(f"kept {int(moe.stats.kept_E.sum())}, experts {model.moe.experts.w_in.grad.shape}")
"""
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*torchrun, str(example)], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    said = re.findall(r"rank (\d): torch.Size\(\[4, 16, 32\]\) True (\S+)", done.stdout)
    assert sorted(rank for rank, _ in said) == ["0", "1"]
    assert said[0][1] == said[1][1]
    assert done.stdout.count("kept 128, experts torch.Size([4, 64, 256])") == 2


def test_a_router_of_your_own() -> None:
    code = python_block("expert_parallel/moe/README.md")
    command = f"""import torch
{code}
from expert_parallel.moe.layer import MoEConfig, MoELayer
router = {{"kind": "cosine", "temperature": 0.1}}
tree = {{"d_model": 8, "num_experts": 4, "router": router, "experts": {{"hidden": 4}}}}
layer = MoELayer(MoEConfig.model_validate(tree))
layer(torch.randn(6, 8)).y.sum().backward()
print(type(layer.router).__name__, layer.router.config.temperature, float(layer.router.weight.grad.norm()) > 0)
"""
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.stdout == "CosineRouter 0.1 True\n", done.stderr


@pytest.mark.parametrize("page", sorted(ROOT.glob("**/README.md")), ids=lambda page: str(page.relative_to(ROOT)))
def test_named_paths_exist(page: Path) -> None:
    if ".venv" in page.parts:
        return
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page}: {target}"
    for target in re.findall(r"`((?:launch|configs|tests)/[\w./-]+)`", page.read_text()):
        assert (ROOT / target).exists(), f"{page}: {target}"
