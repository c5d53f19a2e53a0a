"""Runs kernels that host_build.py compiled. Needs nothing but Python, g++ and its binutils.

A `Launch` is what CUDA's launch is: a kernel, a grid, a block, bytes of shared memory, arguments.
An argument is an int, a float, None for a null pointer, or a `Pointer` into a piece of memory.
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from host_build import BuildError, runtime_of
from host_memory import Guarded, HostKernelError, Memory, Pointer, buffers_of

Dim = tuple[int, int, int]
Argument = Pointer | int | float | None
MAX_GRID = (2**31 - 1, 65535, 65535)
MAX_BLOCK = (1024, 1024, 64)
MAX_SHARED_BYTES = 48 * 1024
ORDERS = ("forward", "reverse")


class LaunchError(Exception):
    """A launch that CUDA would refuse, or whose arguments the kernel does not take."""


@dataclass(frozen=True)
class Launch:
    """One launch of one kernel."""

    kernel: str
    grid: Dim
    block: Dim
    arguments: tuple[Argument, ...]
    shared_bytes: int = 0

    def name_of(self, memory: int) -> str:
        """The arguments that point into a piece of memory."""
        numbers = [
            str(i)
            for i, argument in enumerate(self.arguments)
            if isinstance(argument, Pointer) and argument.memory == memory
        ]
        return f"argument {' and '.join(numbers)}"


class Library:
    """A build, loaded."""

    def __init__(self, path: Path) -> None:
        self.buffers = buffers_of(runtime_of(path))
        try:
            self.library = ctypes.CDLL(str(path))
        except OSError as error:
            reason = "a build with a sanitizer runs in a process of its own, see replay.py"
            raise BuildError(f"{error}; {reason}") from error
        self.static_shared_bytes: int = self.library.shim_static_shared_bytes()

    def signature(self, kernel: str) -> str:
        """A letter a parameter: r, w for pointers read or written through, i, f for numbers."""
        function = self.library[f"shim_signature_{kernel}"]
        function.restype = ctypes.c_char_p
        signature: bytes = function()
        return signature.decode()

    def run(
        self,
        launch: Launch,
        memory: Sequence[Memory] = (),
        order: str | int = "forward",
    ) -> None:
        """Runs `launch` to its end.   order: see HostLauncher.

        Raises LaunchError before, or HostKernelError; no memory has changed then.
        """
        signature = self.signature(launch.kernel)
        bound: int = self.library[f"shim_bound_{launch.kernel}"]()
        check_limits(launch, self.static_shared_bytes, bound)
        check_arguments(launch, signature)
        written = _written(launch, signature)
        with _one_launch, Guarded(self.buffers, memory, written, launch.name_of) as guarded:
            self._run(launch, order, guarded)
            try:
                guarded.finish()
            except HostKernelError as error:
                raise HostKernelError(f"kernel {launch.kernel}: {error}") from None

    def _run(self, launch: Launch, order: str | int, guarded: Guarded) -> None:
        begins = guarded.begins()
        values = [_value(argument, begins) for argument in launch.arguments]
        pointers = (ctypes.c_void_p * len(values))(*[ctypes.addressof(v) for v in values])
        failure = _Failure()
        entry = self.library[f"shim_launch_{launch.kernel}"]
        if not entry(ctypes.byref(_launch(launch, order)), pointers, ctypes.byref(failure)):
            return
        message: str = failure.message.decode(errors="replace")
        if failure.address is not None:
            message += guarded.explain(failure.address)
        if failure.code is not None:
            message += f" ({_line(failure.code)})"
        raise HostKernelError(message)


@functools.cache
def load(path: Path) -> Library:
    """The library of a build; the same one each time."""
    return Library(path)


_one_launch = threading.Lock()  # the runtime runs one at a time, and so use the idle buffers


def check_limits(launch: Launch, static_shared_bytes: int, max_threads: int) -> None:
    """What cudaLaunchKernel refuses on every GPU, with no attribute set.

    max_threads: what the kernel's __launch_bounds__ say, or CUDA's 1024.
    """
    for what, size, limits in (("grid", launch.grid, MAX_GRID), ("block", launch.block, MAX_BLOCK)):
        if not all(1 <= n <= limit for n, limit in zip(size, limits, strict=True)):
            raise LaunchError(f"{launch.kernel}: {what} {size}, where CUDA takes 1 to {limits}")
    threads = launch.block[0] * launch.block[1] * launch.block[2]
    if threads > max_threads:
        raise LaunchError(f"{launch.kernel}: {threads} threads a block; at most {max_threads}")
    shared = static_shared_bytes + launch.shared_bytes
    if not 0 <= launch.shared_bytes <= shared <= MAX_SHARED_BYTES:
        raise LaunchError(
            f"{launch.kernel}: {static_shared_bytes} + {launch.shared_bytes} bytes of shared "
            f"memory, where CUDA takes {MAX_SHARED_BYTES}"
        )


def check_arguments(launch: Launch, signature: str) -> None:
    """As many as the kernel has parameters, each of the parameter's kind."""
    if len(launch.arguments) != len(signature):
        raise LaunchError(
            f"{launch.kernel} takes {len(signature)} arguments, not {len(launch.arguments)}"
        )
    kinds = {"r": (Pointer, type(None)), "w": (Pointer, type(None)), "i": (int,), "f": (float,)}
    words = {"r": "a pointer", "w": "a pointer", "i": "an integer", "f": "a float"}
    for i, (argument, kind) in enumerate(zip(launch.arguments, signature, strict=True)):
        if not isinstance(argument, kinds[kind]):
            raise LaunchError(f"{launch.kernel}: argument {i} is {argument!r}, not {words[kind]}")
        if isinstance(argument, int) and not -(2**31) <= argument < 2**32:
            raise LaunchError(f"{launch.kernel}: argument {i} is {argument}, beyond 32 bits")


