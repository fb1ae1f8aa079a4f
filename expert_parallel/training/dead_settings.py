"""Finds settings of a run that are valid but have no effect, or another one than they seem to have."""

from collections.abc import Iterator

from expert_parallel.checkpoint.config import CheckpointConfig
from expert_parallel.model.config import ModelConfig
from expert_parallel.moe.capacity.policies import AbsoluteConfig, CapacitySettings, FactorConfig
from expert_parallel.moe.config import MoEConfig, preset_contradictions
from expert_parallel.moe.routers.base import LinearSettings, TopKRouterConfig
from expert_parallel.moe.routers.noisy import GShardConfig
from expert_parallel.moe.routers.registry import router_settings
from expert_parallel.parallel.degrees import ShardedConfig
from expert_parallel.training.config import Config, EvaluationConfig, TrainingConfig
from expert_parallel.training.optim import CosineConfig, WSDConfig


def dead_settings(config: Config) -> list[str]:
    """Returns a sentence for each setting that has no effect, with its path and the numbers."""
    found = [*_run_length(config), *_training(config.training)]
    if config.model.moe is not None:
        found += [
            *_preset(config.model.moe),
            *_routing(config.model.moe),
            *_capacity(config.model.moe, config.training),
        ]
    return [*found, *_model(config.model, config.training), *_layout(config)]


def _run_length(config: Config) -> Iterator[str]:
    training, steps = config.training, config.training.steps
    warmup = training.schedule.warmup_steps
    if warmup >= steps:
        yield (
            f"training.schedule.warmup_steps ({warmup}) is not below training.steps ({steps}): the run ends within the "
            f"warm-up, and training.schedule.kind {training.schedule.kind!r} has no effect"
        )
    # A value above the run's length is worth a word where somebody chose it.
    evaluation, checkpoint = config.evaluation, config.checkpoint
    if evaluation.every > steps and evaluation.every != EvaluationConfig().every:
        yield (
            f"evaluation.every ({evaluation.every}) is above training.steps ({steps}): the model is evaluated "
            "before the first and after the last step alone"
        )
    if checkpoint.every > steps and checkpoint.every != CheckpointConfig().every:
        yield f"checkpoint.every ({checkpoint.every}) is above training.steps ({steps}): the last step alone is saved"
    if checkpoint.keep_every is not None and checkpoint.keep_every > steps:
        yield f"checkpoint.keep_every ({checkpoint.keep_every}) is above training.steps ({steps}): it keeps nothing"


def _training(training: TrainingConfig) -> Iterator[str]:
    schedule = training.schedule
    if schedule.warmup_steps >= training.steps:
        return
    if isinstance(schedule, CosineConfig | WSDConfig) and schedule.final_fraction == 1:
        yield (
            f"training.schedule.final_fraction is 1: the schedule {schedule.kind} does not decay, as if its kind were "
            "'constant'"
        )


def _preset(moe: MoEConfig) -> Iterator[str]:
    tree = moe.model_dump()
    yield from preset_contradictions(tree)
    if moe.preset_overrides and not preset_contradictions({**tree, "preset_overrides": False}):
        preset = "null" if moe.preset is None else moe.preset
        yield f"model.moe.preset_overrides is true, but no setting contradicts model.moe.preset, which is {preset}"


def _routing(moe: MoEConfig) -> Iterator[str]:
    router, experts = router_settings(moe.router), moe.num_experts
    chosen = router.num_choices(experts)
    if isinstance(router, TopKRouterConfig) and router.group_limit is not None:
        groups = router.group_limit
        if groups.limit == groups.count:
            yield (
                f"model.moe.router.group_limit.limit ({groups.limit}) equals model.moe.router.group_limit.count "
                f"({groups.count}): every group may be chosen from, so it limits nothing"
            )
    chooses_all = isinstance(router, LinearSettings) and chosen == experts
    if chooses_all:
        yield (
            f"model.moe.router.k ({chosen}) equals model.moe.num_experts ({experts}): every token uses every expert, "
            "and the router only weighs them"
        )
    if isinstance(router, TopKRouterConfig) and router.balance_bias_rate and chooses_all:
        yield (
            f"model.moe.router.balance_bias_rate ({router.balance_bias_rate:g}) changes the choice of experts, but "
            f"model.moe.router.k ({chosen}) equals model.moe.num_experts ({experts})"
        )
    for number, loss in enumerate(moe.losses):
        if loss.kind == "balance" and (experts == 1 or (chooses_all and loss.choices == "all")):
            yield (
                f"model.moe.losses[{number}] balances the load, but every token uses all of model.moe.num_experts "
                f"({experts}): the loss is always 1 and has no gradient"
            )
        if loss.kind == "balance" and loss.choices == "first" and chosen == 1:
            yield f"model.moe.losses[{number}].choices is 'first', but model.moe.router.k is 1: there is no other one"
    if isinstance(router, GShardConfig) and router.second == "gumbel" and router.threshold != 0.5:
        yield (
            f"model.moe.router.threshold ({router.threshold:g}) is used by model.moe.router.second 'proportional' "
            "alone, and it is 'gumbel'"
        )


