"""When the disk reads, the link copies and the device computes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from bminf.checks import is_number, plain
from bminf.errors import ArgumentError
from bminf.offload.trace import Span, Trace
from bminf.plot.theme import WIDTH_CM, Frame, frame, unit_of_seconds, words_cm

_NUM_ENTRIES = 3  # of the legend, at most
_NUMBER = re.compile(r"\d+")
_LABEL_PT = 6.5
_THIN_CM = 0.06
_DARK_INK = "#111111"  # legible on the colour of what streams, in any theme
_DIGIT_CM = 0.17  # of a number in a bar, with some room beside it
_BESIDE_CM = 1.9  # of the axes: names of rows and margins


def timeline(
    trace: Trace,
    *,
    end_s: float | None = None,
    title: str | None = None,
    width_cm: float = WIDTH_CM,
    dark: bool = False,
) -> Any:
    """A Figure: a row each for copies, for computation and, if it is read, for the disk.

    Numbers are those of the blocks, as far as there is room. Gaps are what waits.
    trace: of simulate(), or of a Recording.   end_s: of what is shown; None is the end of the
    trace.   title: None says whether times are predicted.
    Raises ArgumentError for an empty trace, an end or a width, BMInfError where matplotlib is
    missing.
    """
    if not trace.computed:
        raise ArgumentError("this trace has no computation in it; record a model while it runs")
    end_s = trace.end_s if end_s is None else plain(end_s)
    if not is_number(end_s) or end_s <= 0:
        raise ArgumentError(f"end_s={end_s!r}; give seconds above 0, for a trace that takes time")
    title = _title(trace) if title is None else title
    rows = {"disk": trace.reads, "link": trace.copies, "compute": trace.computed}
    shown = {name: spans for name, spans in rows.items() if spans}
    height_cm = 0.7 * len(shown) + 1.5 + words_cm(title, _NUM_ENTRIES, width_cm)
    found = frame(title, width_cm, dark, height_cm)
    unit_s, unit = unit_of_seconds(end_s)
    streamed = {span.name for span in trace.copies}
    for y, (name, spans) in enumerate(shown.items()):
        _draw_row(found, y, spans, _colors(found, name, spans, streamed), unit_s, end_s)
    axes = found.axes[0]
    axes.set_yticks(range(len(shown)), list(shown))
    axes.set(xlim=(0, end_s / unit_s), ylim=(len(shown) - 0.45, -0.55))
    axes.set_xlabel(f"time ({unit})")
    found.legend(list(_entries(found, trace)))
    return found.figure


def _title(trace: Trace) -> str:
    kind = "predicted" if trace.is_predicted else "measured"
    return f"Copies and computation, {kind}"


def _colors(found: Frame, row: str, spans: Sequence[Span], streamed: set[str]) -> list[str]:
    theme = found.theme
    if row != "compute":
        return [theme.streams] * len(spans)
    return [
        theme.streams if s.name in streamed else theme.stays if s.name else theme.other
        for s in spans
    ]


def _draw_row(
    found: Frame, y: int, spans: Sequence[Span], colors: Sequence[str], unit_s: float, end_s: float
) -> None:
    axes, cm_per_s = found.axes[0], (found.width_cm - _BESIDE_CM) / end_s
    xranges = [(s.start_s / unit_s, (s.end_s - s.start_s) / unit_s) for s in spans]
    edges = [  # which part neighbours, and would hide what is thinner than they are
        found.theme.paper if (s.end_s - s.start_s) * cm_per_s > _THIN_CM else color
        for s, color in zip(spans, colors, strict=True)
    ]
    axes.broken_barh(
        xranges, (y - 0.36, 0.72), facecolors=list(colors), edgecolors=edges, linewidth=0.4
    )
    for span, color in zip(spans, colors, strict=True):
        ink = found.theme.paper if color == found.theme.stays else _DARK_INK
        _draw_number(axes, y, span, ink, unit_s, end_s, cm_per_s)


def _draw_number(
    axes: Any, y: int, span: Span, ink: str, unit_s: float, end_s: float, cm_per_s: float
) -> None:
    """The last number in the name of a block, if there is room for it."""
    number = (_NUMBER.findall(span.name) or [""])[-1]
    start_s, stop_s = max(span.start_s, 0.0), min(span.end_s, end_s)
    if number and cm_per_s * (stop_s - start_s) > _DIGIT_CM * (len(number) + 0.6):
        middle = (start_s + stop_s) / 2 / unit_s
        axes.text(middle, y, number, color=ink, fontsize=_LABEL_PT, ha="center", va="center")


def _entries(found: Frame, trace: Trace) -> Iterator[Any]:
    yield found.patch("a block that stays", found.theme.stays)
    if trace.copies:
        yield found.patch("a block that streams", found.theme.streams)
    if any(not span.name for span in trace.computed):
        yield found.patch("outside all blocks", found.theme.other)
