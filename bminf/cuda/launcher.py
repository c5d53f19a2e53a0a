"""Who runs a kernel: the GPU, or in tests the same source compiled for the host.

An op packs its arguments and computes its grid once, for whichever launcher serves the device of
its tensors. Where none does, on a CPU outside the tests, the op takes its plain torch path.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import numpy as np
import torch

from bminf.cuda.compile import compile_kernel
from bminf.cuda.source import Argument, Grid, Kernel
from bminf.errors import KernelError


class Launcher:
    """Runs kernels on one device: loaded once, launched through CuPy on torch's current stream.

    capability: of the device, the compute capability as one number: 61, 75, 80, ...
    """

    def __init__(self, device: torch.device) -> None:
        properties = torch.cuda.get_device_properties(device)
        self.device = device
        self.capability = 10 * properties.major + properties.minor
        self._functions: dict[Kernel, Any] = {}

    def launch(
        self, kernel: Kernel, grid: Grid, block: Grid, arguments: Sequence[Argument]
    ) -> None:
        """Queue one launch; nothing is allocated or waited for.   Raises KernelError."""
        with torch.cuda.device(self.device):
            function = self._functions.get(kernel) or self._load(kernel)
            values = tuple(map(_packed, arguments))
            try:
                stream = torch.cuda.current_stream(self.device).cuda_stream
                function(grid, block, values, 0, _cupy_stream(stream))
            except Exception as error:  # CuPy's drivers' errors share no public base
                raise KernelError(
                    f"{kernel} cannot be launched on {self.device} with a grid of {grid} and "
                    f"blocks of {block}: {error}"
                ) from error

    def _load(self, kernel: Kernel) -> Any:
        from cupy.cuda.function import Module

        if torch.cuda.is_current_stream_capturing():
            raise KernelError(
                f"{kernel} is not loaded yet, which cannot be done while a CUDA graph is captured; "
                "run the same shapes once before the capture"
            )
        module = Module()
        try:
            module.load(compile_kernel(kernel, self.capability))
            function = module.get_function(kernel.name)
        except KernelError:
            raise
        except Exception as error:
            raise KernelError(
                f"{kernel} cannot be loaded on {self.device}: {error}; if the driver is older than "
                "the compiler (NVRTC), update the driver"
            ) from error
        self._functions[kernel] = function
        return function


_test_launchers: dict[str, Launcher] = {}
"""By type of device; the tests put one here for tensors on a CPU."""


def launcher_for(device: torch.device) -> Launcher | None:
    """The launcher of `device`; None for a device that runs no kernels."""
    kind = device.type
    of_test = _test_launchers.get(kind)
    if of_test is not None or kind != "cuda":
        return of_test
    return device_launcher(device)


_VARIABLE = "BMINF_FUSED_KERNELS"
_uses_fused: ContextVar[bool] = ContextVar("uses_fused", default=os.environ.get(_VARIABLE) != "0")


def fused_launcher(device: torch.device) -> Launcher | None:
    """The launcher for kernels in whose place there are operators of torch: attention, norms,
    positions. None takes these instead: on a CPU, and where fused_kernels() or the environment
    variable BMINF_FUSED_KERNELS, which is 0 then, says so."""
    return launcher_for(device) if _uses_fused.get() else None


@contextmanager
def fused_kernels(is_on: bool) -> Iterator[None]:
    """Take kernels of our own, or torch's operators in place of them, in what this thread runs."""
    token = _uses_fused.set(is_on)
    try:
        yield
    finally:
        _uses_fused.reset(token)


@cache
def device_launcher(device: torch.device) -> Launcher:
    """The launcher of a CUDA device."""
    if device.index is None:
        return device_launcher(torch.device("cuda", torch.cuda.current_device()))
    return Launcher(device)


def _packed(argument: Argument) -> Any:
    if argument is None:
        return np.uint64(0)
    if isinstance(argument, torch.Tensor):
        return np.uint64(argument.data_ptr())
    return np.int32(argument) if isinstance(argument, int) else np.float32(argument)


class _TorchStream:
    """What CuPy asks of another library's stream; torch's own class answers since 2.7 only."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._handle


@cache
def _cupy_stream(handle: int) -> Any:
    import cupy

    if hasattr(cupy.cuda.Stream, "from_external"):
        return cupy.cuda.Stream.from_external(_TorchStream(handle))
    return cupy.cuda.ExternalStream(handle)
