"""Three products to profile: one row and 16 rows, 8 and 4 bits, of a matrix that no cache holds."""

from __future__ import annotations

import sys

import torch

from bminf.ops.linear import linear
from bminf.quantization.packed import INT4, INT8, Format, pack

PRODUCTS: tuple[tuple[Format, int], ...] = ((INT8, 1), (INT4, 1), (INT4, 16))
_SHAPE = (12288, 12288)


def main(device: str = "cuda", shape: tuple[int, int] = _SHAPE) -> int:
    """0; a profiler that is told so sees the second time of each product only."""
    torch.manual_seed(0)
    weights = {form: pack(torch.randn(shape, device=device), form) for form in (INT8, INT4)}
    calls = [
        (torch.randn(num_rows, shape[1], device=device).half(), weights[form])
        for form, num_rows in PRODUCTS
    ]
    for x, weight in calls:
        linear(x, weight)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    for x, weight in calls:
        linear(x, weight)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
