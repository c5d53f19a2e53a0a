"""Products by the kernels of kernels/cpu/, of a library and at a level of one's choice.

As a program it computes some of every kind with a library that a sanitizer watches.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from bminf.cpu.library import Kernels, at_level, levels_of, open_library
from bminf.ops import cpu_linear
from bminf.ops.gated_linear import ACTIVATION_FUNCTIONS
from bminf.quantization.packed import INT8, Format, PackedWeight
from bminf.quantization.packing import pack

FORMATS = [
    Format(8), Format(8, 4), Format(8, 16), Format(8, 32), Format(8, 6), Format(8, 100),
    Format(4), Format(4, None, True),
    Format(4, 8), Format(4, 16), Format(4, 32), Format(4, 48), Format(4, 128), Format(4, 10),
    Format(4, 16, True), Format(4, 24, True), Format(4, 6, True),
    Format(4, 16, scale_bits=8), Format(4, 32, scale_bits=8), Format(4, 20, scale_bits=8),
    Format(4, 32, True, 8), Format(4, 16, True, 8),
]  # fmt: skip
COLUMNS = (2, 30, 66, 130, 400, 1030)
BOUNDS = {torch.float32: 2**-13, torch.float16: 1e-3, torch.bfloat16: 6e-3}
DTYPES = tuple(BOUNDS)


def multiply(
    kernels: Kernels,
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None = None,
    y: torch.Tensor | None = None,
    activation_bits: int = cpu_linear.FINEST_BITS,
) -> torch.Tensor:
    """x W^T + bias in the dtype of x, into a poisoned y, as integers however small the weight is.
    x: (M, K)."""
    if y is None:
        y = x.new_full((len(x), weight.out_features), float("nan"))
    kernels.multiply(cpu_linear._product(x, weight, bias, y, len(x), 0, activation_bits))
    return y


def multiply_many(
    kernels: Kernels,
    products: list[tuple[torch.Tensor, PackedWeight, torch.Tensor | None]],
    float_elements: int = 0,
) -> list[torch.Tensor]:
    """As multiply, all by one call."""
    results = [x.new_full((len(x), w.out_features), float("nan")) for x, w, _ in products]
    kernels.multiply_many(
        [
            cpu_linear._product(*one, y, len(y), float_elements)
            for one, y in zip(products, results, strict=True)
        ]
    )
    return results


def multiply_gated(
    kernels: Kernels,
    x: torch.Tensor,
    weights: tuple[PackedWeight, PackedWeight],
    activation: str,
    biases: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    y: torch.Tensor | None = None,
) -> torch.Tensor:
    """activation(x W_gate^T + bias) * (x W_up^T + bias), as multiply."""
    if y is None:
        y = x.new_full((len(x), weights[0].out_features), float("nan"))
    gate, up = (
        cpu_linear._product(x, weight, bias, y, len(x), float_elements=0)
        for weight, bias in zip(weights, biases, strict=True)
    )
    kernels.multiply_gated(gate, up, list(ACTIVATION_FUNCTIONS).index(activation))
    return y


def unpack(kernels: Kernels, weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    y = torch.full((weight.out_features, weight.in_features), float("nan"), dtype=dtype)
    kernels.unpack(cpu_linear._product(None, weight, None, y, 0))
    return y


def random_weight(out_features: int, in_features: int, form: Format) -> PackedWeight:
    return pack(torch.randn(out_features, in_features), form)


def main(path: Path) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(2)
    library = open_library(path)
    for level in levels_of(library):
        kernels = at_level(library, level)
        for form in FORMATS:
            for columns in (30, 1030):
                weight, up = random_weight(7, columns, form), random_weight(7, columns, form)
                for num_rows, dtype in ((1, DTYPES[0]), (7, DTYPES[1]), (16, DTYPES[2])):
                    x = torch.randn(num_rows, columns).to(dtype)
                    x[0, 0], x[-1] = float("inf"), 1e-36
                    bias = torch.randn(7).to(dtype)
                    y = multiply(kernels, x, weight, bias)
                    assert y[1:].isfinite().all()
                    both = [(x, weight, bias), (x[:1], up, None)]
                    assert all(y[1:].isfinite().all() for y in multiply_many(kernels, both))
                    if form == INT8:
                        y = multiply(kernels, x, weight, bias, activation_bits=8)
                        assert y[1:].isfinite().all()
                    for name in ACTIVATION_FUNCTIONS:
                        y = multiply_gated(kernels, x, (weight, up), name, (None, bias))
                        assert y[1:].isfinite().all()
                    assert unpack(kernels, weight, dtype).isfinite().all()
    print("clean")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
