"""How much memory there is for a model on a device (bminf/offload/backends/__init__.py)."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch
from streaming import make_stack

import bminf
from bminf.errors import ArgumentError
from bminf.offload import memory
from bminf.offload.backends import device_for, host_budget


def test_without_a_limit_nine_tenths_are_taken_and_a_mapped_model_is_not_memory_to_come(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of what is free, and what the model itself will let go of."""
    monkeypatch.setattr(memory, "free_bytes", lambda: 10**6)
    model, mapped = make_stack(width=64), make_stack(width=64)
    nbytes = sum(t.nbytes for t in model.state_dict().values())
    for number, parameter in enumerate(mapped.parameters()):
        path = tmp_path / str(number)
        path.write_bytes(parameter.detach().numpy().tobytes())
        flat = torch.from_file(str(path), size=parameter.numel(), shared=True)
        parameter.data = flat.view(parameter.shape)
    bminf.wrapper(model, False, device="cpu")
    bminf.wrapper(mapped, False, device="cpu")
    buffer_bytes = sum(buffer.nbytes for buffer in mapped.buffers())
    assert bminf.plan_of(model).budget == int(0.9 * (10**6 + nbytes))
    assert bminf.plan_of(mapped).budget == int(0.9 * (10**6 + buffer_bytes))


def test_an_index_is_that_of_a_gpu_whether_it_is_there_or_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert device_for(1) == device_for(numpy.int64(1)) == torch.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ArgumentError, match=r"device=0, but torch .* sees 0 GPUs"):
        bminf.TransformerBlockList(make_stack().layers, gpus=[0])
    for wrong in (-1, True, 1.0):
        with pytest.raises(ArgumentError, match=f"device={wrong}; accepted"):
            device_for(wrong)


def test_host_memory_is_what_is_free_and_what_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda: 1000)
    assert host_budget(torch.device("cuda"), 500) == 1200
    assert host_budget(torch.device("cuda")) == 800
    assert host_budget(torch.device("cuda"), 500, 2) == 800  # half of what is free, and its own
    assert host_budget(torch.device("cpu"), 500) is None  # its homes lie in a file anyway
