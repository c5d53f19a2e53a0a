"""Page-locked host memory of exactly the size asked for.

torch's `pin_memory()` and CuPy's pool round up to powers of two and waste up to half. Here the
memory is mapped and then registered with the driver: one page is the only rounding.

CuPy registers it, not torch: each has a CUDA runtime of its own, which keeps the error of a failed
call until it is queried. CuPy queries it; in torch's runtime it would be raised by the next kernel
launch, as if that had failed.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from bminf.errors import OffloadError
from bminf.pages import allow_fork, forbid_fork, populate, private_pages
from bminf.units import format_bytes

logger = logging.getLogger("bminf")

_PORTABLE = 1  # cudaHostRegisterPortable: locked for all GPUs, not only for the one in use now


class PinnedMemory:
    """`nbytes` of page-locked memory as `tensor`: (nbytes,) uint8 on the CPU.

    Raises OffloadError where the system has not so much, or refuses to lock it.
    """

    def __init__(self, nbytes: int) -> None:
        self._runtime = _runtime()  # kept, because the last ones are closed when modules are gone
        try:
            self._region = private_pages(nbytes)
            forbid_fork(self._region)
            populate(self._region)  # or registering would fault every page in, one by one
        except (OSError, OverflowError) as error:
            raise _refused(nbytes, error) from error
        with torch.inference_mode(False):
            self.tensor = torch.frombuffer(self._region, dtype=torch.uint8)
        try:
            self._runtime.hostRegister(self.tensor.data_ptr(), nbytes, _PORTABLE)
        except self._runtime.CUDARuntimeError as error:
            raise _refused(nbytes, error) from error

    def close(self) -> None:
        """Unlock the memory; a tensor that is still referenced becomes pageable memory."""
        try:
            self._runtime.hostUnregister(self.tensor.data_ptr())
        except self._runtime.CUDARuntimeError as error:  # after an error that ended the context
            logger.debug("%d bytes stay page-locked: %s", len(self._region), error)
        allow_fork(self._region)


def _runtime() -> Any:
    """CuPy's binding of its CUDA runtime."""
    try:
        from cupy.cuda import runtime
    except ImportError as error:
        raise OffloadError(
            f"streaming to a GPU needs CuPy, which cannot be imported ({error}); install it with "
            "pip install cupy-cuda12x (or cupy-cuda13x, to match the driver)"
        ) from error
    return runtime


def _refused(nbytes: int, error: Exception) -> OffloadError:
    return OffloadError(
        f"{format_bytes(nbytes)} of host memory cannot be page-locked ({error}); free host memory, "
        "quantize to fewer bits, or, under WSL, which locks about half of the memory at most, give "
        "it more"
    )
