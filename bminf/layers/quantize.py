"""Which linears of a module are quantised, how large they will be, and the exchange itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from bminf.layers.quantized_linear import QuantizedLinear, is_conv1d

Predicate = Callable[[torch.nn.Module], bool]


def is_quantizable(module: torch.nn.Module) -> bool:
    """Exactly nn.Linear or Conv1D: a subclass may read its weight in ways of its own.

    Lazy, parametrised and already packed linears are subclasses, and stay as they are.
    """
    if not (type(module) is torch.nn.Linear or is_conv1d(module)):
        return False
    # Not an attribute that a hook computes anew from other parameters (weight_norm, pruning).
    weight = module._parameters.get("weight")
    return weight is not None and weight.is_floating_point() and weight.dim() == 2


def skeleton(linear: torch.nn.Module) -> QuantizedLinear:
    """The QuantizedLinear that `linear` will become, on the meta device: shapes without bytes."""
    with torch.device("meta"):
        twin = torch.nn.Linear(1, 1, bias=linear.bias is not None)
    twin.weight = torch.nn.Parameter(_meta(linear.weight), requires_grad=False)
    if linear.bias is not None:
        twin.bias = torch.nn.Parameter(_meta(linear.bias), requires_grad=False)
    if is_conv1d(linear):
        twin.weight = torch.nn.Parameter(twin.weight.t(), requires_grad=False)
    return QuantizedLinear(twin)


def quantize_children(root: torch.nn.Module, wanted: Predicate) -> Iterator[str]:
    """Put a QuantizedLinear in place of each module below `root` that is `wanted`; yield its name.

    A module that is registered twice is exchanged in both places for the same new one.
    """
    exchanged: dict[torch.nn.Module, QuantizedLinear] = {}
    for name, parent in list(root.named_modules(remove_duplicate=False)):
        for child_name, child in list(parent._modules.items()):
            if child is None or not wanted(child):
                continue
            if child not in exchanged:
                exchanged[child] = QuantizedLinear(child)
            parent._modules[child_name] = exchanged[child]
            yield f"{name}.{child_name}" if name else child_name


def _meta(tensor: torch.nn.Parameter | torch.Tensor | torch.nn.Module) -> torch.Tensor:
    assert isinstance(tensor, torch.Tensor)
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
