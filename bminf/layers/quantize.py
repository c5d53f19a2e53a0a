"""Which linears of a module are quantised, how large they will be, and the exchange itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from bminf.errors import ArgumentError
from bminf.layers.quantized_linear import QuantizedLinear, is_conv1d
from bminf.ops.rows import ELEMENTS
from bminf.quantization.packed import Format


def is_quantizable(module: torch.nn.Module) -> bool:
    """Exactly nn.Linear or Conv1D: a subclass may read its weight in ways of its own.

    Lazy, parametrised and already packed linears are subclasses, and stay as they are.
    """
    if not (type(module) is torch.nn.Linear or is_conv1d(module)):
        return False
    # Not an attribute that a hook computes anew from other parameters (weight_norm, pruning).
    weight = module._parameters.get("weight")
    return weight is not None and weight.dtype in ELEMENTS and weight.dim() == 2


def skeleton(linear: torch.nn.Module, form: Format) -> QuantizedLinear:
    """The QuantizedLinear that `linear` will become, on the meta device: shapes without bytes."""
    with torch.device("meta"):
        twin = torch.nn.Linear(1, 1, bias=linear.bias is not None)
    twin.weight = torch.nn.Parameter(_meta(linear.weight), requires_grad=False)
    if linear.bias is not None:
        twin.bias = torch.nn.Parameter(_meta(linear.bias), requires_grad=False)
    if is_conv1d(linear):
        twin.weight = torch.nn.Parameter(twin.weight.t(), requires_grad=False)
    return QuantizedLinear(twin, quantization=form)


def quantize_children(
    root: torch.nn.Module,
    stand_ins: Mapping[torch.nn.Module, QuantizedLinear],
    prefix: str = "",
) -> Iterator[str]:
    """Put a QuantizedLinear in place of each module below `root` that has a stand-in; yield names.

    stand_ins: module -> its skeleton.   prefix: of the names, that of `root` with a dot.
    A module that is registered twice is exchanged in both places for the same new one. Raises
    ArgumentError, with the name, for a weight that cannot be packed.
    """
    exchanged: dict[torch.nn.Module, QuantizedLinear] = {}
    for name, parent in list(root.named_modules(remove_duplicate=False)):
        for child_name, child in list(parent._modules.items()):
            if child is None or child not in stand_ins:
                continue
            full_name = prefix + (f"{name}.{child_name}" if name else child_name)
            if child not in exchanged:
                exchanged[child] = _packed(child, stand_ins[child], full_name)
            parent._modules[child_name] = exchanged[child]
            yield full_name


def _packed(linear: torch.nn.Module, stand_in: QuantizedLinear, name: str) -> QuantizedLinear:
    try:
        return QuantizedLinear(linear, stand_in.activations, stand_in.form)
    except ArgumentError as error:
        raise ArgumentError(f"{name!r} cannot be quantised: {error}") from error


def _meta(tensor: torch.nn.Parameter | torch.Tensor | torch.nn.Module) -> torch.Tensor:
    assert isinstance(tensor, torch.Tensor)
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
