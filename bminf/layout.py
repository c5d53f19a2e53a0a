"""Where each tensor of a block lies in its blob: names, shapes, strides and dtypes -> byte offsets.

One contiguous range holds a whole block, so that it is moved by one transfer. A tensor keeps its
strides and, where its device stays the same, its address modulo 64: the CPU's fp32 matrix-vector
product gives other last bits for another alignment. Tensors that overlap in their source (tied
weights, views of one buffer) overlap in the blob alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import mul

import torch

Chunk = tuple[str, torch.Tensor] | tuple[str, torch.Tensor, int]
"""A tensor by its name; or some rows of it, and the index of the first, so that no copy of the
whole tensor is ever needed."""

ADDRESS_MODULUS = 64  # what a kept address keeps: one cache line, the widest CPU vector
DEFAULT_ALIGNMENT = 256  # where the address is ours to choose: what CUDA's allocator gives at least


@dataclass(frozen=True)
class TensorSpec:
    """Shape, strides and dtype of one tensor, and where its bytes start in their source.

    start: address in bytes; None for a tensor whose bytes are not there yet (meta device).
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    start: int | None = None

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorSpec:
        start = None if tensor.is_meta else tensor.data_ptr()
        return cls(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, start)

    @property
    def nbytes(self) -> int:
        """From the first element to the end of the last, the gaps of the strides included."""
        return span_elements(self.shape, self.stride) * self.dtype.itemsize


