"""Defines the rule for rotary positions in a config.json.

transformers 5 stores them in rope_parameters, earlier versions in rope_theta and rope_scaling.
"""

import math
import sys
from dataclasses import dataclass
from typing import Any

from expert_parallel.interop.hf_config import HuggingFaceConfig, Tree, short
from expert_parallel.interop.rules import get_setting, set_setting

ORIGINAL_LENGTH, PARTIAL = "original_max_position_embeddings", "partial_rotary_factor"
SCALINGS = {  # rope_type -> key in config.json -> our setting
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_frequency_factor",
        "high_freq_factor": "high_frequency_factor",
        ORIGINAL_LENGTH: "original_length",
    },
    "yarn": {
        "factor": "factor",
        ORIGINAL_LENGTH: "original_length",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
        "mscale": "mscale",
        "mscale_all_dim": "mscale_all_dim",
        "truncate": "truncate",
    },
}
LONGROPE = "longrope"
LARGEST_FLOAT = sys.float_info.max
# Keys of YaRN that may be absent or null: then our default holds, which is that of transformers.
NULLABLE = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")


@dataclass(frozen=True)
class Rope:
    """Translates rotary positions. Reads and writes both forms, so that every version of transformers finds its own.
    Comes after the rules of heads.

    is_optional: without any of the keys, positions are unscaled. In gpt-oss the keys are required, since versions of
    transformers have different defaults. partial: the default of partial_rotary_factor, the share of a head's columns
    that are rotary; None: it must be 1. size_key: the key that gives their number instead, if any. mscales: as in
    Phi-3.5-MoE, LongRoPE has two factors for cos and sin, short_mscale and long_mscale.
    """

    default_theta: float = 10000.0
    is_optional: bool = True
    partial: float | None = None
    size_key: str | None = None
    mscales: bool = False

    def read(self, theirs: HuggingFaceConfig, ours: Tree) -> None:
        found = self._parameters(theirs)
        theta = _number("rope_theta", found.pop("rope_theta", self.default_theta))
        if theta <= 1:
            raise ValueError(f"config.json: rope_theta of the rotary positions is {theta}, it must be above 1")
        set_setting(ours, "position", {"kind": "rope", "theta": theta})
        self._set_rope_size(theirs, ours)
        longest = theirs.size("max_position_embeddings", default=None)
        kinds = [found.pop(key) for key in ("rope_type", "type") if key in found] or ["default"]
        kind = kinds[0]
        if any(other != kind for other in kinds) or kind not in ("default", *SCALINGS, LONGROPE):
            raise ValueError(
                f"config.json: rope_type is {' and '.join(map(short, kinds))}, it must be one of "
                f"{', '.join(('default', *SCALINGS, LONGROPE))}"
            )
        if kind == LONGROPE:
            set_setting(ours, "position.scaling", self._longrope(theirs, found, longest))
        elif kind != "default":
            set_setting(ours, "position.scaling", {"kind": kind, **_scaling(kind, found, longest)})
        if found:
            left = ", ".join(f"{short(key)} ({short(value)})" for key, value in found.items())
            raise ValueError(f"config.json: rotary positions of rope_type {kind!r} have no parameter {left}")

    def _parameters(self, theirs: HuggingFaceConfig) -> Tree:
        """Returns the parameters, with rope_theta. Raises a ValueError if they are in two places and differ.

        As in transformers 5, rope_scaling stands before rope_parameters, and rope_theta is for a form without one.
        """
        forms = {key: theirs.take(key, default=None) for key in ("rope_scaling", "rope_parameters")}
        for key, form in forms.items():
            if form is not None and not isinstance(form, dict):
                raise theirs.refuse(key, "it must be an object")
            if any(isinstance(inner, dict) for inner in (form or {}).values()):
                raise theirs.refuse(key, "rotary positions that differ between blocks are not supported")
        older, newer = (_with_rope_type(form or {}) for form in forms.values())
        for form in (older, newer):
            form.pop(PARTIAL, None)  # see _set_rope_size
        if not (older or newer or self.is_optional):
            raise ValueError("config.json: rope_parameters or rope_scaling is missing")
        theta = theirs.take("rope_theta", default=self.default_theta)
        found = {"rope_theta": theta, **(older or newer)}
        beside = {"rope_theta": theta} if theirs.values.get("rope_theta") is not None else {}
        for key, value in (*newer.items(), *beside.items()):
            if found.get(key) is not value and found.get(key) != value:  # NaN is not equal to itself
                raise ValueError(
                    f"config.json: {key} of the rotary positions is {short(found.get(key))} in one place and "
                    f"{short(value)} in another (rope_parameters, rope_scaling, rope_theta)"
                )
        return found

    def _set_rope_size(self, theirs: HuggingFaceConfig, ours: Tree) -> None:
        """Sets the number of rotary columns of a head unless it is all. As in transformers, it is rounded down."""
        theirs.take(PARTIAL, default=None)
        older, newer = (theirs.values.get(key) or {} for key in ("rope_scaling", "rope_parameters"))
        found = [_number(PARTIAL, place[PARTIAL]) for place in (older or newer, theirs.values) if PARTIAL in place]
        factor = next(iter(found), self.partial or 1.0)
        for other in (*found, _number(PARTIAL, newer.get(PARTIAL, factor))):
            if other != factor:
                raise ValueError(f"config.json: {PARTIAL} is {other:g} in one place, but transformers takes {factor:g}")
        if self.partial is None:
            if factor != 1:
                raise ValueError(f"config.json: {PARTIAL} is {factor:g}: only 1 is supported in this family")
            return
        if not 0 < factor <= 1:
            raise ValueError(f"config.json: {PARTIAL} is {factor:g}: it must be above 0 and at most 1")
        head_size = get_setting(ours, "attention.head_size")
        size = int(head_size * factor)
        if self.size_key is not None and (given := theirs.size(self.size_key, default=None)) is not None:
            if found and given != size:
                raise theirs.refuse(self.size_key, f"{PARTIAL} ({factor:g}) makes {size} of {head_size} columns rotary")
            size = given
        if size != head_size:
            set_setting(ours, "attention.rope_size", size)

    def _longrope(self, theirs: HuggingFaceConfig, found: Tree, longest: int | None) -> Tree:
        """Returns our settings of LongRoPE, and removes their keys from `found`. longest: max_position_embeddings.

        transformers' class of Phi-3.5-MoE multiplies cos and sin by long_mscale in long sequences, but keeps the short
        factors there; other classes use the long ones.
        """
        given = theirs.size(ORIGINAL_LENGTH, default=None)
        if ORIGINAL_LENGTH not in found and given not in (None, longest):
            raise theirs.refuse(
                ORIGINAL_LENGTH,
                f"the parameters of the rotary positions lack it, and transformers then takes {longest} "
                "(max_position_embeddings): state it there, too",
            )
        original = found.pop(ORIGINAL_LENGTH, longest)
        if type(original) is not int or original < 2 or given not in (None, original):
            raise ValueError(
                f"config.json: {ORIGINAL_LENGTH} of the rotary positions is {short(original)}: it must be an integer "
                "of at least 2, the same in all places"
            )
        factors = {f"{name}_factors": _numbers(f"{name}_factor", found) for name in ("short", "long")}
        if self.mscales:
            scales = [_number(key, found.pop(key, None)) for key in ("short_mscale", "long_mscale")]
        else:
            scales = [_longrope_factor(found, longest, original)] * 2
        scaling = {"kind": LONGROPE, **factors, "original_length": original, "uses_long_factors": not self.mscales}
        return scaling | dict(zip(("short_attention_factor", "long_attention_factor"), scales, strict=True))

    def write(self, ours: Tree, theirs: Tree) -> None:
        theta, scaling = get_setting(ours, "position.theta"), get_setting(ours, "position.scaling")
        older = None
        if scaling is not None and scaling["kind"] in SCALINGS:
            keys = {their: scaling.get(own) for their, own in SCALINGS[scaling["kind"]].items()}
            older = {"rope_type": scaling["kind"], **{key: value for key, value in keys.items() if value is not None}}
        if scaling is not None and scaling["kind"] == LONGROPE:
            older = self._written_longrope(scaling)
            theirs[ORIGINAL_LENGTH] = scaling["original_length"]
        base = {} if theta is None else {"rope_theta": theta}  # None: other positions, which the format cannot express
        partial = self._partial(ours)
        theirs["rope_parameters"] = {"rope_type": "default", **(older or {}), **base, **partial}
        theirs |= {**base, **partial, "rope_scaling": older}
        if partial and self.size_key is not None:
            theirs[self.size_key] = get_setting(ours, "attention.rope_size")

    def _written_longrope(self, scaling: Tree) -> Tree:
        """Returns the parameters of LongRoPE in a config.json."""
        short_scale, long_scale = scaling["short_attention_factor"], scaling["long_attention_factor"]
        scales = {"short_mscale": short_scale, "long_mscale": long_scale}
        return {
            "rope_type": LONGROPE,
            "short_factor": scaling["short_factors"],
            "long_factor": scaling["long_factors"],
            ORIGINAL_LENGTH: scaling["original_length"],
            **(scales if self.mscales else {"attention_factor": short_scale}),
        }

    def _partial(self, ours: Tree) -> Tree:
        """Returns the keys for the rotary columns of a head, if the family has them."""
        size, head_size = (get_setting(ours, f"attention.{name}") for name in ("rope_size", "head_size"))
        if self.partial is None or size is None or head_size is None:
            return {}
        factor = size / head_size
        # Readers round down, and the product may lie just below the number of columns.
        return {PARTIAL: factor if int(head_size * factor) == size else math.nextafter(factor, 2)}


