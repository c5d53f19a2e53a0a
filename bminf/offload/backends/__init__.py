"""Where a model is to run, and how much memory there is for it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bminf.checks import plain
from bminf.errors import ArgumentError
from bminf.offload import memory
from bminf.offload.backends import cuda
from bminf.offload.backends.base import Backend
from bminf.offload.backends.cpu import CpuBackend

_FREE_FRACTION = 0.9  # of the free memory, where no limit is given; the rest is for activations

# Of the free host memory. What is page-locked cannot be swapped out, and the rest has to do for the
# Python process, for one block that is being packed, and for the cache of the files being read; in
# a control group whose limit is reached the system ends the process rather than refuse a page.
_PINNED_FRACTION = 0.8


def device_for(device: torch.device | str | int | None) -> torch.device:
    """`device`, whether it is there or not; None is the GPU where there is one, else the CPU.

    Raises ArgumentError for one that is neither.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = plain(device)
    is_index = type(device) is int and device >= 0  # which torch reads only where there is a GPU
    try:
        wanted = torch.device(f"cuda:{device}" if is_index else device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ArgumentError(f'device={device!r}; accepted: "cpu", "cuda", "cuda:1"') from error
    if wanted.type not in ("cpu", "cuda"):
        raise ArgumentError(f'device={device!r}; accepted: "cpu", "cuda", "cuda:1"')
    return wanted


def backend_for(device: torch.device | str | int | None) -> Backend:
    """The backend of `device`; None is the GPU where there is one, else the CPU.

    Raises ArgumentError for a device that is not there.
    """
    wanted = device_for(device)
    if wanted.type == "cpu":
        return CpuBackend()
    if not torch.cuda.is_available() or (wanted.index or 0) >= torch.cuda.device_count():
        raise ArgumentError(
            f"device={device!r}, but torch {torch.__version__} sees "
            f'{torch.cuda.device_count()} GPUs; accepted here: "cpu"'
        )
    return cuda.CudaBackend(wanted)


def allocated_bytes_on(device_type: str) -> Callable[[int], int]:
    """Bytes of a buffer -> bytes that it takes of a device of this type, "cpu" or "cuda"."""
    return cuda.allocated_bytes if device_type == "cuda" else int


def free_budget(device: torch.device, model_bytes: int = 0) -> int:
    """The limit where none is given: 90% of what is free on `device`.

    model_bytes: what the model takes there now, and frees as it is wrapped.
    """
    free = memory.free_bytes() if device.type == "cpu" else cuda.free_bytes(device)
    return int((free + model_bytes) * _FREE_FRACTION)


def spare_bytes(budget: int) -> int:
    """Of the free memory, what free_budget() did not make the limit."""
    return int(budget * (1 - _FREE_FRACTION) / _FREE_FRACTION)


def host_budget(device: torch.device, model_bytes: int = 0, num_processes: int = 1) -> int | None:
    """Bytes of host memory for copies of streamed blocks, on this machine as it is now.

    model_bytes: what the model takes there now, and frees as it is wrapped.
    num_processes: that share what is free.
    None, which is no limit, on the CPU: its host copies lie in a file.
    """
    if device.type == "cpu":
        return None
    return int((memory.free_bytes() / num_processes + model_bytes) * _PINNED_FRACTION)
