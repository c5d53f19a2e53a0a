from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from typing import Any

import pytest
import torch
from fake_decoder import FakeDecoder, log_probability, random_logits

from bminf.engine.beam import Hypothesis
from bminf.engine.glm_beam import glm_beam_search
from bminf.errors import ArgumentError, UnsupportedModelError


def search(
    decoder: FakeDecoder, start: list[list[int]], num_beams: int = 2, stop_ids: Any = (),
    max_new_tokens: int = 4, contexts: Any = None, is_deterministic: bool = True, **options: Any,
) -> list[list[Hypothesis]]:  # fmt: skip
    return glm_beam_search(
        decoder, torch.tensor(start), start if contexts is None else contexts, num_beams, stop_ids,
        max_new_tokens, is_deterministic=is_deterministic, **options,
    )  # fmt: skip


def log_shares(*shares: float) -> list[float]:
    return [math.log(share) for share in shares]


def slow_search(
    logits_of: Any, fed: list[int], context: list[int], num_beams: int, stop_ids: tuple[int, ...],
    max_new_tokens: int, length_penalty: float, no_repeat_ngram_size: int, min_length: int,
    banned_ids: tuple[int, ...],
) -> list[tuple[float, list[int], bool]]:  # fmt: skip
    """The rules once more, over lists of everything, with a map of n-grams for each beam."""
    n = no_repeat_ngram_size

    def penalised(total: float, ids: list[int]) -> float:
        return total * (6 / (5 + len(context) + len(ids))) ** length_penalty

    beams: list[tuple[float, list[int], dict[tuple[int, ...], list[int]]]] = [(0.0, [], {})]
    ends: list[tuple[float, list[int], bool]] = []
    for step in range(max_new_tokens):
        every = []
        for total, ids, followers in beams:
            whole = context + ids
            prefix = tuple(whole[max(0, len(whole) - (n - 1)) :])
            out = [*banned_ids, *(stop_ids if step < min_length else ())]
            out += followers.get(prefix, []) if n and len(whole) > n else []
            logits = list(logits_of((*fed, *ids)))
            for token in out:
                logits[token] = -65504.0
            mass = sum(math.exp(logit) for logit in logits)
            for token in set(range(len(logits))) - set(out):
                longer = followers | {prefix: [*followers.get(prefix, []), token]}
                every.append((total + logits[token] - math.log(mass), [*ids, token], longer))
        if not every:
            break
        every.sort(key=lambda entry: -entry[0])
        going_on = []
        for entry in every[: num_beams * (1 + max(1, len(stop_ids)))]:
            if entry[1][-1] in stop_ids:
                ends.append((penalised(entry[0], entry[1]), entry[1], True))
            elif len(going_on) == num_beams:
                break
            else:
                going_on.append(entry)
        ends = sorted(ends, key=lambda end: -end[0])[:num_beams]
        beams = going_on
        best = max((penalised(total, ids) for total, ids, _ in beams), default=-math.inf)
        if not beams or (len(ends) == num_beams and ends[-1][0] >= best):
            return ends
    ends += [(penalised(total, ids), ids, False) for total, ids, _ in beams]
    return sorted(ends, key=lambda end: -end[0])[:num_beams]


def random_case(seed: int) -> tuple[int, list[list[int]], list[list[int]], dict[str, Any]]:
    """The vocabulary's size, start, contexts, settings."""
    pick = random.Random(seed)
    vocab_size = pick.choice([3, 5, 8, 12])
    ids = range(vocab_size)
    start = [[pick.choice(ids), pick.choice(ids)] for _ in range(pick.choice([1, 2, 4]))]
    contexts = [[pick.choice(ids) for _ in range(pick.randint(1, 9))] for _ in start]
    return (
        vocab_size,
        start,
        contexts,
        {
            "num_beams": pick.randint(1, 4),
            "stop_ids": tuple(pick.sample(ids, pick.randint(0, min(3, vocab_size - 1)))),
            "max_new_tokens": pick.randint(1, 8),
            "length_penalty": pick.choice([0.0, 0.6, 1.0, 3.0, -1.0]),
            "no_repeat_ngram_size": pick.choice([0, 0, 1, 2, 2, 3]),
            "min_length": pick.choice([0, 0, 1, 3]),
            "banned_ids": tuple(pick.sample(ids, pick.choice([0, 0, 1]))),
        },
    )


