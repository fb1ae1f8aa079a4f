"""Implements a torch.distributed process group over an MPI communicator.

It is the one file that depends on which methods torch calls on a group, and on their names in different versions.
Collectives are complete when they return, even with async_op=True: on a CPU all cores compute, so that overlap gains
nothing. send and recv return at once, as pipelines need it.
"""

import ctypes
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from mpi4py import MPI
from torch import Tensor

from expert_parallel.runtime.mpi import messages
from expert_parallel.runtime.mpi.messages import REDUCE_DTYPES, buffer_spec, rows_buffer_spec
from expert_parallel.runtime.mpi.watchdog import Watchdog

# AVG is computed as a sum and a division.
REDUCTIONS = {
    dist.ReduceOp.SUM: MPI.SUM,
    dist.ReduceOp.AVG: MPI.SUM,
    dist.ReduceOp.PRODUCT: MPI.PROD,
    dist.ReduceOp.MIN: MPI.MIN,
    dist.ReduceOp.MAX: MPI.MAX,
    dist.ReduceOp.BAND: MPI.BAND,
    dist.ReduceOp.BOR: MPI.BOR,
    dist.ReduceOp.BXOR: MPI.BXOR,
}


def group_builder(watchdog: Watchdog) -> Callable[[Any, Any], "MPIGroup"]:
    """Returns the function that torch calls to create a process group, the default group or a further one, on each of
    its ranks. watchdog: ends the job if an MPI call takes too long."""

    def make(options: Any, _: Any) -> MPIGroup:
        world, ranks = MPI.COMM_WORLD, options.global_ranks_in_group
        comm = world.Create_group(world.group.Incl(ranks)) if ranks else world.Dup()
        return MPIGroup(comm, ranks or range(world.size), options.timeout, watchdog)

    return make


def query_cuda_support() -> bool:
    """Returns True if the MPI library is CUDA-aware, by an extension of Open MPI and MPICH; False if it has none."""
    try:
        return bool(ctypes.CDLL(MPI.__file__).MPIX_Query_cuda_support())
    except AttributeError:
        return False


class MPIWork(dist.Work):
    """Implements torch's Work handle over an MPI request.

    request: the MPI request; None if the call is already complete. keep: the tensor that MPI reads or writes, kept
    alive until the request is complete. finish: called once after completion. watch: returns the watchdog that limits
    the time of waiting.
    """

    def __init__(
        self,
        request: MPI.Request | None = None,
        keep: Tensor | None = None,
        finish: Callable[[], object] = lambda: None,
        watch: Callable[[], Watchdog] | None = None,
    ) -> None:
        super().__init__()
        self.request = request
        self.keep = keep
        self.finish = finish
        self.watch = watch

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Blocks until the request is complete; the watchdog's timeout applies, not `timeout`."""
        if self.request is not None and self.watch is not None:
            with self.watch():
                self.request.Wait()
            self._done()
        return True

    def is_completed(self) -> bool:
        """Tests for completion without blocking."""
        if self.request is not None and self.request.Test():
            self._done()
        return self.request is None

    def _done(self) -> None:
        self.request = self.keep = None
        self.finish()


ProcessGroup: Any = dist.ProcessGroup  # untyped: the names of its methods depend on the version of torch


