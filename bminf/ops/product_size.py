"""What a product with a packed weight holds at its peak, read off the operations beside it."""

from __future__ import annotations

from bminf.quantization.packed import INT8, Format

_SLICE_BYTES = 2**27  # a slice of a dequantized weight, see linear_weight_only.py


def product_bytes(
    num_rows: int, inputs: int, outputs: int, itemsize: int, format_: Format | None, is_cpu: bool
) -> int:
    """Bytes of the result of (num_rows, inputs) times a weight, and of what is held on the way.

    itemsize: of an activation.   format_: of the weight; None is not packed.
    """
    per_row = outputs * itemsize
    if format_ is None:
        return num_rows * per_row
    if is_cpu:
        return num_rows * (per_row + _on_cpu(inputs, outputs, itemsize, format_))
    weight = min(_SLICE_BYTES, inputs * outputs * itemsize)
    rounded = inputs + 4 * outputs if format_ == INT8 else 0  # codes and their sums
    return num_rows * (per_row + rounded) + weight


def _on_cpu(inputs: int, outputs: int, itemsize: int, format_: Format) -> int:
    """Bytes of a row, see cpu_linear.py."""
    wide = 0 if itemsize == 4 else 4 * (inputs + outputs)  # all is done in float32
    if format_ == INT8:  # numbers, two digits of each, and the sums of both
        return wide + max(20 * inputs, 10 * inputs + 16 * outputs)
    return wide + 5 * inputs + 4 * outputs
