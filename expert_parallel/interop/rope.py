"""Defines the rule for rotary positions in a config.json.

transformers 5 stores them in rope_parameters, earlier versions in rope_theta and rope_scaling.
"""

import math
from dataclasses import dataclass

from expert_parallel.interop.rules import REQUIRED, HuggingFaceConfig, Tree, get_setting, set_setting

SCALINGS = {  # rope_type -> (key in config.json, our setting, default)
    "linear": (("factor", "factor", REQUIRED),),
    "llama3": (
        ("factor", "factor", REQUIRED),
        ("low_freq_factor", "low_frequency_factor", REQUIRED),
        ("high_freq_factor", "high_frequency_factor", REQUIRED),
        ("original_max_position_embeddings", "original_length", None),
    ),
    "yarn": (
        ("factor", "factor", None),
        ("original_max_position_embeddings", "original_length", None),
        ("beta_fast", "beta_fast", 32.0),
        ("beta_slow", "beta_slow", 1.0),
        ("attention_factor", "attention_factor", None),
        ("mscale", "mscale", None),
        ("mscale_all_dim", "mscale_all_dim", None),
        ("truncate", "truncate", True),
    ),
}


@dataclass(frozen=True)
class Rope:
    """Translates rotary positions. Reads and writes both forms, so that every version of transformers finds its own.

    is_optional: without any of the keys, positions are unscaled. In gpt-oss the keys are required, since versions of
    transformers have different defaults.
    """

    default_theta: float = 10000.0
    is_optional: bool = True

    def read(self, theirs: HuggingFaceConfig, ours: Tree) -> None:
        found = self._parameters(theirs)
        kinds = {str(found.pop(key)) for key in ("rope_type", "type") if key in found} or {"default"}
        kind = next(iter(kinds))
        theta = found.pop("rope_theta", None)
        if theta is not None and not (isinstance(theta, int | float) and 0 < theta < math.inf):
            raise ValueError(f"config.json: rope_theta is {theta!r}, it must be a number above 0")
        if len(kinds) > 1 or (kind != "default" and kind not in SCALINGS):
            names = ", ".join(("default", *SCALINGS))
            both = " and ".join(map(repr, sorted(kinds)))
            raise ValueError(f"config.json: rope_type is {both}, it must be one of {names}")
        set_setting(ours, "position", {"kind": "rope", "theta": self.default_theta if theta is None else theta})
        longest = theirs.size("max_position_embeddings", default=None)
        if kind != "default":
            set_setting(ours, "position.scaling", {"kind": kind, **_scaling(kind, found, longest)})
        if found:
            key, value = next(iter(found.items()))
            raise ValueError(f"config.json: {key} of the rotary positions is {value!r}: {kind!r} has no such parameter")

    def _parameters(self, theirs: HuggingFaceConfig) -> Tree:
        """Merges the keys of both forms. Raises a ValueError if they contradict each other."""
        newer, older = theirs.take("rope_parameters", default=None), theirs.take("rope_scaling", default=None)
        for key, value in (("rope_parameters", newer), ("rope_scaling", older)):
            if value is not None and not isinstance(value, dict):
                raise theirs.refuse(key, "it must be an object")
            if any(isinstance(inner, dict) for inner in (value or {}).values()):
                raise theirs.refuse(key, "rotary positions that differ between blocks are not supported")
        theta = theirs.take("rope_theta", default=None)
        if not (newer or older or self.is_optional):
            raise ValueError("config.json: rope_parameters or rope_scaling is missing")
        parts = [part for part in (newer, older, {"rope_theta": theta} if theta is not None else None) if part]
        found: Tree = {}
        for part in parts:
            for key, value in part.items():
                if found.get(key, value) != value:
                    raise ValueError(
                        f"config.json: {key} of the rotary positions is {found[key]!r} in one place and {value!r} in "
                        "another (rope_parameters, rope_scaling, rope_theta)"
                    )
                found[key] = value
        if found.pop("partial_rotary_factor", 1.0) != 1.0 or theirs.take("partial_rotary_factor", default=1.0) != 1.0:
            raise ValueError("config.json: partial_rotary_factor is not 1: partly rotary heads are not supported")
        return found

    def write(self, ours: Tree, theirs: Tree) -> None:
        theta, scaling = get_setting(ours, "position.theta"), get_setting(ours, "position.scaling")
        older = None
        if scaling is not None and scaling["kind"] in SCALINGS:
            keys = {their: scaling.get(own) for their, own, _ in SCALINGS[scaling["kind"]]}
            older = {"rope_type": scaling["kind"], **{key: value for key, value in keys.items() if value is not None}}
        theirs["rope_parameters"] = {"rope_type": "default", **(older or {}), "rope_theta": theta}
        theirs |= {"rope_theta": theta, "rope_scaling": older}


def _scaling(kind: str, found: Tree, longest: int | None) -> Tree:
    """Returns our settings of a scaling, and removes their keys from `found`. longest: max_position_embeddings."""
    ours = {}
    for their, own, default in SCALINGS[kind]:
        value = found.pop(their, default)
        if value is REQUIRED:
            raise ValueError(f"config.json: {their} of the rotary positions is missing: {kind!r} needs it")
        ours[own] = value
    if "original_length" in ours and ours["original_length"] is None:
        ours["original_length"] = longest
    if ours["factor"] is None and longest is not None:  # DeepSeek-V3 may omit it
        ours["factor"] = longest / ours["original_length"]
    return {name: value for name, value in ours.items() if value is not None}
