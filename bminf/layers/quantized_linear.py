"""QuantizedLinear: a drop-in for torch.nn.Linear with weights in 8 or 4 bits."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch

from bminf.errors import ArgumentError, UnsupportedModelError
from bminf.layers.saving import check_not_saved
from bminf.lazy import PACKED_IS_FROZEN, LazyTensor
from bminf.ops.dequantize import dequantize_weight
from bminf.ops.linear import ACTIVATIONS, linear_of_checked
from bminf.quantization.packed import (
    INT8,
    PACKED_FIELDS,
    Format,
    PackedWeight,
    empty,
    parse_format,
)
from bminf.quantization.packing import pack

_SCALES = ("scale", "minimum", "row_scale")


def is_conv1d(module: torch.nn.Module) -> bool:
    """Whether `module` is transformers' Conv1D (GPT-2): a linear whose weight is stored (K, N)."""
    return _is_class_of_conv1d(type(module))


def _is_class_of_conv1d(kind: type) -> bool:
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def is_of_class(module: torch.nn.Module, family: str, name: str) -> bool:
    """Whether `module` is of the class of this name in the model `family` of transformers."""
    kind = type(module)
    home = f"transformers.models.{family}.modeling_{family}"
    return kind.__name__ == name and kind.__module__ == home


class QuantizedLinear(torch.nn.Linear):
    """The linear layer `linear`, its weight packed to 8 or 4 bits.

    It passes isinstance(..., torch.nn.Linear), which libraries of adapters check.

    linear: torch.nn.Linear, or transformers' Conv1D; it is left as it is. What code hung on it
        (hooks, attributes) is carried over.
    activations: "float" multiplies in the precision of the input (W8A16, W4A16); "int8" rounds each
        token to 8 bits too (W8A8) and needs 8-bit weights with a scale a row; "auto" is "float"
        but for many tokens at once on a GPU without fast half precision.
    quantization: "int8", "int4", or a Format.

    Buffers: qweight, scale, minimum, code_sum, row_scale: the fields of PackedWeight, those that
    the format has; `packed` gives them together. The bias stays in its dtype. `weight` answers as
    the dequantized weight would. Frozen: gradients flow to the input only. Raises ArgumentError for
    another module or word, an odd number of columns in 4 bits, or a weight that is not finite.
    """

    qweight: torch.Tensor
    scale: torch.Tensor
    minimum: torch.Tensor | None
    code_sum: torch.Tensor | None
    row_scale: torch.Tensor | None

    def __init__(
        self,
        linear: torch.nn.Module,
        activations: str = "auto",
        quantization: str | Format = "int8",
    ) -> None:
        torch.nn.Module.__init__(self)  # Linear's own would make a weight
        self.form = format_ = _format_of(quantization)
        _check_activations(activations, format_)
        weight = _weight_of(linear)
        self.out_features, self.in_features = weight.shape
        self.activations = activations
        self.dtype = weight.dtype
        if weight.is_meta:
            packed = empty(self.out_features, self.in_features, format_, "meta")
        else:
            packed = pack(weight, format_)
        # Not by register_buffer(), which asks for each whether there is such an attribute.
        self._buffers.update({name: getattr(packed, name) for name in PACKED_FIELDS})
        self._parameters["bias"] = None
        if linear.bias is not None:
            bias: Any = linear.bias
            self.bias = torch.nn.Parameter(bias.detach().clone(), requires_grad=False)
        copy_attributes(linear, self)
        self._packed_class = type(linear)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        held = self._parameters  # Module.__getattr__ is slow; a bias may be computed by others
        bias = held["bias"] if "bias" in held else self.bias
        return linear_of_checked(x, self.packed, bias, self.activations)

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
            buffers["row_scale"],
        )

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The dequantized weight, (out_features, in_features) in the compute dtype.

        Reading its dtype, device or shape is free; reading its values dequantizes it each time.
        """
        if torch.compiler.is_compiling():
            return self.dequantize()  # what is not used is left out of the graph
        shape = (self.out_features, self.in_features)
        like = torch.empty(shape, dtype=self.dtype, device="meta")
        return LazyTensor(self.dequantize, like, device=self.scale.device)

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "weight":
            super().__setattr__(name, value)
        # What is there already is accepted: adapters, taken off, give a layer its own weight.
        elif not (isinstance(value, LazyTensor) and value._read == self.dequantize):
            raise UnsupportedModelError(
                f"the weight of a packed linear cannot be set; {PACKED_IS_FROZEN}"
            )

    def __getattr__(self, name: str) -> Any:
        # peft takes a layer with an attribute of this name for one of GPTQ's, and hands the codes
        # to models that ask its adapters for the dtype of a weight.
        if name == "qweight" and _is_called_from_peft(sys._getframe(1)):
            raise AttributeError("no layer of GPTQ's")
        kind = self.__dict__.get("_packed_class", torch.nn.Linear)
        if name.startswith("__") or not hasattr(kind, name):
            return super().__getattr__(name)
        member = inspect.getattr_static(kind, name)  # a method or property of the class it was
        return member.__get__(self, kind) if hasattr(member, "__get__") else member

    def dequantize(self) -> torch.Tensor:
        return dequantize_weight(self.packed, self.dtype)

    def __prepare_scriptable__(self) -> None:
        """torch.jit.script asks for what it is to compile in this module's place."""
        raise UnsupportedModelError(
            "torch.jit.script cannot compile a packed linear; use torch.jit.trace or torch.export"
        )

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> QuantizedLinear:
        """Follow moves between devices; a new dtype is for the activations, not for the scales."""
        before = {name: getattr(self, name) for name in _SCALES}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=before["scale"].device)).dtype
        for name, tensor in before.items():
            if tensor is not None and getattr(self, name).dtype != tensor.dtype:
                setattr(self, name, tensor.to(self.qweight.device))
        return self

    def _save_to_state_dict(self, *arguments: Any, **more: Any) -> None:
        check_not_saved()
        super()._save_to_state_dict(*arguments, **more)

    def _load_from_state_dict(self, *arguments: Any, **more: Any) -> None:
        """Kernels read these buffers unchecked at each call, so they are checked here."""
        super()._load_from_state_dict(*arguments, **more)
        self.packed.check()

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, activations={self.activations!r}, {self.form}"
        )


