"""Lists all peers by name, with functions that build their layers, or raise `NotMeasured` with the reason."""

from collections.abc import Callable
from functools import partial

from expert_parallel.bench.peers import deepspeed, megatron, ours, plain, torchtitan, transformers, tutel
from expert_parallel.bench.peers.contender import Case, Contender
from expert_parallel.bench.peers.decoder import Trainee, build_decoder
from expert_parallel.bench.shapes import TrainShape

Adapter = Callable[[Case], Contender]


def _in_decoder(build: Adapter, shape: TrainShape, case: Case) -> Trainee:
    return build_decoder(shape, build, case)


PEERS: dict[str, Adapter] = {
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
DEFAULT = tuple(name for name in PEERS if name != "dense")

# Models for `bench train`: a peer's layers in a plain decoder, or a peer's own model.
TrainAdapter = Callable[[TrainShape, Case], Trainee]
TRAINEES: dict[str, TrainAdapter] = {
    **{name: partial(_in_decoder, PEERS[name]) for name in DEFAULT if name != "one-hot einsum"},
    "transformers model": transformers.build_model,
}
