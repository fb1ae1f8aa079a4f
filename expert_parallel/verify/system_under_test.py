"""Runs training steps of the real model in a layout, and captures the tensors that a rank can observe.

Everything that `verify` must know about how training builds a model and gives a rank its tokens is in this file."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from expert_parallel.checkpoint.manifest import MOMENTS
from expert_parallel.data.batch import MicroBatch
from expert_parallel.data.sampler import Sequences, number_by_end_tokens
from expert_parallel.model.parallelize import build_model
from expert_parallel.model.transformer import Block
from expert_parallel.moe.context import RouterReplay, StepContext
from expert_parallel.moe.experts.grouped import choose_backend, supports_grouped_mm
from expert_parallel.moe.parameters import logical_parameters
from expert_parallel.nn.ffn import w_in_columns
from expert_parallel.parallel.mesh import ParallelMesh
from expert_parallel.runtime.process import Runtime
from expert_parallel.training.config import DTYPES, Config
from expert_parallel.training.engines.native import NativeEngine
from expert_parallel.training.run import TrainingRun
from expert_parallel.training.setup import build, check_world_size
from expert_parallel.training.step import StepReport, train_step

Tensors = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class FixedSequenceSampler:
    """Yields the given sequences instead of samples of a corpus; implements Sampler."""

    fixed: Sequences

    def sequences(self, first: int, count: int) -> Sequences:
        return self.fixed.select(first, count)


class SilentRun(TrainingRun):
    """Is a training run that prints nothing."""

    def print_rank_0(self, text: str) -> None:
        pass


@contextmanager
def set_up(
    config: Config,
    runtime: Runtime,
    sequences_GS: Tensor,
    held_out: Tensor | None = None,
    checkpoints: Sequence[Path] = (),
) -> Iterator[TrainingRun]:
    """Sets up a training run, without its data and folder, for the body of a `with` statement. sequences_GS: the tokens
    of its steps from step 0 on, (steps * global_batch, sequence_length + 1). held_out: those of its evaluation.
    checkpoints: those that it resumes from."""
    degrees = runtime.run_on_all_ranks(lambda: check_world_size(config, runtime))
    mesh, model, engine = build(config, runtime, degrees)
    fixed = number_by_end_tokens(sequences_GS, separator(config))
    evaluated = number_by_end_tokens(sequences_GS[:0] if held_out is None else held_out, separator(config))
    yield SilentRun(config, runtime, mesh, model, engine, FixedSequenceSampler(fixed), evaluated, list(checkpoints))
    _destroy_groups(mesh)


def _destroy_groups(mesh: ParallelMesh) -> None:
    """Destroys the process groups, which hold sockets and threads, except those of DTensors, which torch caches."""
    meshes = [over for over in (mesh.dense_mesh, mesh.expert_mesh) if over is not None]
    kept = {id(group) for over in meshes for group in over.get_all_groups()}
    for held in [*vars(mesh).values(), *vars(mesh.nodes).values()]:
        if isinstance(held, dist.ProcessGroup) and id(held) not in kept:
            kept.add(id(held))
            dist.destroy_process_group(held)


def separator(config: Config) -> int | None:
    """Returns the token that ends a document if `data.documents` is `separate`, which confines attention to documents;
    else None."""
    return 0 if config.data.documents == "separate" else None


def random_sequences(config: Config, num_steps: int = 1) -> Tensor:
    """Draws the tokens of steps, int64 (num_steps * global_batch, sequence_length + 1); see `_draw`."""
    batch = config.training.global_batch
    return torch.cat([_draw(config, batch, config.seed + 1000 * step) for step in range(num_steps)])


def held_out_sequences(config: Config) -> Tensor:
    """Draws the tokens of an evaluation: one sequence more than a micro-step has, so that in its second pass all ranks
    but one have none. int64 (sequences, sequence_length + 1); see `_draw`."""
    return _draw(config, config.training.global_batch // config.training.micro_steps + 1, config.seed + 1)


def _draw(config: Config, count: int, seed: int) -> Tensor:
    """Draws `count` sequences, int64 (count, sequence_length + 1). A row is one document or, if documents are separate,
    several that end at random positions.

    Documents begin with different tokens where the vocabulary allows, and none with the same token twice: tokens whose
    whole context is one repeated token would have equal scores but for rounding, and such ties break differently in
    other layouts."""
    vocab_size = config.model.vocab_size
    end = separator(config)
    generator = torch.Generator().manual_seed(seed)
    shape = (count, config.training.sequence_length + 1)
    tokens_GS = torch.randint(0, vocab_size, shape, generator=generator)
    begins_GS = torch.zeros(shape, dtype=torch.bool)
    begins_GS[:, 0] = True
    if end is not None:
        tokens_GS = torch.randint(1, vocab_size, shape, generator=generator)
        for place in range(1, shape[1] - 1):
            ends_G = (torch.rand(shape[0], generator=generator) < 0.3) & ~begins_GS[:, place]
            tokens_GS[ends_G, place] = end
            begins_GS[ends_G, place + 1] = True
    first = torch.randperm(vocab_size, generator=generator)
    first = first if end is None else first[first != end]
    tokens_GS[begins_GS] = first.repeat(-(-int(begins_GS.sum()) // len(first)))[: int(begins_GS.sum())]
    for place in range(1, shape[1]):
        follows_G = begins_GS[:, place - 1] & (tokens_GS[:, place] == tokens_GS[:, place - 1])
        tokens_GS[follows_G, place] = 1 + tokens_GS[follows_G, place] % (vocab_size - 1)
    return tokens_GS


def initial_weights(config: Config) -> Tensors:
    """Returns the initial weights and balance biases of the model on one rank, by logical name, in float64."""
    return read_weights(build_model(config.model, dtype=torch.float64, seed=config.seed))


def read_weights(model: nn.Module) -> Tensors:
    """Returns the full weights of the parameters that this rank holds a shard of, and the balance biases. A collective
    if weights are sharded."""
    found: Tensors = {}
    for logical in logical_parameters(model):
        found |= logical.whole(logical.parameter.detach())
    return _to_cpu(found | dict(_balance_biases(model)))


def read_moments(run: TrainingRun) -> dict[str, Tensors]:
    """Returns AdamW's moments of the parameters that this rank holds a shard of, by `exp_avg` or `exp_avg_sq`, then by
    logical name. A collective if they are sharded."""
    assert isinstance(run.engine, NativeEngine), "verify supports the native engine only"
    found: dict[str, Tensors] = {moment: {} for moment in MOMENTS}
    for logical in logical_parameters(run.model):
        state = run.engine.optimizer.state[logical.parameter]
        for moment in MOMENTS:
            found[moment] |= _to_cpu(logical.whole(state[moment]))
    return found


def write_weights(model: nn.Module, start: Tensors) -> None:
    """Copies the weights and balance biases `start`, by logical name, into the model; each rank copies its own
    shards."""
    for logical in logical_parameters(model):
        logical.fill(logical.parameter, [start[name] for name in logical.names])
    for name, buffer in _balance_biases(model):
        buffer.copy_(start[name])


def _balance_biases(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for part in model if isinstance(model, nn.ModuleList) else [model]:
        yield from ((name, buffer) for name, buffer in part.named_buffers() if name.endswith("balance_bias_E"))


def _to_cpu(tensors: Tensors) -> Tensors:
    # Waits for the device. float64 holds every dtype's values exactly; a copy, since the step overwrites its tensors.
    return {name: tensor.detach().to("cpu", torch.float64, copy=True) for name, tensor in tensors.items()}


def own_token_indices(run: TrainingRun, mine: list[MicroBatch]) -> list[tuple[Tensor, Tensor]]:
    """Returns, for each micro-step, which tokens this rank holds: the indices of their sequences and their positions,
    int64."""
    return [(batch.sequence_index_B.cpu(), run.own_positions) for batch in mine]


def context_token_indices(context: StepContext, length: int) -> tuple[Tensor, Tensor]:
    """Returns which tokens a block was called with: the indices of their sequences and their positions, int64."""
    assert context.sequence_index_B is not None
    positions_S = torch.arange(length) if context.positions_S is None else context.positions_S
    return context.sequence_index_B.cpu(), positions_S.cpu()


@dataclass
class CapturedStep:
    """Holds what one rank observed of a training step. gradients: before clipping. weights: after the step. moments:
    AdamW's after the step, by `exp_avg` or `exp_avg_sq`. outputs: of this rank's blocks, by (micro-step, block), each
    with the context that the block was called with. ledger_errors: messages."""

    report: StepReport
    gradients: Tensors = field(default_factory=dict)
    weights: Tensors = field(default_factory=dict)
    moments: dict[str, Tensors] = field(default_factory=dict)
    outputs: dict[tuple[int, int], tuple[StepContext, Tensor]] = field(default_factory=dict)
    ledger_errors: list[str] = field(default_factory=list)


def capture_step(
    run: TrainingRun, mine: list[MicroBatch], step: int = 0, replay: RouterReplay | None = None
) -> CapturedStep:
    """Takes a step by training's own `train_step`, with hooks that record gradients and outputs. mine: this rank's
    micro-batches. step: its number. replay: records the routers' choices in the first run that uses it, and makes later
    ones repeat them."""
    captured = CapturedStep(StepReport(0.0, 0, {}))

    def capture_output(block: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        context = arguments[1]
        captured.outputs[context.micro_step, context.layer] = (context, output.x.detach().to("cpu", torch.float64))

    def capture_gradients(*_: Any) -> None:
        for logical in logical_parameters(run.model):
            assert logical.parameter.grad is not None, f"{logical.names[0]} has no gradient"
            captured.gradients |= _to_cpu(logical.whole(logical.parameter.grad))

    hooks = [block.register_forward_hook(capture_output) for block in run.model.modules() if isinstance(block, Block)]
    assert isinstance(run.engine, NativeEngine), "verify supports the native engine only"
    hooks.append(run.engine.optimizer.register_step_pre_hook(capture_gradients))
    training, seed = run.config.training, run.config.seed
    with collecting_ledger_errors(captured.ledger_errors):
        captured.report = train_step(
            run.model, run.engine, mine, training, run.mesh, step=step, seed=seed, replay=replay
        )
    for hook in hooks:
        hook.remove()
    norm, limit = captured.report.grad_norm, training.clip_norm
    if limit is not None and norm > limit:  # the step has clipped gradients in place: undo it
        captured.gradients = {name: grad * (norm / limit) for name, grad in captured.gradients.items()}
    captured.weights = read_weights(run.model)
    captured.moments = read_moments(run)
    return captured


@contextmanager
def collecting_ledger_errors(ledger_errors: list[str]) -> Iterator[None]:
    """Collects the ledger's errors, which it reports as warnings here, so that the rest of the step is compared as
    well."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        yield
    for warning in said:
        if str(warning.message).startswith("ledger: "):
            ledger_errors.append(str(warning.message))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def in_folder(config: Config, folder: Path | None) -> Config:
    """Returns the config with `run.folder` set, if a folder is given."""
    if folder is None:
        return config
    return config.model_copy(update={"run": config.run.model_copy(update={"folder": str(folder)})})


