"""Defines rules for the rotary positions of single families: a base that is stretched, and queries that are scaled."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from expert_parallel.interop.hf_config import HuggingFaceConfig, Tree, short
from expert_parallel.interop.rope import LARGEST_FLOAT, ORIGINAL_LENGTH, PARTIAL, Rope
from expert_parallel.interop.rules import get_setting, set_setting

FORMS = ("rope_scaling", "rope_parameters")
BETA = "llama_4_scaling_beta"
LARGEST_ALPHA = 1e9  # far above published ones, and its powers are finite


def change_forms(theirs: HuggingFaceConfig, change: Callable[[Tree], Tree]) -> HuggingFaceConfig:
    """Returns a config.json with other rotary parameters, in both forms that there may be. What is read of one of the
    two counts as read of the other."""
    changed = {key: change(theirs.values[key]) for key in FORMS if isinstance(theirs.values.get(key), dict)}
    other = HuggingFaceConfig({**theirs.values, **changed})
    other.asked = theirs.asked
    return other


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -LARGEST_FLOAT <= value <= LARGEST_FLOAT


@dataclass(frozen=True)
class StretchedRope(Rope):
    """Translates Hunyuan's rope_type `dynamic` with an alpha: heads of h columns have the base theta alpha^(h / (h -
    2)), whatever the length of a text. Exports state this base as rope_theta."""

    def read(self, theirs: HuggingFaceConfig, ours: Tree) -> None:
        size, beside = get_setting(ours, "attention.head_size"), theirs.values.get("rope_theta")

        def is_stretched(form: Any) -> bool:
            kind = form.get("rope_type", form.get("type")) if isinstance(form, dict) else None
            return kind == "dynamic" and bool(form.get("alpha"))

        def stretch(form: Tree) -> Tree:
            if not is_stretched(form):
                return form
            alpha, theta = form["alpha"], form.get("rope_theta", self.default_theta if beside is None else beside)
            if not _is_number(alpha) or not 0 < alpha <= LARGEST_ALPHA or size <= 2:
                raise ValueError(
                    f"config.json: alpha of the rotary positions is {short(alpha)}: it must be a number above 0 and at "
                    f"most {LARGEST_ALPHA:g}, and head_dim ({size}) must be above 2"
                )
            factor = alpha ** (size / (size - 2))
            return {"rope_type": "default", "rope_theta": theta * factor if _is_number(theta) else theta}

        changed = change_forms(theirs, stretch)
        if any(is_stretched(theirs.values.get(key)) for key in FORMS):
            changed.values.pop("rope_theta", None)  # it is in the forms, stretched
        super().read(changed, ours)


@dataclass(frozen=True)
class ScaledQueriesRope(Rope):
    """Translates the rotary positions of Mistral 4, whose parameters also scale queries by their position, and give the
    share of a latent head's columns that are rotary."""

    def read(self, theirs: HuggingFaceConfig, ours: Tree) -> None:
        rope, nope = (get_setting(ours, f"attention.{name}") for name in ("rope_size", "nope_size"))
        scalings = []

        def take_scaling(form: Tree) -> Tree:
            form = dict(form)
            form.pop("max_position_embeddings", None)  # beside the key of this name, which is the one that is read
            share = form.pop(PARTIAL, rope / (rope + nope))
            if not _is_number(share) or int((rope + nope) * share) != rope:
                raise ValueError(
                    f"config.json: {PARTIAL} is {short(share)}: it must make {rope} of {rope + nope} columns rotary, "
                    "as qk_rope_head_dim says"
                )
            scalings.append({"beta": form.pop(BETA, None), "length": form.get(ORIGINAL_LENGTH)})
            return form

        super().read(change_forms(theirs, take_scaling), ours)
        if get_setting(ours, "position.scaling") is None:  # transformers' class then rotates all columns, and fails
            raise ValueError(
                "config.json: the rotary positions have no scaling, such as rope_type 'yarn': without one, the class "
                "of transformers does not compute this model"
            )
        for scaling in scalings:
            if not _is_number(scaling["beta"]) or scaling != scalings[0]:
                raise ValueError(
                    f"config.json: {BETA} of the rotary positions is {short(scaling['beta'])}: it must be a number, "
                    "and the same in rope_parameters and rope_scaling"
                )
            if scaling["beta"]:
                set_setting(ours, "attention.length_scaling", scaling)

    def write(self, ours: Tree, theirs: Tree) -> None:
        super().write(ours, theirs)
        sizes = [get_setting(ours, f"attention.{name}") for name in ("rope_size", "nope_size")]
        scaling = get_setting(ours, "attention.length_scaling")
        for form in (theirs[key] for key in FORMS if theirs[key] is not None and None not in sizes):
            form |= {BETA: 0.0 if scaling is None else scaling["beta"], PARTIAL: sizes[0] / sum(sizes)}
