"""What the names and persistent ids in a file of torch.save mean, and that all others mean nothing.

Source: torch/_utils.py, torch/_tensor.py, torch/storage.py, torch/serialization.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeGuard

import torch

from bminf.checkpoint.binary_file import BinaryFile
from bminf.checkpoint.pickled import Function, Placeholder, Stream, items_of, unpickle
from bminf.checkpoint.stored import InFile

STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "UntypedStorage": torch.uint8,
}
# Their sizes are needed to find what lies behind them; tensors of them are not read.
_QUANTIZED_STORAGE_DTYPES = {
    "QInt8Storage": torch.qint8,
    "QUInt8Storage": torch.quint8,
    "QInt32Storage": torch.qint32,
    "QUInt4x2Storage": torch.quint4x2,
    "QUInt2x4Storage": torch.quint2x4,
}
_DTYPES = {
    f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)
}
# Whose values are those of the tensor that they are made of, whatever attributes they carry. Those
# of another subclass may be codes of its own.
_TENSOR_CLASSES = {
    "torch.Tensor",
    "torch._tensor.Tensor",
    "torch.nn.parameter.Parameter",
    "torch.nn.parameter.Buffer",
}

_MAX_DIMENSIONS = 64  # torch's own kernels take no more


@dataclass(frozen=True)
class StorageId:
    """What a persistent id says of a storage; num_elements and view count elements of dtype.

    view: (key, first element, number of elements) of a storage that is a part of this one.
    """

    storage_class: str
    dtype: torch.dtype
    key: str
    num_elements: int
    view: tuple[str, int, int] | None

    @property
    def nbytes(self) -> int:
        return self.num_elements * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class _Storage(Placeholder):
    """The bytes that one or several tensors lie in; met by itself it is no tensor."""

    key: str
    offset: int
    nbytes: int
    dtype: torch.dtype


def load(file: BinaryFile, stream: Stream, extents: Mapping[str, tuple[int, int]]) -> object:
    """The object of one pickle in `file`, an InFile in the place of each tensor.

    extents: key -> (offset in the file, number of bytes) of each storage.
    Raises ValueError where the pickle, or a tensor in it, is damaged.
    """
    meaning = _Meaning(file, extents)
    return unpickle(stream, _DTYPES, meaning.functions(), meaning.storage)


def storages_in(file: BinaryFile, stream: Stream) -> dict[str, StorageId]:
    """Key -> storage, of those that the object of one pickle lies in.   Raises as load()."""
    meaning = _Meaning(file, None)
    unpickle(stream, _DTYPES, meaning.functions(), meaning.storage)
    return meaning.storages


class _Meaning:
    """extents: None where the offsets do not matter, because only the storages are looked for."""

    def __init__(self, file: BinaryFile, extents: Mapping[str, tuple[int, int]] | None) -> None:
        self._file, self._extents = file, extents
        self.storages: dict[str, StorageId] = {}

    def functions(self) -> dict[str, Function]:
        return {
            **_FUNCTIONS,
            **self._tensors(),
            "torch._tensor._rebuild_from_type": self._with_attributes,
            "torch._tensor._rebuild_from_type_v2": self._with_attributes,
        }

    def _tensors(self) -> dict[str, Function]:
        # Made anew each time: kept here, they would be a cycle, and the file would stay open.
        return {
            "torch._utils._rebuild_tensor": self._tensor,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_tensor_v3": self._tensor_of_dtype,
        }

    def storage(self, persistent_id: object) -> Placeholder:
        if type(persistent_id) is tuple and persistent_id[:1] == ("module",):
            return Placeholder("a module saved whole")
        found = _storage_id(persistent_id)
        self.storages.setdefault(found.key, found)
        nbytes, itemsize = found.nbytes, found.dtype.itemsize
        offset = 0 if self._extents is None else _offset_of(found.key, nbytes, self._extents)
        name = f"torch.{found.storage_class}()"
        if found.view is None:
            return _Storage(name, found.key, offset, nbytes, found.dtype)
        key, first, num_elements = found.view
        if first + num_elements > found.num_elements:
            raise ValueError(f"the storage {key!r} reaches beyond {found.key!r}, a part of which")
        return _Storage(name, key, offset + first * itemsize, num_elements * itemsize, found.dtype)

    def _tensor_of_dtype(self, arguments: tuple[object, ...]) -> object:
        """(storage of bytes, and as for _tensor() up to the hooks, dtype[, the same bits])."""
        return self._tensor((*arguments[:6], *arguments[7:8]), arguments[6])

    def _with_attributes(self, arguments: tuple[object, ...]) -> object:
        """(function, class, its arguments, attributes), the last of which go."""
        function, kind, inner = arguments[:3]
        if not (isinstance(function, Placeholder) and isinstance(kind, Placeholder)):
            raise ValueError("a tensor with attributes of no function or no class")
        rebuild = self._tensors().get(function.name)  # which does not come back here, to any depth
        if kind.name not in _TENSOR_CLASSES or rebuild is None or type(inner) is not tuple:
            return kind.made()
        return rebuild(inner)

    def _tensor(self, arguments: tuple[object, ...], dtype: object = None) -> object:
        """(storage, first element, shape, stride, requires_grad, hooks[, conjugate or negative]).

        dtype: None is that of the storage.
        """
        storage, first, shape, stride = arguments[:4]
        if not isinstance(storage, _Storage):
            return Placeholder("a tensor with no storage in the file")
        if any(arguments[6:7]):
            return Placeholder("a conjugate or negative tensor")
        dtype = storage.dtype if dtype is None else dtype
        if not isinstance(dtype, torch.dtype):
            return Placeholder("a tensor of a dtype that this torch does not have")
        if dtype in _QUANTIZED_STORAGE_DTYPES.values():
            return Placeholder("a tensor of a quantized dtype")
        if not (_is_size(first) and _are_sizes(shape) and _are_sizes(stride)):
            raise ValueError("a tensor with an impossible shape, stride or offset")
        if len(shape) != len(stride):
            raise ValueError(f"a tensor with {len(shape)} dimensions and {len(stride)} strides")
        start = first * dtype.itemsize
        tensor = InFile(self._file, storage.offset + start, shape, stride, dtype, storage.key)
        if start + tensor.span_bytes > storage.nbytes:
            raise ValueError(f"a tensor of shape {shape} reaches beyond its storage")
        if math.prod(shape) * dtype.itemsize > self._file.nbytes:
            # Strides of 0 can make any size of a few bytes; no weight is saved so.
            raise ValueError(f"a tensor of shape {shape}, larger than the whole file")
        return tensor


def _offset_of(key: str, nbytes: int, extents: Mapping[str, tuple[int, int]]) -> int:
    offset, held = extents.get(key, (0, None))
    if held != nbytes:
        has = "is missing" if held is None else f"has {held}"
        raise ValueError(f"its storage {key!r} should have {nbytes} bytes, but {has}")
    return offset


def _storage_id(persistent_id: object) -> StorageId:
    if type(persistent_id) is not tuple or len(persistent_id) not in (5, 6):
        raise ValueError("a persistent id that is no storage")
    word, named, key, _, num_elements, view = (*persistent_id, None)[:6]
    storage_class = named.name.rpartition(".")[2] if isinstance(named, Placeholder) else ""
    dtype = {**STORAGE_DTYPES, **_QUANTIZED_STORAGE_DTYPES}.get(storage_class)
    if word != "storage" or dtype is None:
        raise ValueError(f"a storage of the unknown class {storage_class!r}")
    if type(key) is not str or not _is_size(num_elements):
        raise ValueError("a storage with an impossible key or size")
    return StorageId(storage_class, dtype, key, num_elements, _view(view))


def _view(view: object) -> tuple[str, int, int] | None:
    if view is None:
        return None
    if type(view) is tuple and len(view) == 3:
        key, first, num_elements = view
        if type(key) is str and _is_size(first) and _is_size(num_elements):
            return key, first, num_elements
    raise ValueError("a part of a storage that is not described")


def _is_size(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 2**60


def _are_sizes(values: object) -> TypeGuard[tuple[int, ...]]:
    if type(values) is not tuple or len(values) > _MAX_DIMENSIONS:
        return False
    return all([_is_size(value) for value in values])


def _first(arguments: tuple[object, ...]) -> object:
    """A parameter is the tensor it holds; requires_grad, hooks and Python attributes go."""
    if not arguments:
        raise ValueError("a parameter with no tensor")
    return arguments[0]


def _of_another_device(arguments: tuple[object, ...]) -> object:
    """(tensor on the CPU, dtype, device, requires_grad), as devices without storages are saved."""
    tensor, dtype = arguments[:2]
    is_same = isinstance(tensor, InFile) and tensor.dtype == dtype
    return tensor if is_same else Placeholder("a tensor that was on another device")


def _device(arguments: tuple[object, ...]) -> object:
    if any(type(argument) not in (str, int) for argument in arguments):
        raise ValueError("a torch.device of something else than its name")
    return ":".join(str(argument) for argument in arguments)


_FUNCTIONS: dict[str, Function] = {
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _of_another_device,
    "torch.Size": lambda arguments: tuple(items_of(arguments)),
    "torch.device": _device,
}
