"""The product's launcher, for CPU tensors: it runs each kernel's real text on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import host_memory
import host_run
import recording
from host_build import Build, build

if TYPE_CHECKING:
    import torch

    from bminf.cuda.source import Kernel, LaunchPlan


@contextmanager
def served_by(launcher: Any) -> Iterator[None]:
    """Let `launcher` run the kernels for tensors on the CPU in the meantime."""
    import torch

    from bminf.cuda.launcher import known_launchers as known

    cpu = torch.device("cpu")
    before = known.get(cpu)
    known[cpu] = launcher
    try:
        yield
    finally:
        known[cpu] = before


@contextmanager
def reaching(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """Say which tensors a kernel reaches through addresses that it reads, so that its launches are
    recorded with them."""
    _reached.extend(map(_memory, tensors))
    try:
        yield
    finally:
        _reached.clear()


_reached: list[host_memory.Memory] = []


class NotingLauncher:
    """Notes the kernels and their grids, and runs none of them."""

    def __init__(self, capability: int = 80, num_processors: int = 1) -> None:
        self.capability, self.num_processors = capability, num_processors
        self.launches: list[tuple[Kernel, host_run.Dim]] = []

    def launch(self, kernel: Kernel, grid: host_run.Dim, *_: object) -> None:
        self.launches.append((kernel, grid))

    def run(self, plan: LaunchPlan, tensors: object) -> None:
        self.launch(plan.kernel, plan.grid)

    @property
    def names(self) -> list[str]:
        """Of the kernels, in the order of their launches."""
        return [kernel.name for kernel, _ in self.launches]


class HostLauncher:
    """Compiles a kernel at its first launch, and runs it on copies between guard pages.

    Arguments are copied to memory that ends at a page which nobody may touch, and back; what a
    kernel takes as const is read-only meanwhile. Threads that meet a barrier at different lines are
    an error.

    capability: of the GPU to stand in for, which sets __CUDA_ARCH__: 61, 70, 75, 80, ...
    order: "forward", "reverse", or the seed of a permutation, of threads and of blocks.
    record: a folder to which every launch is written, for replay.py.
    source_of: the full text of a kernel; the product's unless told.
    num_processors: what the launcher says of its device, for those who size grids by it.
    names: of the kernels that were launched, in their order.
    """

    def __init__(
        self,
        capability: int = 80,
        order: str | int = "forward",
        record: Path | None = None,
        source_of: Callable[[Kernel], str] | None = None,
        num_processors: int = 2,
    ) -> None:
        self.capability = capability
        self.num_processors = num_processors
        self.order = order
        self.record = record
        self.source_of = source_of or _source_of
        self.names: list[str] = []
        self._libraries: dict[Kernel, host_run.Library] = {}

    def launch(
        self,
        kernel: Kernel,
        grid: host_run.Dim,
        block: host_run.Dim,
        arguments: Sequence[torch.Tensor | int | float | None],
        shared_bytes: int = 0,
    ) -> None:
        """Runs `kernel` to its end. Raises HostKernelError, LaunchError or BuildError."""
        self.names.append(kernel.name)
        memory, values = _marshal(arguments)
        launch = host_run.Launch(kernel.name, grid, block, values, shared_bytes)
        library = self._library(kernel)
        before = None if self.record is None else recording.bytes_of(memory)
        library.run(launch, memory, self.order)
        if self.record is not None and before is not None:
            self._write(self.record, kernel, launch, memory, before)

    def run(self, plan: LaunchPlan, tensors: Sequence[torch.Tensor | None]) -> None:
        """The same, as a launcher runs what was worked out before."""
        self.launch(plan.kernel, plan.grid, plan.block, [*tensors, *plan.numbers])

    def build_of(self, kernel: Kernel) -> Build:
        """What g++ is given for `kernel`."""
        return Build(self.source_of(kernel), (kernel.name,), kernel.macros, self.capability)

    def _library(self, kernel: Kernel) -> host_run.Library:
        if kernel not in self._libraries:
            self._libraries[kernel] = host_run.load(build(self.build_of(kernel)))
        return self._libraries[kernel]

    def _write(
        self,
        folder: Path,
        kernel: Kernel,
        launch: host_run.Launch,
        memory: Sequence[host_memory.Memory],
        before: tuple[bytes, ...],
    ) -> None:
        modulo_16 = tuple(piece.address % 16 for piece in [*memory, *_reached])
        links = recording.find_links(before, _reached)
        contents = (
            recording.without(links, before),
            recording.without(links, recording.bytes_of(memory)),
        )
        reached = recording.bytes_of(_reached)
        record = recording.Record(
            kernel.file, self.build_of(kernel), launch, modulo_16, *contents, reached, links
        )
        recording.write(folder, record)


def run(
    body: str,
    *arguments: torch.Tensor | int | float | None,
    parameters: str,
    before: str = "",
    block: host_run.Dim = (32, 1, 1),
    grid: host_run.Dim = (1, 1, 1),
    shared_bytes: int = 0,
    capability: int = 80,
    order: str | int = "forward",
) -> None:
    """One launch of a kernel with `parameters` and `body`, and the text `before` it."""
    from bminf.cuda.source import Kernel

    source = f'{before}\nextern "C" __global__ void word({parameters}) {{\n{body}\n}}\n'
    launcher = HostLauncher(capability, order, source_of=lambda kernel: source)
    launcher.launch(Kernel("word.cu", "word"), grid, block, arguments, shared_bytes)


def _source_of(kernel: Kernel) -> str:
    from bminf.cuda.source import source_of

    return source_of(kernel)


def _marshal(
    arguments: Sequence[torch.Tensor | int | float | None],
) -> tuple[list[host_memory.Memory], tuple[host_run.Argument, ...]]:
    """The memory under all tensors, and the arguments with pointers into it."""
    values: list[host_memory.Memory | int | float | None] = [
        argument if argument is None or isinstance(argument, (int, float)) else _memory(argument)
        for argument in arguments
    ]
    memory, pointers = host_memory.merge(
        [value for value in values if isinstance(value, host_memory.Memory)]
    )
    remaining = iter(pointers)
    return memory, tuple(
        next(remaining) if isinstance(value, host_memory.Memory) else value for value in values
    )


def _memory(tensor: torch.Tensor) -> host_memory.Memory:
    """From the first element of `tensor` to the last that its strides reach."""
    if tensor.device.type != "cpu":
        raise ValueError(f"a tensor on {tensor.device}; the host launcher takes CPU tensors")
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in steps)
    num_elements = last + 1 if tensor.numel() else 0
    return host_memory.Memory(tensor.data_ptr(), num_elements * tensor.element_size())
