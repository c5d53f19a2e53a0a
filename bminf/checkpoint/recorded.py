"""What other code makes of tensors that are not read yet, recorded instead of computed.

A Recorded has a shape and a dtype, and no bytes. Operations on it cost nothing: their results are
Recorded again, and remember how to be computed. So a library that renames, joins and casts the
tensors of a checkpoint does so with all of them, and the loader then reads one at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from bminf.checkpoint.stored import Sliced, Stored, pieces, slice_of, strides_of
from bminf.errors import UnsupportedModelError

_ATEN = torch.ops.aten
_SAME_VALUES = (_ATEN.detach.default, _ATEN.alias.default, _ATEN.lift_fresh.default)
# Of one tensor, element by element: some rows of the result are the result of some rows.
_BY_ELEMENT = (_ATEN._to_copy.default, _ATEN.clone.default)
_STACK, _CAT = _ATEN.stack.default, _ATEN.cat.default


class Recorded(torch.Tensor):
    """A tensor on the CPU whose values are those of `stored`, and are not read yet.

    What returns no tensor, such as a comparison, is computed at once. Writing to it raises
    UnsupportedModelError.
    """

    stored: Stored

    @staticmethod
    def __new__(cls, stored: Stored) -> Recorded:
        tensor: Recorded = torch.Tensor._make_wrapper_subclass(
            cls,
            stored.shape,
            strides=_stride_of(stored),
            dtype=stored.dtype,
            device=torch.device("cpu"),
        )
        tensor.stored = stored
        torch._C._set_throw_on_mutable_data_ptr(tensor)  # C++ code would find a null pointer
        return tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Everything is set in __new__."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(a.alias_info and a.alias_info.is_write for a in func._schema.arguments):
            raise UnsupportedModelError(
                f"{func} writes to a weight that is not read yet; load this model with its own "
                "library, and give it to bminf.wrapper()"
            )
        if func in _SAME_VALUES:
            return Recorded(args[0].stored)
        if func is _ATEN.equal.default and type(args[0]) is type(args[1]) is Recorded:
            return _are_equal(args[0].stored, args[1].stored)
        operation = Operation(func, *tree_map_only(Recorded, _stored_of, (args, kwargs)))
        if not all("Tensor" in str(result.type) for result in func._schema.returns):
            return operation.run(_read)
        shapes = operation.run(_meta_of, torch.device("meta"))
        if isinstance(shapes, torch.Tensor):
            return Recorded(Computed.of(operation, shapes))
        computed = [Computed.of(operation, shape, i) for i, shape in enumerate(shapes)]
        return type(shapes)([Recorded(stored) for stored in computed])

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return f"Recorded({self.stored.where}, {tuple(self.shape)}, {self.dtype})"


@dataclass(frozen=True)
class Operation:
    """A call of an operator, with a Stored in place of each tensor that is not read."""

    function: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def run(self, tensor_of: Any, device: torch.device | None = None) -> Any:
        """Call it.   tensor_of: what each argument becomes.   device: of what it creates."""
        args, kwargs = tree_map(tensor_of, (self.args, dict(self.kwargs)))
        if device is not None and kwargs.get("device") is not None:
            kwargs["device"] = device
        with torch.no_grad():
            return self.function(*args, **kwargs)

    @property
    def sources(self) -> list[Stored]:
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if _is_stored(leaf)]


@dataclass(frozen=True)
class Computed(Sliced):
    """The result of an operation; the one of this index, if it has several."""

    operation: Operation
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    index: int | None = None

    @classmethod
    def of(cls, operation: Operation, like: torch.Tensor, index: int | None = None) -> Computed:
        """like: the result on the meta device."""
        return cls(operation, tuple(like.shape), like.stride(), like.dtype, index)

    @property
    def where(self) -> str:
        names = list(dict.fromkeys(source.where for source in self.operation.sources))
        return names[0] + (f" and {len(names) - 1} more" if names[1:] else "")

    @property
    def is_read_by_rows(self) -> bool:
        return bool(self.shape) and self._some(0, 0, 1) is not None

    def read(self) -> torch.Tensor:
        result = self.operation.run(_read)
        tensor: torch.Tensor = result if self.index is None else result[self.index]
        return tensor

    def _slice(self, axis: int, start: int, end: int) -> Stored:
        operation = self._some(axis, start, end)
        if operation is None:
            return InMemory(self.read().narrow(axis, start, end - start), self.where)
        return Computed.of(operation, operation.run(_meta_of, torch.device("meta")))

    def _some(self, axis: int, start: int, end: int) -> Operation | None:
        """What computes some rows or columns alone; None where nothing less than all does."""
        function, (given, *more) = self.operation.function, self.operation.args
        if function in _BY_ELEMENT:
            parts = _slices([given], axis, start, end)
            given = parts and parts[0]
        elif function in (_STACK, _CAT) and self.index is None:
            dim = (more[0] if more else self.operation.kwargs.get("dim", 0)) % len(self.shape)
            if function is _STACK and axis == dim == 0:
                given = given[start:end]  # one for each row
            else:
                is_apart = function is _CAT and axis != dim
                given = _slices(given, axis, start, end) if is_apart else None
        else:
            return None
        return None if given is None else replace(self.operation, args=(given, *more))


def _slices(parts: Sequence[Stored], axis: int, start: int, end: int) -> list[Stored] | None:
    """The same rows or columns of each of them; None where these are no less than all."""
    if axis == 0 and not all(part.is_read_by_rows for part in parts):
        return None
    return [slice_of(part, axis, start, end) for part in parts]


@dataclass(frozen=True)
class InMemory(Sliced):
    """A tensor that is read already."""

    tensor: torch.Tensor
    where: str = "a tensor"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def stride(self) -> tuple[int, ...]:
        return self.tensor.stride()

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def read(self) -> torch.Tensor:
        return self.tensor

    def _slice(self, axis: int, start: int, end: int) -> InMemory:
        return replace(self, tensor=self.tensor.narrow(axis, start, end - start))


def _are_equal(one: Stored, other: Stored) -> bool:
    """As torch.equal() says, some rows at a time: of tied weights that a file holds twice."""
    if one is other:
        return True
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return torch.equal(one.read(), other.read())
    pairs = zip(pieces(one), pieces(other), strict=True)
    return all(torch.equal(first, second) for (_, first), (_, second) in pairs)


def _stored_of(tensor: Recorded) -> Stored:
    return tensor.stored


def _is_stored(value: Any) -> bool:
    return hasattr(value, "read") and hasattr(value, "where")


def _read(value: Any) -> Any:
    return value.read() if _is_stored(value) else value


def _meta_of(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to("meta")
    if not _is_stored(value):
        return value
    return torch.empty_strided(value.shape, _stride_of(value), dtype=value.dtype, device="meta")


def _stride_of(stored: Stored) -> tuple[int, ...]:
    """Those of what it reads as; in C order where it does not say."""
    return getattr(stored, "stride", None) or strides_of(stored.shape)
