"""When blocks of a model are copied and computed (bminf/offload/recording.py)."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from streaming import least_limit, make_stack
from tiny_zoo import tiny

import bminf
from bminf.errors import ArgumentError
from bminf.offload.recording import Recording, _without_waits
from bminf.offload.trace import Span


def hooks_of(model: Any) -> int:
    modules = list(model.modules())
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)


def wrapped_stack() -> Any:
    model = make_stack()
    return bminf.wrapper(model, False, least_limit(model) + 9000)


@torch.no_grad()
def test_every_copy_and_block_is_there() -> None:
    model, x = wrapped_stack(), torch.randn(3, 16)
    model(x)
    plan, before = bminf.plan_of(model), bminf.stats_of(model)
    assert plan.streamed and plan.resident
    with Recording(model) as recording:
        model(x)
        model(x)
    trace, after = recording.trace, bminf.stats_of(model)
    assert [span.name for span in trace.computed] == 2 * [block.name for block in plan.blocks]
    assert {copy.name for copy in trace.copies} == set(plan.streamed)
    # What was begun before, or is still on its way, is in one of the two counts alone.
    assert abs(len(trace.copies) - (after.copies - before.copies)) <= 2
    assert all(span.start_s <= span.end_s for span in (*trace.copies, *trace.computed))
    assert all(one.end_s <= other.start_s for one, other in pairwise(trace.computed))
    assert {copy.slot for copy in trace.copies} == {0, 1} and not trace.is_predicted
    assert trace.end_s == trace.computed[-1].end_s > 0
    assert hooks_of(model) == 0


@torch.no_grad()
def test_a_block_is_not_computed_before_its_copy_has_ended() -> None:
    model, x = wrapped_stack(), torch.randn(3, 16)
    with Recording(model) as recording:
        for _ in range(4):
            model(x)
    for copy in recording.trace.copies:
        uses = [
            span
            for span in recording.trace.computed
            if span.name == copy.name and span.end_s > copy.end_s
        ]
        assert not uses or uses[0].start_s >= copy.end_s


def test_a_wait_for_a_copy_is_no_computation() -> None:
    copies = [Span("a", 1.0, 3.0, 0), Span("b", 3.0, 4.0, 1), Span("a", 6.0, 9.0, 0)]
    called = [Span("a", 0.0, 5.0), Span("b", 5.0, 6.0), Span("resident", 6.0, 7.0)]
    assert list(_without_waits(called, copies)) == [Span("a", 3.0, 5.0), *called[1:]]


def test_an_error_in_the_model_leaves_nothing_behind() -> None:
    model = wrapped_stack()
    recording = Recording(model)
    with pytest.raises(RuntimeError), recording:
        model(torch.randn(3, 99))
    assert hooks_of(model) == 0
    assert model.__dict__["_bminf_scheduler"].backend.copy_log is None


def test_a_model_of_the_zoo_is_recorded(tmp_path: Path) -> None:
    folder = tiny("cpm2").write_original(tmp_path / "cpm2")
    with bminf.models.CPM2(folder, "1GB") as model:
        with Recording(model) as recording:
            model.generate("今天", max_tokens=2, temperature=0)
        blocks = {block.name for block in model.plan.blocks}
    assert {span.name for span in recording.trace.computed} == blocks
    assert not recording.trace.copies


@pytest.mark.parametrize("model", [torch.nn.Linear(2, 2), "a model", None])
def test_what_bminf_does_not_run_is_refused(model: Any) -> None:
    with pytest.raises(ArgumentError, match="is not run by bminf"):
        Recording(model)


@torch.no_grad()
def test_a_recording_can_be_entered_again_but_not_in_another() -> None:
    model, x = wrapped_stack(), torch.randn(3, 16)
    recording = Recording(model)
    with recording:
        model(x)
    first = recording.trace
    with recording:
        model(x)
        with pytest.raises(ArgumentError, match="is being recorded"), Recording(model):
            pass
        model(x)
    assert len(recording.trace.computed) == 2 * len(first.computed)
    assert recording.trace.copies and recording.trace.computed[0].start_s >= 0


@torch.no_grad()
def test_what_was_recorded_before_the_model_was_unwrapped_is_known() -> None:
    model = wrapped_stack()
    with Recording(model) as recording:
        model(torch.randn(3, 16))
        bminf.unwrap(model)
    assert recording.trace.computed and recording.trace.copies


def test_a_model_that_has_lost_a_block_is_left_without_hooks() -> None:
    model = wrapped_stack()
    block = bminf.plan_of(model).blocks[-1].name
    holder, _, name = block.rpartition(".")
    del model.get_submodule(holder)._modules[name]
    with pytest.raises(AttributeError), Recording(model):
        pass
    assert hooks_of(model) == 0
