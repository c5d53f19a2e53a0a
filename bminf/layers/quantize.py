"""Which linears of a module are quantised, how large they will be, and the exchange itself."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

import torch

from bminf.errors import ArgumentError
from bminf.layers.quantized_linear import QuantizedLinear, is_conv1d, is_hooked
from bminf.ops.rows import ELEMENTS
from bminf.quantization.packed import Format

_PROBE = (64, 48)  # columns and rows

# torch.nn.MultiheadAttention computes with the weight of its output projection, and never calls it.
_READ_BY_PARENT = (torch.nn.modules.linear.NonDynamicallyQuantizableLinear,)


def is_linear(module: torch.nn.Module) -> bool:
    """Whether `module` is a linear that is not packed yet, of whatever class."""
    return (isinstance(module, torch.nn.Linear) or is_conv1d(module)) and not isinstance(
        module, QuantizedLinear
    )


def is_quantizable(module: torch.nn.Module) -> bool:
    """Whether a QuantizedLinear can stand in for `module`: nn.Linear, Conv1D, or a subclass of
    nn.Linear that computes the same.

    A linear whose weight is computed anew by a hook (weight_norm, pruning) or a parametrization,
    is not initialised yet, or is read by the module around it, stays as it is.
    """
    if not is_linear(module) or type(module) in _READ_BY_PARENT:
        return False
    weight = module._parameters.get("weight")
    if weight is None or weight.dtype not in ELEMENTS or weight.dim() != 2:
        return False
    return is_conv1d(module) or computes_as_linear(module)


def why_not_quantizable(module: torch.nn.Module) -> str:
    """What to say of a linear that is_quantizable() is not true of."""
    weight = module._parameters.get("weight")
    if type(module) in _READ_BY_PARENT:
        return f"of the class {type(module).__name__}, which the module around it reads"
    if _has_forward_of_its_own(module):
        return "whose forward was replaced on the instance"
    if weight is not None and weight.dtype not in ELEMENTS:
        return f"of the dtype {weight.dtype}"
    return f"of the class {type(module).__name__}, not computing as torch.nn.Linear does"


def computes_as_linear(module: torch.nn.Module) -> bool:
    """Whether `module`, of nn.Linear or a subclass, gives x W^T + b and has no other state.

    A subclass with a forward of its own is tried on small random numbers, weights and inputs, in
    float32. The module itself is not called.
    """
    names = {name for name, tensor in module._parameters.items() if tensor is not None}
    if not names <= {"weight", "bias"} or module._buffers or module._modules:
        return False
    if _has_forward_of_its_own(module):
        return False
    if type(module).__call__ is not torch.nn.Module.__call__:  # and around its forward, whatever
        return False
    if type(module).forward is torch.nn.Linear.forward:
        return True
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        return _agrees_on_a_probe(module)


def _has_forward_of_its_own(module: torch.nn.Module) -> bool:
    """Whether somebody has put another forward on this instance."""
    forward = module.__dict__.get("_old_forward" if is_hooked(module) else "forward")
    is_of_class = getattr(forward, "__func__", None) is type(module).forward
    return forward is not None and not (is_of_class and forward.__self__ is module)


def _agrees_on_a_probe(module: torch.nn.Module) -> bool:
    twin = torch.nn.Linear(_PROBE[0], _PROBE[1], bias=module._parameters.get("bias") is not None)
    probe = copy.copy(module)
    probe.__dict__["_parameters"] = {"weight": twin.weight, "bias": twin.bias}
    probe.__dict__["in_features"], probe.__dict__["out_features"] = _PROBE
    rows = torch.randn(6, _PROBE[0])
    # Large and small ones: a clamp, or a rounding of activations, shows.
    for x in (rows, rows.view(2, 3, -1), 1e3 * rows, 1e-3 * rows):
        try:
            y = type(probe).forward(probe, x)
        except Exception:  # whatever it wants instead, it is no linear
            return False
        expected = twin(x)
        if not isinstance(y, torch.Tensor) or y.shape != expected.shape:
            return False
        if (y - expected).abs().max() > 1e-5 * expected.abs().max():
            return False
    return True


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
