"""Names the settings to try against an unhealthy condition of a run, with the values that they have now."""

import math
from collections.abc import Callable
from typing import Any

from expert_parallel.config import one_line
from expert_parallel.moe.capacity.policies import AbsoluteConfig, FactorConfig
from expert_parallel.moe.config import MoEConfig
from expert_parallel.moe.routers.base import HashConfig, TopKRouterConfig
from expert_parallel.moe.routers.registry import router_settings
from expert_parallel.training.config import Config, TrainingConfig
from expert_parallel.training.freeze import AllTrainable
from expert_parallel.training.health import HealthEvent, Kind, describe
from expert_parallel.training.replay import ReplayConfig

BALANCING = ("balance", "importance", "load")  # kinds of losses
# A larger coefficient would cost more loss than balance gains; the published ones are 0.0001 to 0.1.
MAX_COEFFICIENT, MAX_BIAS_RATE = 0.1, 0.01
BALANCE, Z_LOSS = {"kind": "balance", "coefficient": 0.01}, {"kind": "z_loss", "coefficient": 0.001}
UNEVEN = 0.5  # a load cv above it is the likely cause of drops
SAFE_RATE = 1e-3  # with which AdamW trains most small models; published large ones have less
ABSURD_RATE = 0.02  # beyond any published rate of AdamW for transformers; it is then the first suspect


def health_sentence(events: list[HealthEvent], config: Config) -> str:
    """Returns what a group of events of one kind is (see `describe`), and the settings to try with their present
    values."""
    is_uneven = any(event.condition.load_cv > UNEVEN for event in events)
    advice = ADVICE | UNEVEN_ADVICE if is_uneven else ADVICE
    suggestions = advice[events[0].condition.kind](config.model.moe, config.training)
    if config.training.optimizer.learning_rate >= ABSURD_RATE:
        suggestions = list(dict.fromkeys([_lower_rate(config.training, 2), *suggestions]))
    return f"{describe(events)}. {'; or '.join(suggestions)}"


def advise_balance(moe: MoEConfig | None, training: TrainingConfig) -> list[str]:
    """Returns suggestions against an uneven load of the experts."""
    assert moe is not None
    if fixed := _fixed_routing(moe, training):
        return fixed
    router = router_settings(moe.router)
    found = _more_balance(moe)
    if isinstance(router, TopKRouterConfig) and 0 < router.balance_bias_rate < MAX_BIAS_RATE:
        rate = router.balance_bias_rate
        found.append(_change("model.moe.router.balance_bias_rate", rate, min(10 * rate, MAX_BIAS_RATE)))
    if isinstance(router, TopKRouterConfig) and router.jitter == 0:
        found.append(_change("model.moe.router.jitter", 0, 0.01))
    return found or [_lower_rate(training, 2)]


def advise_drops(moe: MoEConfig | None, training: TrainingConfig) -> list[str]:
    """Returns suggestions against dropped choices: more room, or a more even load."""
    assert moe is not None
    capacity = moe.capacity
    if isinstance(capacity, AbsoluteConfig):
        found = [_change("model.moe.capacity.train", capacity.train, math.ceil(1.5 * capacity.train))]
    elif isinstance(capacity, FactorConfig):
        found = [_change("model.moe.capacity.train", capacity.train, max(1.5 * capacity.train, 1.25))]
    elif capacity.receive_bound is not None:
        found = [_change("model.moe.capacity.receive_bound", capacity.receive_bound, 1.5 * capacity.receive_bound)]
    else:  # a replayed record has drops, whatever the capacity is
        found = []
    return found + advise_balance(moe, training)


def advise_uneven_drops(moe: MoEConfig | None, training: TrainingConfig) -> list[str]:
    """Returns suggestions against dropped choices of an uneven load: first a more even one, as room for all choices of
    the fullest expert would be empty in the others."""
    assert moe is not None
    balance = [] if _fixed_routing(moe, training) else _more_balance(moe)
    return list(dict.fromkeys([*balance, *advise_drops(moe, training)]))


def advise_entropy(moe: MoEConfig | None, training: TrainingConfig) -> list[str]:
    """Returns suggestions against a router whose probabilities are nearly 0 and 1: smaller logits, slower steps."""
    assert moe is not None
    if fixed := _fixed_routing(moe, training):
        return fixed
    if any(loss.kind == "z_loss" for loss in moe.losses):
        return [*_raise_coefficients(moe, ("z_loss",)), _lower_rate(training, 2)]
    return [f"model.moe.losses has no z-loss: set {add_losses(moe, Z_LOSS)}", _lower_rate(training, 2)]


