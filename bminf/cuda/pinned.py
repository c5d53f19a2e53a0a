"""Page-locked host memory of exactly the size asked for.

torch's `pin_memory()` and CuPy's pool round up to powers of two and waste up to half. Here the
memory is mapped and then registered with the driver: one page is the only rounding.
"""

from __future__ import annotations

import mmap

import torch

from bminf.errors import OffloadError
from bminf.units import format_bytes


class PinnedMemory:
    """`nbytes` of page-locked memory as `tensor`: (nbytes,) uint8 on the CPU.

    Raises OffloadError where the system refuses to lock that much.
    """

    def __init__(self, nbytes: int) -> None:
        with torch.inference_mode(False):
            self.tensor = torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8)
        cudart = torch.cuda.cudart()
        code = int(cudart.cudaHostRegister(self.tensor.data_ptr(), nbytes, 0))
        if code != 0:
            raise OffloadError(
                f"{format_bytes(nbytes)} of host memory cannot be page-locked "
                f"(CUDA error {code}: {torch.cuda.CudaError(code)}); "
                "free host memory, raise the limit of locked memory, or quantize to fewer bits"
            )

    def close(self) -> None:
        """Unlock the memory; whoever still holds the tensor keeps ordinary memory."""
        torch.cuda.cudart().cudaHostUnregister(self.tensor.data_ptr())
