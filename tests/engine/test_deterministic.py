"""Engines with deterministic=True: the bits of a row do not depend on its company, of the zoo
(bminf/models/rows.py) and of transformers' models."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from streaming import stream
from tiny_glm import tiny_model, tokenizer_of
from tiny_models import VOCAB, make

import bminf
from bminf.engine.engine import Engine
from bminf.engine.request import Request
from bminf.engine.sampling import Sampling
from bminf.errors import UnsupportedModelError

pytestmark = pytest.mark.slow

OPTIONS = [Sampling(0.0), Sampling(1.0), Sampling(0.7, top_k=20), Sampling(1.3, top_p=0.8)]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def asked(chance: random.Random, ids: list[int], start_ids: Any = None) -> Request:
    """Another request each time, of the same ids and options for the same `chance`."""
    sampling = OPTIONS[chance.randrange(len(OPTIONS))]
    sampling = Sampling(sampling.temperature, sampling.top_k, sampling.top_p,
        seed=chance.randrange(10**6))  # fmt: skip
    return Request(ids, chance.randint(1, 9), sampling, num_logprobs=0, start_ids=start_ids)


def told(request: Request) -> list[tuple[int, float]]:
    """Tokens and the bits of their log-probabilities."""
    assert request.error is None
    return [(one.token, one.logprob) for one in request.logprobs]


def request_of(number: int, vocab_size: int, start_ids: Any = None) -> Request:
    chance = random.Random(number)
    length = chance.choice([1, 2, 5, 15, 16, 17, 33, 40])
    return asked(chance, [chance.randrange(3, vocab_size) for _ in range(length)], start_ids)


def check_companies(model: Any, make_request: Any, **room: int) -> None:
    """17 of them: with all models of this file, more than 200."""
    engine, usual = Engine(model, deterministic=True, **room), Engine(model, **room)
    num_texts = 8
    torch.set_num_threads(1)
    alone = []
    for number in range(num_texts):
        request, as_usual = engine.add(make_request(number)), usual.add(make_request(number))
        engine.run([request])
        usual.run([as_usual])
        alone.append(told(request))
        assert alone[-1][0][1] == pytest.approx(told(as_usual)[0][1], abs=1e-2)  # 8 bits round
    for company in range(17):
        chance = random.Random(company)
        torch.set_num_threads(2 if company == 0 else 1)  # which wait for each other, busily
        numbers = [chance.randrange(num_texts) for _ in range(chance.randint(2, 6))]
        requests = [make_request(number) for number in numbers]
        waiting = list(requests)
        while waiting or engine.num_running or engine.num_waiting:
            while waiting and chance.random() < 0.4:
                engine.add(waiting.pop(0))
            engine.step()
        assert [told(request) for request in requests] == [alone[number] for number in numbers]


def turns(engine: Engine, keep: bool) -> tuple[list[list[tuple[int, float]]], int]:
    """A conversation: what its answers are, and how many tokens the model was fed."""
    num_fed, forward, said = 0, engine._rows.forward, []

    def counted(feeds: Any, num_tokens: int | None = None) -> torch.Tensor:
        nonlocal num_fed
        num_fed += sum(len(feed.ids) for feed in feeds)
        return forward(feeds, num_tokens)

    engine._rows.forward = counted  # type: ignore[method-assign]
    ids = [5 + n % 7 for n in range(21)]
    for turn in range(3):
        request = engine.add(Request(ids, 9, Sampling(0.0), num_logprobs=0, keep=keep))
        engine.run([request])
        said.append(told(request))
        ids = [*ids, *request.tokens, 6 + turn, 8]
    engine._rows.forward = forward  # type: ignore[method-assign]
    return said, num_fed


def check_turns(engine: Engine) -> None:
    anew, num_anew = turns(engine, keep=False)
    assert turns(engine, keep=True) == (anew, num_anew - 16 - 32)


SHALLOW: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 4},
    "gemma3_text": {"num_hidden_layers": 2},  # both of sliding attention
    "gpt2": {"n_layer": 2},
    "bart": {"encoder_layers": 2, "decoder_layers": 2},
}


@pytest.mark.parametrize("name", SHALLOW)
def test_rows_of_transformers_do_not_depend_on_their_company(name: str) -> None:
    model = make(name, **SHALLOW[name])
    model = stream(model) if name == "llama" else model
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*one after another")
        check_companies(
            model, lambda number: request_of(number, VOCAB), max_length=64, max_batch_size=8
        )
    if name != "bart":
        check_turns(Engine(model, max_length=64, max_batch_size=2, deterministic=True))


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
@pytest.mark.parametrize("name", ["cpm1", "cpm2"])
def test_rows_of_the_zoo_do_not_depend_on_their_company(
    name: str, quantization: str | None, tmp_path: Path
) -> None:
    kind = {"cpm1": bminf.models.CPM1, "cpm2": bminf.models.CPM2}[name]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="found no sentencepiece model")
        model: Any = kind(
            tiny_model(name).write_original(tmp_path), quantization=quantization, device="cpu",
            tokenizer=tokenizer_of(name), max_length=64, max_batch_size=8,
        )  # fmt: skip
    start_ids = None if name == "cpm1" else [1, 2]
    with model:
        size = model.config.vocab_size
        check_companies(model, lambda number: request_of(number, size, start_ids))
        if name == "cpm1":
            check_turns(Engine(model, deterministic=True))


@pytest.mark.parametrize("name", ["glm130b", "glm10b"])
def test_rows_of_a_glm_do_not_depend_on_their_company(name: str, tmp_path: Path) -> None:
    texts = ["the", "the blocks [sMASK]", "the blocks of a [MASK] wait on the host", "a layer"]
    model: Any = bminf.models.GLM(
        tiny_model(name).write_original(tmp_path), quantization=None, device="cpu",
        tokenizer=tokenizer_of(name), max_length=64, max_batch_size=8,
    )  # fmt: skip

    def make_request(number: int) -> Request:
        blank, sampling = model._prompt(texts[number % 4]), OPTIONS[number % 3]
        return Request(
            blank.input_ids, 8, Sampling(sampling.temperature, sampling.top_k, seed=number),
            num_logprobs=0, start_ids=blank.start_ids, prompt=blank,
        )  # fmt: skip

    with model:
        check_companies(model, make_request)


def test_experts_make_rows_depend_on_others() -> None:
    with pytest.raises(UnsupportedModelError, match=r"deterministic=True.*Mixtral"):
        Engine(make("mixtral"), deterministic=True)
