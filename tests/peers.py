"""Peers as oracles: what it takes to compare with them in double precision."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch


@contextmanager
def peers_in_float64() -> Iterator[None]:
    """transformers takes its norms, softmaxes and rotary angles in float32, also in a float64 model; DeepSpeed its
    masks. Built and run within, they take them in float64: then equal means equal to the last digits. So do quotients
    of integers, such as positions."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield from _with_other_names()
    finally:
        torch.set_default_dtype(default)


def _with_other_names() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield
