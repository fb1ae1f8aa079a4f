"""Routing, capacity and losses as the papers have them, by name: `moe: {preset: switch, ...}`. What is set beside it
wins."""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # Jiang et al. 2024; the coefficient of the released config, 0.02, times k, which transformers' loss counts
    "mixtral": {
        "router": {"kind": "top_k", "k": 2},
        "capacity": {"kind": "dropless"},
        "losses": [{"kind": "balance", "coefficient": 0.04, "layers": "pooled"}],
    },
    # Muennighoff et al. 2024
    "olmoe": {
        "router": {"kind": "top_k", "k": 8, "normalise": False},
        "capacity": {"kind": "dropless"},
        "losses": [{"kind": "balance", "coefficient": 0.01}, {"kind": "z_loss", "coefficient": 0.001}],
    },
    # Fedus et al. 2021
    "switch": {
        "router": {"kind": "top_k", "k": 1, "normalise": False, "jitter": 0.01},
        "capacity": {"kind": "factor", "train": 1.25, "eval": 2.0, "minimum": 0},
        "losses": [{"kind": "balance", "coefficient": 0.01}],
    },
    # Lepikhin et al. 2020, algorithm 1
    "gshard": {
        "router": {"kind": "gshard"},
        "capacity": {"kind": "factor", "train": 1.0, "eval": 1.0, "minimum": 0},
        "losses": [{"kind": "balance", "coefficient": 0.01, "choices": "first"}],
    },
    # Shazeer et al. 2017
    "shazeer": {"router": {"kind": "noisy_top_k", "k": 4, "noise": "learned"}, "capacity": {"kind": "dropless"}},
    # Riquelme et al. 2021
    "v_moe": {
        "router": {"kind": "noisy_top_k", "k": 2, "noise": "normal", "normalise": False},
        "capacity": {"kind": "factor", "train": 1.05, "eval": 1.05, "minimum": 0, "priority": "batch_priority"},
    },
    # DeepSeek-AI 2024
    "deepseek_v3": {
        "router": {
            "kind": "top_k",
            "k": 8,
            "score": "sigmoid",
            "scale": 2.5,
            "balance_bias_rate": 0.001,
            "group_limit": {"count": 8, "limit": 4},
        },
        "capacity": {"kind": "dropless"},
        "losses": [{"kind": "balance", "coefficient": 0.0001, "scope": "sequence"}],
    },
    # Zhou et al. 2022
    "expert_choice": {"router": {"kind": "expert_choice", "train": 2.0, "eval": 2.0}, "capacity": {"kind": "dropless"}},
    # Roller et al. 2021
    "hash_layers": {"router": {"kind": "hash", "k": 1}, "capacity": {"kind": "dropless"}},
    # Clark et al. 2022
    "s_base": {"router": {"kind": "sinkhorn", "k": 1}, "capacity": {"kind": "dropless"}},
}


def apply_preset(tree: Any) -> Any:
    """The block with its preset's values beneath its own; a block of another `kind` than the preset's replaces it."""
    if not isinstance(tree, dict) or not isinstance(tree.get("preset"), str):
        return tree  # no preset, or none that its field accepts
    if tree["preset"] not in PRESETS:
        raise ValueError(f"preset is {tree['preset']!r}, it must be one of {', '.join(map(repr, PRESETS))}")
    return merge(PRESETS[tree["preset"]], tree)


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """The blocks of both; where both say something, `above` does. A block of another `kind` replaces the one below."""
    merged = {**below, **above}
    for key in below.keys() & above.keys():
        old, new = below[key], above[key]
        if isinstance(old, dict) and isinstance(new, dict) and new.get("kind", old.get("kind")) == old.get("kind"):
            merged[key] = merge(old, new)
    return merged
