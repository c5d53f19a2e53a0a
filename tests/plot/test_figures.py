"""Pictures: what they say, that it is what they were given, and that it can be read.

Of bminf/plot/plans.py, bminf/plot/timelines.py, bminf/plot/speed.py, bminf/plot/memory.py,
bminf/plot/experts.py, bminf/plot/theme.py.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy
import pytest
from drawn import check_legible, labels, legend, title
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

import bminf
from bminf.errors import ArgumentError, BMInfError
from bminf.offload.plan import Block, Experts, Plan, plan
from bminf.offload.predict import predict, simulate
from bminf.plot import theme
from bminf.plot.memory import filling
from bminf.plot.theme import DARK, LIGHT
from bminf.units import format_bytes

MIB = 2**20
LINK, MEMORY, DISK = 12e9, 192e9, 2e9
LAYERS = [
    *(Block(f"encoder.layers.{i}", 12 * MIB, "encoder.layers") for i in range(6)),
    *(Block(f"decoder.layers.{i}", 15 * MIB, "decoder.layers") for i in range(24)),
]
USES = {block.name: 1 if block.list_name.startswith("encoder") else 128 for block in LAYERS}


def plan_at(budget: int, **more: Any) -> Plan:
    more = {"outside_bytes": 40 * MIB, "reserved_bytes": 20 * MIB, "uses": USES, **more}
    return plan(LAYERS, budget, **more)


HALF = plan_at(300 * MIB)
FITS = plan_at(900 * MIB)
DISK_TOO = plan_at(200 * MIB, host_bytes=180 * MIB, tables=["embed"], table_bytes=10 * MIB)
BY_NEED = replace(HALF, experts=Experts(256, 256 * MIB, MIB, 64, 8 * MIB))
LONG = plan(
    [Block(f"transformer.encoder.layers.{i}.attention.query_key_value", MIB + i,
           "transformer.encoder.layers.attention.query_key_value") for i in range(300)],
    150 * MIB,
)  # fmt: skip
STATS = [bminf.Stats(expert_hits=11 * n, expert_misses=5 * n + n % 3) for n in range(31)]
PLANS = {"half": HALF, "fits": FITS, "disk": DISK_TOO, "experts": BY_NEED, "long": LONG}
CURVES = {"8 bits": [(2**30, 1.5), (2**31, 3.0)], "4 bits": [(2**29, 2.5), (2**31, 40.0)]}


def figures() -> dict[str, Callable[..., Any]]:
    """By name, each of which takes a width and whether it is dark."""
    found: dict[str, Callable[..., Any]] = {}
    for name, made in PLANS.items():
        trace = bminf.plot.simulate(made, LINK, MEMORY, DISK)
        found[f"map {name}"] = partial(bminf.plot.plan_map, made)
        found[f"timeline {name}"] = partial(bminf.plot.timeline, trace)
        found[f"memory {name}"] = partial(bminf.plot.memory_over_time, made, trace)
    found["speed"] = partial(
        bminf.plot.speed_by_limit, CURVES, limits={"GTX 1060, 6 GiB": 6 * 2**30}
    )
    found["hits"] = partial(bminf.plot.expert_hits, STATS)
    return found


@pytest.mark.parametrize("name", figures())
def test_words_neither_overlap_nor_leave_the_figure(name: str) -> None:
    for width_cm in (8, 16):
        for dark in (False, True):
            figure = figures()[name](width_cm=width_cm, dark=dark)
            check_legible(figure)
            assert figure.get_figwidth() * 2.54 == pytest.approx(width_cm)
            paper = (DARK if dark else LIGHT).paper
            assert to_hex(figure.get_facecolor()) == paper


def test_what_overlaps_is_found() -> None:
    figure = bminf.plot.expert_hits(STATS)
    figure.text(0.5, 0.5, "one word")
    check_legible(figure)
    figure.text(0.52, 0.5, "another word")
    with pytest.raises(AssertionError, match="covers"):
        check_legible(figure)


def cells(figure: Any) -> list[str]:
    """Colours of the blocks of a plan map."""
    return [to_hex(p.get_facecolor()) for p in figure.axes[1].patches if type(p) is Rectangle]


@pytest.mark.parametrize("made", PLANS.values(), ids=PLANS)
def test_a_map_shows_each_block_in_its_place(made: Plan) -> None:
    figure = bminf.plot.plan_map(made)
    streamed = set(made.streamed)
    assert cells(figure) == [
        LIGHT.streams if block.name in streamed else LIGHT.stays for block in made.blocks
    ]
    said = [text.get_text() for text in figure.axes[1].texts]
    assert len(said) == len({block.list_name for block in made.blocks})
    if made is HALF:
        num_streamed = len(streamed)
        assert title(figure) == f"{30 - num_streamed} of 30 blocks stay within 300.0 MiB"
        assert said == [
            "encoder.layers: 0 stay, 6 stream",
            f"decoder.layers: {30 - num_streamed} stay, {num_streamed - 6} stream",
        ]
        assert labels(figure)[0] == ("memory (MiB)", "")


def test_a_map_shows_what_memory_holds() -> None:
    figure = bminf.plot.plan_map(DISK_TOO)
    unit, rows = MIB, figure.axes[0]
    assert [tick.get_text() for tick in rows.get_yticklabels()] == ["device", "host", "disk"]
    by_row: dict[int, float] = {}
    for bar in rows.patches:
        row = round(bar.get_y() + bar.get_height() / 2)
        by_row[row] = by_row.get(row, 0.0) + bar.get_width() * unit
    assert by_row[0] == pytest.approx(DISK_TOO.budget)
    assert by_row[1] == pytest.approx(DISK_TOO.host_bytes)
    assert by_row[2] == pytest.approx(DISK_TOO.disk_bytes)
    names = [entry.partition(":")[0] for entry in legend(figure)]
    assert names == [
        "blocks that stay", "outside all blocks", "two slots", "reserved for the text", "free",
        "blocks that stream", "read by row", "staging buffers", "blocks on disk",
    ]  # fmt: skip


def test_a_map_of_experts_shows_the_pool() -> None:
    figure = bminf.plot.plan_map(BY_NEED)
    assert title(figure).endswith(", and 64 of 256 experts")
    assert {"slots for experts: 64.0 MiB", "experts: 256.0 MiB"} <= set(legend(figure))


def test_a_timeline_shows_each_copy_and_block() -> None:
    trace = bminf.plot.simulate(DISK_TOO, LINK, MEMORY, DISK)
    figure = bminf.plot.timeline(trace)
    (axes,) = figure.axes
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["disk", "link", "compute"]
    for row, spans in zip(
        axes.collections, (trace.reads, trace.copies, trace.computed), strict=True
    ):
        ends = [path.get_extents().intervalx for path in row.get_paths()]
        assert [end[1] - end[0] for end in ends] == pytest.approx(
            [(span.end_s - span.start_s) * 1e3 for span in spans]
        )
    assert labels(figure) == [("time (ms)", "")]
    assert title(figure) == "Copies and computation, predicted"
    assert legend(figure) == ["a block that stays", "a block that streams", "outside all blocks"]
    shorter = bminf.plot.timeline(trace, end_s=trace.end_s / 4)
    assert shorter.axes[0].get_xlim() == pytest.approx((0, trace.end_s * 1e3 / 4))
    assert title(bminf.plot.timeline(replace(trace, is_predicted=False))).endswith("measured")
    with pytest.raises(ArgumentError, match="no computation in it"):
        bminf.plot.timeline(bminf.plot.Trace((), ()))


def test_speeds_are_those_that_are_predicted() -> None:
    limits = [MIB, 150 * MIB, 300 * MIB, 600 * MIB]
    points = bminf.plot.predicted_speeds(plan_at, limits, LINK, MEMORY)
    assert points == [
        (limit, 1 / predict(plan_at(limit), LINK, MEMORY).pass_s) for limit in limits[1:]
    ]
    figure = bminf.plot.speed_by_limit({"it": points}, limits={"a card": 500 * MIB})
    curve, mark = figure.axes[0].lines
    assert [x * MIB for x, _ in curve.get_xydata()] == pytest.approx([p[0] for p in points])
    assert [y for _, y in curve.get_xydata()] == pytest.approx([p[1] for p in points])
    assert mark.get_xdata()[0] == 500
    assert labels(figure) == [("memory limit (MiB)", "tokens/s, predicted")]
    assert legend(figure) == ["it", "a card"]
    measured = bminf.plot.speed_by_limit({"it": points}, is_predicted=False, title="ours")
    assert labels(measured)[0][1] == "tokens/s" and title(measured) == "ours"
    with pytest.raises(ArgumentError, match="curves has no points"):
        bminf.plot.speed_by_limit({"it": []})


def test_memory_is_that_of_the_plan_and_its_slots_fill() -> None:
    trace = bminf.plot.simulate(HALF, LINK, MEMORY)
    figure = bminf.plot.memory_over_time(HALF, trace, measured=[(0.0, MIB), (1e-3, 2 * MIB)])
    assert labels(figure) == [("time (ms)", "memory (MiB)")]
    assert legend(figure) == [
        f"stays: {format_bytes(HALF.resident_bytes)}", "two slots: 30.0 MiB",
        "reserved: 20.0 MiB", "limit: 300.0 MiB", "measured",
    ]  # fmt: skip
    line = figure.axes[0].lines[-1]
    assert line.get_xydata().tolist() == [[0.0, 1.0], [1.0, 2.0]]
    for slot in (0, 1):
        points = list(filling(HALF, trace, slot))
        times = [time for time, _ in points]
        assert times == sorted(times) and times[-1] >= trace.end_s
        fills = [nbytes for _, nbytes in points]
        assert set(fills[1::3]) == {0} and set(fills[2::3]) == {15 * MIB}


def test_hits_and_misses_are_those_of_each_token() -> None:
    figure = bminf.plot.expert_hits(STATS)
    (axes,) = figure.axes
    hits, misses = axes.containers
    assert [bar.get_height() for bar in hits] == [11] * 30
    assert [bar.get_height() for bar in misses] == [5 + (1 if n % 3 else -2) for n in range(1, 31)]
    assert title(figure) == "330 of 480 experts that were wanted were in the pool"
    assert labels(figure) == [("token", "experts, all layers")]
    assert legend(figure) == ["hits: in the pool", "misses: copied"]
    with pytest.raises(ArgumentError, match="less than two entries"):
        bminf.plot.expert_hits(STATS[:1])


def test_points_may_be_an_array_and_what_is_read_once() -> None:
    points = [(2**30, 1.0), (2**31, 3.0)]
    for given in (points, numpy.array(points), iter(points)):
        axes = bminf.plot.speed_by_limit({"a": given}, limits={"card": "3GiB"}).axes[0]
        curve, mark = axes.get_lines()
        assert curve.get_xydata().tolist() == [[1.0, 1.0], [2.0, 3.0]]
        assert mark.get_xdata() == [3.0, 3.0]
    figure = bminf.plot.expert_hits(iter(STATS))
    assert title(figure) == "330 of 480 experts that were wanted were in the pool"


@pytest.mark.parametrize(
    ("draw", "said"),
    [
        (lambda: bminf.plot.timeline(simulate(HALF, 1e9, 1e9), end_s=0), "end_s=0; give seconds"),
        (lambda: bminf.plot.timeline(simulate(HALF, 1e9, 1e9), end_s=-1), "end_s=-1"),
        (lambda: bminf.plot.timeline(simulate(HALF, 1e9, 1e9), end_s=math.nan), "end_s=nan"),
        (lambda: simulate(HALF, 0, 1e9), "link_bytes_per_s=0; accepted: bytes per second"),
        (lambda: simulate(HALF, 1e9, math.nan), "memory_bytes_per_s=nan"),
        (lambda: simulate(HALF, 1e9, 1e9, num_passes=0), "num_passes=0"),
        (lambda: predict(HALF, 1e9, -1), "memory_bytes_per_s=-1"),
        (lambda: bminf.plot.speed_by_limit({"a": [(1, 1.0)]}, limits={"b": "x"}), r"limits\['b'\]"),
        (lambda: bminf.plot.save(3, "a.png"), "figure is a int"),
        (lambda: bminf.plot.save(None, 3), "file is a int; give a path"),
    ],
)
def test_what_cannot_be_drawn_is_refused_by_name(draw: Callable[[], Any], said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        draw()


@pytest.mark.parametrize("width_cm", [5, "wide", float("nan"), float("inf")])
def test_a_width_that_is_none_is_refused(width_cm: Any) -> None:
    with pytest.raises(ArgumentError, match="give a number from 6 to 100"):
        bminf.plot.plan_map(HALF, width_cm=width_cm)


def test_without_matplotlib_an_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(BMInfError, match=r'pip install "bminf\[plot\]"'):
        bminf.plot.plan_map(HALF)


def test_units_are_those_that_numbers_are_read_in() -> None:
    assert theme.unit_of_bytes(5 * 2**30) == (2**30, "GiB")
    assert theme.unit_of_bytes(3000) == (2**10, "KiB") and theme.unit_of_bytes(0) == (1, "B")
    assert theme.unit_of_seconds(2) == (1.0, "s") and theme.unit_of_seconds(2e-9) == (1e-6, "µs")
