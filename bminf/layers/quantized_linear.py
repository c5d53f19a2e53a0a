"""QuantizedLinear: a drop-in for torch.nn.Linear with row-wise INT8 weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bminf.errors import ArgumentError
from bminf.lazy import LazyTensor
from bminf.ops.linear_int8 import linear_w8a8, linear_w8a16
from bminf.quantization.int8 import dequantize_rows, quantize_rows

# "auto" is weight-only, the more exact of the two; 8-bit activations pay only with kernels.
_FORWARD = {"auto": linear_w8a16, "float": linear_w8a16, "int8": linear_w8a8}

_SLICE_ELEMENTS = 2**18


def is_conv1d(module: torch.nn.Module) -> bool:
    """Whether `module` is transformers' Conv1D (GPT-2): a linear whose weight is stored (K, N)."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


class QuantizedLinear(torch.nn.Module):
    """The linear layer `linear`, its weight packed to INT8 with one scale a row.

    linear: torch.nn.Linear, or transformers' Conv1D; it is left as it is.
    activations: "float" multiplies in the dtype of the input (W8A16); "int8" packs each token too
    (W8A8); "auto" chooses, at present "float".

    Buffers: qweight (out_features, in_features) int8, scale (out_features,) float32. The bias stays
    in its dtype. `weight` answers as the dequantised weight would. Frozen: gradients flow to the
    input only. Raises ArgumentError for another module or word.
    """

    qweight: torch.Tensor
    scale: torch.Tensor

    def __init__(self, linear: torch.nn.Module, activations: str = "auto") -> None:
        super().__init__()
        if activations not in _FORWARD:
            raise ArgumentError(f"activations={activations!r}; accepted: {', '.join(_FORWARD)}")
        weight = _weight_of(linear)
        self.out_features, self.in_features = weight.shape
        self.activations = activations
        self.dtype = weight.dtype
        qweight, scale = _pack(weight)
        self.register_buffer("qweight", qweight)
        self.register_buffer("scale", scale)
        self.bias: torch.nn.Parameter | None = None
        if linear.bias is not None:
            bias: Any = linear.bias
            self.bias = torch.nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.train(linear.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _FORWARD[self.activations](x, self.qweight, self.scale, self.bias)

    @property
    def weight(self) -> torch.Tensor:
        """The dequantised weight, (out_features, in_features) in the compute dtype.

        Reading its dtype, device or shape is free; reading its values dequantises it each time.
        """
        like = torch.empty(self.qweight.shape, dtype=self.dtype, device="meta")
        return LazyTensor(self.dequantize, like, device=self.qweight.device)

    def dequantize(self) -> torch.Tensor:
        return dequantize_rows(self.qweight, self.scale, self.dtype)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> QuantizedLinear:
        """Follow moves between devices; a new dtype is for the activations, not for the scales."""
        scale = self.scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=scale.device)).dtype
        if self.scale.dtype != torch.float32:
            self.scale = scale.to(self.scale.device)
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, activations={self.activations!r}"
        )


def _pack(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """quantize_rows in slices of rows: its temporaries are then small beside any block."""
    qweight = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    if weight.is_meta:
        return qweight, scale
    num_rows = max(1, _SLICE_ELEMENTS // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], num_rows):
        rows = slice(start, start + num_rows)
        qweight[rows], scale[rows] = quantize_rows(weight[rows])
    return qweight, scale


def _weight_of(linear: torch.nn.Module) -> torch.Tensor:
    """The weight as (out_features, in_features)."""
    if is_conv1d(linear):
        return linear.weight.detach().t()  # type: ignore[operator]
    if isinstance(linear, torch.nn.Linear):
        return linear.weight.detach()
    raise ArgumentError(
        "QuantizedLinear takes a torch.nn.Linear or transformers' Conv1D, "
        f"not {type(linear).__name__}"
    )