def _capacity(moe: MoEConfig, training: TrainingConfig) -> Iterator[str]:
    capacity, router, experts = moe.capacity, router_settings(moe.router), moe.num_experts
    if not isinstance(capacity, CapacitySettings):
        return
    chosen = router.num_choices(experts)
    if capacity.priority in ("probability", "batch_priority") and router.kind == "hash":
        yield (
            f"model.moe.capacity.priority is {capacity.priority!r}, but model.moe.router.kind is 'hash', whose scores "
            "are all equal: the queue goes by position"
        )
    elif capacity.priority in ("probability", "batch_priority") and experts == 1:
        yield (
            f"model.moe.capacity.priority is {capacity.priority!r}, but model.moe.num_experts is 1, whose score is "
            "always 1: the queue goes by position"
        )
    if chosen == 1 and not capacity.first_choices_first:
        yield "model.moe.capacity.first_choices_first is false, but model.moe.router.k is 1: each choice is a first one"
    if capacity.pad:  # for static shapes, whether or not something is dropped
        return
    # A token chooses an expert once, so no expert gets more choices than there are tokens.
    if isinstance(capacity, FactorConfig) and min(capacity.train, capacity.eval) * chosen >= experts:
        yield (
            f"model.moe.capacity.train ({capacity.train:g}) and eval ({capacity.eval:g}) times model.moe.router.k "
            f"({chosen}) are not below model.moe.num_experts ({experts}): every expert has room for every token, so "
            "nothing is dropped, as with model.moe.capacity.kind 'dropless'"
        )
    tokens = training.global_batch // training.micro_steps * training.sequence_length
    if isinstance(capacity, AbsoluteConfig) and min(capacity.train, capacity.eval) >= tokens:
        yield (
            f"model.moe.capacity.train ({capacity.train}) and eval ({capacity.eval}) are not below the {tokens} tokens "
            "of a micro-step: nothing is dropped, as with model.moe.capacity.kind 'dropless'"
        )


def _model(model: ModelConfig, training: TrainingConfig) -> Iterator[str]:
    for name in ("window", "chunk"):
        limit = getattr(model.attention, name, None)
        if limit is not None and limit >= training.sequence_length:
            yield (
                f"model.attention.{name} ({limit}) is not below training.sequence_length ({training.sequence_length}): "
                "every token sees all earlier ones in training"
            )
    scaling = model.attention.length_scaling
    if scaling is not None and scaling.length >= training.sequence_length + scaling.offset:
        yield (
            f"model.attention.length_scaling.length ({scaling.length}) is not below training.sequence_length + offset "
            f"({training.sequence_length + scaling.offset}): no query is scaled in training"
        )


def _layout(config: Config) -> Iterator[str]:
    parallel, moe = config.parallel, config.model.moe
    if isinstance(parallel.data, ShardedConfig) and parallel.data.shards == 1 and parallel.data.expert_shards == 1:
        yield "parallel.data.kind is 'sharded', but shards and expert_shards are 1: every rank holds whole weights"
    if moe is not None and parallel.ep == 1 and moe.dispatcher.exchange_dtype != "model":
        yield (
            f"model.moe.dispatcher.exchange_dtype is {moe.dispatcher.exchange_dtype!r}, but parallel.ep is 1: no rows "
            "are exchanged"
        )
    if moe is not None and parallel.ep == 1 and moe.dispatcher.overlap > 1:
        yield (
            f"model.moe.dispatcher.overlap is {moe.dispatcher.overlap}, but parallel.ep is 1: there is no exchange to "
            "overlap"
        )
