"""QuantizedLinear: a drop-in for torch.nn.Linear with weights in 8 or 4 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bminf.errors import ArgumentError
from bminf.lazy import LazyTensor
from bminf.ops.dequantize import dequantize_weight
from bminf.ops.linear import ACTIVATIONS, linear_of_checked
from bminf.quantization.packed import FORMATS, Format, PackedWeight, pack


def is_conv1d(module: torch.nn.Module) -> bool:
    """Whether `module` is transformers' Conv1D (GPT-2): a linear whose weight is stored (K, N)."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def format_for(quantization: str | Format) -> Format:
    """The format that `quantization` names. Raises ArgumentError for another word."""
    if isinstance(quantization, Format):
        return quantization
    if not isinstance(quantization, str) or quantization not in FORMATS:
        names = ", ".join(f'"{name}"' for name in FORMATS)
        raise ArgumentError(f"quantization={quantization!r}; accepted: {names}, or a bminf.Format")
    return FORMATS[quantization]


class QuantizedLinear(torch.nn.Module):
    """The linear layer `linear`, its weight packed to 8 or 4 bits.

    linear: torch.nn.Linear, or transformers' Conv1D; it is left as it is.
    activations: "float" multiplies in the precision of the input (W8A16, W4A16); "int8" rounds each
        token to 8 bits too (W8A8) and needs 8-bit weights with a scale a row; "auto" is "float"
        but for many tokens at once on a GPU without fast half precision.
    quantization: "int8", "int4", or a Format.

    Buffers: qweight, scale, minimum, code_sum: the fields of PackedWeight, those that the format
    has. The bias stays in its dtype. `weight` answers as the dequantised weight would. Frozen:
    gradients flow to the input only. Raises ArgumentError for another module or word, an odd number
    of columns in 4 bits, or a weight that is not finite.
    """

    qweight: torch.Tensor
    scale: torch.Tensor
    minimum: torch.Tensor | None
    code_sum: torch.Tensor | None

    def __init__(
        self,
        linear: torch.nn.Module,
        activations: str = "auto",
        quantization: str | Format = "int8",
    ) -> None:
        super().__init__()
        self.form = format_for(quantization)
        _check_activations(activations, self.form)
        weight = _weight_of(linear)
        self.out_features, self.in_features = weight.shape
        self.activations = activations
        self.dtype = weight.dtype
        packed = pack(weight, self.form)
        for name in ("qweight", "scale", "minimum", "code_sum"):
            self.register_buffer(name, getattr(packed, name))
        self.bias: torch.nn.Parameter | None = None
        if linear.bias is not None:
            bias: Any = linear.bias
            self.bias = torch.nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.train(linear.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear_of_checked(x, self.packed, self.bias, self.activations)

    @property
    def packed(self) -> PackedWeight:
        buffers: Any = self._buffers  # Module.__getattr__ would take five times as long
        return PackedWeight(
            buffers["qweight"],
            buffers["scale"],
            buffers["minimum"],
            self.in_features,
            self.form.group_size,
            buffers["code_sum"],
        )

    @property
    def weight(self) -> torch.Tensor:
        """The dequantised weight, (out_features, in_features) in the compute dtype.

        Reading its dtype, device or shape is free; reading its values dequantises it each time.
        """
        if torch.compiler.is_compiling():
            return self.dequantize()  # what is not used is left out of the graph
        shape = (self.out_features, self.in_features)
        like = torch.empty(shape, dtype=self.dtype, device="meta")
        return LazyTensor(self.dequantize, like, device=self.qweight.device)

    def dequantize(self) -> torch.Tensor:
        return dequantize_weight(self.packed, self.dtype)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> QuantizedLinear:
        """Follow moves between devices; a new dtype is for the activations, not for the scales."""
        before = {name: getattr(self, name) for name in ("scale", "minimum")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=before["scale"].device)).dtype
        for name, tensor in before.items():
            if tensor is not None and getattr(self, name).dtype != tensor.dtype:
                setattr(self, name, tensor.to(self.qweight.device))
        return self

    def _load_from_state_dict(self, *arguments: Any, **more: Any) -> None:
        """Kernels read these buffers unchecked at each call, so they are checked here."""
        super()._load_from_state_dict(*arguments, **more)
        self.packed.check()

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, activations={self.activations!r}, {self.form}"
        )


def _check_activations(activations: str, form: Format) -> None:
    if activations not in ACTIVATIONS:
        raise ArgumentError(f"activations={activations!r}; accepted: {', '.join(ACTIVATIONS)}")
    if activations == "int8" and form != FORMATS["int8"]:
        raise ArgumentError(
            'activations="int8" needs quantization="int8", not '
            f'{form}; with it, activations is "auto" or "float"'
        )


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
