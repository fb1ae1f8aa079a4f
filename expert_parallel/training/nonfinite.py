"""Finds the first tensor of a training step that is not finite, by running the step again and checking every module.

It is used after a step whose loss or gradient norm was NaN or infinite, and costs nothing before. The engine has not
updated the weights then (`Engine.skips_bad_updates`), and all randomness is a function of the position in the run, so
the second run computes what the first one did.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from expert_parallel.data.batch import MicroBatch
from expert_parallel.model.outputs import BlockOutput, ModelOutput
from expert_parallel.model.pipeline import Pipeline, Stage
from expert_parallel.model.transformer import LanguageModel, Transformer
from expert_parallel.moe.context import RouterReplay, StepContext
from expert_parallel.moe.parameters import local_tensor, logical_parameters
from expert_parallel.moe.types import DispatchedTokens, MoEOutput, RoutingPlan
from expert_parallel.parallel.collectives import all_gather_text
from expert_parallel.parallel.mesh import ParallelMesh
from expert_parallel.training.config import TrainingConfig
from expert_parallel.training.engines.engine import Engine
from expert_parallel.training.step import forward_backward

Phase = Literal["weights", "forward", "backward"]
PHASES: tuple[Phase, ...] = ("weights", "forward", "backward")  # in the order in which the search looks at them

LAST = 2**31  # comes after every stage and every module

# The fields to check of a module's output or input. Other fields may hold -inf or unset values on purpose.
CHECKED_FIELDS: dict[type, tuple[str, ...]] = {
    RoutingPlan: ("logits_TE", "probabilities_TE", "weights_TK"),
    DispatchedTokens: ("x_VD",),
    MoEOutput: ("y", "losses"),
    BlockOutput: ("x", "losses"),
    ModelOutput: ("logits", "mtp_logits", "losses"),
}


@dataclass(frozen=True)
class BadTensor:
    """Names a tensor that holds NaN or infinite values.

    phase: `weights` are those before the step; `forward` is the output of a module; `backward` is the gradient of a
    parameter on this rank, before it is summed over ranks (after it with FSDP2 and DeepSpeed, which sum it in the
    backward pass). name: of the parameter, or of the module and the part of its output. micro_step: of the forward
    pass, else 0. num_nan, num_inf, size: numbers of values. largest_input, largest_weight: the largest absolute values
    that the module was given; None if it has none, or NaN. order: sorts the tensors of a phase by the time at which
    they are computed, on all ranks alike.
    """

    phase: Phase
    name: str
    rank: int
    order: list[int]
    micro_step: int
    num_nan: int
    num_inf: int
    size: int
    largest_input: float | None = None
    largest_weight: float | None = None

    @property
    def sort_key(self) -> tuple[int, list[int], int]:
        """Returns a key by which the first of several bad tensors is the smallest."""
        return PHASES.index(self.phase), self.order, self.rank

    def __str__(self) -> str:
        return {
            "weights": f"the weight {self.name}",
            "forward": f"the output {self.name} in the forward pass",
            "backward": f"the gradient of {self.name} in the backward pass",
        }[self.phase]


def find_first_bad_tensor(
    model: LanguageModel,
    engine: Engine,
    batches: list[MicroBatch],
    config: TrainingConfig,
    mesh: ParallelMesh,
    *,
    step: int,
    seed: int,
    replay: RouterReplay | None,
) -> BadTensor | None:
    """Runs the forward and backward passes of a step again and returns the first bad tensor of all ranks, the same on
    each; None if there is none. A collective.

    Weights come first, then outputs in the order of the forward pass, then gradients in the order of the backward pass.
    Arguments: as for `train_step`. The gradients of the step are left in the model.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    watch = ModuleWatch(rank)
    bad_weights = list(_bad_parameters(model, watch, "weights"))
    for parameter in model.parameters():
        parameter.grad = None
    with watch.attached(model):
        passes = forward_backward(model, engine, batches, config, mesh, step=step, seed=seed, replay=replay)
        for micro_step, (counted, _) in enumerate(passes):
            watch.check_loss(micro_step, counted[:, 0])
    found = [*bad_weights, *watch.found, *_bad_parameters(model, watch, "backward")]
    first = min(found, key=lambda bad: bad.sort_key, default=None)
    gathered = all_gather_text("" if first is None else json.dumps(asdict(first)), torch.device("cpu"))
    return min((BadTensor(**json.loads(text)) for text in gathered if text), key=lambda bad: bad.sort_key, default=None)


def largest_weight(model: LanguageModel) -> tuple[float, str]:
    """Returns the largest absolute value of all weights on all ranks, and the parameter's name. A collective."""
    weights = [(logical.names[0], local_tensor(logical.parameter).detach()) for logical in logical_parameters(model)]
    own = [(_largest(iter([weight])) or math.inf, name) for name, weight in weights if weight.numel() and weight.any()]
    gathered = all_gather_text(json.dumps(max(own, default=(0.0, ""))), torch.device("cpu"))
    value, name = max(json.loads(text) for text in gathered)
    return value, name


