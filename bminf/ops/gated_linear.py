"""The first half of a gated feed-forward: activation(x W_gate^T) * (x W_up^T).

For few rows one kernel reads both weights once and writes the product; otherwise two linears.
Kernel: kernels/linear_few_rows.cu with GATED.   Source: Shazeer 2020, arXiv:2002.05202.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from bminf.cuda.launcher import Launcher, launcher_for
from bminf.errors import ArgumentError
from bminf.ops.linear import linear
from bminf.ops.linear_weight_only import MAX_FEW_ROWS, launch_few_rows, uses_tensor_cores
from bminf.ops.rows import as_rows, check_activations, check_codes, check_vector
from bminf.quantization.packed import PackedWeight

ACTIVATION_FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "silu": F.silu,
}
"""In the order of `activate` in kernels/common.cuh."""


def check_activation(name: str, where: str = "") -> None:
    """Raise ArgumentError for an activation that there is no function and no kernel for.

    where: what the message begins with.
    """
    if not isinstance(name, str) or name not in ACTIVATION_FUNCTIONS:
        known = ", ".join(ACTIVATION_FUNCTIONS)
        raise ArgumentError(f"{where}activation {name!r}; accepted: {known}")


def gated_linear(
    x: torch.Tensor,
    gate: PackedWeight,
    up: PackedWeight,
    activation: str,
    gate_bias: torch.Tensor | None = None,
    up_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """activation(x W_gate^T + gate_bias) * (x W_up^T + up_bias).

    x: (..., K) float32, float16 or bfloat16.   gate, up: (N, K) packed in one format.
    activation: "gelu_tanh", "gelu" or "silu".   Returns (..., N) in the dtype of x.
    Raises ArgumentError.
    """
    check_activation(activation)
    _check_alike(gate, up)
    check_activations(x, gate.in_features, gate.qweight.device)
    launcher = launcher_for(x.device)
    rows = as_rows(x.detach())
    is_fused = launcher is not None and _is_fused(launcher, x, rows, gate)
    if launcher is None or not is_fused:
        function = ACTIVATION_FUNCTIONS[activation]
        return function(linear(x, gate, gate_bias)) * linear(x, up, up_bias)
    gate_bias, up_bias = (_checked(bias, gate, x.dtype) for bias in (gate_bias, up_bias))
    check_codes("gate", gate.qweight)
    check_codes("up", up.qweight)
    index = list(ACTIVATION_FUNCTIONS).index(activation)
    y = launch_few_rows(launcher, rows, gate, gate_bias, up, up_bias, index)
    return y.view(*x.shape[:-1], gate.out_features)


def _is_fused(launcher: Launcher, x: torch.Tensor, rows: torch.Tensor, gate: PackedWeight) -> bool:
    return (
        0 < len(rows) <= MAX_FEW_ROWS
        and 0 not in (gate.in_features, gate.out_features)
        and not uses_tensor_cores(launcher.capability, len(rows), x.dtype)
        and not (torch.is_grad_enabled() and x.requires_grad)
    )


def _check_alike(gate: PackedWeight, up: PackedWeight) -> None:
    gate.check()
    up.check()
    for name in ("form", "in_features", "out_features"):
        of_gate, of_up = getattr(gate, name), getattr(up, name)
        if of_gate != of_up:
            raise ArgumentError(f"gate has {name} {of_gate}, up {of_up}; they must be alike")
    if gate.qweight.device != up.qweight.device:
        raise ArgumentError(f"gate is on {gate.qweight.device}, up on {up.qweight.device}")


def _checked(
    bias: torch.Tensor | None, gate: PackedWeight, dtype: torch.dtype
) -> torch.Tensor | None:
    check_vector("bias", bias, gate.out_features, gate.qweight.device)
    return None if bias is None else bias.to(dtype).contiguous()