def _with_rope_type(form: Tree) -> Tree:
    """Returns the parameters with the older key `type` as `rope_type`, if it is alone."""
    return {("rope_type" if key == "type" and "rope_type" not in form else key): form[key] for key in form}


def _scaling(kind: str, found: Tree, longest: int | None) -> Tree:
    """Returns our settings of a scaling, and removes their keys from `found`. longest: max_position_embeddings.

    Raises a ValueError for a parameter that is missing or no number; the settings check its range.
    """
    names = SCALINGS[kind]
    if ORIGINAL_LENGTH in names and longest is not None:
        found.setdefault(ORIGINAL_LENGTH, longest)
    given = {key: found.pop(key) for key in names if key in found}
    given = {key: value for key, value in given.items() if value is not None or key not in NULLABLE}
    for key in names:
        if key not in given and key not in (*NULLABLE, "truncate"):
            raise ValueError(f"config.json: {key} of the rotary positions is missing: rope_type {kind!r} needs it")
    if kind == "yarn" and given["factor"] is None:
        given["factor"] = _length_ratio(longest, given[ORIGINAL_LENGTH])
    if not isinstance(given.get("truncate", True), bool):
        shown = short(given["truncate"])
        raise ValueError(f"config.json: truncate of the rotary positions is {shown}, it must be true or false")
    return {names[key]: value if key == "truncate" else _number(key, value) for key, value in given.items()}


