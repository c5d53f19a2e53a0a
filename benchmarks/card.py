"""A card that a model is planned for, and need not be there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bminf.offload.plan import Plan


@dataclass(frozen=True)
class Card:
    """A GPU. memory_limit: bytes.   link_bytes_per_s: from page-locked host memory to the card.
    memory_bytes_per_s: that the card reads of its own memory."""

    name: str
    memory_limit: int
    link_bytes_per_s: int
    memory_bytes_per_s: int


def plan_entries(plan: Plan) -> dict[str, Any]:
    """The plan in numbers, for a JSON file."""
    return {
        "memory_limit": plan.budget,
        "planned_bytes": plan.total_bytes,
        "reserved_bytes": plan.reserved_bytes,
        "resident": len(plan.resident),
        "streamed": len(plan.streamed),
        "resident_bytes": plan.resident_bytes,
        "streamed_bytes": plan.streamed_bytes,
        "on_disk": len(plan.on_disk),
    }


def streamed_bytes(plan: Plan, lists: Sequence[str] | None = None) -> int:
    """Bytes that come over the link in one pass through `lists`; None is all."""
    streamed = set(plan.streamed)
    return sum(
        b.nbytes
        for b in plan.blocks
        if b.name in streamed and (lists is None or b.list_name in lists)
    )
