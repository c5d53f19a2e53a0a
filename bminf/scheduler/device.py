"""Where a model is to run, and how much memory there is for it."""

from __future__ import annotations

from pathlib import Path
from warnings import warn

import torch

from bminf.errors import ArgumentError
from bminf.scheduler import memory
from bminf.scheduler.backends.base import Backend
from bminf.scheduler.backends.cpu import CpuBackend
from bminf.scheduler.backends.cuda import CudaBackend
from bminf.scheduler.backends.cuda import free_bytes as cuda_free_bytes

_FREE_FRACTION = 0.9  # of the free memory, where no limit is given; the rest is for activations


def backend_for(
    device: torch.device | str | int | None, offload_dir: str | Path | None, stacklevel: int
) -> Backend:
    """The backend of `device`; None is the GPU where there is one, else the CPU.

    Raises ArgumentError for a device that is not there. stacklevel: of the warning for an
    offload_dir that a GPU has no use for, counted from here.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ArgumentError(
            f'device={device!r}: {error}; accepted: "cpu", "cuda", "cuda:1"'
        ) from error
    if wanted.type == "cpu":
        return CpuBackend()
    if wanted.type != "cuda":
        raise ArgumentError(f'device={device!r}; accepted: "cpu", "cuda", "cuda:1"')
    if not torch.cuda.is_available() or (wanted.index or 0) >= torch.cuda.device_count():
        raise ArgumentError(
            f"device={device!r}, but torch {torch.__version__} sees "
            f'{torch.cuda.device_count()} GPUs; accepted here: "cpu"'
        )
    if offload_dir is not None:
        warn(
            "offload_dir is for device='cpu'; on a GPU, streamed blocks wait in page-locked memory",
            stacklevel=stacklevel + 1,
        )
    return CudaBackend(wanted)


def free_budget(device: torch.device, own_bytes: int = 0) -> int:
    """The limit where none is given: 90% of what is free on `device`.

    own_bytes: what the model takes there now, and lets go of as it is wrapped.
    """
    free = memory.free_bytes() if device.type == "cpu" else cuda_free_bytes(device)
    return int((free + own_bytes) * _FREE_FRACTION)
