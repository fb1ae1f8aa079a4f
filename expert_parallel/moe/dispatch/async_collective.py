"""Runs collectives inside autograd: each is started first and waited for later, in the backward pass too."""

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from expert_parallel.moe.dispatch.ledger import Ledger
from expert_parallel.parallel.collectives import ExchangeKey, Peers, Wait

Outputs = Tensor | tuple[Tensor, ...]


class SplitSizes(NamedTuple):
    """Holds the number of rows sent to each rank of a group, and received from each."""

    send: list[int]
    receive: list[int]

    @property
    def reversed(self) -> "SplitSizes":
        """Returns the sizes of the opposite direction."""
        return SplitSizes(self.receive, self.send)


class AsyncCollective:
    """Runs one collective in the forward pass and another for its gradient in the backward pass. Each is started first
    and waited for later, so that other work can overlap it.

        forward     start:   launch(x)               ...     finish:  wait for the result
        backward    finish:  launch_backward(grad)   ...     start:   wait for the gradient of x

    Autograd runs ready nodes in the reverse order of their creation, so whatever is computed between `start` and
    `finish` overlaps the exchange in both passes. A subclass defines the two exchanges.
    """

    def launch(self, x: Tensor) -> Wait:
        """Starts the exchange of the forward pass. x: detached."""
        raise NotImplementedError

    def launch_backward(self, grad: Tensor) -> Wait:
        """Starts the exchange of the backward pass. grad: the gradient of the (first) output."""
        raise NotImplementedError

    def unpack(self, arrived: Tensor) -> Outputs:
        """Converts the received tensor to the outputs. Only the first output has a gradient; others are integers."""
        return arrived

    def unpack_backward(self, arrived: Tensor) -> Tensor:
        """Converts the tensor received in the backward pass to the gradient of x."""
        return arrived

    def start(self, x: Tensor) -> Self:
        """Starts the exchange of x. Returns this object."""
        self._token = _Node.apply(x, self._start_forward, self._finish_backward)
        return self

    def finish(self) -> Any:
        """Waits for the exchange and returns its outputs, as `unpack` gives them. It can be called only once."""
        token = self._token
        del self._token  # its autograd node holds this object: a reference cycle otherwise
        return _Node.apply(token, self._finish_forward, self._start_backward)

    def _start_forward(self, x: Tensor) -> Tensor:
        self._wait = self.launch(x.detach())  # detached: a backend's thread may keep its input, and so the graph, alive
        return x.new_empty(0)  # the token: an empty tensor that makes the node of `finish` depend on that of `start`

    def _finish_forward(self, token: Tensor) -> Outputs:
        return self.unpack(self._waited())

    def _start_backward(self, grad: Tensor) -> Tensor:
        self._wait = self.launch_backward(grad)
        return grad.new_empty(0)

    def _finish_backward(self, token: Tensor) -> Tensor:
        return self.unpack_backward(self._waited())

    def _waited(self) -> Tensor:
        wait = self._wait
        del self._wait  # it keeps the sent tensor alive
        return wait()


class _Node(torch.autograd.Function):
    """Runs one function in the forward pass and another in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, forward_step: Callable[[Tensor], Outputs], backward_step: Callable[[Tensor], Tensor]
    ) -> Outputs:
        ctx.backward_step = backward_step
        outputs = forward_step(x)
        if isinstance(outputs, Tensor):
            return outputs.detach()  # on a single rank the result may be x itself
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, None, None]:
        return ctx.backward_step(grad), None, None


class AsyncAllToAll(AsyncCollective):
    """Exchanges rows by an all-to-all, which the ledger counts and checks. Gradients take the all-to-all in the
    opposite direction."""

    def __init__(self, ledger: Ledger, sizes: SplitSizes, peers: Peers, key: ExchangeKey) -> None:
        self.ledger = ledger
        self.sizes = sizes
        self.peers = peers
        self.key = key

    def launch(self, x: Tensor) -> Wait:
        """Starts the all-to-all of the rows."""
        return self.ledger.all_to_all(x, *self.sizes, self.peers, self.key)

    def launch_backward(self, grad: Tensor) -> Wait:
        """Starts the all-to-all of the rows' gradients."""
        return self.ledger.all_to_all(grad, *self.sizes.reversed, self.peers, self.key.backward_key)
