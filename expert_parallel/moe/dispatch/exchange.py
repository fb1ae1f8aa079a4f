"""Exchanges of rows between ranks that autograd sees: each is started and finished apart, in the backward pass too."""

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from expert_parallel.moe.dispatch.ledger import Ledger
from expert_parallel.parallel.collectives import ExchangeKey, Peers, Wait

Outputs = Tensor | tuple[Tensor, ...]


class SplitSizes(NamedTuple):
    """Says how many rows go to each rank of a group, and how many come from each."""

    send: list[int]
    receive: list[int]

    @property
    def reversed(self) -> "SplitSizes":
        """Returns the sizes of the way back."""
        return SplitSizes(self.receive, self.send)


class AsyncCollective:
    """Runs one collective, and in the backward pass that of its gradient, each in two halves with other work between.

        forward     start:   begin(x)               ...     finish:  wait for what arrives
        backward    finish:  begin_backward(grad)   ...     start:   wait for the gradient of x

    Autograd runs nodes that are ready in the reverse order of their making. So whatever is computed between `start` and
    `finish` overlaps the exchange in both passes. A subclass says what the two passes exchange.
    """

    def begin(self, x: Tensor) -> Wait:
        """Starts the exchange of the forward pass."""
        raise NotImplementedError

    def begin_backward(self, grad: Tensor) -> Wait:
        """Starts the exchange of the backward pass: of the gradient of what arrived."""
        raise NotImplementedError

    def unpack(self, arrived: Tensor) -> Outputs:
        """Returns the outputs, made of what arrived. The first has a gradient; others are integers."""
        return arrived

    def unpack_backward(self, arrived: Tensor) -> Tensor:
        """Returns the gradient of x, made of what arrived."""
        return arrived

    def start(self, x: Tensor) -> Self:
        """Starts the exchange of x."""
        self._token = _Node.apply(x, self._start_forward, self._finish_backward)
        return self

    def finish(self) -> Any:
        """Waits for what arrives. Called once."""
        token = self._token
        del self._token  # the token's node holds this object, which must not hold the node
        return _Node.apply(token, self._finish_forward, self._start_backward)

    def _start_forward(self, x: Tensor) -> Tensor:
        self._wait = self.begin(x.detach())  # a backend's thread may hold what it sent, which would hold the graph
        return x.new_empty(0)  # the token, which ties the node of `finish` to that of `start`

    def _finish_forward(self, token: Tensor) -> Outputs:
        return self.unpack(self._waited())

    def _start_backward(self, grad: Tensor) -> Tensor:
        self._wait = self.begin_backward(grad)
        return grad.new_empty(0)

    def _finish_backward(self, token: Tensor) -> Tensor:
        return self.unpack_backward(self._waited())

    def _waited(self) -> Tensor:
        wait = self._wait
        del self._wait  # it holds what was sent
        return wait()


class _Node(torch.autograd.Function):
    """Takes one step in the forward pass, and another one in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, forward_step: Callable[[Tensor], Outputs], backward_step: Callable[[Tensor], Tensor]
    ) -> Outputs:
        ctx.backward_step = backward_step
        outputs = forward_step(x)
        if isinstance(outputs, Tensor):
            return outputs.detach()  # what arrived may be x itself, where a rank is alone
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, None, None]:
        return ctx.backward_step(grad), None, None


class AsyncAllToAll(AsyncCollective):
    """Exchanges rows, which the ledger accounts for. The gradient is the same all-to-all the other way round."""

    def __init__(self, ledger: Ledger, sizes: SplitSizes, peers: Peers, key: ExchangeKey) -> None:
        self.ledger, self.sizes, self.peers, self.key = ledger, sizes, peers, key

    def begin(self, x: Tensor) -> Wait:
        return self.ledger.all_to_all(x, *self.sizes, self.peers, self.key)

    def begin_backward(self, grad: Tensor) -> Wait:
        return self.ledger.all_to_all(grad, *self.sizes.reversed, self.peers, self.key.of_backward)
