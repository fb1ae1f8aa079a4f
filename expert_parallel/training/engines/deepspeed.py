"""Adapts DeepSpeed as an engine: our model, data, schedule and checkpoints; its reductions, ZeRO and optimizer step.

DeepSpeed recognises experts only by its own MoE layer. It would take ours for replicated parameters: broadcast them
from rank 0 at the start and average them at every step, without an error. So they are marked here, and their groups
registered. Only this file and zero.py use DeepSpeed's internals; both were written for version 0.19.8.
"""

import logging
import warnings
from argparse import Namespace
from functools import partial
from typing import Any

import deepspeed
import torch
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups
from torch import Tensor, nn

from expert_parallel.checkpoint.state import TorchState, TrainingState
from expert_parallel.model.outputs import ModelOutput
from expert_parallel.model.transformer import Block, Transformer
from expert_parallel.moe.context import StepContext
from expert_parallel.moe.parameters import logical_parameters
from expert_parallel.parallel.degrees import ranks_by_group
from expert_parallel.parallel.mesh import ParallelMesh, group_builder
from expert_parallel.runtime.process import Runtime
from expert_parallel.training.config import TrainingConfig
from expert_parallel.training.engines.config import DeepSpeedConfig
from expert_parallel.training.engines.zero import ZeroState
from expert_parallel.training.grads import BUCKET_BYTES, clip_gradients, global_grad_norm
from expert_parallel.training.optim import skip_update_if_not_finite

VERSION = "0.19.8"


class TupleOutput(nn.Module):
    """Returns the model's output as a tuple: DeepSpeed's hooks find tensors in tuples and dicts, not in dataclasses."""

    def __init__(self, model: Transformer) -> None:
        nn.Module.__init__(self)
        self.model = model

    def forward(self, inputs_BS: Tensor, context: StepContext) -> tuple[Any, ...]:
        output: ModelOutput = self.model(inputs_BS, context)
        return tuple(output)


class MoETupleOutput(TupleOutput, MoE):
    """Makes DeepSpeed treat the model as one with experts, by being an instance of DeepSpeed's MoE layer.

    It uses nothing else of that class. The process groups of the experts are registered when DeepSpeed asks its MoE
    layers to create them.
    """

    def __init__(self, model: Transformer, num_experts: int, name: str, ep_group: Any, edp_group: Any) -> None:
        TupleOutput.__init__(self, model)
        self.num_experts = num_experts
        self.registered = (name, ep_group, edp_group)

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        name, ep_group, edp_group = self.registered
        groups._EXPERT_PARALLEL_GROUP = {name: ep_group}
        groups._EXPERT_DATA_PARALLEL_GROUP = {name: edp_group}


class DeepSpeedEngine:
    """Trains a model with DeepSpeed's ZeRO; implements Engine (engine.py)."""

    def __init__(
        self,
        model: Transformer,
        optimizer: torch.optim.Optimizer,
        mesh: ParallelMesh,
        runtime: Runtime,
        config: TrainingConfig,
    ) -> None:
        """Initializes DeepSpeed; every rank must call it. optimizer: from `build_optimizer`; DeepSpeed wraps and
        changes it."""
        assert isinstance(config.engine, DeepSpeedConfig)
        set_up_deepspeed(runtime)
        self.model = model
        self.optimizer = optimizer
        self.mesh = mesh
        self.stage = config.engine.zero_stage
        self.clip_norm = config.clip_norm
        # ZeRO-3 always averages over all ranks; the factor turns the mean into a sum (exact for powers of two).
        self.loss_factor = float(runtime.world_size) if self.stage == 3 else 1.0
        register_freeze_hooks(optimizer)
        frozen = [group["frozen_rows"] for group in optimizer.param_groups]
        module = mark_experts(model, optimizer, mesh, runtime)
        if self.stage == 3:
            prepare_zero3(module, model)
        settings = deepspeed_config(config, on_gpu=runtime.device.type == "cuda")
        self.engine, *_ = deepspeed.initialize(
            args=Namespace(device_rank=runtime.device.index or 0),
            model=module,
            optimizer=optimizer,
            config=settings,
            dist_init_required=False,
        )
        self._state: TrainingState = TorchState(optimizer)
        if self.stage > 0:
            self._state = zero = ZeroState(self.engine.optimizer, optimizer, self.stage)
            for group, rows in zip(optimizer.param_groups, frozen, strict=True):
                group["frozen_rows"] = zero.flatten_rows(rows)

    @property
    def state(self) -> TrainingState:
        return self._state

    @property
    def skips_bad_updates(self) -> bool:
        return self.stage < 3  # ZeRO 1 and 2 skip them by themselves

    def forward(self, inputs_BS: Tensor, context: StepContext) -> ModelOutput:
        return ModelOutput(*self.engine(inputs_BS, context))

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        # scale_wrt_gas: DeepSpeed would divide by the number of micro-steps; the loss is divided by all tokens already.
        self.engine.backward(loss * self.loss_factor, scale_wrt_gas=False)
        if not is_last:
            self.engine.step()  # between micro-steps it only counts

    def update(self, rate: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.stage > 0:
            self.engine.step()
            return float(self.engine.get_global_grad_norm())  # device sync: the loop reports the norm
        # Without ZeRO, DeepSpeed clips by the mean of the ranks' norms, which is wrong if experts are sharded.
        # Gradients are not sharded here, so our own norm and clipping apply.
        norm = global_grad_norm(self.model, self.mesh)
        if self.clip_norm is not None:
            clip_gradients(self.model, norm, self.clip_norm)
        skip_update_if_not_finite(self.optimizer, norm)
        self.engine.step()
        return float(norm)


def check_deepspeed_version() -> None:
    """Raises ValueError if DeepSpeed has another version than the one that this engine supports."""
    if deepspeed.__version__.split("+")[0] != VERSION:
        raise ValueError(
            f"training.engine.kind is 'deepspeed' but DeepSpeed {deepspeed.__version__} is installed: the engine needs "
            f"{VERSION}, whose internals it reads"
        )


def set_up_deepspeed(runtime: Runtime) -> None:
    """Silences DeepSpeed's log and, on the CPU, disables its compiled operators."""
    deepspeed.utils.logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)  # DeepSpeed uses them
    if runtime.device.type == "cpu":
        # DeepSpeed would compile a shared-memory all-reduce at first use, which takes half a minute and needs a
        # compiler. gloo's is enough, so we declare all of its operators incompatible without probing.
        deepspeed.ops.__compatible_ops__ = {}


def mark_experts(
    model: Transformer, optimizer: torch.optim.Optimizer, mesh: ParallelMesh, runtime: Runtime
) -> TupleOutput:
    """Tells DeepSpeed which ranks share the dense parameters, and which the experts.

    DeepSpeed reads `allreduce` and `group_name` of a parameter, `moe` and `name` of an optimizer group, and its
    registry of groups by these names. With ep 1 experts are replicated like all other parameters, and nothing is
    marked.
    """
    degrees, make = mesh.degrees, group_builder(runtime.device.type, runtime.timeout)
    world = make([list(range(degrees.world_size))], alone=True)
    groups._WORLD_GROUP = world  # DeepSpeed's own would not have the user's timeout
    groups._EXPERT_PARALLEL_GROUP = {}
    groups._EXPERT_DATA_PARALLEL_GROUP = {}
    if degrees.ep == 1:
        return TupleOutput(model)
    name = f"ep_size_{degrees.ep}"  # DeepSpeed parses this name
    experts: set[Any] = {logical.parameter for logical in logical_parameters(model) if logical.is_expert}
    for parameter in experts:
        parameter.allreduce = False
        parameter.group_name = name
    for group in optimizer.param_groups:
        if group["params"][0] in experts:
            group["moe"] = True
            group["name"] = name
    ranks = ranks_by_group(degrees)
    return MoETupleOutput(model, len(experts), name, make(ranks["ep"], alone=True), make(ranks["edp"], alone=True))


def register_freeze_hooks(optimizer: torch.optim.Optimizer) -> None:
    """Registers hooks that set the gradients of frozen rows to 0 before DeepSpeed reads them."""
    for group in optimizer.param_groups:
        for parameter, rows in group["frozen_rows"].items():
            mask = rows.view(-1, *[1] * (parameter.dim() - 1))
            parameter.register_hook(partial(torch.Tensor.masked_fill, mask=mask, value=0.0))


def prepare_zero3(module: TupleOutput, model: Transformer) -> None:
    """Tells ZeRO-3 which weights to gather together, as it gathers them when a module's forward pass begins.

    Blocks are gathered whole, since dataclasses inside them hide tensors from its hooks; the output projection is
    gathered with the whole model, since the logits use its weight outside the forward of its module.
    """
    deepspeed.utils.set_z3_leaf_modules(module, [Block])
    table = model.embedding if model.unembedding is None else model.unembedding
    assert table is not None
    deepspeed.zero.register_external_parameter(module, table.weight)


def deepspeed_config(config: TrainingConfig, *, on_gpu: bool) -> dict[str, Any]:
    """Returns DeepSpeed's config. The model casts by itself, so that DeepSpeed sees float32 only."""
    assert isinstance(config.engine, DeepSpeedConfig)
    stage, clips = config.engine.zero_stage, config.clip_norm is not None
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": False,
        "reduce_bucket_size": BUCKET_BYTES // 4,
        "allgather_bucket_size": BUCKET_BYTES // 4,
        "memory_efficient_linear": False,  # True would replace torch's linear in the whole process
    }
    if config.engine.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    return {
        "train_micro_batch_size_per_gpu": 1,  # only used by DeepSpeed's own log
        "gradient_accumulation_steps": config.micro_steps,
        # Each rank has back-propagated its share of the global loss. (ZeRO-3 refuses "sum".)
        "gradient_allreduce_op": "mean" if stage == 3 else "sum",
        "gradient_clipping": config.clip_norm if clips and stage > 0 else 0.0,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's own Adam would be compiled at first use
        "steps_per_print": None,
    }
