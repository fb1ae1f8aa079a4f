"""Text generation, byte by byte. No cache: each byte runs the whole window again."""

from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from expert_parallel.collectives import all_reduce_sum, group_rank
from expert_parallel.config import load_config
from expert_parallel.mesh import ParallelMesh
from expert_parallel.model.parallelize import build_model
from expert_parallel.model.pipeline import Pipeline
from expert_parallel.model.sequence import SequencePlace, length_unit
from expert_parallel.model.tensor_parallel import gather_logits
from expert_parallel.model.transformer import ModelOutput, Transformer
from expert_parallel.moe import random
from expert_parallel.moe.plan import StepContext
from expert_parallel.training.checkpoint import list_checkpoints, load_checkpoint
from expert_parallel.training.data import VOCABULARY_SIZE
from expert_parallel.training.step import DTYPES, forget_gathered_weights


@torch.no_grad()
def generate(
    model: Transformer | Pipeline,
    prompt: bytes,
    *,
    num_tokens: int,
    temperature: float,
    window: int,
    seed: int = 0,
    mesh: ParallelMesh | None = None,
) -> bytes:
    """The prompt and `num_tokens` more. temperature 0: the likeliest byte each time. window: bytes that the model sees.

    Every rank of the mesh calls it with the same arguments and gets the same text. The first data rank (the ranks that
    divide its sequences, its stages) brings the one sequence, the others none, so that nothing is decided across copies
    of it. The rank that has the last position draws the byte, which is a function of (seed, position). Sequences that
    ranks divide are padded to a length that divides.
    """
    if not prompt:
        raise ValueError("the prompt is empty, at least one byte is needed (--prompt)")
    model.eval()
    device = next(model.parameters()).device
    place, tp_group = SequencePlace.of(mesh), None if mesh is None else mesh.tp_group
    unit = length_unit(place.cp, place.tp)
    is_here = mesh is None or mesh.dp_rank == 0
    tokens = torch.tensor([list(prompt)], device=device)
    for position in range(num_tokens):
        seen = tokens[: int(is_here), -window:]
        length = seen.shape[1]
        padded = F.pad(seen, (0, -length % unit))
        mask_BS = (torch.arange(padded.shape[1], device=device) < length).expand(padded.shape) if unit > 1 else None
        first_B = torch.arange(len(seen), device=device)
        context = StepContext(seed=seed, step=position, sequence_index_B=first_B, mask_BS=mask_BS)
        output: ModelOutput = model(padded, context)
        choice = torch.zeros(1, 1, dtype=torch.int64)
        row = (place.context(padded.shape[1]) == length - 1).nonzero().flatten()
        if is_here and len(row) and (not isinstance(model, Pipeline) or model.has_logits):
            logits_V = gather_logits(output.logits[0, int(row)], tp_group, model.config.vocab_size)
            if group_rank(tp_group) == 0:
                choice = draw(logits_V[:VOCABULARY_SIZE], temperature, seed, position).view(1, 1)
        tokens = torch.cat([tokens, all_reduce_sum(choice.to(device), dist.group.WORLD if mesh else None)], dim=1)
    forget_gathered_weights(model)
    return bytes(tokens[0].tolist())


def draw(logits_V: Tensor, temperature: float, seed: int, position: int) -> Tensor:
    """A byte, int64, on the CPU. logits_V: of bytes alone, where a larger vocabulary has ids beyond them."""
    logits_V = logits_V.double().cpu()
    if temperature == 0:
        return logits_V.argmax()
    share = random.uniform(seed, torch.tensor([position]), 1)[0, 0]
    choice = torch.searchsorted((logits_V / temperature).softmax(0).cumsum(0), share)
    return choice.clamp(max=len(logits_V) - 1)


def generate_from_run(run: Path, prompt: str, *, num_tokens: int, temperature: float, seed: int) -> str:
    """Text from the newest checkpoint in the folder `run`, on this process alone, whatever layout trained it."""
    if not run.is_dir():
        raise ValueError(f"there is no run folder {run}")
    config = load_config(run / "config.yaml")
    checkpoints = list_checkpoints(run / "checkpoints")
    if not checkpoints:
        raise ValueError(f"{run / 'checkpoints'} holds no checkpoint")
    model = build_model(config.model, dtype=DTYPES[config.training.dtype])
    load_checkpoint(checkpoints[-1], model, optimizer=None)
    window = config.training.sequence_length
    text = generate(model, prompt.encode(), num_tokens=num_tokens, temperature=temperature, window=window, seed=seed)
    return text.decode(errors="replace")
