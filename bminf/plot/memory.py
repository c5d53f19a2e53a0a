"""What the memory of the device holds, while blocks come and go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from bminf.offload.plan import Plan
from bminf.offload.ring import NUM_SLOTS
from bminf.offload.trace import Trace
from bminf.plot.theme import (
    WIDTH_CM,
    Frame,
    frame,
    unit_of_bytes,
    unit_of_seconds,
    words_cm,
)
from bminf.units import format_bytes

Points = Sequence[tuple[float, int]]
"""(seconds since a trace began, bytes)."""

_SLOTS = "two slots"
_AXES_CM = 5.2


def memory_over_time(
    plan: Plan,
    trace: Trace,
    *,
    measured: Points = (),
    title: str = "Device memory over time",
    width_cm: float = WIDTH_CM,
    dark: bool = False,
) -> Any:
    """A Figure: what stays, what has arrived in each slot, the pool and what is reserved.

    Each of them keeps its place; a slot fills while a copy lasts, and the next one begins it anew.
    trace: of a model under `plan`.   measured: (seconds since the trace began, bytes), drawn as a
    line, for example of torch.cuda.memory_allocated().
    Raises ArgumentError for a width, BMInfError where matplotlib is missing.
    """
    num_entries = len(_parts(plan)) + 1 + bool(measured)
    found = frame(title, width_cm, dark, _AXES_CM + words_cm(title, num_entries, width_cm))
    largest = max(plan.budget, *(nbytes for _, nbytes in measured), 1)
    unit, unit_name = unit_of_bytes(largest)
    unit_s, seconds = unit_of_seconds(trace.end_s)
    entries = list(_draw_parts(found, plan, trace, unit, unit_s))
    axes, ink = found.axes[0], found.theme.ink
    limit = f"limit: {format_bytes(plan.budget)}"
    entries.append(
        axes.axhline(plan.budget / unit, color=ink, linestyle="--", linewidth=0.9, label=limit)
    )
    if measured:
        x, y = [time / unit_s for time, _ in measured], [n / unit for _, n in measured]
        entries += axes.plot(x, y, color=ink, linewidth=1, label="measured")
    axes.set(xlim=(0, trace.end_s / unit_s), ylim=(0, 1.06 * largest / unit))
    axes.set_xlabel(f"time ({seconds})")
    axes.set_ylabel(f"memory ({unit_name})")
    found.legend(entries)
    return found.figure


def _parts(plan: Plan) -> list[tuple[str, int, str]]:
    """From the bottom to the top: what, bytes, use."""
    parts = [
        ("stays", plan.resident_bytes, "stays"),
        (_SLOTS, plan.slot_bytes, "streams"),
        ("slots for experts", plan.pool_bytes, "streams"),
        ("reserved", plan.reserved_bytes, "other"),
    ]
    return [part for part in parts if part[1]]


def _draw_parts(found: Frame, plan: Plan, trace: Trace, unit: int, unit_s: float) -> Iterator[Any]:
    """One above the other; their entries in the legend."""
    low, ends = 0.0, [0, trace.end_s / unit_s]
    for name, nbytes, use in _parts(plan):
        color = found.theme.of(use)
        if name == _SLOTS:
            _draw_slots(found, plan, trace, low, unit, unit_s)
        else:
            found.axes[0].fill_between(ends, low, low + nbytes / unit, color=color, linewidth=0)
        low += nbytes / unit
        yield found.patch(f"{name}: {format_bytes(nbytes)}", color)


def _draw_slots(
    found: Frame, plan: Plan, trace: Trace, low: float, unit: int, unit_s: float
) -> None:
    axes, height = found.axes[0], plan.slot_bytes / NUM_SLOTS / unit
    for slot in range(NUM_SLOTS):
        bottom = low + slot * height
        points = list(filling(plan, trace, slot))
        x, y = [time / unit_s for time, _ in points], [bottom + n / unit for _, n in points]
        axes.fill_between(x, bottom, y, color=found.theme.streams, linewidth=0)
        axes.axhline(bottom + height, color=found.theme.faint, linewidth=0.4)


def filling(plan: Plan, trace: Trace, slot: int) -> Iterator[tuple[float, int]]:
    """(seconds, bytes that have arrived) of one slot, a line from each point to the next."""
    sizes, before = {block.name: block.nbytes for block in plan.blocks}, 0
    end_s = trace.end_s
    for copy in trace.copies:
        if copy.slot != slot or copy.start_s >= trace.end_s:
            continue  # the latter for what comes after the trace
        yield copy.start_s, before
        before, end_s = sizes[copy.name], max(trace.end_s, copy.end_s)
        yield copy.start_s, 0
        yield copy.end_s, before
    yield end_s, before
