"""What streaming adds to a block in Python calls, counted: time depends on the machine."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
import transformers
from streaming import Stack, make_stack, stream

import bminf
from bminf import tracing
from bminf.offload import hooks

NUM_BLOCKS = 30
MOST_CALLS = 70  # that streaming adds to a block; 242 where every tensor was asked for by itself


def calls_of(work: Callable[[], Any]) -> Counter[tuple[str, str]]:
    """(file, function) of each Python frame that `work` begins in this thread; C has none."""
    calls: Counter[tuple[str, str]] = Counter()

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            calls[frame.f_code.co_filename, frame.f_code.co_name] += 1

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(before)
    return calls


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=NUM_BLOCKS,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def decoding(model: Any) -> Callable[[], torch.Tensor]:
    """A function that decodes one more token, and gives its logits."""
    cache = model(torch.arange(8).unsqueeze(0), use_cache=True).past_key_values
    ids = torch.tensor([[5]])
    return lambda: model(ids, past_key_values=cache, use_cache=True).logits


@pytest.mark.parametrize("mode", ["inference", "grad"])
def test_streaming_adds_few_calls_to_a_block(mode: str) -> None:
    resident, streamed = llama().requires_grad_(False), stream(llama().requires_grad_(False))
    assert len(bminf.plan_of(streamed).streamed) == NUM_BLOCKS
    with torch.inference_mode(mode == "inference"):
        steps = [decoding(model) for model in (resident, streamed)]
        assert torch.equal(*[step() for step in steps])  # and what is set up once is
        num_calls = [calls_of(step).total() for step in steps]
    added = (num_calls[1] - num_calls[0]) / NUM_BLOCKS
    assert 5 < added <= MOST_CALLS


class Around(torch.nn.Module):
    """A stack with a module more around it."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def test_a_guard_takes_two_calls_beside_what_torch_takes() -> None:
    """Around a module; that of a block has one more, for its slot."""
    # Not the backends: how often one waits for its reader depends on the machine.
    files = (hooks.__file__, tracing.__file__)
    stack: Stack = make_stack()
    stream(stack)
    around = stream(Around(make_stack()))
    x = torch.randn(3, 16)
    counts = []
    for model in (stack, around):
        model(x)
        calls = calls_of(lambda model=model: model(x))
        counts.append(Counter({key: n for key, n in calls.items() if key[0] in files}))
    extra = {function: n for (_, function), n in (counts[1] - counts[0]).items()}
    assert extra == {"__call__": 1, "call": 1, "active_tracer": 1, "active_capture": 1}