class MPIGroup(ProcessGroup):
    """Implements each method as torch.distributed documents the function of that name. Tensors may be strided and on a
    GPU."""

    def __init__(self, comm: MPI.Intracomm, ranks: Sequence[int], timeout: timedelta, watchdog: Watchdog) -> None:
        """Wraps `comm`. ranks: the members' global ranks. timeout: of every call, after which the job is aborted."""
        super().__init__(comm.rank, comm.size)
        self.comm = comm
        self.seconds = timeout.total_seconds()
        self.watchdog = watchdog
        self.members = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
        self.is_cuda_aware = query_cuda_support()
        self.done = MPIWork()
        self.pending_sends: list[MPIWork] = []
        self.torch_name = self.torch_description = ""

    # -- names and settings of the group ------------------------------------------------------------------------------

    def getBackendName(self) -> str:
        return "mpi4py"

    def getGroupName(self) -> str:
        return self.torch_name

    def setGroupName(self, name: str) -> None:
        self.torch_name = name

    def getGroupDesc(self) -> str:
        return self.torch_description

    def setGroupDesc(self, description: str) -> None:
        self.torch_description = description

    group_name = property(getGroupName)
    group_desc = property(getGroupDesc)

    def set_timeout(self, timeout: timedelta) -> None:
        self.seconds = timeout.total_seconds()

    def shutdown(self) -> None:
        """Frees the communicator, as MPI has a limited number of them. All members must call it."""
        self.comm.Free()

    # -- one tensor to all, or all to one -----------------------------------------------------------------------------

    def broadcast(self, tensors: list[Tensor], options: Any) -> MPIWork:
        for x in tensors:
            buffer = self._send_buffer(x)
            with self._watch("broadcast"):
                self.comm.Bcast(buffer_spec(buffer), options.rootRank)
            self._copy_back(x, buffer)
        return self.done

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], options: Any) -> MPIWork:
        is_root, target = self.comm.rank == options.rootRank, self._receive_buffer(outputs[0])
        source = self._send_buffer(torch.cat([part.reshape(-1) for part in inputs[0]])) if is_root else None
        with self._watch("scatter"):
            sent = None if source is None else buffer_spec(source, self.comm.size)
            self.comm.Scatter(sent, buffer_spec(target), options.rootRank)
        return self._copy_back(outputs[0], target)

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], options: Any) -> MPIWork:
        is_root, source = self.comm.rank == options.rootRank, self._send_buffer(inputs[0])
        target = source.new_empty(self.comm.size, source.numel()) if is_root else None
        with self._watch("gather"):
            received = None if target is None else buffer_spec(target, self.comm.size)
            self.comm.Gather(buffer_spec(source), received, options.rootRank)
        if target is not None:
            for output, part in zip(outputs[0], target, strict=True):
                output.copy_(part.view(output.shape))
        return self.done

    def barrier(self, opts: Any = None) -> MPIWork:  # torch passes it under this name
        with self._watch("barrier"):
            self.comm.Barrier()
        return self.done

    # -- all to all ---------------------------------------------------------------------------------------------------

    def all_to_all_single(
        self,
        output: Tensor,
        input: Tensor,
        output_splits: Sequence[int],
        input_splits: Sequence[int],
        options: Any = None,
    ) -> MPIWork:
        source, target = self._send_buffer(input), self._receive_buffer(output)
        with self._watch("all_to_all_single"):
            if output_splits or input_splits:
                self.comm.Alltoallv(rows_buffer_spec(source, input_splits), rows_buffer_spec(target, output_splits))
            else:
                self.comm.Alltoall(buffer_spec(source, self.comm.size), buffer_spec(target, self.comm.size))
        return self._copy_back(output, target)

    def all_gather_single(self, output: Tensor, input: Tensor, options: Any = None) -> MPIWork:
        source, target = self._send_buffer(input), self._receive_buffer(output)
        own = target.data_ptr() + self.comm.rank * source.nbytes
        sent = MPI.IN_PLACE if source.data_ptr() == own else buffer_spec(source)  # FSDP2 gathers in place
        with self._watch("all_gather_single"):
            self.comm.Allgather(sent, buffer_spec(target, self.comm.size))
        return self._copy_back(output, target)

    def all_gather_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], options: Any = None) -> MPIWork:
        for output, x in zip(outputs, inputs, strict=True):
            self.all_gather_single(output, x)
        return self.done

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], options: Any = None) -> MPIWork:
        for parts, x in zip(outputs, inputs, strict=True):
            gathered = x.new_empty(self.comm.size, *x.shape)
            self.all_gather_single(gathered, x)
            for part, received in zip(parts, gathered, strict=True):
                part.copy_(received.view(part.shape))
        return self.done

    # -- reductions ---------------------------------------------------------------------------------------------------

    def allreduce(self, tensors: list[Tensor], options: Any) -> MPIWork:
        for x in tensors:
            total = self._send_buffer(x, REDUCE_DTYPES.get(x.dtype))
            with self._watch("all_reduce"):
                for part in total.view(-1).split(messages.MAX_COUNT):
                    self.comm.Allreduce(MPI.IN_PLACE, buffer_spec(part), _reduction(options))
            self._copy_back(x, self._averaged(total, options))
        return self.done

    allreduce_coalesced = allreduce

    def reduce(self, tensors: list[Tensor], options: Any) -> MPIWork:
        for x in tensors:
            is_root, total = self.comm.rank == options.rootRank, self._send_buffer(x, REDUCE_DTYPES.get(x.dtype))
            with self._watch("reduce"):
                for part in total.view(-1).split(messages.MAX_COUNT):
                    sent, received = (MPI.IN_PLACE, buffer_spec(part)) if is_root else (buffer_spec(part), None)
                    self.comm.Reduce(sent, received, _reduction(options), options.rootRank)
            if is_root:
                self._copy_back(x, self._averaged(total, options))
        return self.done

    def reduce_scatter_single(self, output: Tensor, input: Tensor, options: Any) -> MPIWork:
        source = self._send_buffer(input, REDUCE_DTYPES.get(input.dtype)).view(self.comm.size, -1)
        target = self._receive_buffer(output, REDUCE_DTYPES.get(output.dtype))
        with self._watch("reduce_scatter_single"):
            columns = max(1, messages.MAX_COUNT // self.comm.size)
            for part, total in zip(source.split(columns, dim=1), target.view(-1).split(columns), strict=True):
                blocks = part.contiguous()
                self.comm.Reduce_scatter_block(
                    buffer_spec(blocks, self.comm.size), buffer_spec(total), _reduction(options)
                )
        return self._copy_back(output, self._averaged(target, options))

    def reduce_scatter_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], options: Any) -> MPIWork:
        for output, x in zip(outputs, inputs, strict=True):
            self.reduce_scatter_single(output, x, options)
        return self.done

    # -- point to point -----------------------------------------------------------------------------------------------

    def send(self, tensors: list[Tensor], rank: int, tag: int = 0) -> MPIWork:
        source = self._send_buffer(tensors[0])
        call = self._pending("send", self.comm.Isend(buffer_spec(source), rank, tag), source)
        self.pending_sends = [other for other in self.pending_sends if not other.is_completed()] + [
            call
        ]  # keeps their buffers alive
        return call

    def recv(self, tensors: list[Tensor], rank: int, tag: int = 0) -> MPIWork:
        target = self._receive_buffer(tensors[0])
        request = self.comm.Irecv(buffer_spec(target), rank, tag)
        return self._pending("recv", request, target, lambda: self._copy_back(tensors[0], target))

    # -- names of torch before 2.13 -----------------------------------------------------------------------------------

    alltoall_base = all_to_all_single
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    # -- memory -------------------------------------------------------------------------------------------------------

    def _send_buffer(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Returns x in contiguous memory that MPI can read, in `dtype` if given; x itself if it already is.

        GPU tensors are copied to pinned host memory unless MPI is CUDA-aware.
        """
        if x.is_cuda and not self.is_cuda_aware:
            return torch.empty(x.shape, dtype=dtype or x.dtype, pin_memory=True).copy_(x)
        source = x.contiguous() if dtype is None else x.to(dtype).contiguous()
        if x.is_cuda:  # MPI does not see CUDA streams: x must have been computed before it reads
            torch.cuda.current_stream(x.device).synchronize()
        return source

    def _receive_buffer(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Returns memory for MPI to write the result for x to; x itself if possible. `_copy_back` completes it."""
        if x.is_cuda and not self.is_cuda_aware:
            return torch.empty(x.shape, dtype=dtype or x.dtype, pin_memory=True)
        if x.is_cuda:
            torch.cuda.current_stream(x.device).synchronize()  # no kernel may still read x's memory
        if x.is_contiguous() and dtype is None:
            return x
        return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)

    def _copy_back(self, x: Tensor, written: Tensor) -> MPIWork:
        """Copies the result into x if MPI wrote to other memory."""
        if written is not x:
            x.detach().copy_(written)
        return self.done

    def _averaged(self, total: Tensor, options: Any) -> Tensor:
        return total.div_(self.comm.size) if options.reduceOp.op == dist.ReduceOp.AVG else total

    # -- time ---------------------------------------------------------------------------------------------------------

    def _watch(self, call: str) -> Watchdog:
        return self.watchdog.watch(f"{call} among ranks {self.members}", self.seconds)

    def _pending(
        self, name: str, request: MPI.Request, keep: Tensor, finish: Callable[[], object] = lambda: None
    ) -> MPIWork:
        return MPIWork(request, keep, finish, lambda: self._watch(name))


def _reduction(options: Any) -> MPI.Op:
    """Returns the MPI operation of torch's reduction. Raises NotImplementedError if there is none."""
    op = REDUCTIONS.get(options.reduceOp.op)
    if op is None:
        raise NotImplementedError(f"{options.reduceOp.op} over MPI")
    return op