def _written(launch: Launch, signature: str) -> set[int]:
    """The pieces of memory that the kernel has a pointer to which is not to const."""
    return {
        argument.memory
        for argument, kind in zip(launch.arguments, signature, strict=True)
        if isinstance(argument, Pointer) and kind == "w"
    }


def _line(code: int) -> str:
    """File and line of an instruction in this process."""
    place = _Place()
    ctypes.CDLL(None).dladdr(ctypes.c_void_p(code), ctypes.byref(place))
    if place.base is None:
        return "outside of any library"
    command = ["addr2line", "-e", place.file.decode(), hex(code - place.base)]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip().split("/")[-1]


# ---- The structures of host/shim_interface.h ----


class _Dim3(ctypes.Structure):
    _fields_ = (("x", ctypes.c_uint), ("y", ctypes.c_uint), ("z", ctypes.c_uint))


class _Launch(ctypes.Structure):
    _fields_ = (
        ("kernel", ctypes.c_char_p),
        ("grid", _Dim3),
        ("block", _Dim3),
        ("shared_bytes", ctypes.c_uint),
        ("order", ctypes.c_uint),
        ("seed", ctypes.c_uint),
    )


class _Failure(ctypes.Structure):
    _fields_ = (
        ("message", ctypes.c_char * 768),
        ("address", ctypes.c_void_p),
        ("code", ctypes.c_void_p),
    )


class _Place(ctypes.Structure):  # Dl_info of dladdr(3)
    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def _value(
    argument: Argument, begins: list[int]
) -> ctypes.c_void_p | ctypes.c_float | ctypes.c_int:
    if isinstance(argument, Pointer):
        return ctypes.c_void_p(begins[argument.memory] + argument.offset)
    if argument is None:
        return ctypes.c_void_p(None)
    return ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_int(argument)


def _launch(launch: Launch, order: str | int) -> _Launch:
    is_seeded = not isinstance(order, str)
    if not is_seeded and order not in ORDERS:
        raise ValueError(f"order {order!r}; there are {ORDERS} and seeds")
    return _Launch(
        launch.kernel.encode(),
        _Dim3(*launch.grid),
        _Dim3(*launch.block),
        launch.shared_bytes,
        len(ORDERS) if is_seeded else ORDERS.index(str(order)),
        int(order) & 0xFFFFFFFF if is_seeded else 0,
    )