def _numbers(key: str, found: Tree) -> list[int | float]:
    """Removes a list of numbers from the parameters, and returns it. Raises a ValueError for anything else."""
    values = found.pop(key, None)
    if not isinstance(values, list):
        raise ValueError(f"config.json: {key} of the rotary positions is {short(values)}, it must be a list of numbers")
    return [_number(key, value) for value in values]


def _longrope_factor(found: Tree, longest: int | None, original: int) -> float:
    """Returns the factor of LongRoPE for cos and sin, and removes its keys: attention_factor, or else what the paper
    recommends for a context that is `factor` times as long (Ding et al. 2024, section 3.4)."""
    ratio, factor = found.pop("factor", None), found.pop("attention_factor", None)
    if factor is not None:
        return _number("attention_factor", factor)
    ratio = _length_ratio(longest, original) if ratio is None else _number("factor", ratio)
    return 1.0 if ratio <= 1 else math.sqrt(1 + math.log(ratio) / math.log(original))


def _length_ratio(longest: int | None, original: Any) -> float:
    """Returns a factor that is null or absent, as in DeepSeek-V3: the new context length over the original."""
    if longest is None or type(original) is not int or original < 1:
        raise ValueError(
            "config.json: factor of the rotary positions is null, which stands for max_position_embeddings "
            f"({longest}) / {ORIGINAL_LENGTH} ({short(original)}): both must be integers of at least 1"
        )
    return longest / original


def _number(key: str, value: Any) -> int | float:
    """Returns a parameter that is a finite number. Raises a ValueError for anything else."""
    if isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST_FLOAT <= value <= LARGEST_FLOAT:
        return value
    raise ValueError(f"config.json: {key} of the rotary positions is {short(value)}, it must be a finite number")
