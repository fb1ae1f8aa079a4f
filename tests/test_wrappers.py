"""The recipes of moe/README.md for Accelerate and Lightning, run with these packages on two ranks under torchrun, and
compared with one rank that has the whole batch."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.launches import ROOT, environment, free_port

pytestmark = pytest.mark.system

BLOCKS = re.findall(
    r"```py\n(.*?)```",
    (ROOT / "expert_parallel" / "moe" / "README.md")
    .read_text()
    .partition("## With Accelerate")[2]
    .partition("\n## ")[0],
    flags=re.DOTALL,
)
MODEL = """
import os

import torch
import torch.distributed as dist
from torch import nn
from expert_parallel import MoEConfig, MoELayer, clip_grad_norm_, full_state_dict, prepare_data_parallel

CONFIG = MoEConfig.model_validate(
    {
        "d_model": 8,
        "num_experts": 4,
        "experts": {"hidden": 12},
        "shared_experts": {"hidden": 4},
        "losses": [{"kind": "balance", "coefficient": 0.1}],
    }
)


class Model(nn.Module):
    def __init__(self, group=None):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.moe, self.last = nn.Linear(8, 8), MoELayer(CONFIG, group), nn.Linear(8, 8)
        self.double()

    def forward(self, x):
        h = self.first(x)
        moe = self.moe(h)
        return self.last(h + moe.y), sum(moe.losses.values())


def make_batches(rank, ranks):
    for step in range(6):
        pair = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(step)).double()
        yield pair[0].chunk(ranks)[rank], pair[1].chunk(ranks)[rank]
"""
ACCELERATE = """
from accelerate import Accelerator

batches = make_batches(int(os.environ["RANK"]), 2)
os.environ["ACCELERATE_USE_CPU"] = "true"
{recipe}
state = full_state_dict(model)
if accelerator.is_main_process:
    torch.save(state, "weights.pt")
accelerator.end_training()
"""
LIGHTNING = """
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

{recipe}

class Data(torch.utils.data.IterableDataset):
    def __iter__(self):
        return make_batches(int(os.environ["RANK"]), 2)


save = ModelCheckpoint(".", "last", save_weights_only=True)
trainer = Trainer(
    accelerator="cpu", devices=2, strategy="ddp", max_steps=6, logger=False, callbacks=[save],
    enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
)
trainer.fit(Training(), torch.utils.data.DataLoader(Data(), batch_size=None))
"""


def run(folder: Path, script: str) -> None:
    (folder / "train.py").write_text(MODEL + script)
    command = ["torchrun", "--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", free_port()]
    variables = {**environment(), "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [*command, "train.py"], cwd=folder, env=variables, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def trained_on_one_rank(micro_steps: int) -> dict[str, torch.Tensor]:
    scope: dict[str, object] = {}
    exec(MODEL, scope)
    model: nn.Module = scope["Model"]()  # type: ignore[operator]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for number, (x, target) in enumerate(scope["make_batches"](0, 1)):  # type: ignore[operator]
        y, losses = model(x)
        (((y - target).square().mean() + losses) / micro_steps).backward()
        if number % micro_steps == micro_steps - 1:
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            assert norm > 0.1  # so that clipping shows
            optimizer.step()
            optimizer.zero_grad()
    return model.state_dict()


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=0, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_accelerate(tmp_path: Path) -> None:
    run(tmp_path, ACCELERATE.format(recipe=BLOCKS[0]))
    assert_same(torch.load(tmp_path / "weights.pt", weights_only=True), trained_on_one_rank(micro_steps=2))


def test_lightning(tmp_path: Path) -> None:
    run(tmp_path, LIGHTNING.format(recipe=BLOCKS[1]))
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert_same(
        {name.removeprefix("model."): value for name, value in state.items()}, trained_on_one_rank(micro_steps=1)
    )
