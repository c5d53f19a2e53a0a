"""A table as its cells: each says whether it was measured, predicted, published, or why it is
empty."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

MEASURED, PREDICTED, PUBLISHED, NOT_RUN = "measured", "predicted", "published", "not run"
KINDS = (MEASURED, PREDICTED, PUBLISHED, NOT_RUN)

NOT_PUBLISHED = "not published"
DOES_NOT_FIT = "does not fit"


@dataclass(frozen=True)
class Cell:
    """quantity: "ms_per_token", "seconds", ..., a table of its own each.   kind: one of KINDS.

    value: None where there is none, and of what was published where memory did not do.
    reason: why nothing was run.   details: what else is known of it.
    """

    quantity: str
    row: str
    column: str
    kind: str
    value: float | None = None
    reason: str = ""
    details: dict[str, Any] = field(default_factory=dict)


def not_run(quantity: str, row: str, columns: Iterable[str], reason: str) -> Iterator[Cell]:
    """A row, or a part of one, that is empty."""
    for column in columns:
        yield Cell(quantity, row, column, NOT_RUN, reason=reason)


def published_row(
    quantity: str,
    row: str,
    columns: Iterable[str],
    known: Callable[[str], tuple[bool, float | None]],
) -> Iterator[Cell]:
    """known: a column -> whether there is a figure of it, and that, None for out of memory."""
    for column in columns:
        is_known, value = known(column)
        if is_known:
            yield Cell(quantity, row, column, PUBLISHED, value)
        else:
            yield Cell(quantity, row, column, NOT_RUN, reason=NOT_PUBLISHED)
