"""The plan of a model whose experts stream by need: dense parts first, what is left is the pool.

An expert is used by k of E tokens, so of all that could stay it is worth the least a byte. Which of
them are in the pool is decided as they are wanted (pool.py), so the plan says only how many.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from bminf.layout import ModuleBlock
from bminf.offload.blob import Blobs
from bminf.offload.plan import Experts, Plan
from bminf.offload.pool import LEAST_SLOTS
from bminf.offload.routers import experts_per_token
from bminf.offload.start import plan_on


def are_worth_choosing(model: torch.nn.Module, blobs: Blobs) -> bool:
    """Whether a token leaves some experts out; where it takes all, they are as dense as others."""
    for name, stack in blobs.stacks.items():
        chosen = experts_per_token(model, name)
        if chosen is None or chosen < len(stack.experts):
            return True
    return False


def plan_by_need(
    model: torch.nn.Module,
    device_type: str,
    blocks: Iterable[ModuleBlock],
    blobs: Blobs,
    budget: int,
    uses: Mapping[str, float],
    unregistered_bytes: int = 0,
    *,
    host_bytes: int | None = None,
    **more: Any,
) -> Plan:
    """As plan_on(), where all does not fit.   blobs: with stacks.   more: see plan().

    The least are two slots of the largest expert, beside what the dense blocks need.
    """
    stacks = blobs.stacks
    slot_bytes = max(stack.slot_bytes for stack in stacks.values())
    number = sum(len(stack.experts) for stack in stacks.values())
    least_bytes = min(LEAST_SLOTS, number) * slot_bytes
    dense = plan_on(
        device_type, blocks, blobs, budget, uses, unregistered_bytes, host_bytes=host_bytes,
        pool_bytes=least_bytes, **more,
    )  # fmt: skip
    left = budget - dense.total_bytes
    sizes = [layout.nbytes for stack in stacks.values() for layout in stack.experts]
    experts = Experts(
        number=number,
        nbytes=sum(sizes),
        slot_bytes=slot_bytes,
        num_slots=min(number, left // slot_bytes),
        bytes_per_token=sum(_bytes_per_token(model, name, blobs) for name in stacks),
        on_disk=_on_disk(sizes, dense, host_bytes),
    )
    return replace(dense, experts=experts)


def idle_bytes(plan: Plan) -> int:
    """Of the experts of `plan`, those that one token leaves out."""
    return 0 if plan.experts is None else plan.experts.nbytes - plan.experts.bytes_per_token


def _bytes_per_token(model: torch.nn.Module, name: str, blobs: Blobs) -> int:
    """Of the experts that one token goes through in one module."""
    layouts = blobs.stacks[name].experts
    chosen = experts_per_token(model, name) or len(layouts)
    return min(chosen, len(layouts)) * max(layout.nbytes for layout in layouts)


def _on_disk(sizes: list[int], dense: Plan, host_bytes: int | None) -> tuple[int, ...]:
    """Numbers of the experts, the last ones, that host memory has no room for."""
    if host_bytes is None:
        return ()
    left = host_bytes - dense.host_bytes
    if sum(sizes) <= left:
        return ()
    left -= 2 * max(sizes)  # staging buffers
    for number, nbytes in enumerate(sizes):
        left -= nbytes
        if left < 0:
            return tuple(range(number, len(sizes)))
    return ()
