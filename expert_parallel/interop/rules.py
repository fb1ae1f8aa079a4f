"""Defines rules that translate a config.json to our model settings, and back.

Every key of a config.json is read by a rule, known not to affect the logits (`NEUTRAL` in neutral_keys.py), or refused.
"""

from dataclasses import dataclass
from typing import Any, Protocol

from expert_parallel.interop.hf_config import LARGEST, REQUIRED, HuggingFaceConfig, Tree

WINDOWED, FULL = "sliding_attention", "full_attention"  # the two kinds of blocks in layer_types


def get_setting(tree: Tree, path: str) -> Any:
    """Returns the value at a dotted path, or None if a block of the path is absent."""
    value: Any = tree
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def set_setting(tree: Tree, path: str, value: Any) -> None:
    """Sets the value at a dotted path, and creates absent blocks."""
    *parents, leaf = path.split(".")
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[leaf] = value


class Rule(Protocol):
    """Translates some keys of a config.json to some of our settings, and back. Rules run in order.

    A rule may read settings that earlier rules have set.
    """

    def read(self, theirs: HuggingFaceConfig, ours: Tree) -> None:
        """Sets values in our settings (`ours`) from config.json (`theirs`). Raises a ValueError for a value that we
        have no setting for."""

    def write(self, ours: Tree, theirs: Tree) -> None:
        """Sets keys of config.json (`theirs`) from our settings. Omits what the format cannot express: reading the
        result back shows the difference."""


@dataclass(frozen=True)
class Copy:
    """Copies a value unchanged between config.json and a setting.

    keys: the names that reading accepts in config.json; writing uses the first. path: the setting's path in `model`.
    """

    keys: tuple[str, ...] | str
    path: str
    default: Any = REQUIRED

    @property
    def names(self) -> tuple[str, ...]:
        """Returns the keys as a tuple."""
        return (self.keys,) if isinstance(self.keys, str) else self.keys

    def read(self, theirs: HuggingFaceConfig, ours: Tree) -> None:
        value = theirs.take(*self.names, default=self.default)
        if value is None and self.default is not None:
            raise theirs.refuse(self.names[0], "it must have a value")
        set_setting(ours, self.path, value)

    def write(self, ours: Tree, theirs: Tree) -> None:
        theirs[self.names[0]] = get_setting(ours, self.path)


@dataclass(frozen=True)
class CopyInt(Copy):
    """Copies an integer from 1 to `most`."""

    most: int = LARGEST

    def read(self, theirs: HuggingFaceConfig, ours: Tree) -> None:
        set_setting(ours, self.path, theirs.size(*self.names, default=self.default, most=self.most))


@dataclass(frozen=True)
class Require:
    """Accepts only one value of a key, which is also its default. written: exports write the key, for loaders that
    require it. also: values that mean the same."""

    key: str
    value: Any
    written: bool = False
    also: tuple[Any, ...] = ()

    def read(self, theirs: HuggingFaceConfig, ours: Tree) -> None:
        if theirs.take(self.key, default=self.value) not in (self.value, *self.also):
            raise theirs.refuse(self.key, f"only {self.value!r} is supported")

    def write(self, ours: Tree, theirs: Tree) -> None:
        if self.written:
            theirs[self.key] = self.value


@dataclass(frozen=True)
class Const:
    """Sets one of our settings to the value that it has in every model of the family."""

    path: str
    value: Any

    def read(self, theirs: HuggingFaceConfig, ours: Tree) -> None:
        set_setting(ours, self.path, self.value)

    def write(self, ours: Tree, theirs: Tree) -> None:
        pass


@dataclass(frozen=True)
class HeadSize:
    """Translates head_dim. default: used if the key is absent; None: hidden_size / num_attention_heads.

    is_free: head_dim may differ from hidden_size / num_attention_heads.
    """

    default: int | None = None
    is_free: bool = True

    def read(self, theirs: HuggingFaceConfig, ours: Tree) -> None:
        width, heads = ours["d_model"], ours["attention"]["num_heads"]
        size = theirs.size("head_dim", default=None)
        if size is None and "head_dim" not in theirs.values:
            size = self.default
        if size is None and width % heads:
            raise theirs.refuse("num_attention_heads", f"it must divide hidden_size ({width})")
        if size is None:
            size = width // heads
        if not self.is_free and size * heads != width:
            raise theirs.refuse("head_dim", f"{heads} heads of this size must add up to hidden_size ({width})")
        set_setting(ours, "attention.head_size", size)

    def write(self, ours: Tree, theirs: Tree) -> None:
        if self.is_free:
            theirs["head_dim"] = get_setting(ours, "attention.head_size")


