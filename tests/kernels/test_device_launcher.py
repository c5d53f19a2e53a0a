"""The launcher of a kernel's device, on a driver of the test's own: what it loads and passes on.

It is that of bminf/cuda/launcher.py.
"""

from __future__ import annotations

import ctypes
import struct
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from bminf.cuda import launcher as launcher_module
from bminf.cuda.launcher import Launcher
from bminf.cuda.source import Kernel, LaunchPlan
from bminf.errors import KernelError
from bminf.ops.linear_w8a8 import scale_int32_kernel

POINTER = 1234  # of any function
KERNEL = scale_int32_kernel(torch.float16)


class Driver:
    """Notes what is loaded and launched."""

    def __init__(self) -> None:
        self.loaded: list[bytes] = []
        self.launches: list[tuple[Any, ...]] = []
        self.arguments: list[tuple[bytes, ...]] = []  # of each launch
        self.num_arguments = 0  # of the next ones
        self.stream = 7
        self.error: Exception | None = None
        self.is_capturing = False
        self.current_device = self.needed_device = torch.device("cuda", 0)
        self.threads = set[int]()  # that have called the runtime, so that they have a context

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        self.threads.add(threading.get_ident())
        return 0, 0

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self.current_device = self.current_device, device
        yield
        self.current_device = before

    def module(self) -> Any:
        function = types.SimpleNamespace(ptr=POINTER)
        return types.SimpleNamespace(load=self.load, get_function=lambda name: function)

    def load(self, code: bytes) -> None:
        assert self.current_device == self.needed_device
        self.loaded.append(code)

    def launch(self, *arguments: int) -> None:
        """cuLaunchKernel: the last but one is the address of the arguments' addresses."""
        assert self.current_device == self.needed_device
        assert threading.get_ident() in self.threads
        if self.error is not None:
            raise self.error
        *around, addresses, extra = arguments
        assert extra == 0
        self.launches.append(tuple(around))
        pointers = (ctypes.c_uint64 * self.num_arguments).from_address(addresses)
        self.arguments.append(tuple(ctypes.string_at(pointer, 8) for pointer in pointers))


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Driver:
    import cupy.cuda.function

    driver = Driver()
    properties = types.SimpleNamespace(major=8, minor=6, multi_processor_count=28)
    monkeypatch.setenv("BMINF_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "device", driver.device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: driver.current_device.index)
    monkeypatch.setattr(
        torch.cuda,
        "current_stream",
        lambda device: types.SimpleNamespace(cuda_stream=driver.stream),
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", driver.mem_get_info)
    monkeypatch.setattr(launcher_module, "_cells_of_thread", launcher_module._CellsOfThread())
    monkeypatch.setattr(launcher_module, "_raw_stream", launcher_module._stream_of_torch)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: driver.is_capturing)
    monkeypatch.setattr(cupy.cuda.function, "Module", driver.module)
    monkeypatch.setattr(cupy.cuda.driver, "launchKernel", driver.launch)
    return driver


def test_a_kernel_is_loaded_once_and_launched_on_the_current_stream(driver: Driver) -> None:
    launcher = Launcher(torch.device("cuda", 0))
    assert launcher.capability == 86
    tensor, driver.num_arguments = torch.zeros(4), 5
    launcher.launch(KERNEL, (3, 1, 1), (256, 1, 1), [tensor, None, 5, -2, 0.5])
    driver.stream = 9
    launcher.launch(KERNEL, (3, 1, 2), (256, 1, 1), [None, tensor, 2**31 - 1, 7, -1.5])
    assert len(driver.loaded) == 1 and driver.loaded[0][:4] == b"\x7fELF"
    assert driver.launches == [
        (POINTER, 3, 1, 1, 256, 1, 1, 0, 7),
        (POINTER, 3, 1, 2, 256, 1, 1, 0, 9),
    ]
    address = struct.pack("=Q", tensor.data_ptr())
    assert [(a, b, c[:4], d[:4], e[:4]) for a, b, c, d, e in driver.arguments] == [
        (address, bytes(8), *map(struct.pack, "iif", (5, -2, 0.5))),
        (bytes(8), address, *map(struct.pack, "iif", (2**31 - 1, 7, -1.5))),
    ]


def test_what_was_worked_out_before_is_launched_alike(driver: Driver) -> None:
    launcher, tensor, driver.num_arguments = Launcher(torch.device("cuda", 0)), torch.zeros(4), 4
    launcher.launch(KERNEL, (3, 1, 1), (256, 1, 1), [tensor, None, -5, 0.5])
    launcher.run(LaunchPlan(KERNEL, (3, 1, 1), (256, 1, 1), (-5, 0.5)), [tensor, None])
    assert driver.launches[0] == driver.launches[1]
    assert driver.arguments[0] == driver.arguments[1] and driver.arguments[0][2][:4] != bytes(4)


def test_each_thread_has_memory_of_its_own_for_arguments(driver: Driver) -> None:
    """The driver reads it while other threads run."""
    launcher, addresses = Launcher(torch.device("cuda", 0)), set[int]()
    driver.launch = lambda *arguments: addresses.add(arguments[-2])  # type: ignore[method-assign]
    barrier = threading.Barrier(4)

    def launch() -> None:
        for _ in range(3):
            barrier.wait(60)
            launcher.launch(KERNEL, (1, 1, 1), (256, 1, 1), [1])

    launcher._functions[KERNEL] = driver.launch
    threads = [threading.Thread(target=launch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(addresses) == 4


def test_a_thread_of_which_the_driver_knows_nothing_may_launch(driver: Driver) -> None:
    """A tensor was made elsewhere, and its kernel loaded: the launch is the thread's first call."""
    launcher = Launcher(torch.device("cuda", 0))
    launcher.launch(KERNEL, (1, 1, 1), (256, 1, 1), [])
    thread = threading.Thread(target=launcher.launch, args=(KERNEL, (1, 1, 1), (256, 1, 1), []))
    thread.start()
    thread.join()
    assert len(driver.launches) == 2


def test_a_kernel_is_loaded_and_launched_on_its_own_device(driver: Driver) -> None:
    """Which need not be the current one; that is left as it was."""
    with driver.device(torch.device("cuda", 0)):
        for index in (1, 0, 1):
            driver.needed_device = torch.device("cuda", index)
            Launcher(driver.needed_device).launch(KERNEL, (1, 1, 1), (256, 1, 1), [])
            assert driver.current_device == torch.device("cuda", 0)
    assert len(driver.loaded) == len(driver.launches) == 3


def test_a_kernel_is_not_loaded_while_a_graph_is_captured(driver: Driver) -> None:
    launcher = Launcher(torch.device("cuda", 0))
    driver.is_capturing = True
    with pytest.raises(KernelError, match="run the same shapes once before the capture"):
        launcher.launch(KERNEL, (1, 1, 1), (256, 1, 1), [])
    driver.is_capturing = False
    launcher.launch(KERNEL, (1, 1, 1), (256, 1, 1), [])
    driver.is_capturing = True
    launcher.launch(KERNEL, (1, 1, 1), (256, 1, 1), [])
    assert len(driver.launches) == 2


def test_what_the_driver_refuses_is_said(driver: Driver) -> None:
    launcher = Launcher(torch.device("cuda", 0))
    driver.error = RuntimeError("CUDA_ERROR_INVALID_VALUE")
    with pytest.raises(KernelError) as caught:
        launcher.launch(KERNEL, (3, 1, 1), (256, 1, 1), [])
    for part in ("scale_int32 (ELEMENT=16)", "cuda:0", "(3, 1, 1)", "CUDA_ERROR_INVALID_VALUE"):
        assert part in str(caught.value)


def test_code_that_cannot_be_loaded_is_said(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(code: bytes) -> None:
        raise RuntimeError("CUDA_ERROR_NO_BINARY_FOR_GPU")

    monkeypatch.setattr(driver, "loaded", types.SimpleNamespace(append=load))
    launcher = Launcher(torch.device("cuda", 0))
    with pytest.raises(KernelError, match=r"on cuda:0: CUDA_ERROR_NO_BINARY.* update the driver"):
        launcher.launch(KERNEL, (1, 1, 1), (256, 1, 1), [])
    with pytest.raises(KernelError, match=r"no_such\.cu"):
        launcher.launch(Kernel("no_such.cu", "nothing"), (1, 1, 1), (1, 1, 1), [])


def test_the_stream_is_asked_for_by_the_number_of_its_device(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where torch has a function that gives no more than the handle."""
    launcher = Launcher(torch.device("cuda", 0))
    monkeypatch.setattr(launcher_module, "_raw_stream", {0: 11}.__getitem__)
    launcher.launch(KERNEL, (1, 1, 1), (256, 1, 1), [])
    assert driver.launches[0][-1] == 11
