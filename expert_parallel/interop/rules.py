"""Rules between a config.json and our model settings. Each is read in one direction and written in the other, and
every key of a config.json is looked at by a rule, known to change nothing that is computed, or refused."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

Tree = dict[str, Any]
REQUIRED = object()

# Of training, of generation, of bookkeeping: the logits are the same whatever they say.
NEUTRAL = frozenset(
    (
        *("architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "auto_map", "_name_or_path"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "use_cache", "pretraining_tp"),
        *("initializer_range", "output_router_logits", "router_aux_loss_coef"),
    )
)


class HuggingFaceConfig:
    """The keys of a config.json. It knows which of them nobody has asked for."""

    def __init__(self, values: Tree) -> None:
        self.values = values
        self.asked: set[str] = set()

    def take(self, *keys: str, default: Any = REQUIRED) -> Any:
        """The value of the first of these names (older and newer ones of one setting) that is there."""
        self.asked |= set(keys)
        found = [key for key in keys if key in self.values]
        if found:
            return self.values[found[0]]
        if default is REQUIRED:
            raise ValueError(f"config.json: {' or '.join(keys)} is missing")
        return default

    def size(self, *keys: str, default: Any = REQUIRED, least: int = 1) -> Any:
        """A whole number, `least` or more, so that rules may calculate with it; or the default."""
        value = self.take(*keys, default=default)
        if type(value) is not int or value < least:
            if value is default:
                return value
            key = next((key for key in keys if key in self.values), keys[0])
            raise self.refuse(key, f"it must be a whole number, {least} or more")
        return value

    def refuse(self, key: str, why: str) -> ValueError:
        return ValueError(f"config.json: {key} is {self.values.get(key)!r}: {why}")

    def refuse_unknown_keys(self, neutral: Iterable[str]) -> None:
        for key in self.values:
            if key not in self.asked and key not in NEUTRAL and key not in neutral:
                raise self.refuse(key, "this key is not known here, and may change what the model computes")


def get_setting(tree: Tree, path: str) -> Any:
    """The value at a dotted path, None where a block on the way is absent."""
    value: Any = tree
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def set_setting(tree: Tree, path: str, value: Any) -> None:
    *parents, leaf = path.split(".")
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[leaf] = value


class Rule(Protocol):
    def read(self, theirs: HuggingFaceConfig, ours: Tree) -> None:
        """Fills in our settings. ValueError for what we have no setting for."""

    def write(self, ours: Tree, theirs: Tree) -> None:
        """Fills in their keys. What they cannot say is left out: reading back shows the difference."""


@dataclass(frozen=True)
class Copy:
    """One number or word on both sides. keys: its names in theirs; the first is written."""

    keys: tuple[str, ...] | str
    path: str
    default: Any = REQUIRED

    @property
    def names(self) -> tuple[str, ...]:
        return (self.keys,) if isinstance(self.keys, str) else self.keys

    def read(self, theirs: HuggingFaceConfig, ours: Tree) -> None:
        value = theirs.take(*self.names, default=self.default)
        if value is None and self.default is not None:
            raise theirs.refuse(self.names[0], "a value is needed")
        set_setting(ours, self.path, value)

    def write(self, ours: Tree, theirs: Tree) -> None:
        theirs[self.names[0]] = get_setting(ours, self.path)


@dataclass(frozen=True)
class CopyInt(Copy):
    """A whole number, 1 or more."""

    def read(self, theirs: HuggingFaceConfig, ours: Tree) -> None:
        set_setting(ours, self.path, theirs.size(*self.names, default=self.default))


@dataclass(frozen=True)
class Require:
    """A key that we can only take at one value, which is also what its absence means. written: where others' loaders
    want to see it."""

    key: str
    value: Any
    written: bool = False

    def read(self, theirs: HuggingFaceConfig, ours: Tree) -> None:
        if theirs.take(self.key, default=self.value) != self.value:
            raise theirs.refuse(self.key, f"only {self.value!r} can be had here")

    def write(self, ours: Tree, theirs: Tree) -> None:
        if self.written:
            theirs[self.key] = self.value


@dataclass(frozen=True)
class Const:
    """What a family says by being that family."""

    path: str
    value: Any

    def read(self, theirs: HuggingFaceConfig, ours: Tree) -> None:
        set_setting(ours, self.path, self.value)

    def write(self, ours: Tree, theirs: Tree) -> None:
        pass


@dataclass(frozen=True)
class HeadSize:
    """default: what an absent head_dim means; None: hidden_size / num_attention_heads. is_free: head_dim may be another
    than that."""

    default: int | None = None
    is_free: bool = True

    def read(self, theirs: HuggingFaceConfig, ours: Tree) -> None:
        width, heads = ours["d_model"], ours["attention"]["num_heads"]
        size = theirs.size("head_dim", default=None)
        if size is None and "head_dim" not in theirs.values:
            size = self.default
        if size is None and width % heads:
            raise theirs.refuse("num_attention_heads", f"it does not divide hidden_size ({width})")
        if size is None:
            size = width // heads
        if not self.is_free and size * heads != width:
            raise theirs.refuse("head_dim", f"{heads} heads must make up hidden_size ({width})")
        set_setting(ours, "attention.head_size", size)

    def write(self, ours: Tree, theirs: Tree) -> None:
        if self.is_free:
            theirs["head_dim"] = get_setting(ours, "attention.head_size")


@dataclass(frozen=True)
class QKNorm:
    """Norms of queries and keys, with the eps of the others."""

    kind: str

    def read(self, theirs: HuggingFaceConfig, ours: Tree) -> None:
        set_setting(ours, "attention.qk_norm", {"kind": self.kind, "eps": get_setting(ours, "norm.eps")})

    def write(self, ours: Tree, theirs: Tree) -> None:
        pass


# ------------------------------------------------------------------------------------ what differs from block to block


@dataclass(frozen=True)
class SlidingWindow:
    """Attention to the last `sliding_window` positions, in all blocks. switch: the key that turns it on, if any."""

    switch: str | None = None

    def read(self, theirs: HuggingFaceConfig, ours: Tree) -> None:
        size = theirs.take("sliding_window", default=None)
        if self.switch is not None and not theirs.take(self.switch, default=False):
            size = None
        first = theirs.size("max_window_layers", default=0, least=0)
        if self.switch is not None and size is not None and first:
            raise theirs.refuse("max_window_layers", "versions of transformers differ in which blocks have a window")
        if size is not None:
            set_setting(ours, "attention.window", size)

    def write(self, ours: Tree, theirs: Tree) -> None:
        size = get_setting(ours, "attention.window")
        theirs["sliding_window"] = size
        if self.switch is not None:
            theirs[self.switch] = size is not None


@dataclass(frozen=True)
class SlidingWindowByLayer:
    """Attention to the last `sliding_window` positions in the blocks that layer_types names. switch: as in Window;
    then the blocks from max_window_layers on have it where layer_types is absent, else every other, the first too."""

    switch: str | None = None

    def read(self, theirs: HuggingFaceConfig, ours: Tree) -> None:
        size, count = theirs.take("sliding_window", default=None), ours["num_layers"]
        first = theirs.size("max_window_layers", default=count, least=0)
        if self.switch is None:
            usual = [layer % 2 == 0 for layer in range(count)]
        else:
            size = size if theirs.take(self.switch, default=False) else None
            usual = [size is not None and layer >= first for layer in range(count)]
        kinds = theirs.take("layer_types", default=None)
        if kinds is None:
            kinds = ["sliding_attention" if windowed else "full_attention" for windowed in usual]
        known = ("sliding_attention", "full_attention")
        if not isinstance(kinds, list) or len(kinds) != count or any(kind not in known for kind in kinds):
            raise theirs.refuse("layer_types", f"{count} of sliding_attention and full_attention are known here")
        blocks = [layer for layer, kind in enumerate(kinds) if kind == "sliding_attention"]
        if blocks and size is None:
            raise theirs.refuse("sliding_window", f"layer_types gives {len(blocks)} blocks a window")
        if blocks:
            set_setting(ours, "attention.window", size)
            set_setting(
                ours, "window_blocks", {"kind": "list", "indices": blocks} if len(blocks) < count else {"kind": "all"}
            )

    def write(self, ours: Tree, theirs: Tree) -> None:
        size, blocks = get_setting(ours, "attention.window"), set(ours["window_layers"])
        kinds = ["sliding_attention" if layer in blocks else "full_attention" for layer in range(ours["num_layers"])]
        theirs |= {"sliding_window": size, "layer_types": kinds}
        if self.switch is not None:
            theirs |= {self.switch: size is not None, "max_window_layers": min(blocks, default=ours["num_layers"])}


@dataclass(frozen=True)
class SparseStep:
    """Qwen's choice of MoE blocks: every decoder_sparse_step-th that is not in mlp_only_layers."""

    def read(self, theirs: HuggingFaceConfig, ours: Tree) -> None:
        step = theirs.size("decoder_sparse_step", default=1)
        dense = theirs.take("mlp_only_layers", default=None) or []
        if not isinstance(dense, list):
            raise theirs.refuse("mlp_only_layers", "it must be a list of blocks")
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
    """DeepSeek's choice: the first blocks stay dense."""

    def read(self, theirs: HuggingFaceConfig, ours: Tree) -> None:
        k = theirs.size("first_k_dense_replace", least=0)
        set_setting(ours, "moe_blocks", {"kind": "all_but_first", "k": k} if k else {"kind": "all"})

    def write(self, ours: Tree, theirs: Tree) -> None:
        theirs["first_k_dense_replace"] = min(ours["moe_layers"], default=ours["num_layers"])


@dataclass(frozen=True)
class DenseHidden:
    """The hidden size of the dense blocks. Where all are MoE, the key is there in theirs all the same."""

    key: str = "intermediate_size"

    def read(self, theirs: HuggingFaceConfig, ours: Tree) -> None:
        hidden = theirs.take(self.key, default=None)
        if ours["moe_blocks"]["kind"] == "all":
            return
        if hidden is None:
            raise ValueError(f"config.json: {self.key} is missing, the dense blocks need it")
        set_setting(ours, "ffn", {"hidden": hidden, "activation": "swiglu"})

    def write(self, ours: Tree, theirs: Tree) -> None:
        if (hidden := get_setting(ours, "ffn.hidden")) is not None:
            theirs[self.key] = hidden