def with_backend(config: Config, dtype: str, backend: str, runtime: Runtime) -> Config:
    """Returns the config in the dtype, and with the backend of the experts' matrix products that the user has set. In
    sizes too small for `grouped_mm`, `auto` replaces it."""
    moe = config.model.moe
    config = config.model_copy(update={"training": config.training.model_copy(update={"dtype": dtype})})
    if moe is None or (
        backend == "grouped_mm" and not supports_grouped_mm(DTYPES[dtype], runtime.device, _expert_sizes(config))
    ):
        return config
    experts = moe.experts.model_copy(update={"backend": backend})
    model = config.model.model_copy(update={"moe": moe.model_copy(update={"experts": experts})})
    return config.model_copy(update={"model": model})


def _expert_sizes(config: Config) -> tuple[int, ...]:
    """Returns the widths of the experts' matrices on a rank."""
    moe = config.model.moe
    assert moe is not None
    hidden = moe.experts.hidden // config.parallel.etp
    return config.model.d_model, w_in_columns(moe.experts.activation, hidden), hidden


def backend(config: Config, runtime: Runtime) -> str:
    """Returns the name of the backend that multiplies the experts' matrices, `none` for a dense model."""
    moe = config.model.moe
    if moe is None:
        return "none"
    return choose_backend(moe.experts, DTYPES[config.training.dtype], runtime.device, _expert_sizes(config))
