"""Imports and exports MoE layers of Switch Transformers as single layers.

The model around them, T5's encoder and decoder, is not supported.
"""

from collections.abc import Mapping

from torch import Tensor

from expert_parallel.interop.folder import HuggingFaceFolder
from expert_parallel.interop.hf_config import HuggingFaceConfig, Tree
from expert_parallel.interop.tensor_map import IDENTITY, TRANSPOSED, TensorMapping, TensorPair, match_tensors
from expert_parallel.moe.config import MoEConfig
from expert_parallel.moe.layer import MoELayer
from expert_parallel.moe.parameters import logical_parameters

TENSOR_MAP = [
    TensorMapping("router.weight", ("router.classifier.weight",), IDENTITY),
    TensorMapping("router.bias", ("router.classifier.bias",), IDENTITY),
    TensorMapping("experts.{E}.w_in", ("experts.expert_{E}.wi.weight",), TRANSPOSED),
    TensorMapping("experts.{E}.w_out", ("experts.expert_{E}.wo.weight",), TRANSPOSED),
]
ROUTER = "router.classifier.weight"
ACTIVATIONS = ("relu", "gelu")  # both sides use the same names


def switch_config(values: Tree) -> MoEConfig:
    """Returns the layer's config for a Switch model's config.json: as in evaluation, with a capacity per sequence.

    Jitter and dropout, which only training uses, are ignored. Raises a ValueError for a value that is not supported.
    """
    theirs = HuggingFaceConfig(values)
    activation, capacity = theirs.take("dense_act_fn", default="relu"), theirs.take("expert_capacity", default=64)
    if activation not in ACTIVATIONS:
        raise theirs.refuse("dense_act_fn", f"it must be one of {', '.join(ACTIVATIONS)}")
    if theirs.take("router_ignore_padding_tokens", default=False):
        raise theirs.refuse("router_ignore_padding_tokens", "only False is supported")
    return MoEConfig.model_validate(
        {
            "d_model": theirs.take("d_model"),
            "num_experts": theirs.take("num_experts"),
            "router": {"k": 1, "normalise": False, "bias": theirs.take("router_bias", default=False)},
            "experts": {"hidden": theirs.take("d_ff"), "activation": activation},
            "capacity": {"kind": "absolute", "train": capacity, "eval": capacity, "scope": "sequence"},
        }
    )


def switch_prefixes(folder: HuggingFaceFolder) -> list[str]:
    """Returns the name prefixes of a folder's MoE layers, such as `encoder.block.1.layer.1.mlp.`."""
    return sorted(name.removesuffix(ROUTER) for name in folder.files if name.endswith(ROUTER))


def read_switch_layer(folder: HuggingFaceFolder, prefix: str) -> MoELayer:
    """Reads one MoE layer of a folder. prefix: one of `switch_prefixes`."""
    names = [name.removeprefix(prefix) for name in folder.files if name.startswith(prefix)]
    return from_switch(switch_config(folder.config), {name: folder.read(prefix + name) for name in names})


def from_switch(config: MoEConfig, state: Mapping[str, Tensor]) -> MoELayer:
    """Builds a layer with the weights of a state dict of transformers' SwitchTransformersSparseMLP, in their dtype.

    Raises a ValueError if a tensor is missing, left over or of another shape, or if the dtypes differ.
    """
    dtypes = {tensor.dtype for tensor in state.values()}
    if len(dtypes) != 1:
        raise ValueError(f"the tensors of the Switch layer have {len(dtypes)} dtypes, they must have the same one")
    layer = MoELayer(config).to(dtypes.pop())
    left = dict(state)
    ours: dict[str, Tensor] = {}
    for pair in _pairs(layer):
        for name in pair.theirs:
            if name not in left:
                raise ValueError(f"{name} is missing from the Switch layer")
        theirs = [left.pop(name) for name in pair.theirs]
        ours |= dict(zip(pair.ours, pair.transform.to_ours(theirs), strict=True))
    if left:
        raise ValueError(f"{next(iter(left))} is left over in the Switch layer")
    for logical in logical_parameters(layer):
        for name in logical.names:
            if ours[name].shape != logical.shape:
                raise ValueError(
                    f"{name} of the Switch layer has shape {list(ours[name].shape)}, expected {list(logical.shape)}"
                )
        logical.fill(logical.parameter, [ours[name] for name in logical.names])
    return layer


def to_switch(layer: MoELayer) -> dict[str, Tensor]:
    """Returns the state dict of a transformers SwitchTransformersSparseMLP with this layer's weights."""
    ours: dict[str, Tensor] = {}
    for logical in logical_parameters(layer):
        ours |= logical.whole(logical.parameter.detach())
    state: dict[str, Tensor] = {}
    for pair in _pairs(layer):
        tensors = pair.transform.to_theirs([ours[name] for name in pair.ours])
        state |= {name: tensor.contiguous() for name, tensor in zip(pair.theirs, tensors, strict=True)}
    return state


def _pairs(layer: MoELayer) -> list[TensorPair]:
    names = [name for logical in logical_parameters(layer) for name in logical.names]
    return match_tensors(TENSOR_MAP, names, layer.config.num_experts)