@pytest.mark.parametrize("seed", range(150))
def test_it_finds_what_a_search_over_lists_finds(seed: int) -> None:
    vocab_size, start, contexts, options = random_case(seed)
    if len({*options["stop_ids"], *options["banned_ids"]}) == vocab_size:
        options["min_length"] = 0  # or there is no first token
    logits_of = random_logits(vocab_size, seed, scale=1.5)
    decoder = FakeDecoder(logits_of)
    given = search(decoder, start, contexts=contexts, **options)
    for fed, context, own in zip(start, contexts, given, strict=True):
        expected = slow_search(logits_of, fed, context, **options)
        assert [(list(h.ids), h.stopped) for h in own] == [(ids, end) for _, ids, end in expected]
        assert [h.score for h in own] == pytest.approx([score for score, *_ in expected], abs=1e-5)


def test_the_cases_above_have_what_they_are_to_test() -> None:
    """Prompts that end before others, beams that run out, all lengths of results."""
    kinds: Counter[str] = Counter()
    for seed in range(150):
        vocab_size, start, contexts, options = random_case(seed)
        options["min_length"] = 0
        decoder = FakeDecoder(random_logits(vocab_size, seed, scale=1.5))
        given = search(decoder, start, contexts=contexts, **options)
        kinds["fewer rows"] += len({len(rows) for rows in decoder.selected}) > 1
        kinds["early end"] += len(decoder.fed) < options["max_new_tokens"]
        for own in given:
            kinds["fewer results"] += len(own) < options["num_beams"]
            kinds["both kinds"] += len({h.stopped for h in own}) == 2
            kinds["all stopped"] += all(h.stopped for h in own)
    assert all(kinds[kind] > 5 for kind in (
        "fewer rows", "early end", "fewer results", "both kinds", "all stopped",
    )), kinds  # fmt: skip


def test_it_ends_where_the_running_sequence_is_no_better_than_the_finished() -> None:
    """Equal is no better: 0 stops, and 1, as likely, would go on."""
    decoder = FakeDecoder(lambda _: log_shares(0.4, 0.4, 0.2))
    assert [h.ids for h in search(decoder, [[0]], 1, (0,), 5)[0]] == [(0,)]
    assert len(decoder.fed) == 1


def test_a_beam_for_every_sequence_draws_them_all() -> None:
    """Without replacement, and however unlikely: what is drawn is then all there is."""
    for scale in (2.0, 1000.0):
        logits_of = random_logits(3, seed=5, scale=scale)
        exact, drawn = (
            search(FakeDecoder(logits_of), [[0]], 27, (2,), 3, is_deterministic=way, seed=1)
            for way in (True, False)
        )
        assert exact == drawn and len(exact[0]) == 15
        assert all(math.isfinite(h.score) for h in drawn[0])


def drawn_pairs(weights: list[float], num_drawn: int) -> dict[tuple[int, int], float]:
    """The two best of so many drawn in turn, each by its share of what is left: probabilities."""
    pairs: Counter[tuple[int, int]] = Counter()
    for order in itertools.permutations(range(len(weights)), num_drawn):
        chance, left = 1.0, sum(weights)
        for place in order:
            chance, left = chance * weights[place] / left, left - weights[place]
        first, second, *_ = sorted(order, key=lambda place: -weights[place])
        pairs[first, second] += chance
    return pairs


def is_sample(counts: Counter[Any], expected: dict[Any, float]) -> bool:
    """Whether chi-square is what it exceeds once in 10**5 or less; the seeds here are fixed."""
    total, freedom = sum(counts.values()), len(expected) - 1
    chi_square = sum((counts[k] - total * p) ** 2 / (total * p) for k, p in expected.items())
    return set(counts) <= set(expected) and chi_square < freedom + 5 * (2 * freedom) ** 0.5 + 10


def test_candidates_are_drawn_by_their_probability() -> None:
    """Two beams: four of six tokens are drawn, and the best two of these go on."""
    shares = [0.3, 0.02, 0.2, 0.08, 0.15, 0.25]
    given = search(
        FakeDecoder(lambda _: log_shares(*shares)), [[0]] * 6000, 2, (), 1,
        is_deterministic=False, seed=3,
    )  # fmt: skip
    pairs = Counter((first.ids[0], second.ids[0]) for first, second in given)
    assert is_sample(pairs, drawn_pairs(shares, 4))