@dataclass(frozen=True)
class QKNorm:
    """Enables norms of queries and keys, with the epsilon of the other norms.

    switch: the key that enables them, if any; without the key they are off.
    """

    kind: str
    switch: str | None = None

    def read(self, theirs: HuggingFaceConfig, ours: Tree) -> None:
        if self.switch is None or theirs.flag(self.switch, default=False):
            set_setting(ours, "attention.qk_norm", {"kind": self.kind, "eps": get_setting(ours, "norm.eps")})

    def write(self, ours: Tree, theirs: Tree) -> None:
        if self.switch is not None:
            theirs[self.switch] = get_setting(ours, "attention.qk_norm") is not None


# ---------------------------------------------------------------------------------------- settings that vary by block


def _window_size(theirs: HuggingFaceConfig, switch: str | None) -> int | None:
    """Returns sliding_window, or None if it is null or the switch is off. switch: the key that enables it, if any."""
    is_on = switch is None or theirs.flag(switch, default=False)
    if theirs.take("sliding_window", default=None) is None or not is_on:
        if is_on and switch is not None and "sliding_window" not in theirs.values:
            raise ValueError(f"config.json: sliding_window is missing: {switch} is true")
        return None
    size: int = theirs.size("sliding_window")
    return size


@dataclass(frozen=True)
class SlidingWindow:
    """Limits attention to the last `sliding_window` positions in all blocks.

    switch: the key that enables it, if any.
    """

    switch: str | None = None

    def read(self, theirs: HuggingFaceConfig, ours: Tree) -> None:
        size = _window_size(theirs, self.switch)
        first = theirs.size("max_window_layers", default=0, least=0)
        if self.switch is not None and size is not None and first:
            raise theirs.refuse("max_window_layers", "versions of transformers disagree about which blocks it selects")
        if size is not None:
            set_setting(ours, "attention.window", size)

    def write(self, ours: Tree, theirs: Tree) -> None:
        size = get_setting(ours, "attention.window")
        theirs["sliding_window"] = size
        if self.switch is not None:
            theirs[self.switch] = size is not None


def read_layer_types(theirs: HuggingFaceConfig, ours: Tree, usual: list[bool], size: int | None) -> None:
    """Gives the blocks that layer_types lists as sliding_attention a window.

    usual: of each block, True if it has a window where the key is absent. size: of the window, None if there is none.
    """
    count, kinds = ours["num_layers"], theirs.take("layer_types", default=None)
    if kinds is None:
        kinds = [WINDOWED if has_window else FULL for has_window in usual]
    if not isinstance(kinds, list) or len(kinds) != count or any(kind not in (WINDOWED, FULL) for kind in kinds):
        raise theirs.refuse("layer_types", f"it must list {count} of {WINDOWED} or {FULL}")
    blocks = [layer for layer, kind in enumerate(kinds) if kind == WINDOWED]
    if blocks and size is None:
        raise theirs.refuse("sliding_window", f"layer_types gives {len(blocks)} blocks a sliding window")
    if blocks:
        set_setting(ours, "attention.window", size)
        every = len(blocks) == count
        set_setting(ours, "window_blocks", {"kind": "all"} if every else {"kind": "list", "indices": blocks})


def layer_types(ours: Tree) -> list[str]:
    """Returns the value of layer_types for a model's settings."""
    blocks = set(ours["window_layers"])
    return [WINDOWED if layer in blocks else FULL for layer in range(ours["num_layers"])]


