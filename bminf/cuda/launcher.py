"""Who runs a kernel: the GPU, or in tests the same source compiled for the host.

An op packs its arguments and computes its grid once, for whichever launcher serves the device of
its tensors. Where none does, on a CPU outside the tests, the op takes its plain torch path.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch

from bminf.cuda.device import device_launcher
from bminf.cuda.source import Argument, Grid, Kernel


class Launcher(Protocol):
    """Runs kernels on one device."""

    @property
    def capability(self) -> int:
        """The compute capability as one number: 61, 75, 80, ..."""

    @property
    def num_processors(self) -> int:
        """Streaming multiprocessors of the device."""

    def launch(
        self,
        kernel: Kernel,
        grid: Grid,
        block: Grid,
        arguments: Sequence[Argument],
        shared_bytes: int = 0,
    ) -> None:
        """Queue one launch on torch's current stream; nothing is allocated or waited for.

        Raises KernelError.
        """


_stand_ins: dict[str, Launcher] = {}


def launcher_for(device: torch.device) -> Launcher | None:
    """The launcher of `device`; None for a device that runs no kernels."""
    stand_in = _stand_ins.get(device.type)
    if stand_in is not None or device.type != "cuda":
        return stand_in
    return device_launcher(device)


@contextmanager
def served_by(launcher: Launcher, device_type: str = "cpu") -> Iterator[None]:
    """Let `launcher` run the kernels for tensors on `device_type` in the meantime."""
    before = _stand_ins.get(device_type)
    _stand_ins[device_type] = launcher
    try:
        yield
    finally:
        if before is None:
            del _stand_ins[device_type]
        else:
            _stand_ins[device_type] = before