def test_later_candidates_are_drawn_by_the_probability_of_the_whole() -> None:
    """Three tokens: the first step draws them all, and two go on; then four of six are drawn."""
    first, then = [0.5, 0.3, 0.2], {0: [0.1, 0.35, 0.55], 1: [0.62, 0.08, 0.3]}

    def logits(history: tuple[int, ...]) -> list[float]:
        return log_shares(*(first if len(history) == 1 else then.get(history[1], first)))

    given = search(
        FakeDecoder(logits), [[0]] * 6000, 2, (), 2, is_deterministic=False, seed=4
    )  # fmt: skip
    whole = [first[beam] * share for beam in then for share in then[beam]]
    pairs = Counter(
        tuple(3 * h.ids[0] + h.ids[1] for h in (best, second)) for best, second in given
    )
    assert is_sample(pairs, drawn_pairs(whole, 4))


def test_the_same_seed_draws_the_same_and_another_does_not() -> None:
    logits_of = random_logits(50, seed=6)
    before = torch.get_rng_state()
    same, again, other, far, free, freer = (
        search(FakeDecoder(logits_of), [[0]], 3, (), 8, is_deterministic=False, seed=seed)
        for seed in (7, 7, 8, 7 + 2**70, None, None)
    )
    assert same == again
    assert all(a != b for a, b in itertools.combinations([same, other, far, free, freer], 2))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_prompt_draws_what_it_would_draw_alone() -> None:
    """Prompt i with the seed + i; neither the others nor their number matter."""
    starts, logits_of = [[0, 1], [4, 4], [0, 1], [5, 5]], random_logits(8, seed=1)
    options = {"is_deterministic": False, "length_penalty": 0.7, "no_repeat_ngram_size": 2}
    decoder = FakeDecoder(logits_of)
    together = search(decoder, starts, 3, (6, 7), 9, seed=20, **options)
    alone = [
        search(FakeDecoder(logits_of), [own], 3, (6, 7), 9, seed=20 + i, **options)
        for i, own in enumerate(starts)
    ]
    assert together == [given for (given,) in alone]
    assert together[0] != together[2]
    assert len({len(rows) for rows in decoder.selected}) > 1  # a prompt left before the others


def test_scores_of_what_was_drawn_are_exact() -> None:
    logits_of = random_logits(9, seed=3)
    options = {"is_deterministic": False, "seed": 0, "length_penalty": 0.5}
    (given,) = search(FakeDecoder(logits_of), [[1]], 4, (7, 8), 8, **options)
    assert len(given) == 4 and [h.score for h in given] == sorted(h.score for h in given)[::-1]
    for hypothesis in given:
        total = log_probability(logits_of, (1,), hypothesis.ids)
        expected = total / ((5 + 1 + len(hypothesis.ids)) / 6) ** 0.5
        assert hypothesis.score == pytest.approx(expected, abs=1e-5)


def test_a_penalty_is_measured_at_the_longest_sequence() -> None:
    decoder = FakeDecoder(random_logits(6, 0))
    with pytest.raises(
        ArgumentError, match=r"length_penalty=100\.0.*for 60004 tokens, context included"
    ):
        search(decoder, [[0], [0]], contexts=[[0], [0] * 60_000], length_penalty=100.0)
    assert decoder.fed == []
    assert search(decoder, [[0]], length_penalty=100.0) != [[]]


def test_a_search_that_cannot_have_a_first_token_is_refused() -> None:
    options = {"banned_ids": range(5), "stop_ids": [5], "min_length": 1}
    with pytest.raises(ArgumentError, match="min_length=1 none can"):
        search(FakeDecoder(random_logits(6, 0)), [[0]], **options)


@pytest.mark.parametrize("is_deterministic", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_numbers_are_refused(bad: float, is_deterministic: bool) -> None:
    def logits(history: tuple[int, ...]) -> list[float]:
        if history[0] != 1 or len(history) < 2 or history[1] != 2:
            return [0.0, 1.0, 2.0, -1.0]
        return [bad] * 4 if bad < 0 else [0.0, bad, 2.0, -1.0]

    options = {"is_deterministic": is_deterministic, "banned_ids": (3,)}
    with pytest.raises(UnsupportedModelError, match="row 1 of"):
        search(FakeDecoder(logits), [[0], [1]], 2, **options)
