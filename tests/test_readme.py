"""What the READMEs print works: their Python examples run, the paths and pages they name exist, lines are short."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from expert_parallel.cli.app import app
from tests.launches import environment, free_port

ROOT = Path(__file__).parent.parent
MAX_COLUMNS, MAX_LONG_LINES = 120, 20


def pages() -> list[Path]:
    """Returns all pages that git knows or would add, but not those of older versions."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    names = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()
    return [ROOT / name for name in names if not name.startswith("tests/fixtures/") and (ROOT / name).exists()]


PAGES = pages()


def python_block(page: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    return code


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def without_code(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", without_code(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_layer_in_your_own_model(tmp_path: Path) -> None:
    """As it stands, on two ranks: it prints a falling loss, nothing is dropped, and the file has every expert."""
    (tmp_path / "two_ranks.py").write_text(python_block("README.md"))
    command = ["torchrun", "--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", free_port()]
    done = subprocess.run(
        [*command, "two_ranks.py"], capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment()
    )
    assert done.returncode == 0, done.stderr
    *steps, loaded = done.stdout.splitlines()
    losses = [float(line.split("loss ")[1].split()[0]) for line in steps]
    kept = [sum(map(int, re.findall(r"\d+", line.partition("kept ")[2]))) for line in steps]
    assert len(losses) == 5
    assert losses[-1] < 0.95 * losses[0]
    assert kept == [128] * 5  # 4 x 16 tokens with 2 choices each
    assert loaded == "loaded on one rank: torch.Size([4, 16, 64])"
    experts = {key.split(".")[2] for key in torch.load(tmp_path / "model.pt", weights_only=True) if "experts" in key}
    assert experts == set("01234567")


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
    assert run_python(command) == "CosineRouter 0.1 True\n"


def test_a_newcomer_starts_within_400_words() -> None:
    first = " ".join((ROOT / "README.md").read_text().split()[:400])
    for said in ("bash launch/quickstart.sh", "bash launch/test.sh", "Status:", "GPUs: none yet", "Use this if"):
        assert said in first


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_paths_exist(page: Path) -> None:
    text = page.read_text()
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", text):
        linked = page.parent / target if target else page
        assert linked.exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors(linked), f"{page}: {target} has no heading #{anchor}"
    for target in re.findall(r"`((?:launch|configs|tests|docker|expert_parallel)/[\w./-]+)`", text):
        assert (ROOT / target).exists() or (page.parent / target).exists(), f"{page}: {target}"


def test_the_layout_guide_is_what_check_counts() -> None:
    """Each row's memory, which the guide rounds to a tenth of a GiB."""
    guide = (ROOT / "launch/README.md").read_text().split("## Which layout")[1].split("\n## ")[0]
    rows = [[cell.strip(" `") for cell in line.split("|")] for line in guide.splitlines() if line.startswith("| `")]
    assert len(rows) == guide.count("\n| `") >= 15
    for _, size, ranks, settings, _, memory, *_ in rows:
        name = size.split("`")[0]
        command = ["check", f"configs/{name}.yaml", "--world-size", ranks.replace(",", ""), *settings.split()]
        command.append("runtime.device=cuda")
        output = CliRunner().invoke(app, command).output
        (line,) = re.findall(r"^memory of a rank .*$", output, re.MULTILINE)
        counted = [float(number) for number in re.findall(r"([\d.]+) GiB", line)]
        printed = [float(number) for number in re.findall(r"[\d.]+", memory)]
        assert printed == pytest.approx(counted, abs=0.06), f"{name} on {ranks} ranks: {line}"


def test_lines_are_short() -> None:
    """Outside tables and code."""
    long = [
        f"{page.relative_to(ROOT)}: {line[:60]}"
        for page in PAGES
        for line in without_code(page).splitlines()
        if len(line) > MAX_COLUMNS and not line.startswith(("|", "    "))
    ]
    assert len(long) <= MAX_LONG_LINES, "\n".join(long)
