"""A virtual clock in place of a device: it predicts how long a pass takes.

The clock of the computation and that of the link run as the streams of a GPU do, and blobs in a
file pass a disk first, read ahead into staging buffers. Every copy into a slot and every read from
one is logged, and likewise for the staging buffers; tests/offload/test_ring.py looks for a read
that is not of the block it means, begins before its copy has ended, or is overwritten.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import add

from bminf.checks import check_positive
from bminf.errors import ArgumentError
from bminf.offload.disk import NUM_STAGES, Staging
from bminf.offload.hit_rates import UNIFORM, HitRates
from bminf.offload.plan import DEFAULT_USES, Block, Experts, Plan
from bminf.offload.ring import Ring
from bminf.offload.trace import Span, Trace


@dataclass(frozen=True)
class Access:
    """A copy into a slot, or a read from one. Times in seconds of the virtual clock.

    The same of a staging buffer: a read of the disk into it, or the copy from it into a slot.
    """

    block: int
    slot: int
    start_s: float
    end_s: float


class SimulatedDisk:
    """The read-ahead of ReadAhead on the virtual clock: one read at a time, two staging buffers.

    reads_s: block -> seconds that reading its blob takes; in the order of the file.
    """

    def __init__(self, reads_s: Mapping[int, float]) -> None:
        self._reads_s = reads_s
        self._blocks = list(reads_s)
        self._staging = Staging(len(self._blocks))
        self._free_s = 0.0
        self._in_stage: list[Access | None] = [None] * NUM_STAGES  # the read that filled it
        self._stage_free_s = [0.0] * NUM_STAGES
        self.fills: list[Access] = []
        self.uses: list[Access] = []

    def fetch(self, block: int, now_s: float) -> Access:
        """The read that brings `block` into the staging buffer which the result names as slot."""
        blob = self._blocks.index(block)
        self._staging.ask(blob)
        while blob not in self._staging.held:
            self._read_next([blob], now_s)
        fill = self._in_stage[self._staging.held.index(blob)]
        assert fill is not None
        return fill

    def use(self, fill: Access, copy: Access) -> None:
        """Copy what `fill` brought, in the time of `copy`; then read ahead."""
        self.uses.append(replace(copy, slot=fill.slot))
        self._stage_free_s[fill.slot] = copy.end_s

    def read_ahead(self, now_s: float) -> None:
        """Begin what can be read before it is asked for."""
        while self._read_next([], now_s):
            pass

    def _read_next(self, waited_for: Sequence[int], now_s: float) -> bool:
        task = self._staging.next_read(waited_for)
        if task is None:
            return False
        stage, blob = task
        block = self._blocks[blob]
        start_s = max(now_s, self._free_s, self._stage_free_s[stage])
        fill = Access(block, stage, start_s, start_s + self._reads_s[block])
        self._in_stage[stage] = fill
        self._free_s = fill.end_s
        self.fills.append(fill)
        return True


class SimulatedBackend:
    """Transfers over a link of `link_bytes_per_s`; marks are points on the computation's clock.

    on_disk: the blobs, as indices into `blob_bytes`, that are read from a disk of
    `disk_bytes_per_s` before they are transferred.
    """

    def __init__(
        self,
        blob_bytes: Sequence[int],
        link_bytes_per_s: float,
        on_disk: Sequence[int] = (),
        disk_bytes_per_s: float = math.inf,
    ) -> None:
        self._copy_s = [nbytes / link_bytes_per_s for nbytes in blob_bytes]
        self._on_disk = set(on_disk)
        self._link_free_s = 0.0
        self._asked_s = 0.0  # when the host asks for copies, which is mostly ahead of all
        self.now_s = 0.0
        self.disk = SimulatedDisk(
            {index: blob_bytes[index] / disk_bytes_per_s for index in on_disk}
        )
        self.copies: list[Access] = []
        self.reads: list[Access] = []

    def copy(self, block: int, slot: int, after: float | None) -> Access:
        fill = self.disk.fetch(block, self.now_s) if block in self._on_disk else None
        # In the order asked for, also behind a copy that has to wait for the disk.
        start_s = max(self._link_free_s, self._asked_s, after or 0.0, fill.end_s if fill else 0.0)
        access = Access(block, slot, start_s, start_s + self._copy_s[block])
        self._link_free_s = access.end_s
        self.copies.append(access)
        if fill is not None:
            self.disk.use(fill, access)
            self.disk.read_ahead(self.now_s)
        return access

    def wait(self, copied: Access) -> None:
        self.now_s = max(self.now_s, copied.end_s)

    def has_ended(self, copied: Access) -> bool:
        return copied.end_s <= self.now_s

    def mark(self) -> float:
        return self.now_s

    def compute(self, seconds: float) -> None:
        """Computation that touches no slot: a resident block, the head, the sampling."""
        self.now_s += seconds

    def synchronize(self, seconds: float = 0.0) -> None:
        """The host waits for what was computed, which takes it so long, and meanwhile nothing is
        computed. What it asks for afterwards begins no sooner."""
        self.now_s += seconds
        self._asked_s = self.now_s

    def read(self, block: int, slot: int, seconds: float) -> None:
        """Computation with the block that `slot` is meant to hold."""
        self.reads.append(Access(block, slot, self.now_s, self.now_s + seconds))
        self.compute(seconds)

    def busy(self, accesses: Sequence[Access], since_s: float) -> float:
        """Fraction of the time from `since_s` to now that `accesses` took: `copies`, the link's, or
        `disk.fills`."""
        busy = sum(
            max(0.0, min(access.end_s, self.now_s) - max(access.start_s, since_s))
            for access in accesses
        )
        return busy / (self.now_s - since_s)


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
class Rows:
    """What a pass of several tokens does beside reading the weights once for all of them.

    number: tokens in the pass.   weights: block -> its weights, each of which is multiplied and
    added once a token; that of attention, which is little beside it, is left out.
    flops_per_s: operations a second, of which those are two.   cache_bytes: of keys and values,
    read from device memory by all tokens together.
    """

    number: int
    weights: Mapping[str, int]
    flops_per_s: float
    cache_bytes: int = 0

    def arithmetic_s(self, block: str) -> float:
        return 2 * self.weights.get(block, 0) * self.number / self.flops_per_s


@dataclass(frozen=True)
class Prediction:
    """One pass in steady state.

    compute_s, copy_s, disk_s: what computing, the link and the disk would need, each alone.
    link_busy, disk_busy: fraction of the time in which the link copies, the disk reads.
    memory_s, arithmetic_s: what of computing reading device memory would need, and multiplying;
    of each block the longer one counts.   sums_s: what of it sums over ranks take.
    """

    pass_s: float
    compute_s: float
    copy_s: float
    link_busy: float
    disk_s: float = 0.0
    disk_busy: float = 0.0
    memory_s: float = 0.0
    arithmetic_s: float = 0.0
    sums_s: float = 0.0

    @property
    def bound(self) -> str:
        """What binds, being the slowest: "compute", "link" or "disk"."""
        needs = {"compute": self.compute_s, "link": self.copy_s, "disk": self.disk_s}
        return max(needs, key=needs.__getitem__)

    @property
    def binds(self) -> str:
        """As `bound`, with what computing waits for: "link", "disk", "device memory",
        "arithmetic" or "all-reduces"."""
        if self.bound != "compute":
            return self.bound
        if self.sums_s > max(self.memory_s, self.arithmetic_s):
            return "all-reduces"
        return "arithmetic" if self.arithmetic_s > self.memory_s else "device memory"


def rows_until_arithmetic(one: Prediction, number: int) -> float:
    """Tokens in a pass from which on arithmetic takes longer than all else.

    one: of a pass of `number` tokens.   Infinite where nothing is multiplied.
    """
    others_s = max(one.memory_s, one.copy_s, one.disk_s)
    return others_s * number / one.arithmetic_s if one.arithmetic_s else math.inf


_SETTLING_PASSES, _MEASURED_PASSES = 2, 4
NO_SUMS: Mapping[str, float] = {}


def predict(
    plan: Plan,
    link_bytes_per_s: float,
    memory_bytes_per_s: float,
    lists: Sequence[str] | None = None,
    disk_bytes_per_s: float | None = None,
    rows: Rows | None = None,
    hit_rates: HitRates = UNIFORM,
    calls_s: float = 0.0,
    outside_bytes_per_s: float | None = None,
    sums_s: Mapping[str, float] = NO_SUMS,
) -> Prediction:
    """The time of one decode pass (a token) under `plan`.

    A block computes as long as reading its bytes from device memory takes, which is what bounds
    decoding for one sequence, or as long as multiplying all `rows` takes. Blocks used less often
    than the others (an encoder) are left out; one that is used n times a token comes n times.
    Experts by need are copied as Experts.missed_bytes() expects, when a router has chosen them.
    That the host waits for what the router chose is not counted.
    link_bytes_per_s: host to device; memory_bytes_per_s: device memory.
    lists: names of the lists of blocks that a pass goes through, in this order, and nothing else:
        no other list, and nothing of what lies outside all blocks.
    disk_bytes_per_s: file to host memory; needed where the plan has blocks on disk.
    rows: that share the pass; None is one, whose arithmetic is not counted.
    hit_rates: of experts in the pool; PUBLISHED in place of the default is the other end of what
        can be expected.
    calls_s: that each block takes beside reading its bytes, for calls of kernels and of Python.
    outside_bytes_per_s: at which the head, and what else is outside all blocks, is read; None is
        memory_bytes_per_s.
    sums_s: of several ranks, of which this is the plan of one, what their sums take behind a block,
        and under "" behind all of them: then nothing is computed, while the link goes on.
    Raises ArgumentError for a list that the plan does not have, or a rate that is missing or none.
    """
    _check_rates(link_bytes_per_s, memory_bytes_per_s, disk_bytes_per_s)
    _check_disk(plan, disk_bytes_per_s)
    blocks = _used_most(plan) if lists is None else _blocks_of(plan, lists)
    # Of tables a token reads rows alone.
    outside_bytes = plan.fixed_bytes - plan.reserved_bytes if lists is None else 0
    rows = rows or Rows(1, {}, math.inf)
    memory_s = [block.nbytes / memory_bytes_per_s for block in blocks]
    arithmetic_s = [rows.arithmetic_s(block.name) for block in blocks]
    rest_s = outside_bytes / (outside_bytes_per_s or memory_bytes_per_s)
    rest_s += rows.cache_bytes / memory_bytes_per_s
    waiting_s = [*(sums_s.get(block.name, 0.0) for block in blocks), sums_s.get("", 0.0)]
    computing_s = [*(max(pair) + calls_s for pair in zip(memory_s, arithmetic_s, strict=True))]
    computing_s = [*map(add, [*computing_s, rest_s], waiting_s)]
    rates = link_bytes_per_s, disk_bytes_per_s or math.inf
    found = _simulated(plan, blocks, computing_s, *rates)
    found = replace(
        found,
        memory_s=sum(memory_s) + rest_s,
        arithmetic_s=sum(arithmetic_s),
        sums_s=sum(waiting_s),
    )
    if lists is None and rows.number == 1:  # several tokens go through other experts each
        found = _without_reading(found, plan.idle_bytes / memory_bytes_per_s)
    if plan.experts is None or lists is not None:
        return found
    wanted = plan.experts.wanted_bytes(rows.number)
    missed = plan.experts.missed_bytes(rows.number, hit_rates)
    return _with_experts(found, plan.experts, wanted, missed, memory_bytes_per_s, *rates)


def _without_reading(found: Prediction, idle_s: float) -> Prediction:
    """Of a plan that fits, without what reading the experts takes that a token leaves out."""
    return replace(
        found,
        pass_s=found.pass_s - idle_s,
        compute_s=found.compute_s - idle_s,
        memory_s=found.memory_s - idle_s,
    )


def _with_experts(
    dense: Prediction,
    experts: Experts,
    wanted_bytes: float,
    missed_bytes: float,
    memory_bytes_per_s: float,
    link_bytes_per_s: float,
    disk_bytes_per_s: float,
) -> Prediction:
    """With what experts add to a pass. Their copies begin when a router has chosen, so that hardly
    anything is there to hide them behind: they are counted in full."""
    compute_s = wanted_bytes / memory_bytes_per_s
    copy_s = missed_bytes / link_bytes_per_s
    disk_s = missed_bytes * len(experts.on_disk) / experts.number / disk_bytes_per_s
    pass_s = dense.pass_s + compute_s + max(copy_s, disk_s)
    return replace(
        dense,
        pass_s=pass_s,
        compute_s=dense.compute_s + compute_s,
        memory_s=dense.memory_s + compute_s,
        copy_s=dense.copy_s + copy_s,
        link_busy=(dense.link_busy * dense.pass_s + copy_s) / pass_s,
        disk_s=dense.disk_s + disk_s,
        disk_busy=(dense.disk_busy * dense.pass_s + disk_s) / pass_s,
    )


def _simulated(
    plan: Plan,
    blocks: Sequence[Block],
    computing_s: Sequence[float],
    link_bytes_per_s: float,
    disk_bytes_per_s: float,
) -> Prediction:
    """A pass through `blocks`.   computing_s: with each of them, and at last with what is left."""
    clock = _Clock(plan, blocks, computing_s, link_bytes_per_s, disk_bytes_per_s)
    compute_s = sum(computing_s)
    if not clock.streamed:
        return Prediction(compute_s, compute_s, 0.0, 0.0)
    streamed_names, backend = {block.name for block in clock.streamed}, clock.backend
    passing = (block.nbytes for block in blocks if block.name in streamed_names)
    copy_s = sum(passing) / link_bytes_per_s
    disk_s = sum(clock.streamed[index].nbytes for index in clock.on_disk) / disk_bytes_per_s
    clock.run(_SETTLING_PASSES)
    since_s = backend.now_s
    clock.run(_MEASURED_PASSES)
    pass_s = (backend.now_s - since_s) / _MEASURED_PASSES
    busy = [backend.busy(taken, since_s) for taken in (backend.copies, backend.disk.fills)]
    return Prediction(pass_s, compute_s, copy_s, busy[0], disk_s, busy[1])


class _Clock:
    """Passes through `blocks` under a plan. See _simulated()."""

    def __init__(
        self,
        plan: Plan,
        blocks: Sequence[Block],
        computing_s: Sequence[float],
        link_bytes_per_s: float,
        disk_bytes_per_s: float,
    ) -> None:
        streamed_names = set(plan.streamed)
        passing = [block for block in blocks if block.name in streamed_names]
        self.streamed = list(dict.fromkeys(passing))
        indices = {block.name: index for index, block in enumerate(self.streamed)}
        self.on_disk = [indices[name] for name in plan.on_disk if name in indices]
        numbers = [*(indices.get(block.name) for block in blocks), None]
        self._steps = [*map(Step, computing_s, numbers)]
        self._names = [*(block.name for block in blocks), ""]
        sizes = [block.nbytes for block in self.streamed]
        self.backend = SimulatedBackend(sizes, link_bytes_per_s, self.on_disk, disk_bytes_per_s)
        self._ring = Ring(len(sizes), self.backend)

    def run(self, num_passes: int) -> list[Span]:
        """What was computed, one after the other."""
        spans = []
        for _ in range(num_passes):
            for name, step in zip(self._names, self._steps, strict=True):
                run_pass(self.backend, self._ring, [step])
                end_s = self.backend.now_s
                spans.append(Span(name, end_s - step.compute_s, end_s))
        return spans


def simulate(
    plan: Plan,
    link_bytes_per_s: float,
    memory_bytes_per_s: float,
    disk_bytes_per_s: float | None = None,
    num_passes: int = 2,
) -> Trace:
    """Decode passes under `plan`, block by block, as predict() times them once all is steady.

    Experts by need are left out: which of them come is known when a router has chosen. Of a mixture
    of experts that fits, whole blocks are counted as read.
    num_passes: shown, at least 1; what was before them has negative times.
    Raises ArgumentError as predict() does.
    """
    check_positive("num_passes", num_passes)
    _check_rates(link_bytes_per_s, memory_bytes_per_s, disk_bytes_per_s)
    _check_disk(plan, disk_bytes_per_s)
    blocks, outside_bytes = _used_most(plan), plan.fixed_bytes - plan.reserved_bytes
    sizes = [*(block.nbytes for block in blocks), outside_bytes]
    computing_s = [nbytes / memory_bytes_per_s for nbytes in sizes]
    clock = _Clock(plan, blocks, computing_s, link_bytes_per_s, disk_bytes_per_s or math.inf)
    clock.run(_SETTLING_PASSES)
    since_s = clock.backend.now_s
    computed = clock.run(num_passes)
    names = [block.name for block in clock.streamed]

    def shown(accesses: Sequence[Access]) -> tuple[Span, ...]:
        spans = (Span(names[a.block], a.start_s, a.end_s, a.slot) for a in accesses)
        return tuple(span.earlier(since_s) for span in spans)

    return Trace(
        copies=shown(clock.backend.copies),
        computed=tuple(span.earlier(since_s) for span in computed),
        reads=shown(clock.backend.disk.fills),
        is_predicted=True,
    )


def _check_rates(link: float, memory: float, disk: float | None) -> None:
    rates = {"link_bytes_per_s": link, "memory_bytes_per_s": memory, "disk_bytes_per_s": disk}
    for name, rate in rates.items():
        if rate is not None and not rate > 0:
            raise ArgumentError(f"{name}={rate!r}; accepted: bytes per second, above 0")


def _check_disk(plan: Plan, disk_bytes_per_s: float | None) -> None:
    if (places := plan.disk_places) and disk_bytes_per_s is None:
        raise ArgumentError(
            f"disk_bytes_per_s is None, but {len(places)} blocks of the plan wait on disk; "
            "give the bytes a second that the disk reads"
        )


def _used_most(plan: Plan) -> list[Block]:
    most = max(plan.uses.values(), default=DEFAULT_USES)
    if most % DEFAULT_USES:
        return [block for block in plan.blocks if plan.uses[block.name] == most]
    rounds = range(DEFAULT_USES, int(most) + 1, DEFAULT_USES)
    return [block for least in rounds for block in plan.blocks if plan.uses[block.name] >= least]


def _blocks_of(plan: Plan, lists: Sequence[str]) -> list[Block]:
    known = {block.list_name for block in plan.blocks}
    for name in lists:
        if name not in known:
            raise ArgumentError(
                f"lists names {name!r}; the plan has {', '.join(map(repr, sorted(known)))}"
            )
    return [block for name in lists for block in plan.blocks if block.list_name == name]
