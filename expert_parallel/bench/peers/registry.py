"""Lists all peers by name, with functions that build their layers, or raise `NotMeasured` with the reason."""

from collections.abc import Callable
from functools import partial

from expert_parallel.bench.peers import deepspeed, megatron, ours, plain, torchtitan, transformers, tutel
from expert_parallel.bench.peers.decoder import TrainableModel, build_decoder
from expert_parallel.bench.peers.implementation import Case, Implementation
from expert_parallel.bench.shapes import TrainShape

LayerBuilder = Callable[[Case], Implementation]


def _in_decoder(build: LayerBuilder, shape: TrainShape, case: Case) -> TrainableModel:
    return build_decoder(shape, build, case)


PEERS: dict[str, LayerBuilder] = {
    "ours with capacity": ours.build_with_capacity,
    "mask loop": plain.build_mask_loop,
    "one-hot einsum": plain.build_einsum,
    "deepspeed": deepspeed.build_deepspeed,
    "deepspeed + tutel": deepspeed.build_deepspeed_tutel,
    "tutel": tutel.build,
    "megatron-core": megatron.build,
    "torchtitan": torchtitan.build,
    "transformers eager": transformers.build_eager,
    "transformers grouped_mm": transformers.build_grouped_mm,
    "dense": plain.build_dense,
}
DEFAULT_PEERS = tuple(name for name in PEERS if name != "dense")

# Models for `bench train`: a peer's layers in a plain decoder, or a peer's own model.
ModelBuilder = Callable[[TrainShape, Case], TrainableModel]
TRAIN_PEERS: dict[str, ModelBuilder] = {
    **{name: partial(_in_decoder, PEERS[name]) for name in DEFAULT_PEERS if name != "one-hot einsum"},
    "transformers model": transformers.build_model,
}
