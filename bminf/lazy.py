"""A tensor whose bytes are elsewhere: it has a shape, and fetches its values when they are used.

Model code may read the weight of a streamed block, or of a quantized linear, at any time, not only
while the block runs. A placeholder of zeros or NaN would then give a wrong result or an unclear
error; this one gives the right result, slowly.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from bminf.errors import UnsupportedModelError
from bminf.tracing import active_tracer

PACKED_IS_FROZEN = (
    "a packed weight is frozen: change weights, or merge adapters, before wrapping (a model that "
    "changes them in its first pass: run it once before), or wrap with quantization=False"
)


class LazyTensor(torch.Tensor):
    """A tensor without storage that calls `read()` for its values in every operation.

    read: returns the real tensor, of the same shape, dtype and device.
    like: any tensor with the same metadata (such as a meta tensor); device overrides its own.
    is_parameter: whether isinstance(tensor, torch.nn.Parameter) is true.
    write: stores new values, of the same shape and dtype; None where that is impossible, as for a
        packed weight. Writing in place, to the tensor or to a view of it, then raises.

    Metadata (shape, dtype, device, numel, requires_grad) costs nothing. Access to the memory itself
    raises UnsupportedModelError, because there is none.
    """

    _read: Callable[[], torch.Tensor]
    _write: Callable[[torch.Tensor], object] | None

    @staticmethod
    def __new__(
        cls,
        read: Callable[[], torch.Tensor],
        like: torch.Tensor | None = None,
        device: torch.device | None = None,
        is_parameter: bool = False,
        write: Callable[[torch.Tensor], object] | None = None,
        requires_grad: bool = True,
    ) -> Any:
        if isinstance(read, torch.Tensor):  # type(parameter)(data, requires_grad), as others do
            return torch.nn.Parameter(read, requires_grad if like is None else bool(like))
        assert like is not None
        tensor: LazyTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            like.shape,
            strides=like.stride(),
            dtype=like.dtype,
            device=device or like.device,
            requires_grad=like.requires_grad,
        )
        tensor._read, tensor._write = read, write
        tensor._is_param = is_parameter
        # C++ code that accesses the memory itself (DLPack, storages) would find a null pointer.
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
            argument: args[index] if index < len(args) else kwargs.get(argument.name)
            for index, argument in enumerate(func._schema.arguments)
        }
        written = [v for a, v in given.items() if a.alias_info and a.alias_info.is_write]
        if any(_holds_lazy(value) for value in written):
            return _write_through(func, args, kwargs, written)
        if _returns_view(func):
            # Composite operations inside another dispatch, such as .to(dtype), return a view only
            # where there is nothing to convert; their parts show which it is.
            parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
            with torch.inference_mode(False):  # an inference tensor cannot be a view of this one
                return _lazy_views(func, args, kwargs)
        return _call(func, args, kwargs)

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        if self._write is None:
            raise _not_writable("setting the data of a weight")
        if _kind_of(value) != _kind_of(self):
            raise UnsupportedModelError(
                f"a streamed weight ({tuple(self.shape)}, {self.dtype}, on {self.device}, strides "
                f"{self.stride()}) cannot become {tuple(value.shape)}, {value.dtype}, on "
                f"{value.device}, strides {value.stride()}; "
                "do that before wrapping, or call bminf.unwrap(model) first"
            )
        self._write(value.fetch() if isinstance(value, LazyTensor) else value.detach())

    def fetch(self) -> torch.Tensor:
        """The values, as an ordinary tensor without a history."""
        return self._read().detach()

    # ---- values, for printing and for other libraries -----------------------------------------

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return str(self._real_copy().__repr__(**options))

    def __format__(self, spec: str) -> str:
        return format(self.fetch(), spec)

    def numpy(self, *, force: bool = False) -> Any:
        """Read-only: writes to the array would not reach the weight."""
        array = self.fetch().numpy(force=force)
        array.flags.writeable = False
        return array

    def tolist(self) -> Any:
        return self.fetch().tolist()

    def __dlpack__(self, **options: Any) -> Any:
        """Of a copy: the bytes of a slot are overwritten soon."""
        return self.fetch().clone().__dlpack__(**options)

    # ---- access to the memory itself -----------------------------------------------------------

    def _refuse_memory(self, *_: Any, **__: Any) -> Any:
        if (tracer := active_tracer()) is not None:
            raise UnsupportedModelError(
                f"{tracer} cannot record a weight that is streamed or packed; record the model "
                "before wrapping, or call bminf.unwrap(model) first"
            )
        raise UnsupportedModelError(
            "a weight that is streamed or packed has no memory of its own: no address, and no "
            "storage that could be shared or exported; read it with .clone(), or call "
            "bminf.unwrap(model) first"
        )

    data_ptr = untyped_storage = storage = _typed_storage = _refuse_memory
    apply_ = share_memory_ = _refuse_memory
    __cuda_array_interface__ = property(_refuse_memory)

    def is_shared(self) -> bool:
        return False

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


def _kind_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    """The metadata in which new data of a weight has to equal the old."""
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim())
    is_last = channels_last is not None and tensor.is_contiguous(memory_format=channels_last)
    is_last = is_last and not tensor.is_contiguous()  # where a size is 1 it may be both
    return tensor.shape, tensor.dtype, tensor.device, is_last


def _holds_lazy(value: Any) -> bool:
    items = value if isinstance(value, list | tuple) else [value]
    return any(isinstance(item, LazyTensor) for item in items)


def _call(
    func: Any, args: Any, kwargs: Any, read: Callable[[LazyTensor], Any] = lambda t: t._read()
) -> Any:
    """Call `func` with what `read` gives for each lazy tensor."""
    args, kwargs = tree_map_only(LazyTensor, read, (args, kwargs))
    return func(*args, **kwargs)


def _write_through(func: Any, args: Any, kwargs: Any, written: list[Any]) -> Any:
    """Run `func` on copies of the tensors that it writes to, and store the new values."""
    targets = {id(t): t for t in tree_leaves(written) if isinstance(t, LazyTensor)}
    if any(target._write is None for target in targets.values()):
        raise _not_writable(str(func))
    copies = {key: _copy_of(target) for key, target in targets.items()}
    shapes = {key: (copy.shape, copy.stride()) for key, copy in copies.items()}
    result = _call(func, args, kwargs, lambda t: copies[id(t)] if id(t) in copies else t._read())
    if any(shapes[key] != (copy.shape, copy.stride()) for key, copy in copies.items()):
        raise UnsupportedModelError(
            f"{func} changes the shape of a streamed weight; do that before wrapping, "
            "or call bminf.unwrap(model) first"
        )
    for key, target in targets.items():
        assert target._write is not None
        target._write(copies[key])
    lazy = {id(copy): targets[key] for key, copy in copies.items()}
    return tree_map_only(torch.Tensor, lambda tensor: lazy.get(id(tensor), tensor), result)


def _copy_of(tensor: LazyTensor) -> torch.Tensor:
    """A copy of the values with the same strides: clone() would close gaps."""
    value = tensor.fetch()
    return torch.empty_strided(
        value.shape, value.stride(), dtype=value.dtype, device=value.device
    ).copy_(value)


def _not_writable(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{what} changes values that are computed from a quantized weight: they would be lost; "
        f"{PACKED_IS_FROZEN}"
    )


def _returns_view(func: Any) -> bool:
    """Whether the operation returns views of its arguments."""
    return any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)


def _lazy_views(func: Any, args: Any, kwargs: Any) -> Any:
    """The results of `func` as lazy tensors: a write to a view is a write to the weight."""
    base = next(item for item in tree_leaves((args, kwargs)) if _holds_lazy(item))

    def lazy(shape: torch.Tensor, pick: Callable[[Any], torch.Tensor]) -> LazyTensor:
        def write(value: torch.Tensor) -> None:
            whole = _copy_of(base)
            views = _call(func, args, kwargs, lambda t: whole if t is base else t._read())
            pick(views).copy_(value)
            base._write(whole)

        is_kept = base._write is not None
        return LazyTensor(
            lambda: pick(_call(func, args, kwargs)), shape, base.device,
            write=write if is_kept else None,
        )  # fmt: skip

    # The shapes of views follow from shapes alone, so nothing is fetched for these.
    shapes = _call(func, args, kwargs, _meta)
    if isinstance(shapes, torch.Tensor):
        return lazy(shapes, lambda view: view)
    return type(shapes)([lazy(shape, itemgetter(i)) for i, shape in enumerate(shapes)])


def _meta(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
