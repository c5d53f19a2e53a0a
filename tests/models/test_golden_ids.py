"""The likeliest tokens of small models, as tests/snapshots has them: with everything resident, and
with all blocks streamed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import tiny_models
import torch
from snapshot_files import check
from streaming import stream

import bminf
from bminf.models import CPM2

Loader = Callable[..., Any]
FILE = "greedy_ids.json"
WRAPPED_FILE = "greedy_ids_wrapped.json"
LIKELIEST = {"max_tokens": 10, "temperature": 0, "frequency_penalty": 3.0}
"""Without a penalty a small random model says one word again and again."""

CHINESE = "今天天气很好，我们去"
ENGLISH = "the blocks of a layer wait"


def write_batch(model: Any, text: Any) -> None:
    """Two texts of different lengths."""
    model.generate_batch([text, text[: len(text) // 2]], **LIKELIEST, banned_tokens=ends(model))


def write_best(model: Any, text: Any) -> None:
    model.generate(text, max_tokens=10, num_beams=2, banned_tokens=ends(model))


def ends(model: Any) -> list[str]:
    """What ends a text of CPM-2, and comes at once; the other models go on by themselves."""
    sentinels = [f"<s_{number}>" for number in range(190)]
    return ["<eod>", *sentinels] if isinstance(model, CPM2) else []


WAYS = {"batch": write_batch, "two beams": write_best}
TEXTS = {
    "cpm1": CHINESE, "cpm2": CHINESE, "eva": CHINESE, "glm130b": ENGLISH, "glm10b": ENGLISH,
}  # fmt: skip
WRAPPED = (
    "llama", "gemma3_text", "mixtral", "deepseek_v3", "gpt_oss", "gpt2", "bloom", "mamba", "t5",
    "bart", "whisper",
)  # fmt: skip


@pytest.mark.parametrize("streams", [False, True], ids=["resident", "streamed"])
def test_the_ids_of_the_zoo_are_those_of_the_snapshot(load: Loader, streams: bool) -> None:
    found = {}
    for name in TEXTS:
        for form in (None, "int4"):
            model = load(name, quantization=form, max_length=64, max_batch_size=2)
            if streams:
                limit = model.plan.least_limit
                model.close()
                model = load(
                    name, quantization=form, max_length=64, max_batch_size=2, memory_limit=limit
                )
            assert bool(model.plan.streamed) == streams
            for way, write_with in WAYS.items():
                ids = decoded(model, lambda m=model, w=write_with, n=name: w(m, TEXTS[n]))
                found[f"{name}, {form}, {way}"] = ids
            model.close()
    check(FILE, found)


def decoded(model: Any, work: Callable[[], None]) -> list[list[int]]:
    """The ids that the tokenizer is given to make texts of, in the order of the calls."""
    calls: list[list[int]] = []
    decode = model.tokenizer.decode

    def spy(ids: Sequence[int]) -> str:
        calls.append(list(ids))
        return str(decode(ids))

    model.tokenizer.decode = spy
    try:
        work()
    finally:
        del model.tokenizer.decode
    return calls


@pytest.mark.parametrize("streams", [False, True], ids=["resident", "streamed"])
def test_the_ids_of_wrapped_models_are_those_of_the_snapshot(streams: bool) -> None:
    found = {}
    for name in WRAPPED:
        model: Any = tiny_models.make(name)
        if streams:
            stream(model)
        found[name] = likeliest(model, tiny_models.inputs_of(name))
        if streams:
            bminf.unwrap(model)
    check(WRAPPED_FILE, found)


def likeliest(model: Any, given: dict[str, torch.Tensor]) -> list[list[int]]:
    """Of both rows of tiny_models.inputs_of(), no token twice."""
    prompt = {name: value for name, value in given.items() if not name.startswith("decoder_")}
    settings = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False, no_repeat_ngram_size=1)
    ids: list[list[int]] = model.generate(**prompt, **settings).tolist()
    return ids
