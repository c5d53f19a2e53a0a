"""The linear layer with packed weights, as models call it: checked, differentiable, traceable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.fx

from bminf.cuda.launcher import Launcher, launcher_for
from bminf.errors import ArgumentError, UnsupportedModelError
from bminf.ops.cpu_linear import FINEST_BITS, few_rows_linear, row_bytes_of_many
from bminf.ops.dequantize import dequantize_weight
from bminf.ops.linear_w8a8 import MAX_CODE_COLUMNS, check_columns, linear_w8a8
from bminf.ops.linear_weight_only import MAX_FEW_ROWS, few_rows_launched, linear_weight_only
from bminf.ops.rows import as_rows, check_activations, check_vector
from bminf.quantization.packed import INT8, Format, PackedWeight
from bminf.tracing import active_tracer, is_watched

ACTIVATIONS = ("auto", "float", "int8")

_NO_FAST_HALF = 61  # GTX 10 series: half precision at 1/64 of the rate of float, dp4a at four times


def linear(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None = None,
    activations: str = "auto",
) -> torch.Tensor:
    """y = x W^T + bias, with W packed to 8 or 4 bits.

    x: (..., K) float32, float16 or bfloat16.   weight: (N, K) packed.   bias: (N,) or None.
    activations: "float" multiplies x as it is; "int8" rounds each token of x to 8 bits first, and
        needs 8-bit weights with a scale a row; "auto" is "float", except for many tokens at once on
        a GPU without fast half precision (compute capability 6.1).
    Returns (..., N) in the dtype of x. Differentiable in x (through the rounding as if it were not
    there); the weight is frozen. Raises ArgumentError before any work.
    """
    weight.check()
    return linear_of_checked(x, weight, bias, activations)


def linear_of_checked(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, activations: str
) -> torch.Tensor:
    """As linear, for a weight whose parts are known to match, as in a layer of ours."""
    # Not asked for a GPU where tensors are fake, which need none.
    if isinstance(x, torch.Tensor) and activations in ACTIVATIONS and not is_watched():
        launcher, is_int8 = launcher_for(x.device), activations == "int8"
        if launcher is None:
            few = few_rows_linear(x, weight, bias, 8 if is_int8 else FINEST_BITS)
        else:  # in "auto" as in "float", for so few rows
            few = None if is_int8 else few_rows_launched(launcher, x, weight, bias)
        if few is not None:
            return few
    if not _is_recorded(x):
        return _linear(x, weight, bias, activations)
    # Rows in, rows out: an output that is a view made inside could not be written to in place.
    rows = x if x.dim() in (0, 2) else as_rows(x)
    y: torch.Tensor = _traced_linear(
        rows, weight.qweight, weight.scale, weight.minimum, weight.code_sum, bias,
        weight.in_features, weight.group_size, activations, weight.row_scale,
    )  # fmt: skip
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.out_features)


def _is_recorded(x: torch.Tensor) -> bool:
    """Whether autograd or a tracer records what is done to `x`: one op then, not its inside."""
    if isinstance(x, torch.fx.Proxy):
        raise UnsupportedModelError(
            "torch.fx.symbolic_trace cannot look into a packed linear; use torch.export, make_fx, "
            "or a Tracer whose is_leaf_module is true of bminf.QuantizedLinear"
        )
    if torch.compiler.is_compiling() or active_tracer() is not None:
        return True
    return torch.is_grad_enabled() and x.requires_grad


def _linear(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, activations: str
) -> torch.Tensor:
    device = weight.qweight.device
    if torch.is_autocast_enabled(device.type):  # sums are not to be rounded on the way
        with torch.autocast(device.type, enabled=False):
            return _linear(x, weight, bias, activations)
    check_activations(x, weight.in_features, device)
    if bias is not None:
        check_vector("bias", bias, weight.out_features, device)
        bias = bias.to(x.dtype).contiguous()
    launcher = launcher_for(device)
    is_w8a8 = _rounds_activations(x, weight, activations, launcher)
    op = linear_w8a8 if is_w8a8 else linear_weight_only
    if x.numel() == 0 or weight.out_features == 0:
        shape = (*x.shape[:-1], weight.out_features)
        return x.new_zeros(shape) if bias is None else bias.expand(shape).clone()
    if x.dim() == 2:
        return op(x, weight, bias, launcher)
    return op(as_rows(x), weight, bias, launcher).view(*x.shape[:-1], weight.out_features)


def _rounds_activations(
    x: torch.Tensor, weight: PackedWeight, activations: str, launcher: Launcher | None
) -> bool:
    if activations == "float" or (activations == "auto" and launcher is None):
        return False
    can_round = weight.bits == 8 and weight.group_size is None
    if activations == "int8":
        if not can_round:
            raise ArgumentError(
                'activations="int8" needs 8-bit weights with one scale a row, not '
                f'{weight.form}; use activations="float"'
            )
        if launcher is not None:
            check_columns(weight)
        return True
    if activations != "auto":
        raise ArgumentError(f"activations={activations!r}; accepted: {', '.join(ACTIVATIONS)}")
    has_fast_half = launcher is None or launcher.capability != _NO_FAST_HALF
    can_round = can_round and weight.in_features <= MAX_CODE_COLUMNS
    return can_round and not has_fast_half and x.numel() > MAX_FEW_ROWS * x.shape[-1]


# ---- for autograd and torch.compile: the same op, opaque to them ---------------------------------

_traced_linear: Any = torch.library.custom_op(
    "bminf::linear",
    lambda x, qweight, scale, minimum, code_sum, bias, columns, size, activations, row_scale=None: (
        _linear(
            x,
            PackedWeight(qweight, scale, minimum, columns, size, code_sum, row_scale),
            bias,
            activations,
        )
    ),
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor qweight, Tensor scale, Tensor? minimum, Tensor? code_sum, Tensor? bias, "
        "int in_features, int? group_size, str activations, Tensor? row_scale=None) -> Tensor"
    ),
)


def _shape_only(x: torch.Tensor, qweight: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], qweight.shape[0])


def _keep_weight(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, qweight, scale, minimum, _, _, *ctx.sizes, _, row_scale = inputs
    ctx.save_for_backward(qweight, scale, minimum, row_scale)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    qweight, scale, minimum, row_scale = ctx.saved_tensors
    in_features, group_size = ctx.sizes
    weight = PackedWeight(qweight, scale, minimum, in_features, group_size, row_scale=row_scale)
    return _gradient_of_input(grad, weight), *[None] * 9


def _gradient_of_input(grad: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """grad W; of an output head, which is no smaller when it is dequantized than it was, some rows
    of W at a time, summed in float32."""
    num_rows = max(1, _SLICE_BYTES // max(1, weight.in_features * grad.itemsize))
    if num_rows >= weight.out_features:
        return grad @ dequantize_weight(weight, grad.dtype)
    total = grad.new_zeros((*grad.shape[:-1], weight.in_features), dtype=torch.float32)
    for start in range(0, weight.out_features, num_rows):
        rows = slice(start, start + num_rows)
        total += grad[..., rows] @ dequantize_weight(weight.rows(rows), grad.dtype)
    return total.to(grad.dtype)


_traced_linear.register_fake(_shape_only)
_traced_linear.register_autograd(_backward, setup_context=_keep_weight)

# ---- what a product holds at its peak, read off the operations -----------------------------------

_SLICE_BYTES = 2**27  # a slice of a dequantized weight, see linear_weight_only.py


@dataclass(frozen=True)
class Pass:
    """The largest pass that is asked of a model.

    length: tokens of a row, of prompt and answer together where one stack reads both, of each
    elsewhere.   dtype: of activations.   weight_format: of the weights in the blocks; None
    is not packed.   is_cpu: products hold other things there on the way.
    num_ranks: that share heads and feed-forwards, and of which this is the pass of one.
    """

    batch_size: int
    length: int
    dtype: torch.dtype
    weight_format: Format | None
    is_cpu: bool
    num_ranks: int = 1

    def activation_bytes(self, *columns: int) -> int:
        """Bytes of activations of so many columns that are held at once."""
        return self.batch_size * self.length * sum(columns) * self.dtype.itemsize

    def linear_bytes(self, inputs: int, outputs: int) -> int:
        """Bytes of the result of a product, and of what is held on the way beside its input."""
        itemsize, temporary, weight = self.dtype.itemsize, 0, 0
        if self.weight_format is not None and self.is_cpu:
            temporary = row_bytes_of_many(inputs, outputs, itemsize, self.weight_format)
        elif self.weight_format is not None:
            weight = min(_SLICE_BYTES, inputs * outputs * itemsize)
            temporary = (
                inputs + 4 * outputs if self.weight_format == INT8 else 0
            )  # codes and their sums
        return self.activation_bytes(outputs) + self.batch_size * self.length * temporary + weight

    def score_bytes(self, num_heads: int = 1) -> int:
        """Bytes of a bias of scores, of all heads or of each."""
        return self.batch_size * self.length**2 * num_heads * self.dtype.itemsize
