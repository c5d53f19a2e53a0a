"""Which hits a pool of experts can expect: two curves, and what lies on them."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bminf.errors import ArgumentError
from bminf.offload.hit_rates import PUBLISHED, UNIFORM, HitRates

SHARES = [step / 64 for step in range(65)]


@given(st.floats(0, 1))
def test_uniform_routing_hits_what_has_room(share: float) -> None:
    assert UNIFORM.at(share) == pytest.approx(share)


def test_the_published_points_lie_on_their_curve() -> None:
    assert PUBLISHED.at(0.125) == pytest.approx(0.67) and PUBLISHED.at(0.25) == pytest.approx(0.81)
    assert PUBLISHED.at(3 / 16) == pytest.approx((0.67 + 0.81) / 2)


@pytest.mark.parametrize("rates", [PUBLISHED, HitRates(((0.5, 0.46),))])
def test_more_room_hits_more(rates: HitRates) -> None:
    hits = [rates.at(share) for share in SHARES]
    assert hits[0] == 0 and hits[-1] == 1
    assert all(fewer < more for fewer, more in pairwise(hits))


@pytest.mark.parametrize(
    "points",
    [
        ((0.0, 0.5),),
        ((1.0, 0.5),),
        ((0.5, 1.5),),
        ((0.5, -0.1),),
        ((0.5, 0.6), (0.5, 0.7)),
        ((0.5, 0.6), (0.6, 0.5)),
        ((float("nan"), 0.5),),
        ((0.5, float("nan")),),
        (("0.5", 0.5),),
    ],
)
def test_points_that_are_none(points: tuple[tuple[float, float], ...]) -> None:
    with pytest.raises(ArgumentError, match="ascending"):
        HitRates(points)
