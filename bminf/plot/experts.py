"""How many of the experts that were wanted were in the pool already."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from bminf.errors import ArgumentError
from bminf.offload.hooks import Stats
from bminf.plot.theme import WIDTH_CM, frame, words_cm


def expert_hits(
    stats: Iterable[Stats],
    *,
    title: str | None = None,
    width_cm: float = WIDTH_CM,
    dark: bool = False,
) -> Any:
    """A Figure: hits and misses of each token.

    stats: of bminf.stats_of(model), before the first token and after each.   title: None says
    which part of all were hits.
    Raises ArgumentError for less than two of them, or a width; BMInfError where matplotlib is
    missing.
    """
    stats = list(stats)  # it may be one that is read once
    if len(stats) < 2:
        raise ArgumentError("stats has less than two entries; give one before the first token, too")
    hits = [after.expert_hits - before.expert_hits for before, after in pairwise(stats)]
    misses = [after.expert_misses - before.expert_misses for before, after in pairwise(stats)]
    if title is None:
        wanted = sum(hits) + sum(misses)
        title = f"{sum(hits)} of {wanted} experts that were wanted were in the pool"
    found = frame(title, width_cm, dark, 5.2 + words_cm(title, 2, width_cm))
    axes, theme = found.axes[0], found.theme
    tokens = range(1, len(stats))
    axes.bar(tokens, hits, color=theme.stays, width=0.85)
    axes.bar(tokens, misses, bottom=hits, color=theme.streams, width=0.85)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    axes.set_xlim(0.4, len(stats) - 0.4)
    axes.set_xlabel("token")
    axes.set_ylabel("experts, all layers")
    found.legend([found.patch("hits: in the pool", theme.stays),
                  found.patch("misses: copied", theme.streams)])  # fmt: skip
    return found.figure
