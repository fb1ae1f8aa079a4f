"""What the README prints works: its Python example, on 2 ranks, as it stands there; and the paths it names exist."""

import ast
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
    assert len([line for line in code.splitlines() if line]) <= 25
    example = tmp_path / "example.py"
    example.write_text(
        code
        + f"""
from pathlib import Path
dense = [p.grad.norm().item() for n, p in model.named_parameters() if not n.startswith("moe.experts.")]
stack = list(model.moe.experts.w_in.grad.shape)
found = [list(y.shape), min(dense) > 0, sum(dense), int(moe.stats.kept_E.sum()), stack]
Path({str(tmp_path)!r}, f"rank{{dist.get_rank()}}").write_text(str(found))
"""
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*torchrun, str(example)], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    (shape, has_gradients, norms, kept, stack), second = (
        ast.literal_eval((tmp_path / f"rank{rank}").read_text()) for rank in (0, 1)
    )
    assert (shape, has_gradients, kept, stack) == ([4, 16, 32], True, 128, [4, 64, 256])
    assert second[2] == norms


def test_a_router_of_your_own() -> None:
    code = python_block("expert_parallel/moe/README.md")
    command = f"""import torch
{code}
from expert_parallel.moe.config import MoEConfig
from expert_parallel.moe.layer import MoELayer
router = {{"kind": "cosine", "temperature": 0.1}}
tree = {{"d_model": 8, "num_experts": 4, "router": router, "experts": {{"hidden": 4}}}}
layer = MoELayer(MoEConfig.model_validate(tree))
layer(torch.randn(6, 8)).y.sum().backward()
print(type(layer.router).__name__, layer.router.config.temperature, float(layer.router.weight.grad.norm()) > 0)
"""
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.stdout == "CosineRouter 0.1 True\n", done.stderr


@pytest.mark.parametrize("page", sorted(ROOT.glob("**/README.md")), ids=lambda page: str(page.relative_to(ROOT)))
def test_named_paths_exist(page: Path) -> None:
    if ".venv" in page.parts:
        return
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page}: {target}"
    for target in re.findall(r"`((?:launch|configs|tests)/[\w./-]+)`", page.read_text()):
        assert (ROOT / target).exists(), f"{page}: {target}"