def _format_of(quantization: str | Format) -> Format:
    if isinstance(quantization, Format):
        return quantization
    found = parse_format(quantization, is_optional=False)
    assert found is not None  # or it was an error
    return found


def was_conv1d(linear: QuantizedLinear) -> bool:
    """Whether it was packed from transformers' Conv1D, whose weight is (K, N)."""
    return _is_class_of_conv1d(linear._packed_class)


def has_accelerate_hook(module: torch.nn.Module) -> bool:
    """Whether a hook of accelerate stands around the forward of `module`."""
    forward = module.__dict__.get("forward")
    is_around = isinstance(forward, functools.partial) and forward.args == (module,)
    return is_around and "_hf_hook" in module.__dict__ and "_old_forward" in module.__dict__


def has_forward_of_its_own(module: torch.nn.Module) -> bool:
    """Whether the forward was overridden on this instance."""
    forward = module.__dict__.get("_old_forward" if has_accelerate_hook(module) else "forward")
    is_of_class = getattr(forward, "__func__", None) is type(module).forward
    return forward is not None and not (is_of_class and forward.__self__ is module)


def _is_called_from_peft(caller: FrameType) -> bool:
    return str(caller.f_globals.get("__name__", "")).partition(".")[0] == "peft"


def copy_attributes(linear: torch.nn.Module, packed: torch.nn.Module) -> None:
    """Give `packed` the hooks of `linear`, and the attributes that code hung on it.

    They are the very dicts, so that a handle which removes a hook goes on doing so.
    """
    for name, value in linear.__dict__.items():
        if name in ("forward", "_old_forward"):  # accelerate leaves it there without a hook, too
            continue
        is_hook = name.startswith(("_forward_", "_backward_", "_is_full_backward"))
        if is_hook or name not in packed.__dict__:
            packed.__dict__[name] = value
    if has_accelerate_hook(linear):
        hooked: Any = linear.__dict__["forward"]
        packed.__dict__["_old_forward"] = own = packed.forward
        around = functools.partial(hooked.func, packed)
        packed.__dict__["forward"] = functools.update_wrapper(around, own)
    packed.train(linear.training)


def _check_activations(activations: str, format_: Format) -> None:
    if activations not in ACTIVATIONS:
        raise ArgumentError(f"activations={activations!r}; accepted: {', '.join(ACTIVATIONS)}")
    if activations == "int8" and format_ != INT8:
        raise ArgumentError(
            'activations="int8" needs quantization="int8", not '
            f'{format_}; with it, activations is "auto" or "float"'
        )


def _weight_of(linear: torch.nn.Module) -> torch.Tensor:
    """The weight as (out_features, in_features)."""
    if is_conv1d(linear):
        return linear.weight.detach().t()  # type: ignore[operator]
    if isinstance(linear, torch.nn.Linear) and not isinstance(linear, QuantizedLinear):
        return linear.weight.detach()
    raise ArgumentError(
        "QuantizedLinear takes a torch.nn.Linear or transformers' Conv1D, "
        f"not {type(linear).__name__}"
    )
