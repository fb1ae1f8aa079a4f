"""The row kernels of the expert computation, behind one import point: `ops_for(x)`. Nothing else imports Triton.

torch_ops.py says what each function computes; triton_ops.py has the same functions, each one pass over memory;
cpu_ops.py those that the experts need, in torch's fastest operations on the CPU.
"""

from types import ModuleType

from torch import Tensor

from expert_parallel.moe.experts.kernels import cpu_ops, torch_ops


def ops_for(x: Tensor, interpreted: bool = False) -> ModuleType:
    """cpu_ops for the CPU; triton_ops where x is on a GPU and Triton can be imported, else torch_ops.

    interpreted: take Triton on any device. Only its interpreter runs on a CPU, and only where TRITON_INTERPRET=1 stood
    in the environment when Triton was first imported.
    """
    if not (x.is_cuda or interpreted):
        return cpu_ops if x.is_cpu else torch_ops
    try:
        import triton  # noqa: F401
    except ImportError:  # torch's wheels for CUDA bring Triton; other builds of torch may not
        return torch_ops
    from expert_parallel.moe.experts.kernels import triton_ops

    return triton_ops
