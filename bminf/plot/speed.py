"""Tokens per second, by the memory limit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import cycle
from typing import Any

from bminf.errors import ArgumentError, BudgetError
from bminf.offload.hit_rates import UNIFORM, HitRates
from bminf.offload.plan import Plan
from bminf.offload.predict import predict
from bminf.plot.theme import WIDTH_CM, Frame, frame, unit_of_bytes, words_cm
from bminf.units import parse_bytes

Points = Sequence[tuple[int, float]]
"""(memory limit in bytes, tokens/s)."""

_LOOKS = (("stays", "-"), ("streams", "-"), ("stays", ":"), ("other", "-"), ("streams", ":"))
_AXES_CM = 5.2


def predicted_speeds(
    plan_at: Callable[[int], Plan],
    limits: Iterable[int],
    link_bytes_per_s: float,
    memory_bytes_per_s: float,
    disk_bytes_per_s: float | None = None,
    hit_rates: HitRates = UNIFORM,
) -> list[tuple[int, float]]:
    """(limit in bytes, predicted tokens/s) for one text; limits that are too small are left out.

    plan_at: the plan for a limit, as bminf.plan_for() or bminf.models.plan_model() makes it.
    All else as in bminf.offload.predict.predict(). Raises what that raises, and what `plan_at`
    does, but for BudgetError.
    """
    found = []
    for limit in limits:
        try:
            plan = plan_at(limit)
        except BudgetError:
            continue
        prediction = predict(
            plan, link_bytes_per_s, memory_bytes_per_s, disk_bytes_per_s=disk_bytes_per_s,
            hit_rates=hit_rates,
        )  # fmt: skip
        found.append((limit, 1 / prediction.pass_s))
    return found


def speed_by_limit(
    curves: Mapping[str, Points],
    *,
    limits: Mapping[str, int | str] | None = None,
    is_predicted: bool = True,
    title: str = "Speed by memory limit",
    width_cm: float = WIDTH_CM,
    dark: bool = False,
) -> Any:
    """A Figure: tokens/s by memory limit, a line for each of `curves`.

    curves: name -> points, such as those of predicted_speeds().   limits: name -> bytes or
    "6GB", such as those of a card, each marked by a line.   is_predicted: the axis says so.
    Raises ArgumentError for curves without a point or a width, BMInfError where matplotlib is
    missing.
    """
    curves = {name: [(x, y) for x, y in points] for name, points in curves.items()}
    if not any(curves.values()):
        raise ArgumentError("curves has no points; every limit was too small, or there was none")
    marks = {name: parse_bytes(at, f"limits[{name!r}]") for name, at in (limits or {}).items()}
    height_cm = _AXES_CM + words_cm(title, len(curves) + len(marks), width_cm)
    found = frame(title, width_cm, dark, height_cm)
    largest = max(limit for points in curves.values() for limit, _ in points)
    unit, unit_name = unit_of_bytes(largest)
    lines = [*_draw_curves(found, curves, unit), *_draw_marks(found, marks, unit)]
    axes = found.axes[0]
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color=found.theme.faint, linewidth=0.4)
    axes.set_axisbelow(True)
    axes.set_xlabel(f"memory limit ({unit_name})")
    axes.set_ylabel("tokens/s, predicted" if is_predicted else "tokens/s")
    found.legend(lines)
    return found.figure


def _draw_curves(found: Frame, curves: Mapping[str, Points], unit: int) -> Iterator[Any]:
    looks = cycle(_LOOKS)
    for (name, points), (use, style) in zip(curves.items(), looks, strict=False):
        x, y = [limit / unit for limit, _ in points], [speed for _, speed in points]
        yield from found.axes[0].plot(
            x, y, style, color=found.theme.of(use), label=name, linewidth=1.4, marker=".",
            markersize=4,
        )  # fmt: skip


def _draw_marks(found: Frame, marks: Mapping[str, int], unit: int) -> Iterator[Any]:
    for (name, limit), style in zip(marks.items(), cycle(["--", ":", "-."]), strict=False):
        yield found.axes[0].axvline(
            limit / unit, color=found.theme.ink, linestyle=style, linewidth=0.8, label=name
        )
