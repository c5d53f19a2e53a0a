"""What a pass will take, by the virtual clock; that this clock is right is for test_ring.py."""

from __future__ import annotations

import math

import pytest

from bminf.errors import ArgumentError
from bminf.offload.plan import Block, plan
from bminf.offload.predict import (
    Prediction,
    Rows,
    predict,
    rows_until_arithmetic,
    simulate,
)
from bminf.offload.trace import Span, Trace


@pytest.mark.parametrize(
    ("link", "memory", "disk", "bound"),
    [
        (10e9, 1e15, 1e9, "disk"),  # 10 of 30 blobs at a tenth of the rate: 10/3 of the time
        (10e9, 1e15, 2e9, "disk"),
        (10e9, 1e15, 5e9, "link"),  # 2/3 of the time, hidden behind the copies between
        (10e9, 1e9, 5e9, "compute"),
        (1e15, 1e15, 5e9, "disk"),
    ],
)
def test_a_prediction_names_what_binds_and_takes_as_long(
    link: float, memory: float, disk: float, bound: str
) -> None:
    blocks = [Block(f"layers.{at}", 10**7, "layers") for at in range(30)]
    the_plan = plan(blocks, 2 * 10**7, host_bytes=22 * 10**7)
    assert len(the_plan.streamed) == 30 and len(the_plan.on_disk) == 10
    prediction = predict(the_plan, link, memory, disk_bytes_per_s=disk)
    assert prediction.disk_s == pytest.approx(10 * 10**7 / disk)
    assert prediction.copy_s == pytest.approx(30 * 10**7 / link)
    assert prediction.bound == bound
    needs = {
        "disk": prediction.disk_s,
        "link": prediction.copy_s,
        "compute": prediction.compute_s,
    }
    assert prediction.pass_s == pytest.approx(needs[bound], rel=0.04)
    assert (prediction.disk_busy > 0.95) == (bound == "disk")
    without = predict(plan(blocks, 2 * 10**7), link, memory)
    assert without.disk_s == without.disk_busy == 0 and without.pass_s <= prediction.pass_s


def test_a_prediction_with_blocks_on_disk_needs_its_rate() -> None:
    blocks = [Block(f"layers.{at}", 100, "layers") for at in range(9)]
    the_plan = plan(blocks, 200, host_bytes=500)
    with pytest.raises(ArgumentError, match="disk_bytes_per_s is None, but 6 blocks"):
        predict(the_plan, 1.0, 1.0)
    slow = predict(the_plan, 1e9, 1e9, disk_bytes_per_s=1.0)
    assert slow.bound == "disk" and slow.pass_s == pytest.approx(600)


@pytest.mark.parametrize("budget", [10**10, 10**8])  # on the device, and on the host
def test_of_tables_rows_alone_are_read(budget: int) -> None:
    made = plan(
        [Block("only", 10**6)], budget, outside_bytes=10**6, tables=["rows"], table_bytes=10**9
    )
    assert (made.host_table_bytes > 0) == (budget == 10**8)
    assert predict(made, 1e9, 1e9).pass_s == pytest.approx(2e-3)


def test_a_prediction_is_that_of_the_larger_of_copying_and_computing() -> None:
    blocks = [Block(f"layers.{i}", 10**7, "layers") for i in range(20)]
    streaming = plan(blocks, 10 * 10**7, outside_bytes=10**7)
    prediction = predict(streaming, link_bytes_per_s=10e9, memory_bytes_per_s=100e9)
    num_streamed = len(streaming.streamed)
    assert prediction.copy_s == pytest.approx(num_streamed * 1e-3)
    assert prediction.compute_s == pytest.approx(21e-4)
    assert prediction.pass_s == pytest.approx(prediction.copy_s, rel=0.02)
    assert prediction.link_busy > 0.98 and prediction.bound == "link"
    slow_memory = predict(streaming, link_bytes_per_s=100e9, memory_bytes_per_s=1e9)
    assert slow_memory.pass_s == pytest.approx(slow_memory.compute_s, rel=0.02)
    assert slow_memory.bound == "compute"
    resident = predict(plan(blocks, 10**9), 10e9, 100e9)
    assert resident.pass_s == pytest.approx(2e-3) and resident.link_busy == 0
    assert resident.bound == "compute"


