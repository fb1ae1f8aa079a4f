"""Defines the rules for the balance losses of a config.json, which training adds and no logit depends on."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from expert_parallel.interop.hf_config import LARGEST, HuggingFaceConfig, Tree, short
from expert_parallel.interop.rules import Rule, get_setting, set_setting

POOLED, SEQUENCE, Z_LOSS = "router_aux_loss_coef", "aux_loss_alpha", "router_z_loss_coef"
# All keys of losses: an export states those of its family, and takes none over from the model's origin.
LOSS_KEYS = (POOLED, SEQUENCE, "seq_aux", Z_LOSS)
LARGE = 0.1  # published coefficients are smaller


@dataclass(frozen=True)
class PooledBalanceLoss:
    """Translates router_aux_loss_coef, the coefficient of load_balancing_loss_func in transformers.

    That is E * sum over experts of f * P, pooled over all MoE layers. Its f sums to k and ours to 1, so our coefficient
    is k times theirs. default: what transformers takes if the key is absent.
    """

    default: float = 0.001
    keys: ClassVar[tuple[str, ...]] = (POOLED,)

    def read(self, theirs: HuggingFaceConfig, ours: Tree) -> None:
        coefficient = _rounded(get_setting(ours, "moe.router.k") * _coefficient(theirs, POOLED, self.default))
        loss = {"kind": "balance", "coefficient": coefficient, "layers": "pooled"}
        set_setting(ours, "moe.losses", [loss] if coefficient else [])

    def write(self, ours: Tree, theirs: Tree) -> None:
        losses, k = get_setting(ours, "moe.losses"), get_setting(ours, "moe.router.k")
        pooled = [loss["coefficient"] for loss in losses or [] if _is_balance(loss, "pooled", ("global",))]
        if pooled:
            theirs[POOLED] = _rounded(pooled[0] / k)
        elif not losses:
            theirs[POOLED] = 0.0

    def describe(self, theirs: HuggingFaceConfig, losses: list[Tree]) -> str:
        """Returns a sentence on the loss that runs of the imported model train with, or on why there is none."""
        value = f"{POOLED} is {_coefficient(theirs, POOLED, self.default):g}"
        if POOLED not in theirs.values:
            value += " by default"
        if not losses:
            return f"training adds no balance loss, since {value}"
        coefficient, used = losses[0]["coefficient"], bool(theirs.values.get("output_router_logits"))
        k = theirs.take("num_experts_per_tok", "moe_k")
        return (
            f"training adds a balance loss with coefficient {coefficient:g}, since {value} and k is {k}; transformers "
            f"{'does, too' if used else 'does not, since output_router_logits is false'}"
        )


@dataclass(frozen=True)
class SequenceBalanceLoss:
    """Translates aux_loss_alpha and seq_aux of DeepSeek-V3: E * sum over experts of f * P of each layer, over each
    sequence, or over all tokens if seq_aux is false. f sums to 1, as ours.

    transformers has no such loss. Source: DeepSeek-AI 2024, equations 17 to 20.
    """

    keys: ClassVar[tuple[str, ...]] = (SEQUENCE, "seq_aux")

    def read(self, theirs: HuggingFaceConfig, ours: Tree) -> None:
        coefficient = _coefficient(theirs, SEQUENCE, 0.0)
        scope = "sequence" if theirs.flag("seq_aux", default=True) else "global"
        loss = {"kind": "balance", "coefficient": coefficient, "scope": scope}
        set_setting(ours, "moe.losses", [loss] if coefficient else [])

    def write(self, ours: Tree, theirs: Tree) -> None:
        for loss in get_setting(ours, "moe.losses") or []:
            if _is_balance(loss, "each", ("sequence", "global")):
                theirs |= {SEQUENCE: loss["coefficient"], "seq_aux": loss["scope"] == "sequence"}
                return

    def describe(self, theirs: HuggingFaceConfig, losses: list[Tree]) -> str:
        """Returns a sentence on the loss that runs of the imported model train with, or on why there is none."""
        if not losses:
            return f"training adds no balance loss, since config.json has no {SEQUENCE} above 0"
        coefficient, tokens = losses[0]["coefficient"], "sequence" if losses[0]["scope"] == "sequence" else "batch"
        return (
            f"training adds a balance loss of each {tokens} with coefficient {coefficient:g}, which is {SEQUENCE}; "
            "transformers has no such loss"
        )


@dataclass(frozen=True)
class LogitBalanceLoss:
    """Leaves out router_aux_loss_coef of a family with a sigmoid router: load_balancing_loss_func of transformers takes
    the softmax of its logits, which are no scores of that router."""

    keys: ClassVar[tuple[str, ...]] = (POOLED,)

    def read(self, theirs: HuggingFaceConfig, ours: Tree) -> None:
        _coefficient(theirs, POOLED, 0.0)
        set_setting(ours, "moe.losses", [])

    def write(self, ours: Tree, theirs: Tree) -> None:
        pass

    def describe(self, theirs: HuggingFaceConfig, losses: list[Tree]) -> str:
        """Returns a sentence on why runs of the imported model train without the loss of config.json."""
        if not (coefficient := _coefficient(theirs, POOLED, 0.0)):
            return f"training adds no balance loss, since config.json has no {POOLED} above 0"
        return (
            f"{POOLED} ({coefficient:g}) is not kept: transformers takes that loss of a softmax of the logits, but the "
            "scores of the router are sigmoids"
        )


def describe_losses(rules: Iterable[Rule], architecture: str, config: Tree, losses: list[Tree]) -> list[str]:
    """Returns sentences on the losses of a config.json: which one is kept, its coefficient if it is unusual, and which
    are not kept.

    rules: those of the family. architecture: its class in transformers. losses: the resolved `model.moe.losses`.
    """
    kept = [rule for rule in rules if isinstance(rule, PooledBalanceLoss | SequenceBalanceLoss | LogitBalanceLoss)]
    sentences = [rule.describe(HuggingFaceConfig(config), losses) for rule in kept]
    for coefficient in (loss["coefficient"] for loss in losses if loss["coefficient"] > LARGE):
        sentences.append(
            f"{coefficient:g} is a large coefficient: balanced experts alone add {coefficient:g} to the loss; "
            "model.moe.losses changes it"
        )
    own = [key for rule in kept for key in rule.keys]
    for key in (POOLED, SEQUENCE, Z_LOSS):
        if key not in own and config.get(key):
            sentences.append(
                f"{key} ({short(config[key])}) is not kept: {architecture} of transformers has no such loss"
            )
    return sentences


def _coefficient(theirs: HuggingFaceConfig, key: str, default: float) -> float:
    """Returns a coefficient; null is 0. Raises a ValueError unless it is a number from 0 to LARGEST."""
    value = theirs.take(key, default=default)
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= LARGEST:  # also NaN
        raise theirs.refuse(key, f"it must be a number from 0 to {LARGEST:,}")
    return float(value)


def _rounded(value: float) -> float:
    """Returns a product or quotient without its last binary digits: 0.3 instead of 0.30000000000000004."""
    return float(f"{value:.15g}")


def _is_balance(loss: Tree, layers: str, scopes: tuple[str, ...]) -> bool:
    """Returns True for a resolved balance loss that counts all choices and has these settings."""
    kind = (loss["kind"], loss.get("choices"), loss.get("layers"))
    return kind == ("balance", "all", layers) and loss["scope"] in scopes
