"""What tests of quantized models share."""

from __future__ import annotations

import warnings
from typing import Any

import torch

import bminf
from bminf.layers.experts import PackedStack
from bminf.quantization.packed import PackedWeight, dequantize
from bminf.wrapping import plan_for


def quantize_on_cpu(
    model: torch.nn.Module,
    quantization: str | bool,
    memory_limit: Any = "1GB",
    blocks: list[str] | None = None,
) -> Any:
    """Wrap `model` on the CPU; narrow linears stay without a word."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fewer than share a scale")
        return bminf.wrapper(model, quantization, memory_limit, device="cpu", blocks=blocks)


def quantize_and_stream(
    model: torch.nn.Module, quantization: str | bool, blocks: list[str] | None = None
) -> Any:
    """As quantize_on_cpu, with fewer than half of the blocks resident, and few experts."""
    whole = plan_for(model, quantization, blocks=blocks)
    sizes = sorted((block.nbytes for block in whole.blocks), reverse=True)
    limit = whole.fixed_bytes + 2 * sizes[0] + sum(sizes) // 6
    planned = plan_for(model, quantization, limit, blocks=blocks, device="cpu")
    if planned.experts is not None:  # what is dense may fit entirely
        limit = planned.least_limit + planned.experts.slot_bytes
    quantize_on_cpu(model, quantization, limit, blocks)
    plan = bminf.plan_of(model)
    assert plan.experts or len(plan.resident) < len(plan.blocks) / 2
    assert plan.total_bytes <= limit
    return model


def dequantize_linears(model: torch.nn.Module) -> torch.nn.Module:
    """Put an ordinary linear with the same weights in the place of each quantized one, and an
    ordinary stack in that of each quantized stack of experts."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, PackedStack):
                matrices = torch.stack([child[expert] for expert in range(child.num_experts)])
                delattr(parent, name)
                setattr(parent, name, torch.nn.Parameter(matrices, requires_grad=False))
            if isinstance(child, bminf.QuantizedLinear):
                linear = torch.nn.Linear(1, 1, bias=child.bias is not None)
                linear.weight = torch.nn.Parameter(child.dequantize(), requires_grad=False)
                linear.bias = child.bias
                setattr(parent, name, linear)
    return model


def product(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """x W^T in float64, of what the packed weight means."""
    return x.double() @ dequantize(weight, torch.float64).T


def relative_error(given: torch.Tensor, expected: torch.Tensor) -> float:
    given, expected = given.detach().double(), expected.detach().double()
    return float((given - expected).norm() / expected.norm())
