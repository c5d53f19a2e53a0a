"""Whether operations on tensors are being recorded (traced, captured) instead of only run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.fx import _symbolic_trace
from torch.fx.experimental.proxy_tensor import get_proxy_mode

_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", bool)  # or of old torch


def active_tracer() -> str | None:
    """What records every operation of this thread at the moment; None for nothing.

    torch.compile is not among them: it asks beforehand (torch.compiler.is_compiling).
    """
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace (or the ONNX export that uses it)"
    if _is_exporting():
        return "torch.export"
    # Most often the stack of modes is empty, which is quicker to ask than for one of them.
    if torch._C._len_torch_dispatch_stack():
        if get_proxy_mode() is not None:
            return "make_fx"
        if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
            return "FakeTensorMode (AOTAutograd uses it)"
    if _symbolic_trace._is_fx_tracing_flag:
        return "torch.fx.symbolic_trace"
    return None


def is_watched() -> bool:
    """Whether someone is told of every operation: a mode, functorch, a trace, derivatives that
    tensors carry forwards."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )


def active_capture() -> str | None:
    """The CUDA graph that the current stream is captured into; None for none."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph"
    return None


def disable_compile(function: Callable[..., Any], reason: str) -> Callable[..., Any]:
    """`function`, run as it is under torch.compile; fullgraph=True fails with the reason."""
    disable: Callable[..., Callable[..., Any]] = torch.compiler.disable
    try:
        return disable(function, reason=reason)
    except TypeError:  # torch before 2.7 takes no reason
        return disable(function)
