"""What the kernel benchmark works on: weights in several copies, and the right results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from benchmarks.calls import Call, num_sets, relative_error
from bminf.quantization.packed import (
    INT4,
    INT8,
    Format,
    PackedWeight,
    dequantize,
    int8_rows,
    pack,
)

FORMATS = {
    "int8": INT8,
    "int8-g128": Format(8, 128),
    "int4": INT4,  # groups of 16
    "int4-g32-minimum": Format(4, 32, has_minimum=True),
    "int4-g64": Format(4, 64),
    "int4-g128": Format(4, 128),
    "int4-row": Format(4),
}
_SLICE_ELEMENTS = 2**26  # of a weight in float64 at a time


@dataclass(frozen=True)
class Setup:
    """What all calls of a run have in common.

    dtype: of activations.   shapes: (out_features, in_features) of weights.   rows: of activations,
    in ascending order.   rotate_bytes: of other inputs are read before a set comes again.
    """

    device: torch.device
    dtype: torch.dtype
    shapes: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]
    formats: tuple[str, ...]
    rotate_bytes: int
    copy_bytes: int


@dataclass(frozen=True)
class Group:
    """Calls that are measured by turns. calls: makes them, with their inputs."""

    name: str
    device: torch.device
    calls: Callable[[], list[Call]]


class Packed:
    """A weight in one format, in as many copies as are rotated."""

    def __init__(self, weight: torch.Tensor, form: Format, rotate_bytes: int) -> None:
        packed = pack(weight, form)
        self.num_bytes = packed_bytes(packed)
        self.form = form
        self.copies = copies_of(packed, num_sets(self.num_bytes, rotate_bytes))

    def __getitem__(self, index: int) -> PackedWeight:
        return self.copies[index]

    def __len__(self) -> int:
        return len(self.copies)

    def dequantized(self) -> torch.Tensor:
        """(N, K) float32, in plain torch."""
        return dequantize(self.copies[0], torch.float32)


class Inputs:
    """A random weight of one shape and random activations, and all that is made of them, once."""

    def __init__(self, setup: Setup, shape: tuple[int, int]) -> None:
        self.setup = setup
        self.out_features, self.in_features = shape
        self._packed: dict[str, Packed] = {}
        self._plain: dict[torch.dtype, tuple[torch.Tensor, ...]] = {}
        self._expected: dict[str, torch.Tensor] = {}

    @cached_property
    def weight(self) -> torch.Tensor:
        """(N, K) float32."""
        shape = (self.out_features, self.in_features)
        return torch.randn(shape, device=self.setup.device).div_(self.in_features**0.5)

    @cached_property
    def x(self) -> torch.Tensor:
        """(most rows, K)."""
        shape = (max(self.setup.rows), self.in_features)
        return torch.randn(shape, device=self.setup.device).to(self.setup.dtype)

    def packed(self, name: str) -> Packed:
        """The weight in FORMATS[name]."""
        if name not in self._packed:
            self._packed[name] = Packed(self.weight, FORMATS[name], self.setup.rotate_bytes)
        return self._packed[name]

    def plain(self, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """Copies of the weight as it is, for the products of others."""
        if dtype not in self._plain:
            weight = self.weight.to(dtype)
            num_copies = num_sets(weight.nbytes, self.setup.rotate_bytes)
            self._plain[dtype] = clones(weight, num_copies)
        return self._plain[dtype]

    def expected(self, num_rows: int, format: str | None, rounds_x: bool = False) -> torch.Tensor:
        """(num_rows, N) float64: the right product with a format, or with the weight as it is.

        rounds_x: each token of x is rounded to 8 bits first.
        """
        key = f"{format} {rounds_x}"
        if key not in self._expected:
            weight = self.weight if format is None else self.packed(format).dequantized()
            x = rounded(self.x) if rounds_x else self.x.double()
            self._expected[key] = product(x, weight)
        return self._expected[key][:num_rows]

    def error(
        self, num_rows: int, format: str | None, rounds_x: bool = False
    ) -> Callable[[torch.Tensor], float]:
        """The relative error of a result against `expected`, which is computed when needed."""
        return lambda value: relative_error(value, self.expected(num_rows, format, rounds_x))

    def call(
        self,
        op: str,
        num_rows: int,
        variant: str,
        run: Callable[[int], torch.Tensor],
        num_sets: int,
        error: Callable[[torch.Tensor], float],
        bound: float,
        weight_bytes: int,
        num_weights: int = 1,
        **details: Any,
    ) -> Call:
        """A product of `num_rows` rows with `num_weights` weights at once, `weight_bytes` in all.

        The bytes it moves are those of the weights, of the activations and of the result.
        """
        num_elements = num_rows * (self.in_features + self.out_features)
        return Call(
            name=f"{op} {self.out_features}x{self.in_features} M={num_rows}: {variant}",
            run=run,
            num_sets=num_sets,
            error=error,
            bound=bound,
            num_bytes=weight_bytes + num_elements * self.x.element_size(),
            num_ops=2 * num_rows * self.out_features * self.in_features * num_weights,
            details={
                "op": op,
                "variant": variant,
                "rows": num_rows,
                "out_features": self.out_features,
                "in_features": self.in_features,
                "weight_bytes": weight_bytes,
                **details,
            },
        )


def rounded(x: torch.Tensor) -> torch.Tensor:
    """x with each token rounded to 8 bits, in float64."""
    codes, scale = int8_rows(x)
    return codes.double() * scale.double().unsqueeze(-1)


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x W^T in float64, some rows of the weight at a time."""
    num_rows = max(1, _SLICE_ELEMENTS // weight.shape[1])
    return torch.cat([x @ rows.double().t() for rows in weight.split(num_rows)], dim=1)


def packed_bytes(packed: PackedWeight) -> int:
    """Codes, scales and minima: what a product with float activations has to read."""
    tensors = (packed.qweight, packed.scale, packed.minimum)
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def copies_of(packed: PackedWeight, count: int) -> list[PackedWeight]:
    """Equal weights at different addresses."""
    fields = [
        [field] * count if not isinstance(field, torch.Tensor) else clones(field, count)
        for field in packed
    ]
    return [PackedWeight(*each) for each in zip(*fields, strict=True)]


def clones(tensor: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    return tensor.expand(count, *tensor.shape).contiguous().unbind()
