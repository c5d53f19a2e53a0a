"""What a limit keeps and what streams: memory by use, and every block in its place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from bminf.offload.plan import Block, Plan
from bminf.plot.theme import WIDTH_CM, Frame, checked_width, frame, unit_of_bytes, words_cm
from bminf.units import format_bytes

_CELLS_PER_CM = 4
_CHARS_PER_CM = 6
_BESIDE_CM = 1.4  # of the axes: names of bars and margins
_ROW_CM = 0.42  # of cells, and of the words above them
_BAR_CM = 0.62
_HATCH = "////"

_FREE = "free"
_LEAST_FREE = 1e-3  # of the limit: less could not be seen

Part = tuple[str, int, str, str]
"""Of a bar: what it is, bytes, use ("stays", "streams", "other", "free"), hatch."""


def plan_map(
    plan: Plan, *, title: str | None = None, width_cm: float = WIDTH_CM, dark: bool = False
) -> Any:
    """A Figure: what takes the memory of the device and of the host, and which blocks stay.

    title: None says how many blocks stay within the limit.   width_cm: at least 6.
    Raises ArgumentError for a width, BMInfError where matplotlib is missing.
    """
    title = _title(plan) if title is None else title
    lists = [list(blocks) for _, blocks in groupby(plan.blocks, lambda block: block.list_name)]
    longest = max(map(len, lists), default=1)
    num_columns = min(int(_CELLS_PER_CM * (checked_width(width_cm) - _BESIDE_CM)), longest)
    num_rows = sum(-(-len(blocks) // num_columns) + 1.4 for blocks in lists)
    bars = dict(_bars(plan))
    entries = [part for parts in bars.values() for part in parts]
    heights = [_BAR_CM * len(bars) + 0.3, max(_ROW_CM * num_rows, 0.1)]
    height_cm = sum(heights) + words_cm(title, len(entries), width_cm) + 1.5
    found = frame(title, width_cm, dark, height_cm, heights)
    _draw_bars(found, bars)
    _draw_blocks(found, plan, lists, num_columns)
    found.legend(
        [
            found.patch(f"{name}: {format_bytes(nbytes)}", _color(found, use), hatch, use == _FREE)
            for name, nbytes, use, hatch in entries
        ]
    )
    return found.figure


def _title(plan: Plan) -> str:
    limit = format_bytes(plan.budget)
    if not plan.is_streaming:
        return f"All {len(plan.blocks)} blocks stay within {limit}"
    title = f"{len(plan.resident)} of {len(plan.blocks)} blocks stay within {limit}"
    if plan.experts is not None:
        title += f", and {plan.experts.num_slots} of {plan.experts.number} experts"
    return title


def _bars(plan: Plan) -> Iterator[tuple[str, list[Part]]]:
    """Where memory is taken -> by what."""
    outside_bytes = plan.fixed_bytes - plan.reserved_bytes
    device = [
        ("blocks that stay", plan.resident_bytes - outside_bytes, "stays", ""),
        ("outside all blocks", outside_bytes, "stays", _HATCH),
        ("two slots", plan.slot_bytes, "streams", "xxxx"),
        ("slots for experts", plan.pool_bytes, "streams", "||||"),
        ("reserved for the text", plan.reserved_bytes, "other", ""),
    ]
    free_bytes = plan.budget - plan.total_bytes
    if free_bytes > plan.budget * _LEAST_FREE:
        device.append(("free", free_bytes, _FREE, ""))
    yield "device", _taken(device)
    blob_bytes = plan.streamed_bytes - plan.disk_bytes
    beside_bytes = plan.staging_bytes + plan.host_table_bytes
    host = [
        ("blocks that stream", blob_bytes, "streams", ""),
        ("experts", plan.host_bytes - blob_bytes - beside_bytes, "streams", "\\\\\\\\"),
        ("read by row", plan.host_table_bytes, "other", _HATCH),
        ("staging buffers", plan.staging_bytes, "other", "xxxx"),
    ]
    if taken := _taken(host):
        yield "host", taken
    if plan.disk_bytes:
        yield "disk", [("blocks on disk", plan.disk_bytes, "streams", _HATCH)]


def _taken(parts: Sequence[Part]) -> list[Part]:
    return [part for part in parts if part[1] > 0]


def _color(found: Frame, use: str) -> str:
    return found.theme.ink if use == _FREE else found.theme.of(use)


def _draw_bars(found: Frame, bars: dict[str, list[Part]]) -> None:
    axes, theme = found.axes[0], found.theme
    unit, unit_name = unit_of_bytes(max(sum(p[1] for p in parts) for parts in bars.values()))
    for y, parts in enumerate(bars.values()):
        left = 0.0
        for _, nbytes, use, hatch in parts:
            is_free, color = use == _FREE, _color(found, use)
            axes.barh(
                y, nbytes / unit, left=left, height=0.7, hatch=hatch, linewidth=0.6,
                color="none" if is_free else color, edgecolor=color if is_free else theme.paper,
            )  # fmt: skip
            left += nbytes / unit
    axes.set_yticks(range(len(bars)), list(bars))
    axes.invert_yaxis()
    axes.set_xlabel(f"memory ({unit_name})")


def _draw_blocks(
    found: Frame, plan: Plan, lists: Sequence[Sequence[Block]], num_columns: int
) -> None:
    from matplotlib.patches import Rectangle

    axes, theme = found.axes[1], found.theme
    streamed, on_disk = set(plan.streamed), set(plan.on_disk)
    y = 0.0
    for blocks in lists:
        axes.text(0, y + 0.75, _words(blocks, streamed, found.width_cm), fontsize=8,
                  color=theme.ink)  # fmt: skip
        y += 1
        for index, block in enumerate(blocks):
            row, column = divmod(index, num_columns)
            color = theme.streams if block.name in streamed else theme.stays
            hatch = _HATCH if block.name in on_disk else ""
            axes.add_patch(
                Rectangle((column, y + row), 1, 0.8, facecolor=color, edgecolor=theme.paper,
                          hatch=hatch, linewidth=0.8)
            )  # fmt: skip
        y += -(-len(blocks) // num_columns) + 0.4
    axes.set(xlim=(0, num_columns), ylim=(max(y - 0.4, 1), 0))
    axes.set_axis_off()


def _words(blocks: Sequence[Block], streamed: set[str], width_cm: float) -> str:
    num_streamed = sum(block.name in streamed for block in blocks)
    counts = f": {len(blocks) - num_streamed} stay, {num_streamed} stream"
    name, room = (
        blocks[0].list_name or "blocks",
        int(_CHARS_PER_CM * (width_cm - _BESIDE_CM)) - len(counts),
    )
    return (name if len(name) <= room else f"…{name[1 - room :]}") + counts
