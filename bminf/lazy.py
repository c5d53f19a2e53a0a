"""A tensor whose bytes are elsewhere: it knows its shape and fetches its values when asked.

Model code may read the weight of a streamed block, or of a quantised linear, at any time, not only
while the block runs. A placeholder of zeros or NaN would then give a wrong answer or a strange
error; this one gives the right one, slowly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from bminf.errors import UnsupportedModelError
from bminf.tracing import tracer_at_work

UNWRAP_FIRST = (
    "change weights, or merge adapters, before wrapping, or call bminf.unwrap(model) first"
)


class LazyTensor(torch.Tensor):
    """A tensor without storage that calls `read()` for its values in every operation.

    read: returns the real tensor, of the same shape, dtype and device.
    like: any tensor with the metadata wanted (a meta tensor will do); device overrides its own.
    is_parameter: whether isinstance(tensor, torch.nn.Parameter) shall hold.
    advice: what to do instead, for the errors.

    Metadata (shape, dtype, device, numel, requires_grad) costs nothing. Writing raises
    UnsupportedModelError, because the bytes written would be lost; so does asking for the memory
    itself, because there is none.
    """

    _read: Callable[[], torch.Tensor]
    _advice: str

    @staticmethod
    def __new__(
        cls,
        read: Callable[[], torch.Tensor],
        like: torch.Tensor,
        device: torch.device | None = None,
        is_parameter: bool = False,
        advice: str = UNWRAP_FIRST,
    ) -> LazyTensor:
        tensor: LazyTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            like.shape,
            strides=like.stride(),
            dtype=like.dtype,
            device=device or like.device,
            requires_grad=like.requires_grad,
        )
        tensor._read = read
        tensor._is_param = is_parameter
        tensor._advice = advice
        # C++ code that goes for the memory itself (DLPack, storages) would find a null pointer.
        torch._C._set_throw_on_mutable_data_ptr(tensor)
        return tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Everything is set in __new__."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = {
            argument: args[place] if place < len(args) else kwargs.get(argument.name)
            for place, argument in enumerate(func._schema.arguments)
        }
        lazy = {a: value for a, value in given.items() if _holds_lazy(value)}
        for argument, value in lazy.items():
            if argument.alias_info and argument.alias_info.is_write:
                raise _first_lazy(value)._refused(
                    f"{func} writes to a weight that is streamed or packed, where new values would "
                    "be lost"
                )
        if _returns_view(func):
            # Seen whole from inside another dispatch: such as .to(dtype), which returns a view only
            # where there is nothing to convert. Its parts tell.
            parts = func.decompose(*args, **kwargs)
            return _lazy_views(func, args, kwargs) if parts is NotImplemented else parts
        return func(*_read_all(args), **_read_all(kwargs))

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        raise self._refused(
            "the data of a weight that is streamed or packed cannot be set: the new values would "
            "be lost"
        )

    def fetch(self) -> torch.Tensor:
        """The values, as an ordinary tensor without a history."""
        return self._read().detach()

    # ---- the values, for people and for other libraries --------------------------------------

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return str(self._real_copy().__repr__(**options))

    def __format__(self, spec: str) -> str:
        return format(self.fetch(), spec)

    def numpy(self, *, force: bool = False) -> Any:
        return self.fetch().numpy(force=force)

    def tolist(self) -> Any:
        return self.fetch().tolist()

    def __dlpack__(self, **options: Any) -> Any:
        """Of a copy: the bytes that a slot holds are others soon."""
        return self.fetch().clone().__dlpack__(**options)

    # ---- what asks for the memory itself -------------------------------------------------------

    def data_ptr(self) -> int:
        raise self._no_memory()

    def untyped_storage(self) -> torch.UntypedStorage:
        raise self._no_memory()

    def storage(self) -> torch.TypedStorage:
        raise self._no_memory()

    def _typed_storage(self) -> torch.TypedStorage:
        raise self._no_memory()

    def apply_(self, function: Callable[[Any], Any]) -> torch.Tensor:
        raise self._no_memory()

    def share_memory_(self) -> torch.Tensor:
        raise self._no_memory()

    def is_shared(self) -> bool:
        return False

    @property
    def __cuda_array_interface__(self) -> Any:
        raise self._no_memory()

    def _no_memory(self) -> UnsupportedModelError:
        if (tracer := tracer_at_work()) is not None:
            return self._refused(f"{tracer} cannot record a weight that is streamed or packed")
        return self._refused(
            "a weight that is streamed or packed has no memory of its own: no address, and no "
            "storage that could be shared or exported; read it with .clone()"
        )

    def _refused(self, what: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{what}; {self._advice}")

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        real = self._real_copy()
        memo[id(self)] = real
        return real

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._real_copy().__reduce_ex__(protocol)

    def _real_copy(self) -> torch.Tensor:
        real = self.fetch().clone()
        if isinstance(self, torch.nn.Parameter):
            return torch.nn.Parameter(real, requires_grad=self.requires_grad)
        return real


def _holds_lazy(value: Any) -> bool:
    items = value if isinstance(value, list | tuple) else [value]
    return any(isinstance(item, LazyTensor) for item in items)


def _first_lazy(given: Any) -> LazyTensor:
    return next(item for item in tree_leaves(given) if isinstance(item, LazyTensor))


def _read_all(given: Any) -> Any:
    return tree_map_only(LazyTensor, lambda tensor: tensor._read(), given)


def _returns_view(func: Any) -> bool:
    """Whether the operation returns other names for the memory of its arguments."""
    return any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)


def _lazy_views(func: Any, args: Any, kwargs: Any) -> Any:
    """What `func` returns, lazy again: a write to a view is a write to the weight."""

    def compute() -> Any:
        return func(*_read_all(args), **_read_all(kwargs))

    # The shapes of views follow from shapes alone, so nothing is fetched for them.
    shapes = func(
        *tree_map_only(LazyTensor, _meta, args), **tree_map_only(LazyTensor, _meta, kwargs)
    )
    base = _first_lazy((args, kwargs))
    if isinstance(shapes, torch.Tensor):
        return LazyTensor(compute, shapes, base.device, advice=base._advice)
    return type(shapes)(
        LazyTensor(lambda number=number: compute()[number], item, base.device, advice=base._advice)
        for number, item in enumerate(shapes)
    )


def _meta(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
