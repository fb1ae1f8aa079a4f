"""Defines `Family`: rules for config.json and a map of tensors, by which models of one `model_type` are read and
written."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from expert_parallel.interop.hf_config import HuggingFaceConfig, Tree
from expert_parallel.interop.quantization import read_quantization
from expert_parallel.interop.rules import Rule, set_setting
from expert_parallel.interop.tensor_map import TensorMapping
from expert_parallel.model.attention import HeadsConfig
from expert_parallel.model.config import ModelConfig


@dataclass(frozen=True)
class Family:
    """Defines how one `model_type` is read and written.

    architecture: the class in transformers. exported_as: the model_type that exports have; None: the family's own, by
    which transformers finds that class. tensor_map: returns the mappings of a model, given its config.json.
    neutral: keys of config.json that do not affect the logits, in addition to `NEUTRAL`, each with the reason.
    num_mtp_layers: returns how many layers of multi-token prediction may follow those of the model. imports_mtp: True
    if such layers become `model.mtp`, where a folder has them; else they are set aside. set_aside: what further tensors
    are, by a regular expression of their names; those that the model does not use are set aside. zeros: ends of logical
    names; tensors with such a name are 0 if a folder has none of them.
    """

    architecture: str
    rules: tuple[Rule, ...]
    tensor_map: Callable[[Tree], list[TensorMapping]]
    neutral: Mapping[str, str] = field(default_factory=dict)
    exported_as: str | None = None
    num_mtp_layers: Callable[[HuggingFaceConfig], int] = lambda theirs: 0
    imports_mtp: bool = False
    set_aside: Mapping[str, str] = field(default_factory=dict)
    zeros: tuple[str, ...] = ()

    def read(self, values: Tree) -> Tree:
        """Returns the `model` block of our config for a config.json.

        Raises a ValueError that names the first key whose value we do not support or do not know.
        """
        theirs = HuggingFaceConfig(values)
        ours: Tree = {}
        read_quantization(values)  # raises an error for methods that are not supported
        theirs.asked.add("quantization_config")
        for rule in self.rules:
            rule.read(theirs, ours)
        theirs.refuse_unknown_keys(self.neutral)
        return ours

    def write(self, model: ModelConfig) -> Tree:
        """Returns the config.json of this family that is closest to the model's settings. It is exact only if reading
        it back gives the same settings."""
        ours, theirs = settings(model), {"architectures": [self.architecture]}
        if model.moe is not None:
            ours["moe"]["losses"] = [loss.model_dump(mode="json") for loss in model.moe.losses]
        for rule in self.rules:
            rule.write(ours, theirs)
        return theirs


def settings(model: ModelConfig) -> Tree:
    """Returns the settings that the logits of generation depend on, with defaults resolved.

    Omits settings of training, speed and layout, and the capacity, since generation is dropless; multi-token prediction
    is one of training.
    """
    tree = model.model_dump(mode="json")
    for name in ("moe_layers", "window_layers", "rope_layers"):
        tree[name] = [layer for layer in getattr(model, name) if layer < model.num_layers]
    for name in ("moe_blocks", "window_blocks", "rope_blocks", "dropout", "init_std", "mtp"):
        tree.pop(name)
    if isinstance(model.attention, HeadsConfig):
        set_setting(tree, "attention.num_kv_heads", model.attention.kv_heads)
        set_setting(tree, "attention.rope_size", model.attention.rope_columns[1])
        set_setting(tree, "attention.value_size", model.attention.value_columns)
        if model.attention.scale is None:
            set_setting(tree, "attention.scale", model.attention.head_size**-0.5)
        usual = {**tree["attention"], "position": tree["position"]}
        given = {} if tree["window_overrides"] is None else tree["window_overrides"]
        tree["window_overrides"] = {key: value for key, value in given.items() if value not in (None, usual[key])}
        if model.attention.out_bias is None:
            set_setting(tree, "attention.out_bias", model.attention.bias)
    if tree["moe"] is not None:
        for name in ("preset", "preset_overrides", "d_model", "capacity", "losses", "dispatcher", "ledger"):
            tree["moe"].pop(name)
        for name in ("hidden_dropout", "output_dropout", "backend"):
            tree["moe"]["experts"].pop(name)
        tree["moe"]["router"].pop("jitter", None)
        if (rate := tree["moe"]["router"].pop("balance_bias_rate", None)) is not None:
            tree["moe"]["router"]["balance_bias"] = rate > 0
    return tree
