"""Guards of the scheduler and the wrapper, each alone: taken out, its test here fails."""

from __future__ import annotations

import threading
from typing import Any

import torch
from streaming import (
    make_stack,
    stream,
)

import bminf


def test_9_unwrapping_waits_for_the_pass_of_another_thread() -> None:
    model, x = make_stack(), torch.randn(3, 16)
    expected = model(x)
    stream(model)
    thread = threading.Thread(target=lambda: bminf.unwrap(model))

    def hook(*_: Any) -> None:
        handle.remove()
        thread.start()
        thread.join(0.3)

    handle = model.layers[4].up.register_forward_pre_hook(hook)
    assert torch.equal(model(x), expected)
    thread.join()
    assert bminf.plan_of(model) is None and torch.equal(model(x), expected)