@dataclass(frozen=True)
class SlidingWindowByLayer:
    """Limits attention to the last `sliding_window` positions in the blocks that layer_types names.

    switch: the key that enables it, if any. If layer_types is absent, the blocks from max_window_layers on have the
    window. first: the default of max_window_layers; None: every second block has the window, beginning with the first.
    is_listed: True if a window without layer_types is refused, as versions of transformers gave it to other blocks.
    """

    switch: str | None = None
    first: int | None = None
    is_listed: bool = False

    def read(self, theirs: HuggingFaceConfig, ours: Tree) -> None:
        size, count = _window_size(theirs, self.switch), ours["num_layers"]
        first = theirs.size("max_window_layers", default=self.first, least=0)
        if self.first is None:
            usual = [layer % 2 == 0 for layer in range(count)]
        else:
            # Without a switch, transformers has a size of its own if the key is absent: those blocks are refused below.
            is_on = size is not None or (self.switch is None and "sliding_window" not in theirs.values)
            usual = [is_on and layer >= first for layer in range(count)]
        if self.is_listed and size is not None and theirs.values.get("layer_types") is None:
            raise ValueError(
                f"config.json: layer_types is missing: versions of transformers disagree which blocks have the window "
                f"({size})"
            )
        read_layer_types(theirs, ours, usual, size)

    def write(self, ours: Tree, theirs: Tree) -> None:
        size, blocks = get_setting(ours, "attention.window"), set(ours["window_layers"])
        theirs |= {"sliding_window": size, "layer_types": layer_types(ours)}
        if self.first is not None:
            theirs["max_window_layers"] = min(blocks, default=ours["num_layers"])
        if self.switch is not None:
            theirs[self.switch] = size is not None


@dataclass(frozen=True)
class SparseStep:
    """Places MoE blocks as Qwen does: every decoder_sparse_step-th block that is not in mlp_only_layers."""

    def read(self, theirs: HuggingFaceConfig, ours: Tree) -> None:
        step = theirs.size("decoder_sparse_step", default=1)
        dense = theirs.take("mlp_only_layers", default=None) or []
        if not isinstance(dense, list):
            raise theirs.refuse("mlp_only_layers", "it must be a list of block indices")
        blocks = [layer for layer in range(step - 1, ours["num_layers"], step) if layer not in dense]
        if len(blocks) == ours["num_layers"]:
            set_setting(ours, "moe_blocks", {"kind": "all"})
        elif dense:
            set_setting(ours, "moe_blocks", {"kind": "list", "indices": blocks})
        else:
            set_setting(ours, "moe_blocks", {"kind": "every_nth", "n": step})

    def write(self, ours: Tree, theirs: Tree) -> None:
        dense = set(range(ours["num_layers"])) - set(ours["moe_layers"])
        theirs |= {"decoder_sparse_step": 1, "mlp_only_layers": sorted(dense)}


@dataclass(frozen=True)
class FirstDense:
    """Places MoE blocks as DeepSeek does: in all blocks but the first `first_k_dense_replace`."""

    default: Any = REQUIRED

    def read(self, theirs: HuggingFaceConfig, ours: Tree) -> None:
        k = theirs.size("first_k_dense_replace", default=self.default, least=0)
        set_setting(ours, "moe_blocks", {"kind": "all_but_first", "k": k} if k else {"kind": "all"})

    def write(self, ours: Tree, theirs: Tree) -> None:
        theirs["first_k_dense_replace"] = min(ours["moe_layers"], default=ours["num_layers"])


@dataclass(frozen=True)
class DenseHidden:
    """Translates the hidden size of the dense blocks. If all blocks are MoE, the key is read and ignored."""

    key: str = "intermediate_size"

    def read(self, theirs: HuggingFaceConfig, ours: Tree) -> None:
        hidden = theirs.take(self.key, default=None)
        if ours["moe_blocks"]["kind"] == "all":
            return
        if hidden is None:
            raise ValueError(f"config.json: {self.key} is missing: the dense blocks need it")
        set_setting(ours, "ffn", {"hidden": hidden, "activation": "swiglu"})

    def write(self, ours: Tree, theirs: Tree) -> None:
        if (hidden := get_setting(ours, "ffn.hidden")) is not None:
            theirs[self.key] = hidden
