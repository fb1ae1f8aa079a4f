"""Holds the settings of one MoE layer (`MoEConfig`) and the presets of papers; refuses combinations that cannot work or
in which a setting would do nothing."""

import json
import warnings
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationInfo, model_validator

from expert_parallel.moe.capacity.policies import CapacityConfig, DroplessConfig
from expert_parallel.moe.dispatch.dispatcher import AllToAllConfig, DispatcherConfig
from expert_parallel.moe.dispatch.ledger import LedgerConfig
from expert_parallel.moe.experts.grouped import ExpertsConfig
from expert_parallel.moe.routers.base import HashConfig, RouterSettings, TopKRouterConfig
from expert_parallel.moe.routers.losses import LossConfig, loss_name
from expert_parallel.moe.routers.noisy import NoisyTopKConfig
from expert_parallel.moe.routers.registry import RouterConfig, router_params, router_settings
from expert_parallel.nn.ffn import FFNConfig
from expert_parallel.settings import Settings, use_own_names


class MoEConfig(Settings):
    """Describes an MoE layer: its router, capacity, losses, experts, and how tokens are sent to them."""

    preset: str | None = None
    """Names the paper whose router, capacity and losses are the defaults of this block: `mixtral`, `olmoe`, `switch`,
    `gshard`, `shazeer`, `v_moe`, `deepseek_v3`, `expert_choice`, `hash_layers` or `s_base`."""
    preset_overrides: bool = False
    """Allows settings that contradict what the preset's paper means, such as two experts a token with `switch`."""
    d_model: Annotated[int, Field(ge=1)] | None = None
    """Sets the hidden size of a layer that is used alone; in a model it is `model.d_model`."""
    num_experts: int = Field(ge=1, le=1_000_000)
    """Sets the number of routed experts, over all ranks."""
    router: RouterConfig = TopKRouterConfig()
    """Chooses the experts of each token and their weights."""
    capacity: CapacityConfig = DroplessConfig()
    """Limits the choices that an expert takes."""
    losses: list[LossConfig] = Field(default_factory=list)
    """Lists the auxiliary losses of the router; each kind and scope may occur once."""
    experts: ExpertsConfig
    """Describes the routed experts."""
    shared_experts: FFNConfig | None = None
    """Describes a feed-forward network that every token uses besides its routed experts (DeepSeekMoE, Dai et al. 2024);
    null has none."""
    shared_expert_gate: bool = False
    """Multiplies the output of the shared experts by sigmoid(x w), with a learned vector w (Qwen2-MoE)."""
    dispatcher: DispatcherConfig = AllToAllConfig()
    """Chooses how tokens are sent to the ranks of their experts and back."""
    ledger: LedgerConfig = LedgerConfig()
    """Checks that no row is lost between ranks."""

    @model_validator(mode="before")
    @classmethod
    def _expand_preset(cls, tree: Any) -> Any:
        return apply_preset(use_own_names([cls], tree))

    @model_validator(mode="after")
    def _refuse_what_cannot_work(self) -> "MoEConfig":
        router = router_settings(self.router)
        router.refuse(self.num_experts)
        refuse_combinations(router, self.capacity, self.losses, self.num_experts)
        if self.dispatcher.overlap > 1 and self.capacity.pad:
            raise ValueError(
                f"dispatcher.overlap is {self.dispatcher.overlap} and capacity.pad is true: each chunk would be padded "
                "to the whole capacity; set dispatcher.overlap to 1 or capacity.pad to false"
            )
        if self.shared_expert_gate and self.shared_experts is None:
            raise ValueError("shared_expert_gate is true but shared_experts is null: there is no output to multiply")
        return self

    @model_validator(mode="after")
    def _warn_of_contradictions(self, info: ValidationInfo) -> "MoEConfig":
        """Warns of settings made in Python. Of files (which have a context) the commands warn, and a config that was
        dumped (in which every setting is set) has been warned of before."""
        if info.context is None and "preset_overrides" not in self.model_fields_set:
            for sentence in preset_contradictions(self.model_dump(), path=""):
                warnings.warn(sentence, stacklevel=4)  # where the user's code makes the config
        return self

    def num_dense_params(self, d_model: int) -> int:
        """Counts the parameters that every token uses: those of the router, of the shared experts and of their gate."""
        shared = 0 if self.shared_experts is None else self.shared_experts.num_params(d_model)
        gate = d_model if self.shared_expert_gate else 0
        return router_params(self.router, d_model, self.num_experts) + shared + gate

    def num_expert_params(self, d_model: int) -> int:
        """Counts the parameters of all routed experts together."""
        return self.num_experts * self.experts.num_params(d_model)


