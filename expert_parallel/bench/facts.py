"""Where and under which settings something was measured, and that the settings are the same for everyone."""

from datetime import datetime

import torch
from pydantic import BaseModel

from expert_parallel.allocator import keep_freed_memory
from expert_parallel.runtime.process import Runtime


class Facts(BaseModel):
    """What every result says of its surroundings. device: of rank 0. threads: of each rank, on the CPU."""

    ranks: int
    device: str
    transport: str
    threads: int
    torch: str
    allocator: str
    date: str

    def __str__(self) -> str:
        return (
            f"{self.ranks} ranks on {self.device} ({self.transport}), {self.threads} threads each, torch {self.torch}, "
            f"{self.date}; {self.allocator}"
        )


def state_facts(runtime: Runtime, threads: int) -> Facts:
    """Sets threads and allocator, the same for everyone."""
    torch.set_num_threads(threads)
    on_gpu = runtime.device.type == "cuda"
    return Facts(
        ranks=runtime.world_size,
        device=torch.cuda.get_device_name(runtime.device) if on_gpu else "cpu",
        transport=runtime.backend,
        threads=threads,
        torch=torch.__version__,
        allocator=keep_freed_memory() + (", on the GPU torch's caching allocator" if on_gpu else ""),
        date=datetime.now().isoformat(timespec="seconds"),
    )
