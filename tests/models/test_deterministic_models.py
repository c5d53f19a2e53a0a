"""deterministic=True of the models of the zoo (bminf/models/base.py): a text gets the same bits in
any company. What engines do for it is tested in tests/engine/test_deterministic.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from bminf.engine.request import Request
from bminf.engine.sampling import Sampling
from bminf.errors import ArgumentError

Loader = Callable[..., Any]
OTHERS = {"cpm1": ["我们去公园散步吧", "你是谁，今天"], "glm130b": ["a layer", "the [MASK] wait"]}
TEXTS = {"cpm1": "今天天气很好", "glm130b": "the blocks of a layer wait"}

each_kind = pytest.mark.parametrize("name", ["cpm1", "cpm2", "glm130b"])


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def of(name: str, texts: dict[str, Any]) -> Any:
    return texts["glm130b" if name.startswith("glm") else "cpm1"]


@each_kind
def test_a_text_has_the_same_bits_in_any_company(load: Loader, name: str) -> None:
    model = load(name, deterministic=True, max_length=64, max_batch_size=4)
    prompt, others = model._prompt(of(name, TEXTS)), of(name, OTHERS)

    def told(beside: Callable[[], object]) -> list[tuple[int, float]]:
        """Tokens and the bits of their log-probabilities, with `beside` in the same passes."""
        request = Request(
            prompt.input_ids, 9, Sampling(0.9, seed=4), num_logprobs=0,
            start_ids=prompt.start_ids, prompt=prompt,
        )  # fmt: skip
        model.engine.add(request)
        before = model.engine.stats
        beside()
        model.engine.run([request])
        after = model.engine.stats
        shared = after.num_rows - before.num_rows - (after.num_sweeps - before.num_sweeps)
        assert (shared > 0) == (beside is not alone)
        return [(one.token, one.logprob) for one in request.logprobs]

    def alone() -> None: ...

    ends = model.tokenizer.tokens(sorted({*model._end_ids()}))
    options: Any = {"max_tokens": 6, "seed": 1, "banned_tokens": ends}
    torch.set_num_threads(1)
    expected = told(alone)
    assert told(lambda: model.generate_batch(others, **options)) == expected
    torch.set_num_threads(2)
    assert told(lambda: list(model.generate_iter(others[0], **options))) == expected


def test_company_changes_bits_otherwise(load: Loader) -> None:
    """Without which the tests above would show nothing."""
    model = load("cpm1", max_length=64, max_batch_size=4)
    prompt = model._prompt("今天天气很好")
    told = []
    for others in ([], OTHERS["cpm1"]):
        request = Request(prompt.input_ids, 20, Sampling(0.0), num_logprobs=0)
        requests = [model.engine.add(request)]
        for text in others:
            requests.append(model.engine.add(Request(model._prompt(text).input_ids, 20)))
        model.engine.run(requests)
        told.append([one.logprob for one in request.logprobs])
    assert told[0] != told[1] and told[0] == pytest.approx(told[1], abs=1e-3)


@pytest.mark.parametrize("name", ["cpm1", "glm130b"])
def test_beams_are_searched_text_by_text(
    load: Loader, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(name, deterministic=True, max_length=64, max_batch_size=4)
    texts, options = of(name, OTHERS), {"max_tokens": 6, "num_beams": 2}
    options |= {"deterministic": False, "seed": 3} if name == "glm130b" else {}
    seeds = [{"seed": 3 + i} if name == "glm130b" else {} for i in range(2)]
    alone = [
        model.generate_batch([text], **{**options, **seed})[0]
        for text, seed in zip(texts, seeds, strict=True)
    ]
    counts, decoder = list[int](), type(model)._decoder

    def counted(self: Any, prompts: Any) -> Any:
        counts.append(len(prompts))
        return decoder(self, prompts)

    monkeypatch.setattr(type(model), "_decoder", counted)
    assert model.generate_batch(texts, **options) == alone and counts == [1, 1]


def test_room_is_set_aside_for_the_logits_of_a_pass(load: Loader) -> None:
    plans = [load("cpm1", deterministic=fixed, memory_limit="1GB").plan for fixed in (False, True)]
    assert plans[0].reserved_bytes < plans[1].reserved_bytes


def test_deterministic_is_a_bool(load: Loader) -> None:
    with pytest.raises(ArgumentError, match="deterministic=1"):
        load("cpm1", deterministic=1)