def advise_uneven_entropy(moe: MoEConfig | None, training: TrainingConfig) -> list[str]:
    """Returns suggestions against a router whose probabilities are nearly 0 and 1, on few experts."""
    assert moe is not None
    kinds = {loss.kind for loss in moe.losses}
    if _fixed_routing(moe, training) or not kinds.isdisjoint(BALANCING):
        return advise_entropy(moe, training)
    if "z_loss" in kinds:
        return [*_more_balance(moe), *advise_entropy(moe, training)]
    both = add_losses(moe, BALANCE, Z_LOSS)
    return [f"model.moe.losses has no balance loss and no z-loss: set {both}", _lower_rate(training, 2)]


def advise_spikes(moe: MoEConfig | None, training: TrainingConfig) -> list[str]:
    """Returns suggestions against spikes of the gradient norm."""
    found = [_change("training.clip_norm", None, 1)] if training.clip_norm is None else []
    return [*found, _lower_rate(training, 2), *_longer_warmup(training)]


def advise_loss(moe: MoEConfig | None, training: TrainingConfig) -> list[str]:
    """Returns suggestions against a loss that rises."""
    found = [_lower_rate(training, 4), *_longer_warmup(training)]
    return found if training.clip_norm is not None else [*found, _change("training.clip_norm", None, 1)]


ADVICE: dict[Kind, Callable[[MoEConfig | None, TrainingConfig], list[str]]] = {
    "collapse": advise_balance,
    "dead": advise_balance,
    "dropped": advise_drops,
    "entropy": advise_entropy,
    "gradient_spike": advise_spikes,
    "loss_rise": advise_loss,
}
# In place of these if the load of a layer is uneven.
UNEVEN_ADVICE: dict[Kind, Callable[[MoEConfig | None, TrainingConfig], list[str]]] = {
    "dropped": advise_uneven_drops,
    "entropy": advise_uneven_entropy,
}


def add_losses(moe: MoEConfig, *added: dict[str, Any]) -> str:
    """Returns the setting that adds losses to those of the layer, in quotes for a shell."""
    trees = [loss.model_dump(mode="json", exclude_defaults=True) for loss in moe.losses]
    return f"'model.moe.losses={one_line([*trees, *added])}'"


def _fixed_routing(moe: MoEConfig, training: TrainingConfig) -> list[str]:
    """Returns what to change if no loss can change the routing; an empty list if losses can."""
    router = router_settings(moe.router)
    if isinstance(training.routing, ReplayConfig):
        return ["training.routing.kind is 'play', so the choices are those of the record: record others"]
    if not isinstance(training.trainable, AllTrainable) and training.trainable.router == "frozen":
        return ["training.trainable.router is 'frozen': try 'chosen'"]
    if isinstance(router, HashConfig):
        return [
            f"model.moe.router.seed is {router.seed}: try another one, in a new run",
            "model.moe.router.kind is 'hash', which does not adapt: try 'top_k' with a balance loss, in a new run",
        ]
    return []


def _lower_rate(training: TrainingConfig, divisor: int) -> str:
    rate = training.optimizer.learning_rate
    return _change("training.optimizer.learning_rate", rate, min(rate / divisor, SAFE_RATE))


def _longer_warmup(training: TrainingConfig) -> list[str]:
    """Returns a suggestion if the warm-up is shorter than 1 % of the run."""
    warmup, longer = training.schedule.warmup_steps, math.ceil(training.steps / 20)
    return [_change("training.schedule.warmup_steps", warmup, longer)] if 100 * warmup < training.steps else []


def _more_balance(moe: MoEConfig) -> list[str]:
    """Returns suggestions of a balance loss, or of larger coefficients."""
    if any(loss.kind in BALANCING for loss in moe.losses):
        return _raise_coefficients(moe, BALANCING)
    return [f"model.moe.losses has no balance loss: set {add_losses(moe, BALANCE)}"]


def _raise_coefficients(moe: MoEConfig, kinds: tuple[str, ...]) -> list[str]:
    """Returns a suggestion for each loss of these kinds that may have a larger coefficient."""
    found = []
    for number, loss in enumerate(moe.losses):
        larger = float(f"{min(10 * loss.coefficient, MAX_COEFFICIENT):.3g}")
        if loss.kind in kinds and loss.coefficient < MAX_COEFFICIENT:
            losses = [*moe.losses]
            losses[number] = loss.model_copy(update={"coefficient": larger})
            change = _change(f"model.moe.losses[{number}].coefficient", loss.coefficient, larger)
            found.append(f"{change}, with {add_losses(moe.model_copy(update={'losses': losses}))}")
    return found


def _change(path: str, now: float | None, proposed: float) -> str:
    to_try = f"{proposed:.3g}" if proposed < 1000 else f"{proposed:.0f}"
    return f"{path} is {'null' if now is None else f'{now:g}'}: try {to_try}"
