"""The feed-forward networks of the zoo: with a gate and without."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from bminf.layers.quantized_linear import QuantizedLinear
from bminf.ops.gated_linear import ACTIVATION_FUNCTIONS, gated_linear_of_checked
from bminf.ops.linear_weight_only import MAX_FEW_ROWS


class FeedForward(torch.nn.Module):
    """down(activation(up(x))), with biases."""

    def __init__(self, hidden_size: int, intermediate_size: int, activation: str) -> None:
        super().__init__()
        self.up = torch.nn.Linear(hidden_size, intermediate_size)
        self.down = torch.nn.Linear(intermediate_size, hidden_size)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts: Any = self._modules  # Module.__getattr__ takes as long as a small operation
        return parts["down"](ACTIVATION_FUNCTIONS[self.activation](parts["up"](x)))


class GatedFeedForward(torch.nn.Module):
    """down(activation(gate(x)) * up(x)), without biases.

    Source: Shazeer 2020, arXiv:2002.05202.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, activation: str) -> None:
        super().__init__()
        self.gate: torch.nn.Module = torch.nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up: torch.nn.Module = torch.nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down = torch.nn.Linear(intermediate_size, hidden_size, bias=False)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts: Any = self._modules
        return parts["down"](self._gated(x, parts["gate"], parts["up"]))

    def _gated(self, x: torch.Tensor, gate: torch.nn.Module, up: torch.nn.Module) -> torch.Tensor:
        if isinstance(gate, QuantizedLinear) and isinstance(up, QuantizedLinear):
            if _is_fused(gate, up, x):
                return gated_linear_of_checked(x, gate.packed, up.packed, self.activation)
        return ACTIVATION_FUNCTIONS[self.activation](gate(x)) * up(x)


class HalvedFeedForward(torch.nn.Module):
    """down(value * gelu(gate)), with biases, where value and gate are the halves of up(x).

    One matrix gives both, so it is packed, stored and streamed as one. GELU is the exact one.
    Source: Shazeer 2020, arXiv:2002.05202 (GEGLU); Zeng et al. 2022, arXiv:2210.02414:
    the gate comes second.
    """

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.up = torch.nn.Linear(hidden_size, 2 * intermediate_size)
        self.down = torch.nn.Linear(intermediate_size, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts: Any = self._modules
        value, gate = parts["up"](x).chunk(2, dim=-1)
        return parts["down"](value * F.gelu(gate))


def _is_fused(gate: QuantizedLinear, up: QuantizedLinear, x: torch.Tensor) -> bool:
    """Whether one kernel reads both packed weights; it does not round activations."""
    is_alike = gate.form is up.form or gate.form == up.form
    return is_alike and gate.activations != "int8" and x.numel() <= MAX_FEW_ROWS * x.shape[-1]
