"""What tests of streaming share: small hand-written models, and wrapping with little room."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

import bminf
from bminf.offload.disk import Outcome
from bminf.offload.ring import NUM_SLOTS
from bminf.wrapping import plan_for

HANGS_S = 120.0  # what is waited for takes milliseconds, also where all cores are busy seconds


class Residual(torch.nn.Module):
    """A block with two matrices, a bias and a buffer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = torch.nn.Linear(width, 2 * width)
        self.down = torch.nn.Linear(2 * width, width, bias=False)
        self.register_buffer("shift", torch.randn(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x))) + self.shift


class Stack(torch.nn.Module):
    """Blocks in a list, and a head outside it."""

    def __init__(self, num_blocks: int = 7, width: int = 16, block: type = Residual) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([block(width) for _ in range(num_blocks)])
        self.head = torch.nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def num_readers() -> int:
    """Reader threads that are alive; tqdm and others have threads, too."""
    return sum(thread.name == "bminf-reader" for thread in threading.enumerate())


def until(is_so: Callable[[], bool]) -> None:
    """Wait for what another thread does by itself; two minutes are a hang."""
    ends_s = time.monotonic() + HANGS_S
    while not is_so():
        assert time.monotonic() < ends_s
        time.sleep(0.01)


def settled_readers() -> int:
    """As num_readers, once the threads of models that nobody holds any more have ended.

    Their finalizers wait for no thread, so a test that counts must: a thread that was told to end
    does so before the job that is handed to it here, any other thread does the job.
    """
    gc.collect()
    for thread in threading.enumerate():
        if thread.name == "bminf-reader" and (arguments := getattr(thread, "_args", None)):
            answered = threading.Event()
            arguments[0].put((answered.set, Outcome()))
            until(lambda t=thread, a=answered: a.is_set() or not t.is_alive())
    return num_readers()


def timed_copy_bytes(plan: bminf.Plan, num_passes: int) -> int:
    """Bytes of the copies that begin and are waited for between two events around some passes.

    The first blob for each slot was copied before the clock started, and what is copied ahead for
    the pass behind them is not waited for.
    """
    sizes = {block.name: block.nbytes for block in plan.blocks}
    return num_passes * plan.streamed_bytes - sum(sizes[n] for n in plan.streamed[:NUM_SLOTS])


def make_stack(**arguments: Any) -> Stack:
    torch.manual_seed(0)
    return Stack(**arguments).eval()


def least_limit(model: torch.nn.Module, **arguments: Any) -> int:
    """A limit with room for two slots and no block beside them."""
    whole = plan_for(model, **{"quantization": False, **arguments})
    largest = max(block.nbytes for block in whole.blocks)
    return whole.fixed_bytes + 2 * largest


def stream(model: torch.nn.Module, extra_bytes: int = 0, **arguments: Any) -> Any:
    """Wrap `model` on the CPU, unquantized, with room for two slots and `extra_bytes`."""
    chosen = {k: v for k, v in arguments.items() if k in ("quantization", "quantize", "blocks")}
    limit = least_limit(model, **chosen) + extra_bytes
    settings = {"quantization": False, "device": "cpu", "memory_limit": limit, **arguments}
    bminf.wrapper(model, **settings)
    plan = bminf.plan_of(model)
    assert plan.streamed or plan.experts is not None
    return model


def streamed(**arguments: Any) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """A stack that streams, an input, and what the stack gives for it when it does not stream."""
    model, x = make_stack(**arguments), torch.randn(3, arguments.get("width", 16))
    expected = model(x)
    return stream(model), x, expected


def assert_same_weights(given: torch.nn.Module, expected: torch.nn.Module) -> None:
    """Bit for bit, in the same order, under the same names."""
    weights, right = given.state_dict(), expected.state_dict()
    assert list(weights) == list(right)
    for name, tensor in weights.items():
        assert torch.equal(tensor, right[name]), name


def raise_once(module: torch.nn.Module, error: BaseException) -> None:
    """Let the next call of `module` raise from inside."""

    def hook(*_: Any) -> None:
        handle.remove()
        raise error

    handle = module.register_forward_pre_hook(hook)


MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}
