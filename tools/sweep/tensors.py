"""Tensors inside what a model returns or holds, and whether they are the same bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch


def tensors_in(value: Any, name: str = "output") -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of each tensor in nested outputs; caches and other objects are passed over."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors_in(item, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from tensors_in(item, f"{name}.{number}")
    elif is_dataclass(value) and not isinstance(value, type):
        for item in fields(value):
            yield from tensors_in(getattr(value, item.name, None), f"{name}.{item.name}")


def difference(given: Any, expected: Any) -> str | None:
    """What differs first between two outputs, in words; None where all bits are the same."""
    ours, theirs = dict(tensors_in(given)), dict(tensors_in(expected))
    if ours.keys() != theirs.keys():
        return f"tensors {sorted(ours)} instead of {sorted(theirs)}"
    for name, tensor in theirs.items():
        if (what := _differs(ours[name], tensor)) is not None:
            return f"{name} {what}"
    return None


def _differs(given: torch.Tensor, expected: torch.Tensor) -> str | None:
    if (given.shape, given.dtype) != (expected.shape, expected.dtype):
        return (
            f"is {given.dtype} of {tuple(given.shape)} instead of {expected.dtype} "
            f"of {tuple(expected.shape)}"
        )
    if torch.equal(given, expected):
        return None
    if given.is_floating_point() or given.is_complex():
        same = (given == expected) | (given.isnan() & expected.isnan())
    else:
        same = given == expected
    wrong = int((~same).sum())
    return f"differs in {wrong} of {same.numel()} values" if wrong else None


def held_bytes(model: torch.nn.Module) -> int:
    """Bytes of parameters, buffers, and tensors in attributes, lists and dicts of modules; those
    that lie in the same memory count once."""
    attributes = [vars(module) for module in model.modules()]
    kept = [t for some in attributes for name, t in tensors_in(some)]
    spans = sorted(
        (tensor.data_ptr(), tensor.data_ptr() + _span_bytes(tensor))
        for tensor in [*model.parameters(), *model.buffers(), *kept]
        if tensor.numel()
    )
    total = end = 0
    for first, last in spans:
        total += max(0, last - max(first, end))
        end = max(end, last)
    return total


def _span_bytes(tensor: torch.Tensor) -> int:
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return (1 + sum((size - 1) * stride for size, stride in steps)) * tensor.element_size()
