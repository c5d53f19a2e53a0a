"""Whether a kernel of our own can take the place of torch's operators for some tensors."""

from __future__ import annotations

import torch

from bminf.ops.rows import ELEMENTS
from bminf.tracing import active_tracer


def is_fusible(x: torch.Tensor, *others: torch.Tensor) -> bool:
    """False where a gradient or a trace is recorded, which knows torch's operators only, for other
    dtypes than one of ELEMENTS for all, and where there is nothing to compute.

    Asked behind fused_launcher(), which says most often that there is no launcher.
    """
    dtype = x.dtype
    if dtype not in ELEMENTS or not x.numel():
        return False
    for other in others:
        if other.dtype is not dtype:
            return False
    if torch.is_grad_enabled() and any(y.requires_grad for y in (x, *others)):
        return False
    return not torch.compiler.is_compiling() and active_tracer() is None