def refuse_combinations(
    router: RouterSettings, capacity: CapacityConfig, losses: list[LossConfig], num_experts: int
) -> None:
    """Raises a ValueError, which names the settings and their values, if they exclude each other or one would have no
    effect."""
    names = [loss_name(loss) for loss in losses]
    if len(set(names)) < len(names):
        raise ValueError(f"losses: each kind and scope may occur once, found {', '.join(names)}")
    if router.kind == "hash" and losses:
        raise ValueError(f"losses: {names[0]} would do nothing: router.kind is 'hash', which has no parameters")
    if router.kind == "expert_choice" and any(loss.kind == "balance" for loss in losses):
        raise ValueError("losses: balance would do nothing: router.kind is 'expert_choice', which is always balanced")
    if any(loss.kind == "load" for loss in losses):
        if not isinstance(router, NoisyTopKConfig) or router.noise == "gumbel":
            noise = f" with router.noise {router.noise!r}" if isinstance(router, NoisyTopKConfig) else ""
            raise ValueError(
                f"losses: load needs router.kind 'noisy_top_k' with noise 'learned' or 'normal', found {router.kind!r}"
                f"{noise}: the load is the probability that an expert is chosen under this noise"
            )
        if router.k == num_experts:
            raise ValueError(
                f"losses: load would do nothing: router.k ({router.k}) equals num_experts ({num_experts}), so that "
                "every expert is always chosen"
            )
    if isinstance(capacity, DroplessConfig):
        return
    if router.kind == "expert_choice":
        raise ValueError(
            f"capacity.kind is {capacity.kind!r} but router.kind is 'expert_choice', whose router.train and "
            "router.eval already limit each expert: set capacity.kind to 'dropless'"
        )
    if capacity.renormalise and not (router.normalizes or isinstance(router, HashConfig)):
        raise ValueError(
            "capacity.renormalise is true but router.normalise is false: weights that were not normalized have no "
            "fixed sum to restore"
        )
    choices = router.num_choices(num_experts)
    if capacity.overflow == "reroute" and router.kind == "sparsemixer":
        raise ValueError(
            "capacity.overflow is 'reroute' but router.kind is 'sparsemixer': an expert that was not sampled has no "
            "weight, so set capacity.overflow to 'drop'"
        )
    if capacity.renormalise and choices == 1:
        raise ValueError("capacity.renormalise is true but router.k is 1: the only weight is 1 anyway")
    if capacity.overflow == "reroute":
        reachable = num_experts
        if isinstance(router, TopKRouterConfig) and router.group_limit is not None:
            reachable = num_experts // router.group_limit.count * router.group_limit.limit
        if choices >= reachable:
            raise ValueError(
                f"capacity.overflow is 'reroute' but router.k is {choices} of the {reachable} experts that a token may "
                "choose: there is no next best expert"
            )


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
    # Shazeer et al. 2017; both coefficients are those of its language models
    "shazeer": {
        "router": {"kind": "noisy_top_k", "k": 4, "noise": "learned"},
        "capacity": {"kind": "dropless"},
        "losses": [{"kind": "importance", "coefficient": 0.1}, {"kind": "load", "coefficient": 0.1}],
    },
    # Riquelme et al. 2021; the loss is the mean of importance and load, times 0.01
    "v_moe": {
        "router": {"kind": "noisy_top_k", "k": 2, "noise": "normal", "normalise": False},
        "capacity": {"kind": "factor", "train": 1.05, "eval": 1.05, "minimum": 0, "priority": "batch_priority"},
        "losses": [
            {"kind": "importance", "coefficient": 0.005, "of": "probabilities"},
            {"kind": "load", "coefficient": 0.005, "threshold": "all"},
        ],
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


# What makes a layer that of its paper: a preset -> the paper, and the values that these settings have in it. Sizes,
# rates and coefficients, which papers vary themselves, are not among them.
PRESET_CORES: dict[str, tuple[str, dict[str, Any]]] = {
    # Section 2.1: the outputs of the top 2 experts, with the softmax over the logits of these two.
    "mixtral": ("Jiang et al. 2024", {"router.kind": "top_k", "router.k": 2, "router.normalise": True}),
    # Section 2: dropless routing; each token chooses its experts.
    "olmoe": ("Muennighoff et al. 2024", {"router.kind": "top_k", "capacity.kind": "dropless"}),
    # Section 2.1: "Switch routing" is the name for one expert a token, against the conjecture that two are needed.
    "switch": ("Fedus et al. 2021", {"router.kind": "top_k", "router.k": 1}),
    # Algorithm 1: the second expert is drawn in proportion to its weight; the kind has k = 2 alone.
    "gshard": ("Lepikhin et al. 2020", {"router.kind": "gshard"}),
    # Section 2.1: "noisy top-k gating" adds noise of a learned size before the choice.
    "shazeer": ("Shazeer et al. 2017", {"router.kind": "noisy_top_k", "router.noise": "learned"}),
    # Section 2.1: noise of the fixed size 1 / E before the choice.
    "v_moe": ("Riquelme et al. 2021", {"router.kind": "noisy_top_k", "router.noise": "normal"}),
    # Section 2.1.2: affinities by a sigmoid, balanced by a bias, and no token is dropped.
    "deepseek_v3": (
        "DeepSeek-AI 2024",
        {"router.kind": "top_k", "router.score": "sigmoid", "capacity.kind": "dropless"},
    ),
    # Section 3: experts choose tokens.
    "expert_choice": ("Zhou et al. 2022", {"router.kind": "expert_choice"}),
    # Section 3: a fixed hash of the token's id takes the place of the router.
    "hash_layers": ("Roller et al. 2021", {"router.kind": "hash"}),
    # Section 2.2: the assignment is balanced by Sinkhorn's algorithm.
    "s_base": ("Clark et al. 2022", {"router.kind": "sinkhorn"}),
}


def preset_contradictions(tree: Any, path: str = "model.moe.") -> list[str]:
    """Returns a sentence for each setting that contradicts what its preset's paper means, none if `preset_overrides` is
    set.

    tree: the layer's settings, also before they are validated. path: what precedes the settings' names.
    """
    name = tree.get("preset") if isinstance(tree, dict) else None
    if not isinstance(name, str) or name not in PRESET_CORES or tree.get("preset_overrides") is True:
        return []
    found, (source, core) = dict(_leaves(apply_preset(tree))), PRESET_CORES[name]
    others = [setting for setting, value in core.items() if setting in found and found[setting] != value]
    return [
        f"{path}{setting} is {_text(found[setting])}, preset {name} means {_text(core[setting])} ({source}): set "
        f"{path}preset_overrides=true to keep it, or leave the preset out"
        for setting in _without_replaced(others)
    ]


def preset_summary(moe: MoEConfig) -> str | None:
    """Returns how many settings the preset set, and the values that the config has in place of the preset's: `switch
    set 8 settings; the config overrides router.k (2, not 1)`. None without a preset."""
    if moe.preset is None:
        return None
    preset, found = dict(_leaves(PRESETS[moe.preset])), dict(_leaves(moe.model_dump(mode="json")))
    losses: TypeAdapter[list[LossConfig]] = TypeAdapter(list[LossConfig])
    if "losses" in preset:
        preset["losses"] = losses.dump_python(losses.validate_python(preset["losses"]), mode="json")
    others = [path for path, value in preset.items() if found.get(path) != value]
    replaced = tuple(path.removesuffix("kind") for path in others if path.endswith(".kind"))
    number = sum(path not in others and not path.startswith(replaced) for path in preset)
    shown = [
        path if path == "losses" else f"{path} ({_text(found.get(path))}, not {_text(preset[path])})"
        for path in _without_replaced(others)
    ]
    overridden = f"; the config overrides {', '.join(shown)}" if shown else ""
    return f"{moe.preset} set {number} setting{'' if number == 1 else 's'}{overridden}"


def _without_replaced(paths: list[str]) -> list[str]:
    """Leaves out the settings of blocks whose `kind` is among the paths: another kind replaces the whole block."""
    blocks = tuple(path.removesuffix("kind") for path in paths if path.endswith(".kind"))
    return [path for path in paths if path.endswith(".kind") or not path.startswith(blocks)]


def _text(value: Any) -> str:
    """Returns a value as YAML has it."""
    return json.dumps(value).strip('"')


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the dotted path and the value of each setting in a tree."""
    for key, value in tree.items():
        yield from _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]


def apply_preset(tree: Any) -> Any:
    """Returns the layer's tree of settings with its preset's values as defaults; a subtree with another `kind` than the
    preset's replaces the preset's subtree.

    Raises a ValueError if there is no preset of this name.
    """
    if not isinstance(tree, dict) or not isinstance(tree.get("preset"), str):
        return tree  # no preset, or none that its field accepts
    if tree["preset"] not in PRESETS:
        raise ValueError(f"preset is {tree['preset']!r}, it must be one of {', '.join(map(repr, PRESETS))}")
    return merge(PRESETS[tree["preset"]], tree)


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Returns two trees of settings merged into one; where both have a key, `above` wins. A subtree of `above` with
    another `kind` replaces the whole subtree of `below`."""
    merged = {**below, **above}
    for key in below.keys() & above.keys():
        old, new = below[key], above[key]
        if isinstance(old, dict) and isinstance(new, dict) and new.get("kind", old.get("kind")) == old.get("kind"):
            merged[key] = merge(old, new)
    return merged
