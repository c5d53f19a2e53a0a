"""Whether operations on tensors are being recorded (traced, captured) instead of only run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.fx import _symbolic_trace
from torch.fx.experimental.proxy_tensor import get_proxy_mode

_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", bool)  # or of old torch
_interpreter = torch._C._functorch.peek_interpreter_stack
_tracing_state = torch._C._get_tracing_state
_num_modes = torch._C._len_torch_dispatch_stack

has_autocast: Callable[[], bool] = torch._C._is_any_autocast_enabled
"""Whether it is on for some device; the name of that of a tensor takes longer to learn."""


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


def is_recorded() -> bool:
    """Whether operations are more than computed: torch.compile or a tracer keeps them, functorch
    changes what they mean, tensors carry derivatives forwards.

    Asked by every op of every layer, so it is spelled out; torch.compile and torch.export look into
    nothing that stands behind the first question.
    """
    return (
        torch.compiler.is_compiling()
        or _interpreter() is not None
        or forward_ad._current_level >= 0
        or _tracing_state() is not None
        or _symbolic_trace._is_fx_tracing_flag
        or (_num_modes() > 0 and active_tracer() is not None)
    )


def is_watched() -> bool:
    """The same, or a mode is told of every operation, one that only counts them too."""
    return (
        torch.compiler.is_compiling()
        or _num_modes() > 0
        or _interpreter() is not None
        or forward_ad._current_level >= 0
        or _tracing_state() is not None
        or _symbolic_trace._is_fx_tracing_flag
    )


def is_autocast(tensor: torch.Tensor) -> bool:
    """Whether autocast chooses the dtype of what is computed where `tensor` lies."""
    return torch.is_autocast_enabled(tensor.device.type)


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
