"""Names the layer and model shapes that benchmarks measure, and applies the changes that a user makes to them."""

import math
from collections.abc import Sequence
from typing import Any, Literal, Self, TypeVar

from pydantic import Field, model_validator

from expert_parallel.nn.ffn import GATED
from expert_parallel.settings import Settings

S = TypeVar("S", bound=Settings)


class LayerShape(Settings):
    """Holds the sizes of one MoE layer. tokens: of all ranks together. peers: names of the implementations to compare
    with; None: all."""

    tokens: int = Field(ge=1)
    d_model: int = Field(ge=1)
    hidden: int = Field(ge=1)
    num_experts: int = Field(ge=1)
    k: int = Field(ge=1)
    activation: Literal["gelu", "swiglu"] = "gelu"
    peers: tuple[str, ...] | None = None

    @model_validator(mode="after")
    def _choose(self) -> Self:
        if self.k > self.num_experts:
            raise ValueError(f"k ({self.k}) is larger than num_experts ({self.num_experts})")
        return self

    def __str__(self) -> str:
        return (
            f"{self.tokens} tokens, d {self.d_model}, hidden {self.hidden}, {self.num_experts} experts, top-{self.k}, "
            f"{self.activation}"
        )


def num_matrices(activation: str) -> int:
    """Returns the number of weight matrices of one expert, (D, F) or (F, D) each: 3 with a gated activation, else 2."""
    return 3 if activation in GATED else 2


def layer_flops(shape: LayerShape, activation: str) -> int:
    """Returns the FLOPs of the experts alone, forward and backward, over all ranks: each of T * K rows passes each
    matrix three times (output, gradient of the input, gradient of the weight), at 2 D F operations."""
    return 3 * 2 * shape.tokens * shape.k * num_matrices(activation) * shape.d_model * shape.hidden


SHAPES = {
    "base": LayerShape(tokens=4096, d_model=256, hidden=1024, num_experts=8, k=2),
    "fine-grained": LayerShape(tokens=1024, d_model=256, hidden=128, num_experts=64, k=8),
    # The base layer and a dense one with as many parameters: what sparsity gains.
    "dense-8192": LayerShape(tokens=4096, d_model=256, hidden=1024, num_experts=8, k=2, peers=("dense",)),
    "mixtral": LayerShape(tokens=16384, d_model=4096, hidden=14336, num_experts=8, k=2, activation="swiglu"),
    "qwen3-30b-a3b": LayerShape(tokens=32768, d_model=2048, hidden=768, num_experts=128, k=8, activation="swiglu"),
    # The share of one of 8 ranks: 32 of the 256 experts, with the 1024 rows each that 8 x 4096 tokens give them.
    "deepseek-v3-slice": LayerShape(tokens=4096, d_model=7168, hidden=2048, num_experts=32, k=8, activation="swiglu"),
}


def choose_shape(name: str, changes: Sequence[str] = (), scale: float = 1.0) -> LayerShape:
    """Returns the shape of this name with changes such as `tokens=512` applied. The name `given` stands for a shape
    whose sizes are all given as changes.

    scale: factor on the number of tokens. Raises ValueError for unknown names and impossible sizes."""
    if name != "given" and name not in SHAPES:
        raise ValueError(f"--shape is {name!r}, it must be one of {', '.join(SHAPES)}, given")
    if not math.isfinite(scale):
        raise ValueError(f"--scale is {scale}, it must be a number")
    if name == "given":
        named = {change.partition("=")[0] for change in changes}
        missing = [
            field for field, info in LayerShape.model_fields.items() if info.is_required() and field not in named
        ]
        if missing:
            raise ValueError(f"--shape given: {', '.join(missing)} must be given, as in tokens=1024")
    shape = _change(SHAPES.get(name, SHAPES["base"]), changes)
    return shape.model_copy(update={"tokens": max(1, round(shape.tokens * scale))})


class TrainShape(Settings):
    """Holds the sizes of a decoder in which every block has an MoE layer. layer: the sizes of an MoE layer; its tokens
    are those of a step, over all ranks."""

    layer: LayerShape
    num_layers: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    head_size: int = Field(ge=2, multiple_of=2)
    vocab_size: int = Field(ge=2)
    sequence_length: int = Field(ge=2)

    def __str__(self) -> str:
        return (
            f"{self.num_layers} layers, {self.num_heads} heads of {self.head_size}, vocabulary {self.vocab_size}, "
            f"sequences of {self.sequence_length}; each layer {self.layer}"
        )

    @property
    def sequences(self) -> int:
        """Returns the number of sequences in a step, over all ranks."""
        return self.layer.tokens // self.sequence_length


TRAIN_SHAPES = {
    "base": TrainShape(
        layer=SHAPES["base"].model_copy(update={"tokens": 2048}),
        num_layers=4,
        num_heads=8,
        head_size=32,
        vocab_size=256,
        sequence_length=256,
    ),
    # 3.1 billion parameters, 0.76 billion active for a token: for one GPU of 80 GB and more.
    "3b": TrainShape(
        layer=LayerShape(tokens=16384, d_model=2048, hidden=768, num_experts=32, k=4, activation="swiglu"),
        num_layers=18,
        num_heads=16,
        head_size=128,
        vocab_size=32000,
        sequence_length=2048,
    ),
}


def choose_train_shape(name: str, changes: Sequence[str] = (), scale: float = 1.0) -> TrainShape:
    """Returns the shape of this name with sizes of the decoder or of its layers changed. Raises ValueError for unknown
    names and impossible sizes."""
    if name not in TRAIN_SHAPES:
        raise ValueError(f"--shape is {name!r}, it must be one of {', '.join(TRAIN_SHAPES)}")
    shape = TRAIN_SHAPES[name]
    own = [change for change in changes if change.partition("=")[0] in TrainShape.model_fields.keys() - {"layer"}]
    layer = _change(shape.layer, [change for change in changes if change not in own])
    changed = _change(shape.model_copy(update={"layer": layer}), own)
    scaled = changed.layer.model_copy(update={"tokens": max(1, round(changed.layer.tokens * scale))})
    if scaled.tokens % changed.sequence_length:
        raise ValueError(
            f"--shape {name}: tokens ({scaled.tokens}) is not a multiple of sequence_length "
            f"({changed.sequence_length}): a step has whole sequences"
        )
    return changed.model_copy(update={"layer": scaled})


def _change(shape: S, changes: Sequence[str]) -> S:
    """Applies changes of the form NAME=VALUE. Raises ValueError for other names and invalid values."""
    tree = shape.model_dump()
    names = [name for name in tree if name not in ("peers", "layer")]
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals or key not in names:
            raise ValueError(
                f"{change!r} is not a change of a shape: it must be NAME=VALUE with one of {', '.join(names)}"
            )
        if key != "activation" and not value.isdecimal():
            raise ValueError(f"{change!r}: {key} must be a whole number")
        tree[key] = value if key == "activation" else int(value)
    return _validate(type(shape), tree)


def _validate(kind: type[S], tree: dict[str, Any]) -> S:
    return kind.model_validate(tree, context={"where": "the shape is invalid"})
