"""What a device has to offer, so that blocks can stream to it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from bminf.checkpoint.stored import InFile
from bminf.layout import Layout
from bminf.offload.ring import Transfers


@dataclass
class Counters:
    """What was moved, since wrapping. Bytes are those of whole blobs; times are in seconds."""

    copies: int = 0
    bytes_copied: int = 0
    copied_s: float = 0.0
    waits: int = 0
    waited_s: float = 0.0


@dataclass(frozen=True)
class Pooled:
    """Blobs that come to slots of their own, `num_slots` of `slot_bytes`, a multiple of 256."""

    layouts: Sequence[Layout]
    num_slots: int
    slot_bytes: int

    def slots(self, allocate: Callable[[int], torch.Tensor]) -> list[torch.Tensor]:
        """One buffer, cut: there may be thousands."""
        buffer = allocate(self.num_slots * self.slot_bytes)
        return list(buffer.view(self.num_slots, self.slot_bytes).unbind()) if buffer.numel() else []


NOT_POOLED = Pooled((), 0, 0)


class Copied(NamedTuple):
    """A copy that has ended. start, end: points of time, which elapsed_s() understands."""

    block: int
    slot: int
    start: Any
    end: Any


class Backend(Transfers, Protocol):
    """Slots on a device, host copies of streamed blobs, and copies between them."""

    device: torch.device
    copy_log: list[Copied] | None  # a list while somebody wants to know
    keeps_addresses: bool  # whether a tensor that is copied keeps its address modulo 64
    slots: list[torch.Tensor]
    pool: list[torch.Tensor]  # slots of pooled blobs, numbered from NUM_SLOTS on

    def allocate(self, nbytes: int) -> torch.Tensor:
        """(nbytes,) uint8 on the device."""

    def open(
        self,
        layouts: Sequence[Layout],
        offload_dir: str | Path | None,
        on_disk: Sequence[int] = (),
        lying: Mapping[int, InFile] | None = None,
        pooled: Pooled | None = None,
    ) -> Collection[int]:
        """Make room for these blobs on the host, and the slots. Raises OffloadError or BudgetError.

        offload_dir: folder for host copies that lie in a file; None is a temporary one on a disk.
        on_disk: the blobs, as indices into `layouts`, that are to lie in a file in any case.
        lying: those that lie in a file already, and may be read from there.
        pooled: more blobs, numbered behind `layouts`, with slots of their own.
        Returns those that will be, and need no put().
        """

    def put(self, block: int, fill: Callable[[torch.Tensor], object]) -> None:
        """Write the host copy of a block. fill: is given room for its blob, (extent,) uint8."""

    def hold(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        rows: Iterable[torch.Tensor],
        offload_dir: str | Path | None = None,
    ) -> torch.Tensor:
        """A table on the host: `shape` `dtype` on the CPU, whose memory no limit counts.

        rows: of it, in order, on any device.   offload_dir: see open().
        Raises OffloadError or BudgetError.
        """

    def gather(self, table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Rows of a table on the host: ids (...) int32 or int64 -> (..., C) on the device.

        Raises IndexError for an id that is not in the table.
        """

    def host_copy(self, block: int) -> torch.Tensor:
        """A blob, (extent,) uint8 on the CPU. Writing to it is not defined."""

    def write_back(self, block: int, slot: int) -> None:
        """Bring what a block changed in its slot back to its host copy, before any other copy."""

    def rewrite(self, block: int, name: str, tensor: torch.Tensor) -> None:
        """Give one tensor of a block new values in its host copy, before any other copy of it.

        The tensor has the shape and dtype of the layout, on any device; what is copied at the same
        time may get old bytes, new ones or a mixture.
        """

    def counters(self) -> Counters:
        """The counts so far; times only of what has ended."""

    def now(self) -> Any:
        """A point of time behind all computation so far."""

    def elapsed_s(self, start: Any, end: Any) -> float:
        """Seconds from one to the other, which has to be waited for."""

    def close(self) -> None:
        """Free host copies and slots, and wait until that is done."""

    def release(self) -> None:
        """Free host copies and slots without waiting for a lock or a thread.

        For finalizers, which the garbage collector calls at any point of any thread.
        """
