"""Colours, sizes and the frame that all figures share."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bminf.checks import is_number, plain
from bminf.errors import ArgumentError, BMInfError

WIDTH_CM = 16.0
LEAST_WIDTH_CM = 6.0
_MOST_CM = 100.0
_INCH_CM = 2.54
_FONT_PT = 8.0
_TITLE_CHARS_PER_CM = 5.8
_LINE_CM = 0.42
_COLUMNS = 3  # of legends
_SMALL = 12.0  # cm, below which legends have one column and axes few ticks

_STEPS = (1, 2, 5, 10)  # of ticks

_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))
_SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))


@dataclass(frozen=True)
class Theme:
    """Colours. stays, streams: blocks.   other: what is no block.   faint: lines behind all.

    Source of the two hues: Okabe and Ito, Color Universal Design (2008).
    """

    paper: str
    ink: str
    faint: str
    stays: str
    streams: str
    other: str

    def of(self, use: str) -> str:
        """The colour of what "stays", "streams" or is "other"."""
        return {"stays": self.stays, "streams": self.streams}.get(use, self.other)


LIGHT = Theme("#ffffff", "#222222", "#cccccc", "#0072b2", "#e69f00", "#8c8c8c")
DARK = Theme("#14161a", "#e8e8e8", "#45484f", "#56b4e9", "#e69f00", "#8f939c")


@dataclass(frozen=True)
class Frame:
    """A figure and its colours.   axes: from top to bottom."""

    figure: Any
    axes: Sequence[Any]
    theme: Theme
    width_cm: float

    @property
    def is_small(self) -> bool:
        return self.width_cm < _SMALL

    def legend(self, handles: Sequence[Any]) -> None:
        """Below all axes, so that it covers nothing."""
        num_columns = 1 if self.is_small else min(_COLUMNS, len(handles))
        self.figure.legend(
            handles=list(handles), loc="outside lower left", ncols=num_columns, frameon=False,
            fontsize=_FONT_PT, labelcolor=self.theme.ink, handlelength=1.2, handleheight=0.9,
            borderaxespad=0.2,
        )  # fmt: skip

    def patch(self, label: str, color: str, hatch: str = "", is_empty: bool = False) -> Any:
        """An entry of the legend: a filled square, or an outline."""
        from matplotlib.patches import Patch

        fill = "none" if is_empty else color
        edge = color if is_empty else self.theme.paper
        return Patch(facecolor=fill, edgecolor=edge, hatch=hatch, label=label, linewidth=0.6)


def frame(
    title: str, width_cm: float, dark: bool, height_cm: float, ratios: Sequence[float] = (1.0,)
) -> Frame:
    """An empty figure.   ratios: of the heights of its axes.

    Raises ArgumentError as checked_width(), BMInfError where matplotlib is missing.
    """
    theme = DARK if dark else LIGHT
    size = (checked_width(width_cm) / _INCH_CM, height_cm / _INCH_CM)
    figure = _figure_class()(figsize=size, dpi=150, layout="constrained", facecolor=theme.paper)
    grid = figure.subplots(len(ratios), 1, squeeze=False, height_ratios=list(ratios))
    wrapped = textwrap.fill(title, int(width_cm * _TITLE_CHARS_PER_CM))
    figure.suptitle(wrapped, x=0.01, ha="left", fontsize=_FONT_PT + 1, color=theme.ink)
    axes = [row[0] for row in grid]
    for each in axes:
        _dress(each, theme, width_cm < _SMALL)
    return Frame(figure, axes, theme, width_cm)


def _dress(axes: Any, theme: Theme, is_small: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_facecolor(theme.paper)
    axes.tick_params(colors=theme.ink, labelsize=_FONT_PT, length=2.5, width=0.6)
    axes.xaxis.label.set(color=theme.ink, fontsize=_FONT_PT)
    axes.yaxis.label.set(color=theme.ink, fontsize=_FONT_PT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set(color=theme.ink, linewidth=0.6)
    axes.xaxis.set_major_locator(MaxNLocator(5 if is_small else 9, steps=_STEPS))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))


def checked_width(width_cm: float) -> float:
    """`width_cm`.   Raises ArgumentError for one below 6 cm or above 100."""
    width_cm = plain(width_cm)
    if not is_number(width_cm) or not LEAST_WIDTH_CM <= width_cm <= _MOST_CM:
        raise ArgumentError(
            f"width_cm={width_cm!r}; give a number from {LEAST_WIDTH_CM:g} to {_MOST_CM:g}"
        )
    return width_cm


def words_cm(title: str, num_entries: int, width_cm: float) -> float:
    """Centimetres of height that a title takes, and a legend of so many entries."""
    num_lines = len(textwrap.wrap(title, int(checked_width(width_cm) * _TITLE_CHARS_PER_CM)))
    num_rows = num_entries if width_cm < _SMALL else -(-num_entries // _COLUMNS)
    return _LINE_CM * (num_lines + num_rows)


def unit_of_bytes(largest: float) -> tuple[int, str]:
    """Bytes of the unit in which numbers up to `largest` are easily read, and its name."""
    return next((size, name) for size, name in _UNITS if largest >= size or size == 1)


def unit_of_seconds(longest: float) -> tuple[float, str]:
    """As unit_of_bytes()."""
    return next((size, name) for size, name in _SECONDS if longest >= size or size == 1e-6)


def check_matplotlib() -> None:
    """Raise BMInfError, with the command that helps, where matplotlib is missing."""
    _figure_class()


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BMInfError(
            'pictures need matplotlib; install with: pip install "bminf[plot]"'
        ) from error
    return Figure
