"""What can be read off a figure, and whether it can be read."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text


def words(figure: Any) -> list[Text]:
    """All that is written, as it lies on a canvas that was drawn."""
    FigureCanvasAgg(figure).draw()
    beyond = {id(text) for axes in figure.axes for text in _beyond(axes)}
    shown = (text for text in figure.findobj(Text) if text.get_visible() and text.get_text())
    return [text for text in shown if id(text) not in beyond]


def _beyond(axes: Any) -> Iterator[Text]:
    """Labels of ticks that are beyond the end of an axis, or of an axis that is off: not drawn."""
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        for tick in axis.get_major_ticks():
            if not (axes.axison and low <= tick.get_loc() <= high):
                yield from (tick.label1, tick.label2)


def check_legible(figure: Any) -> None:
    """No two words overlap, and none leaves the figure."""
    found = [(text.get_text(), text.get_window_extent()) for text in words(figure)]
    assert found
    for name, box in found:
        within = figure.bbox.padded(0.5)
        assert within.x0 <= box.x0 and box.x1 <= within.x1, f"{name!r} leaves the figure"
        assert within.y0 <= box.y0 and box.y1 <= within.y1, f"{name!r} leaves the figure"
    for (one, box), (other, beside) in combinations(found, 2):
        assert not box.padded(-0.5).overlaps(beside.padded(-0.5)), f"{one!r} covers {other!r}"


def title(figure: Any) -> str:
    return " ".join(figure.get_suptitle().split())


def legend(figure: Any) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def labels(figure: Any) -> list[tuple[str, str]]:
    """Of the axes of each part, that across first."""
    return [(axes.get_xlabel(), axes.get_ylabel()) for axes in figure.axes]
