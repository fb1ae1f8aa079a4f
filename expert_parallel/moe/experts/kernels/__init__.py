"""Selects the row kernels of the expert computation by `ops_for(x)`. Nothing outside this folder imports Triton.

torch_ops.py defines what each function computes; triton_ops.py has the same functions, each one pass over memory;
cpu_ops.py has those that the experts need, in torch's fastest operations on the CPU.
"""

from types import ModuleType

from torch import Tensor

from expert_parallel.moe.experts.kernels import cpu_ops, torch_ops


def ops_for(x: Tensor, interpreted: bool = False) -> ModuleType:
    """Returns the module of kernels for x: cpu_ops on the CPU, triton_ops on a GPU if Triton can be imported, else
    torch_ops.

    interpreted: use Triton on any device. On a CPU only its interpreter runs, and only if TRITON_INTERPRET=1 was set in
    the environment when Triton was first imported.
    """
    if not (x.is_cuda or interpreted):
        return cpu_ops if x.is_cpu else torch_ops
    try:
        import triton  # noqa: F401
    except ImportError:  # torch's wheels for CUDA include Triton; other builds of torch may not
        return torch_ops
    from expert_parallel.moe.experts.kernels import triton_ops

    return triton_ops
