"""Checks that all ranks run the same forward pass at the same time, by a fingerprint that is sent with the numbers of
rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from expert_parallel.moe.context import StepContext
from expert_parallel.parallel.collectives import Peers, all_gather_rows


@dataclass(frozen=True)
class PassFingerprint:
    """Holds the properties of a forward pass in which all its ranks must agree. `encoded` fits in two 31-bit integers.

    width: D, the number of columns of a row. num_choices: K. needs_grad: True if the pass has a backward pass. context:
    only its layer, micro-step and step are compared.
    """

    width: int
    dtype: torch.dtype
    num_choices: int
    needs_grad: bool
    context: StepContext

    DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)  # encoded as their index

    @property
    def encoded(self) -> list[int]:
        """Returns the fields packed into two integers; large values wrap around."""
        shape = (
            self.width % 2**17
            | self.needs_grad << 17
            | self.DTYPES.index(self.dtype) << 18
            | self.num_choices % 2**9 << 22
        )
        c = self.context
        return [shape, c.layer % 2**10 | c.micro_step % 2**7 << 10 | c.step % 2**14 << 17]

    @staticmethod
    def decode(encoded: Sequence[int]) -> str:
        """Returns a description of encoded fields in words, for error messages."""
        shape, place = encoded
        dtype = PassFingerprint.DTYPES[min(shape >> 18 & 15, 3)]
        return (
            f"rows of {shape % 2**17} {str(dtype).removeprefix('torch.')} {'with' if shape >> 17 & 1 else 'without'} "
            f"gradient, {shape >> 22} choices a token, "
            f"layer {place % 2**10}, micro-step {place >> 10 & 127}, step {place >> 17}"
        )


def check_in_sync(fingerprint: PassFingerprint, peers: Peers, device: torch.device) -> None:
    """Raises a ValueError on every rank of `peers` if one of them runs another pass. Takes one small collective, for
    which the host waits."""
    encoded = torch.tensor([fingerprint.encoded], dtype=torch.int32, device=device)
    gathered_P2 = all_gather_rows(encoded, [1] * peers.size, peers.group)
    raise_if_out_of_sync(gathered_P2.tolist(), fingerprint, peers)  # the host waits


def raise_if_out_of_sync(encoded_P2: Sequence[Sequence[int]], fingerprint: PassFingerprint, peers: Peers) -> None:
    """Raises a ValueError, which describes both passes, if a rank runs another pass than this rank; without this check
    the ranks would hang or misread rows.

    encoded_P2: the encoded fingerprint of each rank of `peers`, on the host. fingerprint: that of this rank.
    """
    for peer, encoded in enumerate(encoded_P2):
        if list(encoded) != fingerprint.encoded:
            raise ValueError(
                f"the ranks are not in the same pass: rank {peers.ranks[peers.me]} has "
                f"{PassFingerprint.decode(fingerprint.encoded)}; "
                f"rank {peers.ranks[peer]} has {PassFingerprint.decode(encoded)} (steps modulo 16384)"
            )
