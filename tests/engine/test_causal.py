"""Rows of transformers' models: bminf/engine/causal.py, bminf/engine/alone.py,
bminf/engine/pool_rows.py and bminf/engine/wrapped.py."""

from __future__ import annotations

import random
import warnings
from typing import Any

import pytest
import torch
from streaming import stream
from tiny_models import VOCAB, make

import bminf
from bminf.engine.engine import Engine
from bminf.engine.request import Request
from bminf.engine.sampling import Sampling

GREEDY = Sampling(0.0)
TOGETHER = [
    "llama", "qwen2", "glm4", "gemma3_text", "mixtral", "qwen3_moe", "deepseek_v3", "glm4_moe",
    "gpt_oss", "gpt_neox", "gpt2", "opt",
]  # fmt: skip
ALONE = ["gptj", "bloom", "mamba", "t5", "mt5", "bart"]
LENGTHS = (3, 11, 1, 20, 7)


def prompts(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[list[int]]:
    chance = random.Random(seed)
    return [[chance.randrange(3, VOCAB) for _ in range(length)] for length in lengths]


def generated(model: Any, ids: list[int], max_new_tokens: int) -> list[int]:
    """What the model's own generate() adds to one text."""
    given = torch.tensor([ids])
    found = model.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=max_new_tokens,
        do_sample=False, eos_token_id=None, pad_token_id=0,
    )[0].tolist()  # fmt: skip
    return found[1:] if model.config.is_encoder_decoder else found[len(ids) :]


def engine_of(model: Any, **more: Any) -> Engine:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*one after another")
        return Engine(model, max_length=64, max_batch_size=8, **more)


@pytest.mark.parametrize("is_streamed", [False, True], ids=["plain", "streamed"])
@pytest.mark.parametrize("name", [*TOGETHER, *ALONE])
def test_rows_of_unequal_lengths_say_what_generate_says_of_each(
    name: str, is_streamed: bool
) -> None:
    model = make(name)
    expected = [generated(model, ids, 12) for ids in prompts()]
    if is_streamed:
        model = stream(model)
    engine = engine_of(model, chunk=6)
    requests = [Request(ids, 12, GREEDY) for ids in prompts()]
    for request in requests:  # each joins while others are under way
        engine.add(request)
        engine.step()
    engine.run(requests)
    assert [request.tokens for request in requests] == expected
    if is_streamed:
        bminf.unwrap(model)
    assert generated(model, prompts()[0], 12) == expected[0]  # it is what it was
