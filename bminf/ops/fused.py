"""Whether a kernel of our own can take the place of torch's operators for some tensors."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

from bminf.ops.rows import ELEMENTS, is_ordinary
from bminf.tracing import active_tracer


def is_fusible(x: torch.Tensor, *others: torch.Tensor) -> bool:
    """False where a gradient or a trace is recorded, or operators do more than compute (autocast,
    functorch, other classes of tensors); for other dtypes than one of ELEMENTS for all; and where
    there is nothing to compute.

    Asked behind fused_launcher(), which says most often that there is no launcher.
    """
    dtype = x.dtype
    if dtype not in ELEMENTS or not x.numel() or not is_ordinary(type(x)):
        return False
    for other in others:
        if other.dtype is not dtype:
            return False
    if torch.is_grad_enabled() and any(y.requires_grad for y in (x, *others)):
        return False
    if torch.compiler.is_compiling() or active_tracer() is not None:
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return False
    return not torch.is_autocast_enabled(x.device.type)