def test_a_prediction_leaves_an_encoder_out_of_the_decode_pass() -> None:
    blocks = [Block(f"e.{i}", 100, "e") for i in range(6)] + [
        Block(f"d.{i}", 100, "d") for i in range(6)
    ]
    the_plan = plan(blocks, 800, {"e": 1})
    assert set(the_plan.streamed) <= {f"e.{i}" for i in range(6)}
    prediction = predict(the_plan, 1.0, 100.0)
    assert prediction.copy_s == 0 and prediction.pass_s == pytest.approx(6.0)


def test_a_prediction_of_some_lists_is_of_their_blocks_alone() -> None:
    blocks = [Block(f"{name}.{i}", 100, name) for name in "epd" for i in range(6)]
    the_plan = plan(blocks, 1000 + 50, {"e": 1, "p": 1}, outside_bytes=50)
    streamed = {name: sum(block[0] == name for block in the_plan.streamed) for name in "epd"}
    assert sum(streamed.values()) == 10 and streamed["d"] == 0  # 8 blocks and two slots fit
    for lists in ("d", "pd", "dp", "ep"):
        prediction = predict(the_plan, 50.0, 100.0, lists)
        copy_s = sum(streamed[name] for name in lists) * 100 / 50
        assert prediction.copy_s == pytest.approx(copy_s)
        assert prediction.compute_s == pytest.approx(6.0 * len(lists))  # nothing of the 50 bytes
        assert prediction.pass_s >= max(copy_s, prediction.compute_s) * (1 - 1e-9)
    whole = predict(the_plan, 50.0, 100.0)
    assert whole.compute_s == pytest.approx(6.5)


def test_a_list_that_a_plan_does_not_have_is_named() -> None:
    the_plan = plan([Block("d.0", 100, "d")], 1000)
    with pytest.raises(ArgumentError, match="'e'; the plan has 'd'"):
        predict(the_plan, 1.0, 1.0, ["d", "e"])


# ---- several rows --------------------------------------------------------------------------------

BLOCKS = [Block(f"layers.{i}", 10**6, "layers") for i in range(10)]
WEIGHTS = {block.name: 2 * 10**6 for block in BLOCKS}  # in 4 bits


def predicted(number: int, flops: float, cache_bytes: int = 0, limit: int = 10**8) -> Prediction:
    rows = Rows(number, WEIGHTS, flops, cache_bytes)
    return predict(plan(BLOCKS, limit), 1e9, 1e10, rows=rows)


@pytest.mark.parametrize(
    ("number", "cache_bytes", "limit", "binds"),
    [
        (1, 0, 10**8, "device memory"),  # 1 ms, and 0.04 ms of arithmetic
        (24, 0, 10**8, "device memory"),
        (26, 0, 10**8, "arithmetic"),
        (26, 10**7, 10**8, "device memory"),
        (240, 0, 2 * 10**6, "link"),  # 10 ms
        (260, 0, 2 * 10**6, "arithmetic"),
    ],
)
def test_what_binds_passes_of_several_rows(
    number: int, cache_bytes: int, limit: int, binds: str
) -> None:
    found = predicted(number, 1e12, cache_bytes, limit)
    assert found.arithmetic_s == pytest.approx(number * 4e-5)
    assert found.memory_s == pytest.approx(1e-3 + cache_bytes / 1e10)
    assert found.binds == binds
    needs = (found.memory_s, found.arithmetic_s, found.copy_s)
    assert found.pass_s >= max(needs) * (1 - 1e-9)
    assert found.pass_s <= 1.05 * max(needs) + cache_bytes / 1e10


def test_rows_share_what_is_streamed_until_arithmetic_binds() -> None:
    one = predicted(1, 1e12, limit=2 * 10**6)
    assert rows_until_arithmetic(one, 1) == pytest.approx(250)
    assert predicted(249, 1e12, limit=2 * 10**6).pass_s == pytest.approx(one.pass_s, rel=0.01)
    assert predicted(2500, 1e12, limit=2 * 10**6).pass_s == pytest.approx(10 * one.pass_s, rel=0.02)


