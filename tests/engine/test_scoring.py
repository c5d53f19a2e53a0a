"""Log-probabilities of prompts, by networks.

bminf/engine/scoring.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_glm import tiny_model, tokenizer_of
from tiny_models import make

import bminf
from bminf import Engine, Request, Sampling
from bminf.engine.request import TokenLogprob
from bminf.engine.rows import Feed
from bminf.engine.scoring import SCORED_AT_ONCE, give_scores
from bminf.models import CPM1
from bminf.models.assemble import LOGITS_CHUNK

GREEDY = Sampling(0.0)
pytestmark = pytest.mark.filterwarnings("ignore:found no sentencepiece model")
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma3_text": {"final_logit_softcapping": 0.5},  # and logits are bounded
    "gpt2": {},
    "mixtral": {},
    "mamba": {},  # decoded row by row
}


def scored(ids: Sequence[int], number: int = 1, max_new_tokens: int = 1) -> Request:
    return Request(
        ids, max_new_tokens, GREEDY, num_logprobs=number, num_prompt_logprobs=number
    )  # fmt: skip


def expected_of(logits: torch.Tensor, ids: Sequence[int]) -> list[float]:
    """Of all tokens but the first.   logits: (T, V)."""
    following = torch.tensor(ids[1:])[:, None]
    found: list[float] = logits.log_softmax(-1)[:-1].gather(1, following).view(-1).tolist()
    return found


def logprobs(scores: Sequence[TokenLogprob]) -> list[float]:
    return [one.logprob for one in scores]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.filterwarnings("ignore:texts of a Mamba")
def test_scores_are_those_of_the_network(name: str, streams: bool) -> None:
    """Prompts at the borders of the slices, in passes that are shared, and in parts."""
    model = make(name, **MODELS[name])
    chance = torch.Generator().manual_seed(0)
    lengths = (1, 2, SCORED_AT_ONCE, SCORED_AT_ONCE + 1, 3 * SCORED_AT_ONCE)
    vocab_size = model.config.vocab_size
    texts = [torch.randint(3, vocab_size, (n,), generator=chance).tolist() for n in lengths]
    with torch.inference_mode():
        expected = [expected_of(model(torch.tensor([ids])).logits[0], ids) for ids in texts]
    limit = bminf.plan_for(model, False, device="cpu", max_length=200).least_limit
    model = bminf.wrapper(model, False, limit if streams else None, device="cpu", max_length=200)
    engine, forward = Engine(model, chunk=5), model.base_model.__dict__.get("forward")
    busy = engine.add(Request([3, 4], 30, GREEDY))
    engine.step()
    requests = [engine.add(scored(ids)) for ids in texts]
    engine.run([*requests, busy])
    for request, ids, own in zip(requests, texts, expected, strict=True):
        assert logprobs(request.prompt_logprobs) == pytest.approx(own, abs=1e-5)
        assert [one.token for one in request.prompt_logprobs] == ids[1:]
        assert all(one.top[0][1] >= one.logprob for one in request.prompt_logprobs)
    assert model.base_model.__dict__.get("forward") is forward  # it is as it was


def test_the_answer_behind_a_prompt_that_is_scored_is_the_same() -> None:
    """The prompt is read once for both."""
    model = bminf.wrapper(make("llama"), False, device="cpu", max_length=64)
    engine, ids = Engine(model), [5, 7, 11, 13]
    lengths: list[int] = []
    layer = model.model.layers[0]
    layer.register_forward_hook(lambda module, given, output: lengths.append(given[0].shape[1]))
    plain = engine.add(Request(ids, 6, GREEDY, num_logprobs=1))
    engine.run([plain])
    both = engine.add(scored(ids, max_new_tokens=6))
    engine.run([both])
    assert (both.tokens, both.logprobs) == (plain.tokens, plain.logprobs)
    assert lengths == [4, 1, 1, 1, 1, 1] * 2


def test_logits_of_a_few_tokens_are_in_memory_together() -> None:
    """Those of all tokens of a long prompt would take more than the model."""
    model = bminf.wrapper(make("llama"), False, device="cpu", max_length=200)
    sizes: list[int] = []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, given, output: sizes.append(output.shape[1]))
    engine = Engine(model)
    engine.run([engine.add(scored([5, 6, 7] * 40))])
    assert max(sizes) == SCORED_AT_ONCE and sum(sizes) == 120 + 1
    assert SCORED_AT_ONCE <= LOGITS_CHUNK  # which the plan of a built-in model has room for


def test_scores_copy_no_block_once_more() -> None:
    """Though the head runs several times."""
    model = make("llama")
    limit = bminf.plan_for(model, False, device="cpu", max_length=200).least_limit
    model = bminf.wrapper(model, False, limit, device="cpu", max_length=200)
    engine, ids, copied = Engine(model), [5, 6, 7, 8] * 10, list[int]()
    for request in (Request(ids, 3, GREEDY), Request(ids, 3, GREEDY), scored(ids, 1, 3)):
        engine.run([engine.add(request)])
        copied.append(bminf.stats_of(model).copies)
    assert copied[2] - copied[1] == copied[1] - copied[0] > 0  # the ring is full from the first on


@pytest.fixture(scope="module")
def cpm1(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder: Path = tiny_model("cpm1").write_original(tmp_path_factory.mktemp("cpm1"))
    own = tokenizer_of("cpm1")
    with CPM1(folder, device="cpu", quantization=None, tokenizer=own) as model:
        yield model


def test_a_built_in_model_scores_what_its_logits_say(cpm1: Any) -> None:
    ids = [5 + n * n % 40 for n in range(21)]
    request = cpm1.engine.add(scored(ids))
    cpm1.engine.run([request])
    expected = expected_of(cpm1.logits(ids), ids)
    assert logprobs(request.prompt_logprobs) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", ["llama", "cpm1"])
def test_deterministic_scores_are_the_same_bits_in_any_company(kind: str, cpm1: Any) -> None:
    model = cpm1.row_model if kind == "cpm1" else bminf.wrapper(
        make("llama"), False, device="cpu", max_length=100
    )  # fmt: skip
    engine = Engine(model, deterministic=True)
    texts = [[5 + n * n % 40 for n in range(start, start + 21)] for start in range(3)]
    alone = [engine.add(scored(texts[0]))]
    engine.run(alone)
    busy = engine.add(Request([3, 4], 12, GREEDY))
    engine.step()
    together = [engine.add(scored(ids)) for ids in (texts[1], texts[0], texts[2])]
    engine.run([*together, busy])
    assert together[1].prompt_logprobs == alone[0].prompt_logprobs
    assert together[1].logprobs == alone[0].logprobs


def test_the_head_is_given_as_many_tokens_where_rows_must_not_depend_on_others() -> None:
    given, told = list[list[int]](), list[tuple[int, int]]()

    def head(where: torch.Tensor) -> torch.Tensor:
        given.append(where.tolist())
        return torch.zeros(len(where), 3)

    feeds = [
        Feed(None, [1] * 2),
        Feed(None, [1] * 9, score=lambda first, logits: told.append((first, len(logits)))),
    ]
    give_scores(feeds, head, is_fixed=False)
    assert given == [list(range(2, 10)), [10]] and told == [(0, 8), (8, 1)]
    given.clear()
    give_scores(feeds, head, is_fixed=True)
    assert given == [list(range(2, 10)), [10, *[0] * 7]] and told[2:] == told[:2]
