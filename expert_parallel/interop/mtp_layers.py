"""Imports and exports the layers of multi-token prediction that follow the layers of a model, as DeepSeek-V3 and
GLM-4.5 have them: a block, two norms, a projection and a final norm, and copies of the embedding and of the head."""

from collections.abc import Collection, Iterator

from expert_parallel.interop.folder import HuggingFaceFolder
from expert_parallel.interop.ignored_tensors import HEAD, rows_are_equal
from expert_parallel.interop.tensor_map import IDENTITY, TensorMapping, TensorPair, Transform
from expert_parallel.model.config import ModelConfig
from expert_parallel.model.multi_token import MTPConfig

WEIGHT = 0.1  # of the loss; no config.json states it. DeepSeek-V3 and GLM-4.5 ended with it
COPY = "equal to the embedding or to the head, which multi-token prediction shares; an export writes it again"
NAMES = {
    "embedding_norm": "enorm",
    "hidden_norm": "hnorm",
    "projection": "eh_proj",
    "final_norm": "shared_head.norm",
}
# safetensors refuses to write the same memory twice.
CLONED = Transform(lambda theirs: theirs, lambda ours: [tensor.clone() for tensor in ours])
MTP_TENSORS = [
    TensorMapping(f"blocks.{{L}}.mtp.{own}.weight", (f"model.layers.{{L}}.{their}.weight",), IDENTITY)
    for own, their in NAMES.items()
]


def with_mtp_layers(model: ModelConfig, count: int) -> ModelConfig:
    """Returns the settings of a model with `count` layers of multi-token prediction."""
    return model.model_copy(update={"mtp": MTPConfig(depth=count, weight=WEIGHT)})


def copies(model: ModelConfig) -> Iterator[TensorPair]:
    """Yields the copies of the embedding and of the head that each layer of multi-token prediction has in a folder."""
    head = "embedding.weight" if model.tied_embeddings else "unembedding.weight"
    for layer in model.mtp_layers:
        for ours, theirs in (("embedding.weight", "embed_tokens"), (head, "shared_head.head")):
            yield TensorPair((ours,), (f"model.layers.{layer}.{theirs}.weight",), CLONED)


def reason_to_set_aside(
    folder: HuggingFaceFolder,
    names: Collection[str],
    model: ModelConfig,
    pairs: list[TensorPair],
    table: str,
    compares: bool,
) -> str | None:
    """Returns why the layers of multi-token prediction cannot be imported, or None if they can.

    names: the tensors of these layers in the folder. model, pairs: with these layers. table: the name of the embedding
    in the folder. They can if all their tensors and no others are there, and their copies of the embedding and of the
    head, if there are any, equal these, in the same dtype; compares: False reads no values, and takes them for equal.
    """
    known = {name for pair in (*pairs, *copies(model)) for name in pair.theirs}
    for name in names:
        if name not in known:
            return f"{name} is a tensor that its layers do not have here"
    layers = tuple(f"model.layers.{layer}." for layer in model.mtp_layers)
    for pair in pairs:
        for name in pair.theirs:
            if name.startswith(layers) and name not in folder.files:
                return f"{name} is missing"
    shared = {"embedding.weight": table, "unembedding.weight": HEAD}
    for pair in copies(model):
        original, name = shared[pair.ours[0]], pair.theirs[0]
        if name not in folder.files or original not in folder.files:
            continue
        # An export writes the copy in the dtype of the original.
        is_equal = folder.dtype(name) == folder.dtype(original)
        if not is_equal or (compares and not rows_are_equal(folder, name, original)):
            return f"{name} differs from {original}, and the model has one of them"
    return None
