"""A virtual clock in place of a device: it predicts time, and proves that slots are used rightly.

The clock of the computation and that of the link run as the streams of a GPU do. Every copy into
a slot and every read from one is logged; `check` then looks for a read that is not of the block
it means, begins before its copy has ended, or is overwritten before it ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bminf.errors import ArgumentError
from bminf.scheduler.plan import Block, Plan
from bminf.scheduler.ring import Ring


class SimulationError(AssertionError):
    """The scheduler would have computed with wrong bytes."""


@dataclass(frozen=True)
class Access:
    """A copy into a slot, or a read from one. Times in seconds of the virtual clock."""

    block: int
    slot: int
    began_s: float
    ended_s: float


class SimulatedBackend:
    """Transfers over a link of `link_bytes_per_s`; marks are points on the computation's clock."""

    def __init__(self, blob_bytes: Sequence[int], link_bytes_per_s: float) -> None:
        self._copy_s = [nbytes / link_bytes_per_s for nbytes in blob_bytes]
        self._link_free_s = 0.0
        self.now_s = 0.0
        self.copies: list[Access] = []
        self.reads: list[Access] = []

    def copy(self, block: int, slot: int, after: float | None) -> Access:
        began_s = max(self._link_free_s, after or 0.0)
        access = Access(block, slot, began_s, began_s + self._copy_s[block])
        self._link_free_s = access.ended_s
        self.copies.append(access)
        return access

    def wait(self, copied: Access) -> None:
        self.now_s = max(self.now_s, copied.ended_s)

    def mark(self) -> float:
        return self.now_s

    def compute(self, seconds: float) -> None:
        """Computation that touches no slot: a resident block, the head, the sampling."""
        self.now_s += seconds

    def read(self, block: int, slot: int, seconds: float) -> None:
        """Computation with the block that `slot` is meant to hold."""
        self.reads.append(Access(block, slot, self.now_s, self.now_s + seconds))
        self.compute(seconds)

    def check(self) -> None:
        """Raise SimulationError if any read so far met other bytes than its block's."""
        for read in self.reads:
            self._check_read(read)

    def link_busy(self, since_s: float) -> float:
        """Fraction of the time from `since_s` to now in which the link was copying."""
        busy = sum(
            max(0.0, min(copy.ended_s, self.now_s) - max(copy.began_s, since_s))
            for copy in self.copies
        )
        return busy / (self.now_s - since_s)

    def _check_read(self, read: Access) -> None:
        # Copies into one slot follow one another, so the last one that began counts.
        begun = [c for c in self.copies if c.slot == read.slot and c.began_s < read.ended_s]
        if not begun:
            raise SimulationError(
                f"block {read.block} is read from slot {read.slot}: nothing is there"
            )
        last = begun[-1]
        if last.began_s > read.began_s and any(c.block == read.block for c in begun):
            raise SimulationError(
                f"slot {read.slot} is overwritten by block {last.block} from {last.began_s:.6f} s, "
                f"while block {read.block} is read until {read.ended_s:.6f} s"
            )
        if last.block != read.block:
            raise SimulationError(
                f"block {read.block} is read from slot {read.slot}, which holds block {last.block}"
            )
        if last.ended_s > read.began_s:
            raise SimulationError(
                f"block {read.block} is read at {read.began_s:.6f} s, "
                f"but its copy ends at {last.ended_s:.6f} s"
            )


@dataclass(frozen=True)
class Step:
    """One block of a pass: its time of computation, and its number in the ring if it streams."""

    compute_s: float
    streamed: int | None = None


def run_pass(backend: SimulatedBackend, ring: Ring, steps: Sequence[Step]) -> None:
    """One forward through `steps`, as hooks on real blocks would drive the ring."""
    for step in steps:
        if step.streamed is None:
            backend.compute(step.compute_s)
        else:
            slot = ring.enter(step.streamed)
            backend.read(step.streamed, slot, step.compute_s)
            ring.leave(step.streamed)


@dataclass(frozen=True)
class Prediction:
    """One pass in steady state. link_busy: fraction of the time in which the link copies."""

    pass_s: float
    compute_s: float
    copy_s: float
    link_busy: float


_SETTLING_PASSES, _MEASURED_PASSES = 2, 4


def predict(
    plan: Plan,
    link_bytes_per_s: float,
    memory_bytes_per_s: float,
    lists: Sequence[str] | None = None,
) -> Prediction:
    """The time of one decode pass (a token) under `plan`.

    A block computes as long as reading its bytes from device memory takes, which is what bounds
    decoding for one sequence. Blocks used less often than the others (an encoder) are left out.
    link_bytes_per_s: host to device; memory_bytes_per_s: device memory.
    lists: names of the lists of blocks that a pass goes through, in this order, and nothing else:
        no other list, and nothing of what lies outside all blocks.
    Raises ArgumentError for a list that the plan does not have.
    """
    blocks = _used_most(plan) if lists is None else _blocks_of(plan, lists)
    outside_bytes = plan.outside_bytes if lists is None else 0
    streamed_names = set(plan.streamed)
    streamed = [block for block in blocks if block.name in streamed_names]
    numbers = {block.name: number for number, block in enumerate(streamed)}
    steps = [
        Step(block.nbytes / memory_bytes_per_s, numbers.get(block.name)) for block in blocks
    ] + [Step(outside_bytes / memory_bytes_per_s)]
    compute_s = sum(step.compute_s for step in steps)
    copy_s = sum(block.nbytes for block in streamed) / link_bytes_per_s
    if not streamed:
        return Prediction(compute_s, compute_s, 0.0, 0.0)
    backend = SimulatedBackend([block.nbytes for block in streamed], link_bytes_per_s)
    ring = Ring(len(streamed), backend)
    for _ in range(_SETTLING_PASSES):
        run_pass(backend, ring, steps)
    since_s = backend.now_s
    for _ in range(_MEASURED_PASSES):
        run_pass(backend, ring, steps)
    pass_s = (backend.now_s - since_s) / _MEASURED_PASSES
    return Prediction(pass_s, compute_s, copy_s, backend.link_busy(since_s))


def _used_most(plan: Plan) -> list[Block]:
    most = max(plan.uses.values())
    return [block for block in plan.blocks if plan.uses[block.name] == most]


def _blocks_of(plan: Plan, lists: Sequence[str]) -> list[Block]:
    known = {block.list_name for block in plan.blocks}
    for name in lists:
        if name not in known:
            raise ArgumentError(
                f"lists names {name!r}; the plan has {', '.join(map(repr, sorted(known)))}"
            )
    return [block for name in lists for block in plan.blocks if block.list_name == name]
