"""Products with packed weights by other libraries, where they are installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch

from benchmarks.calls import Call, num_sets
from benchmarks.kernels_inputs import Inputs

# Against the weight before it was quantised: of normally distributed weights, rows of 8 bits lose
# about 1% of the norm, 4 bits about 10%.
_BOUNDS = {8: 3e-2, 4: 2e-1}
_GROUP_SIZE = 128  # of torch's 4-bit product


def others(inputs: Inputs, op: str, num_rows: int) -> list[Call]:
    """Their calls for one number of rows. An error in one becomes the failure of its result."""
    kinds = {"weight-only": _weight_only(inputs), "w8a8": _w8a8(inputs)}[op]
    return [_call(inputs, op, num_rows, *kind) for kind in kinds]


# variant, bits, makes a product with one copy of the weight
_Kind = tuple[str, int, Callable[[Inputs], Callable[[torch.Tensor], torch.Tensor]]]


def _weight_only(inputs: Inputs) -> list[_Kind]:
    kinds: list[_Kind] = []
    if inputs.setup.dtype == torch.bfloat16 and torch.cuda.is_available():
        kinds.append((f"torch int4 g{_GROUP_SIZE}", 4, _torch_int4))
    if _is_there("bitsandbytes"):
        kinds.append(("bitsandbytes nf4", 4, _bitsandbytes_nf4))
    if _is_there("torchao"):
        kinds.append(("torchao int8", 8, partial(_torchao, "Int8WeightOnlyConfig")))
    return kinds


def _w8a8(inputs: Inputs) -> list[_Kind]:
    kinds: list[_Kind] = []
    if _is_there("bitsandbytes"):
        kinds.append(("bitsandbytes int8", 8, _bitsandbytes_int8))
    if _is_there("torchao"):
        config = "Int8DynamicActivationInt8WeightConfig"
        kinds.append(("torchao int8", 8, partial(_torchao, config)))
    return kinds


@cache
def _is_there(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


_made: dict[str, Any] = {}
"""The copies of the latest weight by variant: all numbers of rows share them."""


def _call(
    inputs: Inputs,
    op: str,
    num_rows: int,
    variant: str,
    bits: int,
    make: Callable[[Inputs], Callable[[torch.Tensor], torch.Tensor]],
) -> Call:
    x = inputs.x[:num_rows]
    weight_bytes = inputs.out_features * inputs.in_features * bits // 8
    count = num_sets(weight_bytes, inputs.setup.rotate_bytes)

    def run(i: int) -> torch.Tensor:
        return _copies(inputs, f"{op} {variant}", count, make)[i](x)

    return inputs.call(
        op,
        num_rows,
        variant,
        run,
        count,
        inputs.error(num_rows, None),
        _BOUNDS[bits],
        weight_bytes,
    )


def _copies(
    inputs: Inputs,
    key: str,
    count: int,
    make: Callable[[Inputs], Callable[[torch.Tensor], torch.Tensor]],
) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    if _made.get("inputs") is not inputs:
        _made.clear()
        _made["inputs"] = inputs
    if key not in _made:
        _made[key] = [make(inputs) for _ in range(count)]
    copies: list[Callable[[torch.Tensor], torch.Tensor]] = _made[key]
    return copies


def _linear(inputs: Inputs) -> torch.nn.Linear:
    setup = inputs.setup
    sizes = (inputs.in_features, inputs.out_features)
    linear = torch.nn.Linear(*sizes, bias=False, dtype=setup.dtype, device=setup.device)
    linear.weight = torch.nn.Parameter(inputs.weight.to(setup.dtype), requires_grad=False)
    return linear


def _torch_int4(inputs: Inputs) -> Callable[[torch.Tensor], torch.Tensor]:
    """The 4-bit product of torch itself: code 8 is zero, a scale and a zero for a group."""
    groups = inputs.weight.view(inputs.out_features, -1, _GROUP_SIZE)
    scale = groups.abs().amax(-1, keepdim=True) / 7
    codes = (groups / scale).round_().add_(8).clamp_(0, 15).to(torch.uint8).flatten(1)
    pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous()
    packed = torch._convert_weight_to_int4pack(pairs, 8)
    scales = scale.squeeze(-1).t()
    both = torch.stack([scales, torch.zeros_like(scales)], dim=-1).bfloat16().contiguous()
    return lambda x: torch._weight_int4pack_mm(x, packed, _GROUP_SIZE, both)


def _bitsandbytes_nf4(inputs: Inputs) -> Callable[[torch.Tensor], torch.Tensor]:
    import bitsandbytes as bnb

    sizes, dtype = (inputs.in_features, inputs.out_features), inputs.setup.dtype
    linear = bnb.nn.Linear4bit(*sizes, bias=False, compute_dtype=dtype, quant_type="nf4")
    weight = inputs.weight.to(dtype).cpu()  # it is quantised on its way to the GPU
    linear.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    product: Callable[[torch.Tensor], torch.Tensor] = linear.to(inputs.setup.device)
    return product


def _bitsandbytes_int8(inputs: Inputs) -> Callable[[torch.Tensor], torch.Tensor]:
    import bitsandbytes as bnb

    sizes = (inputs.in_features, inputs.out_features)
    linear = bnb.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False, threshold=0.0)
    weight = inputs.weight.to(inputs.setup.dtype).cpu()
    linear.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    product: Callable[[torch.Tensor], torch.Tensor] = linear.to(inputs.setup.device)
    return product


def _torchao(config: str, inputs: Inputs) -> Callable[[torch.Tensor], torch.Tensor]:
    from torchao import quantization

    linear = _linear(inputs)
    quantization.quantize_(linear, getattr(quantization, config)())
    return linear
