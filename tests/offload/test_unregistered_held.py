"""Weights that were let go and are held by somebody else are told, with their bytes; no others."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module
from streaming import Stack, least_limit, make_stack, stream
from tiny_models import LLAMA

import bminf

WIDTH = 192
BLOCK_BYTES = 2 * 2 * WIDTH * WIDTH * 4 + 2 * WIDTH * 4 + WIDTH * 4  # two matrices, bias, buffer
HEAD_BYTES = 5 * (WIDTH + 1) * 4
ALL_BYTES = 7 * BLOCK_BYTES + HEAD_BYTES


def large() -> Stack:
    return make_stack(width=WIDTH)


def loaded() -> tuple[Stack, Any]:
    weights = large().state_dict()
    with torch.device("meta"):
        model = Stack(width=WIDTH).eval()
    model.load_state_dict(weights, assign=True)
    return model, weights


def trained() -> tuple[Stack, Any]:
    model = large()
    return model, torch.optim.SGD(model.parameters())


def listed() -> tuple[Stack, Any]:
    model = large()
    for layer in model.layers:
        layer.weights = [layer.up.weight, layer.down.weight.t()]
    return model, None


def shared() -> tuple[Stack, Any]:
    model = large()
    other = copy.deepcopy(model)
    for module, twin in zip(model.modules(), other.modules(), strict=True):
        twin._parameters.update(module._parameters)
    return model, other


def differentiated() -> tuple[Stack, Any]:
    model = large()
    return model, model(torch.randn(3, WIDTH))


def viewed() -> tuple[Stack, Any]:
    model = large()
    return model, {"rows": [layer.up.weight.detach()[:1] for layer in model.layers]}


def numbers_in(message: str) -> float:
    amount, unit, *_ = message.split()
    return float(amount) * {"KiB": 2**10, "MiB": 2**20}[unit]


MATRICES = 7 * (BLOCK_BYTES - 3 * WIDTH * 4)
STREAMED = {
    loaded: ALL_BYTES,
    trained: ALL_BYTES - HEAD_BYTES - 7 * WIDTH * 4,  # the head is moved where it is held, too
    listed: MATRICES,
    shared: ALL_BYTES - HEAD_BYTES - 7 * WIDTH * 4,
    viewed: MATRICES // 2,
}


@pytest.mark.parametrize("make", STREAMED)
def test_what_others_hold_is_told(make: Callable[[], tuple[Stack, Any]]) -> None:
    model, holder = make()
    x = torch.randn(3, WIDTH)
    with torch.no_grad():
        expected = model(x)
    with pytest.warns(UserWarning, match="still held by other references.*delete") as said:
        bminf.wrapper(model, False, least_limit(model), device="cpu")
    assert len(said) == 1 and said[0].filename == __file__
    told = numbers_in(str(said[0].message))
    assert told == pytest.approx(STREAMED[make], abs=2**20 / 20)
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    del holder


def test_the_history_of_an_output_is_its_own_affair() -> None:
    model, output = differentiated()
    stream(model)
    assert output.requires_grad


def test_weights_that_are_packed_are_let_go_too() -> None:
    model, weights = loaded()
    with pytest.warns(UserWarning, match=r"MiB of the weights that were let go"):
        bminf.wrapper(model, memory_limit="1GB", device="cpu")
    assert len(weights) == len(large().state_dict())


def tied() -> torch.nn.Module:
    config = transformers.LlamaConfig(
        **{**LLAMA, "vocab_size": 9000, "hidden_size": 64}, tie_word_embeddings=True
    )
    return transformers.LlamaForCausalLM(config).eval()


def in_cycles() -> torch.nn.Module:
    model = large()
    for module in list(model.modules()):
        if isinstance(module, torch.nn.Linear):
            add_hook_to_module(module, ModelHook())  # a forward that refers to its module
    return model


def made_in_inference_mode() -> torch.nn.Module:
    with torch.inference_mode():
        return large()


def wrapped_before() -> torch.nn.Module:
    model = stream(large())
    for layer in model.layers:
        add_hook_to_module(layer, ModelHook())  # holds the forward that streamed
    return bminf.unwrap(model)


@pytest.mark.parametrize("make", [large, tied, in_cycles, made_in_inference_mode, wrapped_before])
@pytest.mark.parametrize("quantization", [False, True])
def test_nothing_is_told_where_all_is_free(
    make: Callable[[], torch.nn.Module], quantization: bool
) -> None:
    """Warnings are errors."""
    for limit in ("1GB", None):
        model = make()
        if limit is not None:
            bminf.wrapper(model, quantization, limit, device="cpu")
        else:
            stream(model, quantization=quantization)
        bminf.unwrap(model)


def test_files_that_are_mapped_are_not_memory(tmp_path: Path) -> None:
    tied().save_pretrained(tmp_path)
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    held = model.state_dict()
    stream(model)
    assert held


def test_a_trainer_of_adapters_beside_the_blocks_holds_nothing() -> None:
    model = large()
    model.layers.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad])
    stream(model)
    model(torch.randn(2, WIDTH)).sum().backward()
    before = model.head.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(before, model.head.weight)