def test_of_one_row_nothing_is_multiplied() -> None:
    found = predict(plan(BLOCKS, 10**8), 1e9, 1e10)
    assert found.arithmetic_s == 0 and found.memory_s == found.compute_s == found.pass_s
    assert rows_until_arithmetic(found, 1) == math.inf


def spans_by_pass(trace: Trace, num_passes: int) -> list[list[Span]]:
    size = len(trace.computed) // num_passes
    return [list(trace.computed[size * n : size * (n + 1)]) for n in range(num_passes)]


def test_a_trace_takes_as_long_as_is_predicted() -> None:
    blocks = [Block(f"layers.{at}", 10**7 + at, "layers") for at in range(30)]
    the_plan = plan(blocks, 12 * 10**7, host_bytes=13 * 10**7, outside_bytes=10**6)
    assert the_plan.resident and the_plan.on_disk
    trace = simulate(the_plan, 10e9, 100e9, disk_bytes_per_s=5e9, num_passes=4)
    predicted = predict(the_plan, 10e9, 100e9, disk_bytes_per_s=5e9)
    assert trace.end_s / 4 == pytest.approx(predicted.pass_s) and trace.is_predicted
    for computed in spans_by_pass(trace, 4):
        assert [span.name for span in computed] == [*(block.name for block in blocks), ""]
        lasted = sum(span.end_s - span.start_s for span in computed)
        assert lasted == pytest.approx(predicted.compute_s)
    shown = [copy for copy in trace.copies if copy.end_s > 0]
    assert {copy.name for copy in shown} == set(the_plan.streamed)
    assert {read.name for read in trace.reads} == set(the_plan.on_disk)
    for number, name in enumerate(the_plan.streamed):
        arrived = [copy.end_s for copy in trace.copies if copy.name == name]
        used = [span.start_s for span in trace.computed if span.name == name]
        # The two passes before those that are shown have used the first copies.
        assert all(a <= u for a, u in zip(arrived[2:], used, strict=False)), number


def test_a_trace_of_what_fits_has_no_copies() -> None:
    the_plan = plan([Block("only", 10**6)], 10**8, outside_bytes=10**6)
    trace = simulate(the_plan, 1e9, 1e9, num_passes=1)
    assert not trace.copies and not trace.reads
    assert [(s.name, s.start_s, s.end_s) for s in trace.computed] == [
        ("only", 0.0, pytest.approx(1e-3)),
        ("", pytest.approx(1e-3), pytest.approx(2e-3)),
    ]


def test_a_trace_with_blocks_on_disk_needs_its_rate() -> None:
    blocks = [Block(f"layers.{at}", 100, "layers") for at in range(9)]
    with pytest.raises(ArgumentError, match="disk_bytes_per_s is None"):
        simulate(plan(blocks, 200, host_bytes=500), 1.0, 1.0)


def test_calls_and_what_lies_outside_take_their_own_time() -> None:
    made = plan([Block(f"layers.{at}", 10**6) for at in range(4)], 10**8, outside_bytes=10**7)
    found = predict(made, 1e9, 1e9, calls_s=1e-3, outside_bytes_per_s=1e10)
    assert found.pass_s == pytest.approx(4 * (1e-3 + 1e-3) + 1e-3)
    assert predict(made, 1e9, 1e9).pass_s == pytest.approx(4e-3 + 1e-2)


def test_sums_over_ranks_are_waited_for_while_the_link_goes_on() -> None:
    blocks = [Block(f"layers.{at}", 10**7, "layers") for at in range(10)]
    sums_s = {**{block.name: 1e-3 for block in blocks}, "": 2e-3}
    whole = predict(plan(blocks, 2**40), 1e9, 1e10, sums_s=sums_s)
    assert whole.sums_s == pytest.approx(12e-3)
    assert whole.pass_s == pytest.approx(10 * 1e-3 + 12e-3)
    assert (whole.bound, whole.binds) == ("compute", "all-reduces")
    streamed = plan(blocks, 4 * 10**7)
    one, ranks = (predict(streamed, 1e9, 1e12, sums_s=sums) for sums in ({}, sums_s))
    assert one.pass_s == pytest.approx(80e-3, rel=0.02)
    assert ranks.pass_s < one.pass_s + 0.6 * 12e-3 and ranks.binds == "link"
