"""What holds the weights of a streamed model: its state dict and parameters, files and copies."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import os
import pickle
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from streaming import HANGS_S, assert_same_weights, make_stack, stream, streamed
from tiny_models import inputs_of, make, output_of

import bminf
from bminf.errors import UnsupportedModelError


def test_parameters_and_buffers_are_the_real_ones() -> None:
    model, reference = stream(make_stack()), make_stack()
    for given, right in zip(model.parameters(), reference.parameters(), strict=True):
        assert isinstance(given, torch.nn.Parameter)
        assert given.shape == right.shape and given.dtype == right.dtype
        assert torch.equal(given, right) and torch.equal(given.data, right)
        assert given.tolist() == right.tolist()
    for given, right in zip(model.buffers(), reference.buffers(), strict=True):
        assert torch.equal(given, right)


def test_the_state_dict_holds_them_also_when_the_model_is_gone() -> None:
    model, reference = stream(make_stack()), make_stack().state_dict()
    model(torch.randn(3, 16))
    weights, layer = model.state_dict(), model.layers[5].state_dict()
    bminf.unwrap(model)
    del model
    gc.collect()
    assert list(weights) == list(reference)
    for name, right in reference.items():
        assert type(weights[name]) is torch.Tensor and torch.equal(weights[name], right), name
    assert all(torch.equal(layer[k], reference[f"layers.5.{k}"]) for k in layer)


def test_a_streamed_model_can_be_saved(tmp_path: Path) -> None:
    model, given = make("llama"), inputs_of("llama")
    expected = output_of(model, given)
    stream(model)
    model.save_pretrained(tmp_path / "hf")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    again = type(model).from_pretrained(tmp_path / "hf").eval()
    assert torch.equal(output_of(again, given), expected)
    other = make("llama", seed=5)
    other.load_state_dict(torch.load(tmp_path / "weights.pt"))
    assert torch.equal(output_of(other, given), expected)
    assert torch.equal(output_of(model, given), expected)


@pytest.mark.parametrize("part", ["", "layers", "layers.5"])
def test_copying_and_pickling_are_refused(part: str) -> None:
    model = stream(make_stack())
    with pytest.raises(UnsupportedModelError, match="copied"):
        copy.deepcopy(model.get_submodule(part))
    with pytest.raises(UnsupportedModelError, match="pickled"):
        pickle.dumps(model.get_submodule(part))


def test_a_state_dict_taken_in_inference_mode_is_an_ordinary_one() -> None:
    model = stream(make_stack())
    with torch.inference_mode():
        homes = [model._bminf_scheduler.backend.host_copy(0)]
    assert not any(home.is_inference() for home in homes)


def test_a_resident_model_can_be_copied_and_pickled() -> None:
    model, x = make_stack(), torch.randn(3, 16)
    bminf.wrapper(model, False, "1GB", device="cpu")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x)) and bminf.plan_of(other) is None
        stream(other)
        assert torch.equal(other(x), model(x))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_gets_an_error_and_does_not_hang() -> None:
    model, x, _ = streamed()
    model(x)

    def use(queue: Any) -> None:
        signal.alarm(int(HANGS_S))
        try:
            model(x)
        except UnsupportedModelError as error:
            queue.put(str(error))

    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=use, args=(queue,))
    process.start()
    process.join(2 * HANGS_S)
    assert process.exitcode == 0 and "forked process" in queue.get()
    model(x)


@pytest.mark.parametrize("part", ["", "layers", "layers.5"])
def test_a_state_dict_is_loaded_into_the_homes(part: str) -> None:
    model, plain, x = stream(make_stack()), make_stack(), torch.randn(3, 16)
    assert "layers.5" in bminf.plan_of(model).streamed
    model(x)  # the first blocks of the next pass are being copied already
    for module in (one.get_submodule(part) for one in (model, plain)):
        module.load_state_dict({k: v + 1 for k, v in module.state_dict().items()})
    assert_same_weights(model, plain)
    assert torch.equal(model(x), plain(x)) and torch.equal(model(x), plain(x))
    bminf.unwrap(model)
    assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize("part", ["", "layers", "layers.5"])
def test_loading_by_assignment_is_refused(part: str) -> None:
    model = stream(make_stack())
    module = model.get_submodule(part)
    weights = {k: v + 1 for k, v in module.state_dict().items()}
    with pytest.raises(UnsupportedModelError, match="leave assign out"):
        module.load_state_dict(weights, assign=True)
    assert_same_weights(model, make_stack())


def test_what_loading_misses_is_what_torch_says() -> None:
    weights = make_stack().state_dict()
    key = next(key for key in weights if key.startswith("layers.5"))
    weights["other"] = weights.pop(key)
    plain, model = make_stack(), stream(make_stack())
    found = [one.load_state_dict(weights, strict=False) for one in (plain, model)]
    assert found[0] == found[1] and found[1].missing_keys == [key]
    messages = []
    for one in (plain, model):
        with pytest.raises(RuntimeError) as caught:
            one.load_state_dict(weights)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
