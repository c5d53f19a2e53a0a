"""What a phase took, and what bound it. Phases of requests are tested with the engine."""

from __future__ import annotations

import pytest

from bminf.offload.hooks import Stats
from bminf.offload.phase import NO_PHASE, Phase, PhaseTally, phase_between


@pytest.mark.parametrize(
    ("seconds", "waited_s", "bound"),
    [(0.0, 0.0, None), (10.0, 0.0, "computing"), (10.0, 1.0, "computing"), (10.0, 1.1, "copying")],
)
def test_a_tenth_of_waiting_makes_the_difference(
    seconds: float, waited_s: float, bound: str | None
) -> None:
    assert Phase(seconds, waited_s).bound == bound
    assert Phase(seconds, waited_s).as_json()["bound"] == bound


def test_phases_are_what_was_counted_meanwhile() -> None:
    before = Stats(bytes_copied=100, waited_s=1.0, expert_hits=1, expert_misses=2)
    after = Stats(bytes_copied=1100, waited_s=1.5, expert_hits=4, expert_misses=9)
    phase = phase_between(before, after, 2.0)
    assert phase == Phase(2.0, 0.5, 1000, 3, 7)
    assert NO_PHASE + phase == phase and phase + phase - phase == phase
    assert str(phase) == "2.00 s, 1000 B copied, 0.50 s waiting for it; bound by copying"
    assert str(Phase(2.0)) == "2.00 s, nothing was copied; bound by computing"


def test_a_tally_is_the_sum_of_its_phases() -> None:
    tally, phases = PhaseTally(), [Phase(2.0, 0.5, 1000), Phase(1.0), Phase(0.25, 0.25, 24, 5, 6)]
    assert tally.phase == NO_PHASE
    for phase in phases:
        tally.add(phase)
    assert tally.phase == sum(phases, NO_PHASE)
