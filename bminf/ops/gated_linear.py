"""The first half of a gated feed-forward: activation(x W_gate^T) * (x W_up^T).

For few rows one kernel reads both weights once and writes the product; otherwise two linears.
Kernels: kernels/linear_few_rows.cu with GATED, kernels/cpu/gated.h.
Source: Shazeer 2020, arXiv:2002.05202.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from bminf.cuda.launcher import Launcher, launcher_for
from bminf.errors import ArgumentError
from bminf.ops.cpu_linear import few_rows_gated
from bminf.ops.linear import linear
from bminf.ops.linear_weight_only import (
    MAX_FEW_ROWS,
    few_rows_launched,
    launch_few_rows,
    uses_tensor_cores,
)
from bminf.ops.rows import as_rows, check_activations, check_codes, check_vector, kernel_rows
from bminf.quantization.packed import PackedWeight
from bminf.tracing import is_recorded, is_watched

ACTIVATION_FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "silu": F.silu,
}
"""In the order of `activate` in kernels/common.cuh and `gate` in kernels/cpu/gated.h."""
_INDICES = {name: index for index, name in enumerate(ACTIVATION_FUNCTIONS)}


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
    return gated_linear_of_checked(x, gate, up, activation, gate_bias, up_bias)


def gated_linear_of_checked(
    x: torch.Tensor,
    gate: PackedWeight,
    up: PackedWeight,
    activation: str,
    gate_bias: torch.Tensor | None = None,
    up_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """As gated_linear, for weights that are known to be alike and their parts to match, and an
    activation that is known, as in a layer of ours."""
    index = _INDICES[activation]
    if not is_watched():
        launcher = launcher_for(x.device)
        if launcher is None:
            few = few_rows_gated(x, gate, up, index, gate_bias, up_bias)
        else:
            few = few_rows_launched(launcher, x, gate, gate_bias, up, up_bias, index)
        if few is not None:
            return few
    # Not asked for a GPU where tensors are fake, which need none.
    launcher = None if is_recorded() else launcher_for(x.device)
    if launcher is None or not _is_fused(launcher, x, gate):
        function = ACTIVATION_FUNCTIONS[activation]
        return function(linear(x, gate, gate_bias)) * linear(x, up, up_bias)
    check_codes("gate", gate.qweight)
    check_codes("up", up.qweight)
    gate_bias, up_bias = (_checked(bias, gate, x.dtype) for bias in (gate_bias, up_bias))
    rows = kernel_rows(as_rows(x.detach()))
    y = launch_few_rows(launcher, rows, gate, gate_bias, up, up_bias, index)
    return y.view(*x.shape[:-1], gate.out_features)


def _is_fused(launcher: Launcher, x: torch.Tensor, gate: PackedWeight) -> bool:
    columns = gate.in_features
    num_rows = x.numel() // columns if columns and x.dim() else 0
    return (
        0 < num_rows <= MAX_FEW_ROWS
        and gate.out_features > 0
        and not uses_tensor_cores(launcher.capability, num_rows, x.dtype)
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
