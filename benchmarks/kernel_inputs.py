"""What the kernel benchmark works on: weights in several copies, and the right results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from benchmarks.harness import Call, relative_error
from bminf.quantization.packed import INT4, INT8, Format, PackedWeight, dequantize, int8_rows, pack

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


class Inputs:
    """A random weight (N, K) and random activations, and all that is made of them, once."""

    def __init__(self, setup: Setup, shape: tuple[int, int]) -> None:
        self.setup, self.shape = setup, shape
        self._made: dict[Any, Any] = {}

    @cached_property
    def weight(self) -> torch.Tensor:
        """(N, K) float32."""
        return torch.randn(self.shape, device=self.setup.device).div_(self.shape[1] ** 0.5)

    @cached_property
    def x(self) -> torch.Tensor:
        """(most rows, K)."""
        shape = (max(self.setup.rows), self.shape[1])
        return torch.randn(shape, device=self.setup.device).to(self.setup.dtype)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` gives, which all calls with this key share."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def num_copies(self, num_bytes: int) -> int:
        """So many that, between two uses of one, `rotate_bytes` of others are read."""
        return 1 + -(-self.setup.rotate_bytes // max(1, num_bytes))

    def packed(self, name: str) -> Sequence[PackedWeight]:
        """Copies of the weight in FORMATS[name]."""

        def make() -> list[PackedWeight]:
            weight = pack(self.weight, FORMATS[name])
            return [
                PackedWeight(*(p.clone() if isinstance(p, torch.Tensor) else p for p in weight))
                for _ in range(self.num_copies(bytes_of(weight)))
            ]

        return self.once(name, make)

    def plain(self, dtype: torch.dtype) -> Sequence[torch.Tensor]:
        """Copies of the weight as it is, for torch's product."""

        def make() -> list[torch.Tensor]:
            weight = self.weight.to(dtype)
            return [weight.clone() for _ in range(self.num_copies(weight.nbytes))]

        return self.once(dtype, make)

    def expected(self, num_rows: int, format: str | None, rounds_x: bool = False) -> torch.Tensor:
        """(num_rows, N) float64: the right product with a format, or with the weight as it is.

        rounds_x: each token of x is rounded to 8 bits first.
        """

        def make() -> torch.Tensor:
            x, weight = self.x.double(), self.weight
            if format is not None:
                weight = dequantize(self.packed(format)[0], torch.float32)
            if rounds_x:
                codes, scale = int8_rows(self.x)
                x = codes.double() * scale.double().unsqueeze(-1)
            step = max(1, _SLICE_ELEMENTS // weight.shape[1])
            return torch.cat([x @ rows.double().t() for rows in weight.split(step)], dim=1)

        return self.once((format, rounds_x), make)[:num_rows]


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

    def product(
        self,
        variant: str,
        run: Callable[[Any], torch.Tensor],
        weights: Sequence[Any],
        bound: float,
        format: str | None = None,
        rounds_x: bool = False,
        finish: Callable[[torch.Tensor], torch.Tensor] = lambda y: y,
        **details: Any,
    ) -> Call:
        """A product of the rows with one of `weights` after the other, or with two of them at once.

        format, rounds_x: see Inputs.expected(), of which the right result is `finish`.
        The bytes it moves are those of the weights, of the activations and of the result.
        """
        num_rows, (n, k), nbytes = self.num_rows, self.inputs.shape, bytes_of(weights[0])
        num_weights = 2 if type(weights[0]) is tuple else 1

        def error(y: torch.Tensor) -> float:
            return relative_error(y, finish(self.inputs.expected(num_rows, format, rounds_x)))

        details |= {
            "op": self.op,
            "variant": variant,
            "format": format,
            "rows": num_rows,
            "out_features": n,
            "in_features": k,
            "weight_bytes": nbytes,
            "num_bytes": nbytes + num_rows * (n + k) * self.x.element_size(),
            "num_ops": 2 * num_rows * n * k * num_weights,
            "num_sets": len(weights),
            "bound": bound,
        }
        return Call(f"{self.op} {self.size}: {variant}", lambda i: run(weights[i]), error, details)


def bytes_of(weight: Any) -> int:
    """What a product with float activations has to read: of a packed weight its codes, scales and
    minima, of several weights all of them."""
    if isinstance(weight, torch.Tensor):
        return weight.nbytes
    if isinstance(weight, PackedWeight):
        weight = [part for part in weight[:3] if part is not None]
    return sum(map(bytes_of, weight))
