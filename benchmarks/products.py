"""Products of random activations and weights, to be checked and timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.harness import Call, relative_error
from bminf.quantization.packed import INT4, INT8, Format, PackedWeight, dequantize
from bminf.quantization.packing import int8_rows, pack

FORMATS = {
    "int8": INT8,
    "int8-g128": Format(8, 128),
    "int4": INT4,  # groups of 16
    "int4-g16": Format(4, 16),
    "int4-g32": Format(4, 32),
    "int4-g32-integers": Format(4, 32, scale_bits=8),
    "int4-g32-minimum": Format(4, 32, has_minimum=True),
    "int4-g64": Format(4, 64),
    "int4-g128": Format(4, 128),
    "int4-row": Format(4),
}

# Relative norm errors: half of the last bit of the result, and of the weights where these are
# rounded to the same type for tensor cores or the library, with room for the order of the sums.
BOUNDS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
_SLICE_ELEMENTS = 2**26  # of a weight in float64 at a time


@dataclass(frozen=True)
class Setup:
    """What all calls of a run have in common.

    dtype: of activations.   shapes: (out_features, in_features) of weights.   rows: of activations,
    in ascending order.   rotate_bytes: of other inputs are read before a set comes again.
    threads: of torch on the CPU.
    """

    device: torch.device
    dtype: torch.dtype
    shapes: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]
    formats: tuple[str, ...]
    rotate_bytes: int
    threads: int = 1


class Inputs:
    """A random weight (N, K) and random activations, and all that is made of them, once."""

    def __init__(self, setup: Setup, shape: tuple[int, int]) -> None:
        self.setup, self.shape = setup, shape
        self._copies: dict[str | torch.dtype, list[Any]] = {}
        self._products: dict[tuple[str | None, bool], torch.Tensor] = {}

    @cached_property
    def weight(self) -> torch.Tensor:
        """(N, K) float32."""
        return torch.randn(self.shape, device=self.setup.device).div_(self.shape[1] ** 0.5)

    @cached_property
    def x(self) -> torch.Tensor:
        """(most rows, K)."""
        shape = (max(self.setup.rows), self.shape[1])
        return torch.randn(shape, device=self.setup.device).to(self.setup.dtype)

    def num_copies(self, num_bytes: int) -> int:
        """So many that, between two uses of one, `rotate_bytes` of others are read."""
        return 1 + -(-self.setup.rotate_bytes // max(1, num_bytes))

    def copies(self, kind: str | torch.dtype) -> Sequence[Any]:
        """Of the weight in FORMATS[kind], or as it is in a type of torch."""
        if kind not in self._copies:
            packs = isinstance(kind, str)
            weight = pack(self.weight, FORMATS[kind]) if packs else self.weight.to(kind)
            count = self.num_copies(bytes_of(weight))
            self._copies[kind] = [deepcopy(weight) for _ in range(count)]
        return self._copies[kind]

    def product(self, format: str | None, rounds_x: bool) -> torch.Tensor:
        """(most rows, N) float64: the right one with a format, or with the weight as it is.

        rounds_x: each token of x is rounded to 8 bits first.
        """
        if (format, rounds_x) not in self._products:
            x, weight = self.x.double(), self.weight
            if format is not None:
                weight = dequantize(self.copies(format)[0], torch.float32)
            if rounds_x:
                codes, scale = int8_rows(self.x)
                x = codes.double() * scale.double().unsqueeze(-1)
            parts = weight.split(max(1, _SLICE_ELEMENTS // weight.shape[1]))
            right = torch.cat([x @ part.double().t() for part in parts], dim=1)
            self._products[format, rounds_x] = right
        return self._products[format, rounds_x]


@dataclass(frozen=True)
class Rows:
    """Some rows of activations for one op; makes its calls."""

    inputs: Inputs
    op: str
    num_rows: int

    @property
    def x(self) -> torch.Tensor:
        return self.inputs.x[: self.num_rows]

    @property
    def size(self) -> str:
        """The shape and the number of rows, as names have it."""
        n, k = self.inputs.shape
        return f"{n}x{k} M={self.num_rows}"

    def plain(self, dtype: torch.dtype, bound: float, count: int | None = None) -> Call:
        """torch's product with a weight that is not quantized.   count: of copies, None is all."""
        x, variant = self.x.to(dtype), f"torch {str(dtype).removeprefix('torch.')}"
        weights = self.inputs.copies(dtype)[:count]
        return self.product(variant, lambda weight: F.linear(x, weight), weights, bound)

    def product(
        self,
        variant: str,
        run: Callable[[Any], torch.Tensor],
        weights: Sequence[Any],
        bound: float,
        format: str | None = None,
        rounds_x: bool = False,
        **details: Any,
    ) -> Call:
        """A product of the rows with one of `weights` after the other.

        format, rounds_x: see Inputs.product(), which is the right result.
        The bytes it moves are those of the weights, of the activations and of the result.
        """
        num_rows, (n, k), nbytes = self.num_rows, self.inputs.shape, bytes_of(weights[0])

        def error(y: torch.Tensor) -> float:
            return relative_error(y, self.inputs.product(format, rounds_x)[:num_rows])

        details |= {
            "op": self.op,
            "variant": variant,
            "format": format,
            "rows": num_rows,
            "out_features": n,
            "in_features": k,
            "weight_bytes": nbytes,
            "num_bytes": nbytes + num_rows * (n + k) * self.x.element_size(),
            "num_ops": 2 * num_rows * n * k,
            "num_sets": len(weights),
            "bound": bound,
        }
        return Call(f"{self.op} {self.size}: {variant}", lambda i: run(weights[i]), error, details)


def bytes_of(weight: Any) -> int:
    """That a product with float activations has to read: of a packed weight codes, scales and
    minima; a weight of another library knows its own."""
    if not isinstance(weight, PackedWeight):
        return int(weight.nbytes)
    parts = (weight.qweight, weight.scale, weight.minimum, weight.row_scale)
    return sum(part.nbytes for part in parts if part is not None)
