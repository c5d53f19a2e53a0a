"""Memory limits that show something, from the plan in which everything fits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bminf.scheduler.plan import Plan


def least_limit(whole: Plan) -> int:
    """The smallest limit that can be kept, in bytes.

    Keeping the k largest blocks leaves smaller slots for the others; the best k is taken.
    """
    sizes = _sizes(whole)
    return _fixed_bytes(whole) + min(_with_slots(sizes, k) for k in range(len(sizes) + 1))


def half_limit(whole: Plan) -> int:
    """A limit that holds half the blocks, the largest ones, beside two slots, in bytes.

    Of four blocks or fewer that would hold all, so it is one byte less than all of them take.
    """
    sizes = _sizes(whole)
    return _fixed_bytes(whole) + min(_with_slots(sizes, len(sizes) // 2), sum(sizes) - 1)


def _with_slots(sizes: Sequence[int], k: int) -> int:
    """Bytes of the first `k` blocks and of two slots for the next one."""
    return sum(sizes[:k]) + 2 * sum(sizes[k : k + 1])


def _sizes(whole: Plan) -> list[int]:
    return sorted((block.nbytes for block in whole.blocks), reverse=True)


def _fixed_bytes(whole: Plan) -> int:
    return whole.outside_bytes + whole.reserved_bytes