@dataclass
class ModuleWatch:
    """Checks the outputs of modules while a model runs.

    found: the first bad output of each pass through a stage. calls: the number of modules that were called before a
    module in its stage's pass, and after which the order of parameters is known.
    """

    rank: int
    found: list[BadTensor] = field(default_factory=list)
    calls: dict[nn.Module, int] = field(default_factory=dict)
    _place: tuple[int, int] = (0, 0)  # micro-step and stage of the pass that runs
    _counter: int = 0

    def check_loss(self, micro_step: int, cross_entropy: Tensor) -> None:
        """Checks the cross entropy of a micro-step, which no module computes."""
        if not _is_finite(cross_entropy):
            order = [micro_step, LAST, LAST]
            self.found.append(BadTensor("forward", "loss", self.rank, order, micro_step, *_count(cross_entropy)))

    @contextmanager
    def attached(self, model: LanguageModel) -> Iterator[None]:
        """Registers hooks on all modules of the model inside the context."""
        handles = []
        for stage in _stages(model):
            handles.append(stage.register_forward_pre_hook(self._begin_pass, with_kwargs=True))
            for name, module in stage.named_modules():
                handles.append(module.register_forward_hook(partial(self._check_output, name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _begin_pass(self, stage: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        assert isinstance(stage, Transformer)
        if isinstance(stage, Stage):
            micro_step = int(keywords["micro_step"])
        else:
            (context,) = (value for value in (*arguments, *keywords.values()) if isinstance(value, StepContext))
            micro_step = context.micro_step
        self._place, self._counter = (micro_step, stage.stage_spec.number), 0

    @torch.no_grad()  # a check must save nothing for the backward pass: recomputation would miss it
    def _check_output(self, name: str, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        self._counter += 1
        self.calls.setdefault(module, self._counter)
        if any(bad.order[:2] == list(self._place) for bad in self.found):
            return
        for part, tensor in _float_tensors(output):
            if _is_finite(tensor):
                continue
            self.found.append(
                BadTensor(
                    "forward",
                    " of ".join(filter(None, (part, name))) or "loss",  # the model itself has no name
                    self.rank,
                    [*self._place, self._counter],
                    self._place[0],
                    *_count(tensor),
                    _largest(tensor for _, tensor in _float_tensors(arguments)),
                    _largest(local_tensor(parameter) for parameter in module.parameters(recurse=False)),
                )
            )
            return


def _bad_parameters(
    model: LanguageModel, watch: ModuleWatch, phase: Literal["weights", "backward"]
) -> Iterator[BadTensor]:
    """Yields the parameters, or for `backward` their gradients, that are not finite: of a stack of experts each expert
    alone."""
    sign, is_good = (1, _is_finite) if phase == "weights" else (-1, _has_finite_norm)
    for stage in _stages(model):
        owners = {parameter: module for module in stage.modules() for parameter in module.parameters(recurse=False)}
        for index, logical in enumerate(logical_parameters(stage)):
            whole = logical.parameter if phase == "weights" else logical.parameter.grad
            if whole is None or is_good(local := local_tensor(whole).detach()):
                continue
            # A module that is never called has its weight used at the end, as the output projection.
            call = watch.calls.get(owners[logical.parameter], len(watch.calls) + 1)
            order = [0, sign * stage.stage_spec.number, sign * (call if phase == "backward" else index)]
            names = logical.names
            if logical.is_expert and len(local) == len(names):
                bad = [slot for slot, one in enumerate(local) if not is_good(one)]
                local, names = (local[bad[0]], (names[bad[0]],)) if bad else (local, names)
            yield BadTensor(phase, names[0], watch.rank, order, 0, *_count(local))


def _stages(model: LanguageModel) -> list[Transformer]:
    """Returns the parts of a model that are called: its pipeline stages on this rank, or the model itself."""
    if isinstance(model, Pipeline):
        return list(model)
    assert isinstance(model, Transformer)
    return [model]


def _float_tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yields (name, tensor) of the floating-point tensors in an output or in arguments, without fields that may hold
    -inf or unset values."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.numel():
            yield name, local_tensor(value).detach()
    elif (fields := CHECKED_FIELDS.get(type(value))) is not None:
        for part in fields:
            yield from _float_tensors(getattr(value, part), part)
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield from _float_tensors(one, f"{name}.{key}" if name else str(key))
    elif isinstance(value, tuple | list):
        for one in value:
            yield from _float_tensors(one, name)


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())  # device sync: only after a step has failed


def _has_finite_norm(tensor: Tensor) -> bool:
    """Returns False also for finite values whose norm overflows, since the gradient norm overflows with it."""
    return bool(torch.linalg.vector_norm(tensor).isfinite())  # device sync: only after a step has failed


def _count(tensor: Tensor) -> tuple[int, int, int]:
    """Returns the numbers of NaN, of infinite and of all values."""
    return int(tensor.isnan().sum()), int(tensor.isinf().sum()), tensor.numel()


def _largest(tensors: Iterator[Tensor]) -> float | None:
    """Returns the largest absolute value; None if there is no value, or one is NaN."""
    values = [float(tensor.abs().max()) for tensor in tensors if tensor.numel()]
    return max(values) if values and not any(value != value for value in values) else None