def span_elements(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Elements from the first to the last, the gaps of the strides included."""
    if 0 in shape:
        return 0
    span: int = 1 + sum(map(mul, shape, stride)) - sum(stride)
    return span


def specs_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, TensorSpec]:
    """The spec of each tensor. One on the meta device that has several names gets an address of its
    own, by which it is known again: farther from any other than a tensor can be long."""
    counts = Counter(id(tensor) for tensor in tensors.values() if tensor.is_meta)
    specs = {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if counts[id(tensor)] > 1:
            specs[name] = replace(specs[name], start=id(tensor) << 60)
    return specs


@dataclass(frozen=True)
class ModuleBlock:
    """A module that moves as one. list_name: the list it stands in, "" for none."""

    name: str
    list_name: str


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Where a module holds a tensor: `module._parameters[key]` or `module._buffers[key]`."""

    module: torch.nn.Module
    key: str
    is_parameter: bool

    @property
    def holder(self) -> dict[str, torch.Tensor | None]:
        return self.module._parameters if self.is_parameter else self.module._buffers  # type: ignore[return-value]

    @property
    def is_listed(self) -> bool:
        """Whether the module computes with a list of its own beside its parameters."""
        return isinstance(self.module, torch.nn.RNNBase)

    def get(self) -> torch.Tensor | None:
        return self.holder.get(self.key)

    def set(self, tensor: torch.Tensor) -> None:
        self.holder[self.key] = tensor
        if self.is_listed:
            setattr(self.module, self.key, tensor)  # this keeps the list up


def tensors_of(module: torch.nn.Module) -> list[tuple[str, TensorPlace, torch.Tensor]]:
    """(name, place, tensor) of every parameter and buffer below `module`, shared ones each time."""
    return [
        (
            f"{path}.{key}" if path else key,
            TensorPlace(child, key, key in child._parameters),
            tensor,
        )
        for path, child in module.named_modules(remove_duplicate=False)
        for key, tensor in [*child._parameters.items(), *child._buffers.items()]
        if tensor is not None
    ]


@dataclass(frozen=True)
class Layout:
    """Offsets of named tensors in one blob, which must itself start at a multiple of 64.

    nbytes: of the tensors, overlaps once: what a plan counts.
    extent: bytes from the beginning of the blob to its end, with the few that alignment costs.
    """

    specs: Mapping[str, TensorSpec]
    offsets: Mapping[str, int]
    nbytes: int
    extent: int

    @classmethod
    def of(cls, specs: Mapping[str, TensorSpec], keep_addresses: bool = True) -> Layout:
        """Lay the tensors out one after another, in the order given.

        keep_addresses: True keeps each source address modulo 64; False aligns each to 256, as a
        fresh tensor on another device would be.
        """
        offsets: dict[str, int] = {}
        nbytes = end = 0
        for start, names in _regions(specs):
            if keep_addresses and start is not None:
                base = end + (start - end) % ADDRESS_MODULUS
            else:
                base = -(-end // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT
            for name in names:
                offsets[name] = base + (specs[name].start or 0) - (start or 0)
                end = max(end, offsets[name] + specs[name].nbytes)
            nbytes += end - base
        return cls(specs, offsets, nbytes, end)

    def view(self, buffer: torch.Tensor, name: str) -> torch.Tensor:
        """The tensor `name` as a view into `buffer`; the same name gives the same memory."""
        spec, offset = self.specs[name], self.offsets[name]
        data = buffer[offset : offset + spec.nbytes]
        if data.device.type == "cpu":
            # A storage of its own, so that saving one tensor does not save the whole blob.
            data = torch.frombuffer(data.numpy(), dtype=spec.dtype) if spec.nbytes else data
        return data.view(spec.dtype).as_strided(spec.shape, spec.stride)

    def span(self, name: str) -> tuple[int, int]:
        """Where the bytes of the tensor `name` begin and end."""
        return self.offsets[name], self.offsets[name] + self.specs[name].nbytes

    def fill(self, buffer: torch.Tensor, tensors: Iterable[Chunk]) -> None:
        """Copy named tensors, in any order and one at a time, to their places in `buffer`.

        Raises KeyError for a name that is not in the layout.
        """
        for name, tensor, *first_row in tensors:
            target = self.view(buffer, name)
            if first_row:
                target = target.narrow(0, first_row[0], tensor.shape[0])
            if tensor.stride() == target.stride() and not target.is_contiguous():
                # Element by element as stored: also right for strides with gaps and of 0.
                target, tensor = _stored(target), _stored(tensor)
            target.copy_(tensor.detach())

    def bind(self, module: torch.nn.Module, buffer: torch.Tensor) -> None:
        """Put views into `buffer` in place of the tensors of `module` that are laid out here; one
        that has several names stays one."""
        renewed: dict[int, torch.Tensor] = {}
        for name, place, tensor in tensors_of(module):
            if name in self.specs:
                view = self.view(buffer, name)
                if place.is_parameter:
                    view = torch.nn.Parameter(view, requires_grad=tensor.requires_grad)
                place.set(renewed.setdefault(id(tensor), view))


def _stored(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().as_strided((span_elements(tensor.shape, tensor.stride()),), (1,))


def _regions(specs: Mapping[str, TensorSpec]) -> Iterator[tuple[int | None, list[str]]]:
    """(start, names) of runs of overlapping tensors, in the order of their first names.

    The order of the addresses would differ between blocks that are otherwise alike, and with it
    the padding. A tensor with no address is its own run.
    """
    located = {name: spec for name, spec in specs.items() if spec.start is not None}
    runs = {name: run for run in overlapping(located) for name in run[1]}
    seen: set[str] = set()
    for name in specs:
        if name not in seen:
            start, names = runs.get(name, (None, [name]))
            seen.update(names)
            yield start, names


def overlapping(specs: Mapping[str, TensorSpec]) -> list[tuple[int, list[str]]]:
    """(start, names) of each largest run of tensors whose byte ranges overlap, by address."""
    runs: list[tuple[int, list[str]]] = []
    end = 0
    for name, spec in sorted(specs.items(), key=lambda item: item[1].start or 0):
        start = spec.start or 0
        if not runs or start >= end:
            runs.append((start, []))
            end = start
        runs[-1][1].append(name)
        end = max(end, start + spec.nbytes)
    return runs
