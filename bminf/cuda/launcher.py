"""Who runs a kernel: the GPU, or in tests the same source compiled for the host.

An op packs its arguments and computes its grid once, for whichever launcher serves the device of
its tensors. Where none does, on a CPU outside the tests, the op takes its plain torch path.
"""

from __future__ import annotations

import ctypes
import os
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
from typing import Any

import torch

from bminf.cuda.compile import compile_kernel
from bminf.cuda.source import Argument, Grid, Kernel, LaunchPlan, cell_of
from bminf.errors import ArgumentError, KernelError


class Launcher:
    """Runs kernels on one device: loaded once by CuPy, launched on torch's current stream.

    capability: of the device, the compute capability as one number: 61, 75, 80, ...
    num_processors: its streaming multiprocessors.
    """

    def __init__(self, device: torch.device) -> None:
        properties = torch.cuda.get_device_properties(device)
        self.device, self._index = device, device.index
        self.capability = 10 * properties.major + properties.minor
        self.num_processors: int = properties.multi_processor_count
        self._functions: dict[Kernel, Callable[..., None]] = {}
        self._modules: list[Any] = []  # a function is there for as long as its module

    def launch(
        self, kernel: Kernel, grid: Grid, block: Grid, arguments: Sequence[Argument]
    ) -> None:
        """Queue one launch; nothing is allocated or waited for.   Raises KernelError."""
        self._launch(kernel, grid, block, [*map(_number, arguments)])

    def run(self, plan: LaunchPlan, tensors: Sequence[torch.Tensor | None]) -> None:
        """The same, of what was worked out before."""
        values = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        self._launch(plan.kernel, plan.grid, plan.block, values + plan.cells)

    def _launch(self, kernel: Kernel, grid: Grid, block: Grid, values: list[int]) -> None:
        index = self._index
        if torch.cuda.current_device() != index:
            with torch.cuda.device(self.device):
                return self._launch(kernel, grid, block, values)
        function = self._functions.get(kernel) or self._load(kernel)
        count = len(values)
        cells = _cells_of_thread.of_count.get(count) or _new_cells(count, self.device)
        cells.pack(*values)
        try:
            function(*grid, *block, 0, _raw_stream(index), cells.addresses, 0)
        except Exception as error:  # CuPy's drivers' errors share no public base
            raise KernelError(
                f"{kernel} cannot be launched on {self.device} with a grid of {grid} and "
                f"blocks of {block}: {error}"
            ) from error

    def _load(self, kernel: Kernel) -> Callable[..., None]:
        from cupy.cuda import driver
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
        self._modules.append(module)
        # Not the function's own call, which looks at each argument for what it may be.
        launch: Callable[..., None] = partial(driver.launchKernel, function.ptr)
        self._functions[kernel] = launch
        return launch


known_launchers: dict[torch.device, Launcher | None] = {}
"""Of the devices that were asked for; the tests put one here for tensors on a CPU."""


def launcher_for(device: torch.device) -> Launcher | None:
    """The launcher of `device`; None for a device that runs no kernels."""
    try:
        return known_launchers[device]
    except KeyError:
        pass
    if device.type == "cuda" and device.index is None:  # whichever is the current one
        return launcher_for(torch.device("cuda", torch.cuda.current_device()))
    found = known_launchers[device] = Launcher(device) if device.type == "cuda" else None
    return found


_VARIABLE = "BMINF_FUSED_KERNELS"
_uses_fused: ContextVar[bool | None] = ContextVar("uses_fused", default=None)


def fused_launcher(device: torch.device) -> Launcher | None:
    """The launcher for kernels in whose place there are operators of torch: attention, norms,
    positions. None takes these instead: on a CPU, and where fused_kernels() or the environment
    variable BMINF_FUSED_KERNELS, which is 0 then, says so.   Raises ArgumentError."""
    launcher = launcher_for(device)
    if launcher is None:
        return None
    is_on = _uses_fused.get()
    return launcher if (fused_by_default() if is_on is None else is_on) else None


@cache
def fused_by_default() -> bool:
    """What the environment says.   Raises ArgumentError for another value than 0 or 1."""
    value = os.environ.get(_VARIABLE) or "1"
    if value not in ("0", "1"):
        raise ArgumentError(
            f"the environment variable {_VARIABLE} is {value!r}; accepted: 0 (torch's operators) "
            "and 1 (kernels of bminf in their place, which is the default)"
        )
    return value == "1"


@contextmanager
def fused_kernels(is_on: bool) -> Iterator[None]:
    """Take kernels of our own, or torch's operators in place of them, in what this thread runs."""
    token = _uses_fused.set(is_on)
    try:
        yield
    finally:
        _uses_fused.reset(token)


# ---- a launch, in as few steps as Python takes ---------------------------------------------------


class _Cells:
    """Memory for the arguments of a launch, 8 bytes each, and the address of their addresses.

    pack: writes all of them. A kernel that takes 4 bytes reads the first ones of its cell.
    """

    def __init__(self, count: int) -> None:
        values, pointers = (ctypes.c_uint64 * count)(), (ctypes.c_uint64 * count)()
        start = ctypes.addressof(values)
        pointers[:] = [start + 8 * i for i in range(count)]
        self.pack = partial(struct.Struct(f"={count}Q").pack_into, values, 0)
        self.addresses, self._pointers = ctypes.addressof(pointers), pointers


class _CellsOfThread(threading.local):
    """By their number. The driver reads them while other threads may run."""

    def __init__(self) -> None:
        self.of_count: dict[int, _Cells] = {}


_cells_of_thread = _CellsOfThread()


def _new_cells(count: int, device: torch.device) -> _Cells:
    # A new thread has no context, which the driver asks for, before it calls the runtime.
    torch.cuda.mem_get_info(device)
    found = _cells_of_thread.of_count[count] = _Cells(count)
    return found


def _number(argument: Argument) -> int:
    """The bytes of an argument as one number."""
    if argument is None:
        return 0
    if isinstance(argument, torch.Tensor):
        return argument.data_ptr()
    return cell_of(argument)


def _stream_of_torch(index: int) -> int:
    return torch.cuda.current_stream(index).cuda_stream


# The handle of torch's current stream: what torch's own compiler takes, where that is there.
_raw_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", _stream_of_torch)
