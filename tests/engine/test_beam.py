from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import test_glm_beam
import torch
from fake_decoder import FakeDecoder, all_sequences, random_logits
from fake_rows import FakeRows

from bminf.engine.beam import Hypothesis, beam_search
from bminf.engine.engine import Engine
from bminf.engine.request import Request
from bminf.engine.sampling import Sampling
from bminf.errors import ArgumentError, UnsupportedModelError

GREEDY = Sampling(0.0)


def search(
    decoder: FakeDecoder, start: list[list[int]], num_beams: int, stop_ids: Any = (),
    max_new_tokens: int = 4, **options: Any,
) -> list[list[Hypothesis]]:  # fmt: skip
    return beam_search(decoder, torch.tensor(start), num_beams, stop_ids, max_new_tokens, **options)


@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 1.0, 2.0, -1.0])
@pytest.mark.parametrize("stop_ids", [(), (2,), (0, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_with_a_beam_for_every_sequence_it_is_exhaustive(
    length_penalty: float, stop_ids: tuple[int, ...], seed: int
) -> None:
    vocab_size, steps = 3, 3
    logits_of = random_logits(vocab_size, seed)
    every = all_sequences(logits_of, (1, 0), vocab_size, steps, stop_ids)
    expected = sorted(
        ((total / len(ids) ** length_penalty, ids) for ids, total in every.items()), reverse=True
    )
    given = search(
        FakeDecoder(logits_of), [[1, 0]], vocab_size**steps, stop_ids, steps,
        length_penalty=length_penalty,
    )[0]  # fmt: skip
    assert [hypothesis.ids for hypothesis in given] == [ids for _, ids in expected]
    assert [h.score for h in given] == pytest.approx([score for score, _ in expected], abs=1e-5)
    assert [h.stopped for h in given] == [ids[-1] in stop_ids for _, ids in expected]


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("seed", range(4))
def test_one_beam_is_greedy(length_penalty: float, seed: int) -> None:
    for scale in (2.0, 0.0):  # 0: nothing but equals
        logits_of = random_logits(7, seed, scale)
        engine, greedy = Engine(FakeRows(logits_of, vocab_size=7)), Request([3], 12, GREEDY, (5, 6))
        engine.run([engine.add(greedy)])
        (given,) = search(
            FakeDecoder(logits_of), [[3]], 1, (5, 6), 12, length_penalty=length_penalty
        )
        ids = tuple(greedy.tokens)
        assert [(h.ids, h.stopped) for h in given] == [(ids, ids[-1] in (5, 6))]


def test_one_prompt_among_others_is_searched_as_alone() -> None:
    starts = [[0, 1], [4, 4], [2, 6], [5, 5]]
    logits_of = random_logits(8, seed=1)
    decoder = FakeDecoder(logits_of)
    together = search(decoder, starts, 3, (6, 7), 9, length_penalty=0.7)
    alone = [
        search(FakeDecoder(logits_of), [own], 3, (6, 7), 9, length_penalty=0.7) for own in starts
    ]
    assert together == [given for (given,) in alone]
    # A prompt that is done leaves the batch, or the test has tested less than it says.
    assert len({len(rows) for rows in decoder.selected}) > 1


each_search = pytest.mark.parametrize("find", [search, test_glm_beam.search])


@each_search
def test_the_prompt_is_fed_once_and_then_a_token_a_beam(find: Any) -> None:
    decoder = FakeDecoder(random_logits(8, seed=2))
    find(decoder, [[0, 1], [2, 3]], 3, (), 4)
    assert [tuple(ids.shape) for ids in decoder.fed] == [(2, 2), (6, 1), (6, 1), (6, 1)]
    assert decoder.selected[0] == [0, 0, 0, 1, 1, 1]
    assert all(max(rows[:3]) < 3 <= min(rows[3:]) for rows in decoder.selected[1:])


def test_a_vocabulary_smaller_than_the_beams() -> None:
    """Beams that do not exist are not made up: two tokens give two sequences."""
    given = search(FakeDecoder(random_logits(2, seed=0)), [[0]], 8, (), 1)[0]
    assert sorted(h.ids for h in given) == [(0,), (1,)]
    given = search(FakeDecoder(random_logits(3, seed=0)), [[0]], 30, (), 2, banned_ids=(1,))[0]
    assert sorted(h.ids for h in given) == sorted(itertools.product((0, 2), repeat=2))


@each_search
def test_where_everything_stops_there_is_nothing_left_to_search(find: Any) -> None:
    decoder = FakeDecoder(random_logits(2, seed=0))
    given = find(decoder, [[0]], 5, (0, 1), 9)[0]
    assert sorted(h.ids for h in given) == [(0,), (1,)] and all(h.stopped for h in given)
    assert len(decoder.fed) == 1 and decoder.selected == []


def test_a_penalty_with_which_scores_overflow_is_refused() -> None:
    decoder = FakeDecoder(random_logits(6, 0))
    with pytest.raises(ArgumentError, match=r"^length_penalty=.*accepted"):
        search(decoder, [[0]], 2, (), 5, length_penalty=1e6)
    assert decoder.fed == []


@pytest.mark.parametrize(
    ("options", "message"),
    [({"stop_ids": (6,)}, "stop_ids holds 6"), ({"banned_ids": (-1,)}, "banned_ids holds -1"),
     ({"banned_ids": range(6)}, "banned_ids holds all 6")],
)  # fmt: skip
@each_search
def test_ids_outside_the_vocabulary_are_refused(
    find: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        find(FakeDecoder(random_logits(6, 0)), [[0]], 2, **options)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_numbers_are_refused(bad: float) -> None:
    def logits(history: tuple[int, ...]) -> list[float]:
        return [0.0, 1.0, 2.0, bad if history[0] == 1 and len(history) == 2 else -1.0]

    with pytest.raises(UnsupportedModelError, match="row 1"):
        search(FakeDecoder(logits), [[0], [1]], 2)


def test_stop_tokens_leave_enough_candidates_to_go_on() -> None:
    """Behind the likeliest token come three that stop; both beams still find one to go on with."""

    def logits(history: tuple[int, ...]) -> list[float]:
        return (
            [2.9, 2.8, 2.7, 3.0, 2.0] if len(history) == 1 else [-30.0, -30.0, -30.0, 30.0, -30.0]
        )

    given = search(FakeDecoder(logits), [[0]], 2, (0, 1, 2), 6)[0]
    assert [h.ids for h in given] == [(3, 3, 3, 3, 3, 3), (4, 3, 3, 3, 3, 3)]


class CachedModel:
    """A transformers model behind the protocol, with its own cache."""

    def __init__(self, model: Any) -> None:
        from transformers import DynamicCache

        self.model, self.cache = model, DynamicCache(config=model.config)

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        out = self.model(input_ids, past_key_values=self.cache, use_cache=True)
        return out.logits[:, -1]

    def select(self, rows: torch.Tensor) -> None:
        self.cache.reorder_cache(rows)


@pytest.fixture(scope="module")
def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=24, n_positions=48, n_embd=16, n_layer=2, n_head=2, initializer_range=0.6,
            bos_token_id=None, eos_token_id=None,
        )
    ).eval()  # fmt: skip
    return model


@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 1.0, 2.0, -0.5])
@pytest.mark.parametrize(
    ("num_beams", "stop_ids", "banned_ids"),
    [(2, (3,), ()), (4, (3, 11, 20), ()), (5, (), ()), (3, (7, 15), (1, 2))],
)
def test_it_finds_what_transformers_finds(
    gpt2: Any,
    length_penalty: float,
    num_beams: int,
    stop_ids: tuple[int, ...],
    banned_ids: tuple[int, ...],
) -> None:
    start = torch.randint(0, 24, (8, 4), generator=torch.Generator().manual_seed(0))
    expected = gpt2.generate(
        start, attention_mask=torch.ones_like(start), num_beams=num_beams, do_sample=False,
        num_return_sequences=num_beams, max_new_tokens=9, length_penalty=length_penalty,
        early_stopping=True, eos_token_id=list(stop_ids) or None, pad_token_id=0,
        suppress_tokens=list(banned_ids) or None, return_dict_in_generate=True,
        output_scores=True,
    )  # fmt: skip
    given = beam_search(
        CachedModel(gpt2), start, num_beams, stop_ids, 9, length_penalty, banned_ids
    )
    flat = [hypothesis for own in given for hypothesis in own]
    for hypothesis, row in zip(flat, expected.sequences[:, 4:].tolist(), strict=True):
        ends = [i + 1 for i, token in enumerate(row) if token in stop_ids]
        assert list(hypothesis.ids) == row[: min(ends, default=9)]
        assert hypothesis.stopped == bool(ends)
    scores = torch.tensor([hypothesis.score for hypothesis in flat])
    torch.testing.assert_close(scores, expected.sequences_scores, rtol=1e-5, atol=1e-5)
    num_stopped = sum(hypothesis.stopped for hypothesis in flat)
    assert num_stopped == 0 or stop_ids
    assert num_stopped > 0 or not stop_ids or length_penalty > 1  # which favours long ones
