"""Whether a kernel of our own can take the place of torch's operators for some tensors."""

from __future__ import annotations

import torch

from bminf.cuda.launcher import Launcher, fused_launcher, known_launchers
from bminf.ops.rows import ELEMENTS, is_ordinary
from bminf.tracing import has_autocast, is_autocast, is_recorded

_CPU = torch.device("cpu")


def launcher_in_place(x: torch.Tensor, *others: torch.Tensor) -> Launcher | None:
    """Who launches a kernel for such tensors in place of torch's operators; None for these.

    That is where a gradient or a trace is recorded, or operators do more than compute (autocast,
    functorch, other classes of tensors); for other dtypes than one of ELEMENTS for all; and where
    there is nothing to compute.
    """
    if x.is_cpu and known_launchers.get(_CPU) is None:  # before all else: it decides for most
        return None
    # No GPU is asked for on behalf of tensors without bytes, whose class is another one.
    if is_recorded() or not is_ordinary(type(x)):
        return None
    launcher, dtype = fused_launcher(x.device), x.dtype
    if launcher is None or dtype not in ELEMENTS or not x.numel():
        return None
    for other in others:
        if other.dtype is not dtype:
            return None
    if torch.is_grad_enabled() and any(y.requires_grad for y in (x, *others)):
        return None
    return None if has_autocast() and is_autocast(x) else launcher
