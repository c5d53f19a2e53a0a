"""What a router with favourites chooses, drawn at random: traces for caches of experts.

No routing of a large model can be measured here. What was published of one is how often a cache
hits that forgets what was used least recently, with room for an eighth and for a quarter of the
experts; so a trace is drawn that gives such a cache just these hits, and is the same in every run.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Routing:
    """Choices of every layer for one token after another.

    layers, experts, chosen: sizes; a token goes through `chosen` different experts of each layer.
    eighth, quarter: of what is drawn, the parts that fall on the eighth of the layer's experts used
    most recently, and on the quarter; within the first, the second and the rest each expert is as
    likely as any other. A cache hits a little less, since no expert is chosen twice.
    """

    layers: int
    experts: int
    chosen: int
    eighth: float
    quarter: float
    seed: int = 22

    def tokens(self, number: int) -> Iterator[list[list[int]]]:
        """Of so many tokens: layer -> the experts that it chooses, ascending."""
        draw = random.Random(self.seed)
        recent = [draw.sample(range(self.experts), self.experts) for _ in range(self.layers)]
        for _ in range(number):
            yield [self._choose(draw, layer) for layer in recent]

    def _choose(self, draw: random.Random, recent: list[int]) -> list[int]:
        """recent: experts of a layer, the one used most recently first; is brought up to date."""
        places: set[int] = set()
        while len(places) < self.chosen:
            places.add(self._place(draw))
        found = [recent[place] for place in sorted(places)]
        for expert in found[::-1]:
            recent.remove(expert)
            recent.insert(0, expert)
        return sorted(found)

    def _place(self, draw: random.Random) -> int:
        part = draw.random()
        low, high = (1 / 4, 1.0) if part >= self.quarter else (1 / 8, 1 / 4)
        if part < self.eighth:
            low, high = 0.0, 1 / 8
        return int(self.experts * (low + (high - low) * draw.random()))
