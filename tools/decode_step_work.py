"""What tools.decode_step runs in a process of its own, with the bminf of some checkout: for each
line that it reads, the CPU seconds of a decode step of CPM-2's decoder.

Tensors lie on the CPU and have the real shapes; kernels are launched as on a GPU, with all checks
and arguments, up to the driver's own call, which returns at once. What a checkout leaves to torch's
operators is computed on the CPU, but for attention, whose work would hide what is measured: it
returns at once, too. Weights are never touched, so that they take no memory.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
import types
from collections.abc import Iterator
from typing import Any

import torch

# What builds for CUDA have, and bminf takes where it is: the handle of the current stream.
torch._C._cuda_getCurrentRawStream = lambda index: 0  # type: ignore

import bminf  # noqa: E402
from bminf.arch.t5 import T5, T5Config  # noqa: E402
from bminf.layers.quantized_linear import QuantizedLinear  # noqa: E402

CONFIG = T5Config(26240, 4096, 10240, 64, 64, 1, 24)
PROMPT_TOKENS, TOKENS, STEPS = 128, 64, 5


def main() -> None:
    print(json.dumps(str(bminf.__file__)), flush=True)
    torch.set_num_threads(1)
    _attention_at_once()
    network = decoder()
    cache = filled_cache(network)
    x = torch.randn(1, 1, CONFIG.hidden_size).half()
    with torch.inference_mode(), served_by(launcher()):
        for _ in sys.stdin:
            print(json.dumps(step_s(network, x, cache)), flush=True)


def decoder() -> Any:
    """CPM-2 with one layer of an encoder, its decoder's linears packed, in memory nobody writes."""
    with torch.device("meta"):
        network = T5(CONFIG).half().eval()
    linears = [n for n, m in network.decoder.named_modules() if isinstance(m, torch.nn.Linear)]
    for name in linears:
        parent, _, own = name.rpartition(".")
        linear = network.decoder.get_submodule(name)
        setattr(network.decoder.get_submodule(parent), own, QuantizedLinear(linear))
    network.to_empty(device="cpu")
    for name, parameter in network.named_parameters():
        if "norm" in name or "bias" in name:
            parameter.data.fill_(1)
    return network


def filled_cache(network: Any) -> Any:
    """Of one row, with a prompt and the first tokens of an answer."""
    cache = network.new_cache(1, PROMPT_TOKENS, 2 * TOKENS)
    begin = getattr(cache, "start", None) or cache.begin
    begin(1, None)
    cache.cross.advance(PROMPT_TOKENS)
    cache.own.advance(TOKENS)
    return cache


def step_s(network: Any, x: torch.Tensor, cache: Any) -> float:
    """CPU seconds of a step, the mean of a few."""
    started = time.process_time()
    for _ in range(STEPS):
        network.decoder(x, cache)
        cache.own.length = TOKENS
    return (time.process_time() - started) / STEPS


def launcher() -> Any:
    """The real one, of a device that is not there: capability 9.0, 132 multiprocessors."""
    try:
        from bminf.cuda.device import DeviceLauncher as Launcher  # type: ignore
    except ImportError:
        from bminf.cuda.launcher import Launcher  # type: ignore
    properties = types.SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    stream = types.SimpleNamespace(cuda_stream=0)
    cuda: Any = torch.cuda
    cuda.get_device_properties = lambda device: properties
    cuda.is_current_stream_capturing = lambda: False
    cuda.current_device = lambda: 0
    cuda.mem_get_info = lambda device: (0, 0)
    cuda.device = lambda device: contextlib.nullcontext()
    cuda.current_stream = lambda device: stream
    for module in _launching():
        module._cupy_stream = lambda handle: handle  # of older checkouts
    found = Launcher(torch.device("cuda", 0))
    found._load = lambda kernel: found._functions.setdefault(kernel, lambda *arguments: None)
    return found


def _launching() -> list[Any]:
    """The modules of a checkout that launch kernels."""
    return [
        m for name, m in sys.modules.items() if name in ("bminf.cuda.launcher", "bminf.cuda.device")
    ]


def _attention_at_once() -> None:
    """torch's operator gives memory of the right size and computes nothing."""
    functional: Any = torch.nn.functional
    functional.scaled_dot_product_attention = lambda query, *_, **__: torch.empty_like(query)


@contextlib.contextmanager
def served_by(found: Any) -> Iterator[None]:
    """Kernels for tensors on the CPU go to `found` in the meantime."""
    from bminf.cuda import launcher as launchers

    names = ("known_launchers", "_test_launchers", "_stand_ins")  # of this commit, of older ones
    name = next(name for name in names if hasattr(launchers, name))
    known: dict[Any, Any] = getattr(launchers, name)
    cpu: Any = torch.device("cpu") if name == "known_launchers" else "cpu"
    known[cpu] = found
    yield
    del known[cpu]


if __name__ == "__main__":
    main()
