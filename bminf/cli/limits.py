"""A memory limit that shows something, from the plan in which everything fits."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bminf.offload.plan import Plan


def half_limit(whole: Plan) -> int:
    """A limit that holds half the blocks, the largest ones, beside two slots, in bytes.

    Of four blocks or fewer that would hold all, so it is one byte less than all of them take.
    """
    sizes = sorted((block.nbytes for block in whole.blocks), reverse=True)
    half = len(sizes) // 2
    held_bytes = sum(sizes[:half]) + 2 * sum(sizes[half : half + 1])
    return whole.outside_bytes + whole.reserved_bytes + min(held_bytes, sum(sizes) - 1)
