"""How often an expert that is wanted is in the pool already, where nobody has measured it.

That is a property of a model and of its text. So there are two answers, and most models lie between
them: what holds if no expert is ever more likely than another, and what a model has reached that
keeps to its favourites. `bminf.stats_of` counts the hits of one that runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from bminf.checks import is_number
from bminf.errors import ArgumentError


@dataclass(frozen=True)
class HitRates:
    """Hits among all experts that are wanted, by the share of the experts that have room.

    points: (share, hits), both from 0 to 1 and ascending. Lines lead from each to the next, to the
    first one from no room, which hits nothing, and from the last one to room for all.
    Raises ArgumentError for points that are none.
    """

    points: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        for before, (share, hits) in pairwise(((0.0, 0.0), *self.points)):
            are_numbers = is_number(share) and is_number(hits)
            if not (are_numbers and before[0] < share < 1 and before[1] <= hits <= 1):
                raise ArgumentError(
                    f"points={self.points!r}; give pairs (share of the experts, hits), each from "
                    "0 to 1, ascending"
                )

    def at(self, share: float) -> float:
        """Hits of a pool with room for `share` of the experts."""
        for (left, low), (right, high) in pairwise(((0.0, 0.0), *self.points, (1.0, 1.0))):
            if share <= right:
                return low + (high - low) * (share - left) / (right - left)
        return 1.0


UNIFORM = HitRates()
"""Every expert as likely as any other, whatever came before."""

PUBLISHED = HitRates(((1 / 8, 0.67), (1 / 4, 0.81)))
"""The highest that was published for a cache that forgets what was used least recently: one model
of 512 experts a layer. Others were reported at 8 to 46%. Source: llama.cpp, number 27861."""
