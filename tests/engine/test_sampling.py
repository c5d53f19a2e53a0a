"""bminf/engine/sampling.py and bminf/engine/row_sampler.py."""

from __future__ import annotations

import gc
import itertools
import math
from typing import Any

import pytest
import torch
from batch_sampler import Sampler
from distribution import probabilities

from bminf.engine import sampling as module
from bminf.engine.row_sampler import log_probabilities
from bminf.engine.sampling import Sampling, rule_for, top_k_then_top_p
from bminf.errors import ArgumentError, UnsupportedModelError

V = 40
PLAIN = Sampling(temperature=1.0)


def random_logits(rows: int = 5, vocab_size: int = V, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed))


def logits_of(*shares: float) -> torch.Tensor:
    """One row whose softmax is `shares`: powers of two, so that their sums are exact."""
    return torch.tensor([shares]).log()


def sampler(sampling: Sampling, rows: int = 1, vocab_size: int = V) -> Sampler:
    return Sampler(sampling, [[]] * rows, vocab_size)


def draws(own: Sampler, logits: torch.Tensor, steps: int) -> list[list[int]]:
    return [own.draw(logits).tolist() for _ in range(steps)]


REFUSED: dict[str, tuple[Any, ...]] = {
    "temperature": (-0.1, math.nan, math.inf, "hot", True),
    "top_k": (0, -3, 2.0, True),
    "top_p": (0.0, 1.0001, -0.5, math.nan, True),
    "frequency_penalty": (math.nan, math.inf, None),
    "presence_penalty": (-math.inf, False),
    "seed": (-1, 1.5, True),
    "logit_bias": (((1, math.nan),), ((1, math.inf),), ((1, "much"),)),
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in REFUSED.items() for value in values]
)
def test_arguments_that_mean_nothing_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=f"^{name}=.*accepted"):
        Sampling(**{name: value})


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (Sampling(top_k=V + 1), "=41 is more than the 40 tokens"),
        (Sampling(banned_ids=(-1, 1.0, True)), r"banned_ids holds -1, 1\.0, True; accepted"),  # type: ignore[arg-type]
        (Sampling(banned_ids=(3, V)), "banned_ids holds 40; accepted: ids of the vocabulary"),
        (Sampling(banned_ids=tuple(range(V))), "banned_ids holds all 40"),
        (Sampling(banned_ids=tuple(range(V, V + 7))), "40, 41, 42, 43, 44 and 2 more"),
        (Sampling(unpenalized_ids=(V,)), "unpenalized_ids holds 40"),
    ],
)
def test_what_does_not_fit_the_vocabulary_is_refused_everywhere(
    sampling: Sampling, message: str
) -> None:
    for ask in (lambda: sampling.check(V), lambda: sampler(sampling)):
        with pytest.raises(ArgumentError, match=message):
            ask()


def test_what_just_fits_the_vocabulary_is_accepted() -> None:
    Sampling(top_k=V, banned_ids=tuple(range(1, V)), unpenalized_ids=(V - 1,)).check(V)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_penalties_are_taken_off_the_divided_logits(dtype: torch.dtype) -> None:
    logits = random_logits(seed=1).to(dtype).requires_grad_()
    counts = torch.randint(0, 4, (5, V), generator=torch.Generator().manual_seed(2))
    before = logits.detach().clone(), counts.clone()
    expected = (before[0].double() / 0.6 - 0.7 * counts - 0.4 * (counts > 0)).softmax(-1)
    given = probabilities(logits, counts, Sampling(0.6, None, None, 0.7, 0.4))
    torch.testing.assert_close(given, expected.float())
    assert torch.equal(logits, before[0]) and torch.equal(counts, before[1])
    assert not given.requires_grad


@pytest.mark.parametrize("top_k", [1, 2, 5, 39, V])
def test_top_k_keeps_exactly_k_of_equals_the_lowest_ids(top_k: int) -> None:
    logits = random_logits().round()  # many equals
    given = probabilities(logits, None, Sampling(1.0, top_k))
    assert ((given > 0).sum(-1) == top_k).all()
    for row, own in zip(logits.tolist(), given, strict=True):
        best = sorted(range(V), key=lambda i: (-row[i], i))[:top_k]
        assert sorted(best) == own.nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("top_p", "num_kept"),
    [(1e-9, 1), (0.4999, 1), (0.5, 2), (0.7, 2), (0.75, 3), (0.8, 3), (0.875, 4), (1.0, 4)],
)
def test_top_p_keeps_the_token_with_which_the_sum_exceeds_it(top_p: float, num_kept: int) -> None:
    given = probabilities(logits_of(0.125, 0.5, 0.125, 0.25), None, Sampling(1.0, None, top_p))
    assert given.nonzero()[:, 1].tolist() == sorted([1, 3, 0, 2][:num_kept])


@pytest.mark.parametrize("top_k", [1, 3, 8, 20])
@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.8, 0.99])
def test_the_stricter_of_both_holds(top_k: int, top_p: float) -> None:
    logits = random_logits(rows=20, seed=3)
    whole = probabilities(logits, None, PLAIN)
    by_k, by_p, by_both = (
        probabilities(logits, None, Sampling(1.0, k, p))
        for k, p in [(top_k, None), (None, top_p), (top_k, top_p)]
    )
    assert torch.equal(by_both > 0, (by_k > 0) & (by_p > 0))
    kept = whole * (by_both > 0)
    torch.testing.assert_close(by_both, kept / kept.sum(-1, keepdim=True))


def test_temperatures_beyond_float32_are_their_limits() -> None:
    logits = torch.tensor([[1.0, -math.inf, 3.0, 3.0]])
    cold, hot = (probabilities(logits, None, Sampling(t)) for t in (5e-324, 1e308))
    torch.testing.assert_close(cold, torch.tensor([[0, 0, 0.5, 0.5]]))
    torch.testing.assert_close(hot, torch.tensor([[1 / 3, 0, 1 / 3, 1 / 3]]))


@pytest.mark.parametrize("temperature", [0, 0.0])
def test_temperature_zero_is_the_highest_logit_after_penalties(temperature: float) -> None:
    logits = torch.tensor([[5.0, 4.0, 4.0, 9.0], [1.0, 1.0, 1.0, 1.0]])
    sampling = Sampling(temperature, None, None, 1.5, banned_ids=(3,))
    counts = torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0]])
    given = probabilities(logits, counts, sampling)
    assert given.tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]  # the lowest id of equals


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_a_bias_is_added_to_the_logit_of_its_token(temperature: float) -> None:
    biased = Sampling(temperature, logit_bias=((3, 1.5), (7, -2.0)))
    logits = random_logits()
    moved = logits.clone()
    moved[:, 3] += 1.5
    moved[:, 7] -= 2.0
    expected = probabilities(moved, None, Sampling(temperature))
    torch.testing.assert_close(probabilities(logits, None, biased), expected)


def test_a_bias_moves_the_most_probable_token_too() -> None:
    logits = random_logits(rows=1)
    greedy = Sampling(0.0, logit_bias=((11, 100.0),))
    assert draws(sampler(greedy), logits, 1) == [[11]]
    with pytest.raises(ArgumentError, match="logit_bias holds 40"):
        Sampling(logit_bias=((V, 1.0),)).check(V)


def test_a_rule_of_another_family_takes_its_place() -> None:
    seen: list[Any] = []

    def last_two(given: torch.Tensor, top_k: int | None, top_p: float | None) -> torch.Tensor:
        seen.append((top_k, top_p))
        return given * torch.tensor([0.0, 0.0, 1.0, 1.0])

    sampling = Sampling(1.0, 2, 0.5, filter=last_two)
    given = probabilities(logits_of(0.5, 0.25, 0.125, 0.125), None, sampling)
    assert given.tolist() == [[0, 0, 0.5, 0.5]] and seen == [(2, 0.5)]
    own = sampler(Sampling(1.0, 2, 0.5, seed=0, filter=last_two), 50, 4)
    assert set(own.draw(logits_of(0.5, 0.25, 0.125, 0.125).expand(50, 4)).tolist()) == {2, 3}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_numbers_are_refused(temperature: float, bad: float) -> None:
    logits = random_logits()
    logits[1, 7] = logits[3, 0] = bad
    sampling = Sampling(temperature, seed=0)
    with pytest.raises(UnsupportedModelError, match="not finite numbers in row 1, 3 of"):
        probabilities(logits, None, sampling)
    with pytest.raises(UnsupportedModelError, match="not finite numbers in row 1, 3 of"):
        sampler(sampling, 5).draw(logits)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_with_nothing_left_is_refused(temperature: float) -> None:
    logits = torch.full((1, 4), -math.inf)
    logits[0, 2] = 1.0
    assert probabilities(logits, None, Sampling(temperature)).tolist() == [[0, 0, 1, 0]]
    with pytest.raises(UnsupportedModelError, match="row 0"):
        probabilities(logits, None, Sampling(temperature, banned_ids=(2,)))


def test_a_sampler_refuses_a_prompt_of_another_vocabulary() -> None:
    with pytest.raises(ArgumentError, match=r"prompt holds 40, -1"):
        Sampler(PLAIN, [[0], [1, V, -1]], V)


def chi_square(tokens: list[int], expected: torch.Tensor) -> float:
    counts = torch.bincount(torch.tensor(tokens), minlength=len(expected)).double()
    assert (counts[expected == 0] == 0).all()
    counts, expected = counts[expected > 0], expected[expected > 0].double() * len(tokens)
    return float(((counts - expected) ** 2 / expected).sum())


# With n degrees of freedom, chi-square exceeds n + 5 sqrt(2 n) + 10 once in 10**5 or less; here
# the seeds are fixed, so it never does by chance.
def bound(kept: int) -> float:
    return (kept - 1) + 5 * math.sqrt(2 * (kept - 1)) + 10


@pytest.mark.parametrize(
    "sampling",
    [Sampling(1.0, seed=0), Sampling(0.7, 5, seed=1), Sampling(1.5, None, 0.8, seed=2),
     Sampling(1.0, 6, 0.9, banned_ids=(1, 2), seed=3)],
)  # fmt: skip
def test_draws_follow_the_probabilities(sampling: Sampling) -> None:
    """20,000 rows: as many seeds in a row. And 5,000 steps of one row."""
    logits = random_logits(1, 12, seed=6)
    expected = probabilities(logits, None, sampling)[0]
    kept = int((expected > 0).sum())
    over_rows = sampler(sampling, 20_000, 12).draw(logits.expand(20_000, 12)).tolist()
    assert chi_square(over_rows, expected) < bound(kept)
    over_steps = [token for (token,) in draws(sampler(sampling, 1, 12), logits, 5_000)]
    assert chi_square(over_steps, expected) < bound(kept)


def test_neighbouring_rows_and_steps_are_independent() -> None:
    logits = torch.zeros(20_000, 3)
    first, second = draws(sampler(Sampling(1.0, seed=5), 20_000, 3), logits, 2)
    uniform = torch.full((9,), 1 / 9)
    assert chi_square([3 * a + b for a, b in zip(first, second, strict=True)], uniform) < bound(9)
    pairs = zip(first[::2], first[1::2], strict=True)
    assert chi_square([3 * a + b for a, b in pairs], uniform) < bound(9)


class Fixed:
    """In the place of a row's random numbers."""

    def __init__(self, number: float) -> None:
        self.number = number

    def random(self) -> float:
        return self.number


@pytest.mark.parametrize(
    ("uniform", "token"),
    [(0.0, 1), (0.4999999, 1), (0.5, 3), (0.7499999, 3), (0.75, 4), (1 - 2**-53, 4)],
)
def test_a_token_with_no_probability_is_never_drawn(uniform: float, token: int) -> None:
    own = sampler(PLAIN, 1, 6)
    own.rows[0]._random = Fixed(uniform)  # type: ignore[assignment]
    assert own.draw(logits_of(0, 0.5, 0, 0.25, 0.25, 0)).tolist() == [token]


def test_the_last_token_is_in_reach_of_every_rounding() -> None:
    logits = random_logits(200, 3001, seed=7)
    own = sampler(PLAIN, 200, 3001)
    for row in own.rows:
        row._random = Fixed(1 - 2**-53)  # type: ignore[assignment]
    assert (own.draw(logits) > 2990).all()


def test_the_same_seed_draws_the_same_and_another_does_not() -> None:
    logits = random_logits(1, 1000)
    first, second, other = (
        draws(sampler(Sampling(1.0, seed=seed), 1, 1000), logits, 30) for seed in (7, 7, 2**70)
    )
    assert first == second != other
    unseeded = [draws(sampler(Sampling(1.0), 1, 1000), logits, 30) for _ in range(2)]
    assert unseeded[0] != unseeded[1]


def test_a_row_draws_what_it_would_draw_alone() -> None:
    """Row i with the seed + i; neither the other rows nor their number matter."""
    sampling = Sampling(0.8, 20, 0.95, 0.5, 0.5, seed=11)
    logits, prompts = random_logits(4, 300, seed=8), [[1, 2], [], [5, 5, 5], [299]]
    together = Sampler(sampling, prompts, 300)
    steps = draws(together, logits, 40)
    for row in range(4):
        seeded = Sampling(0.8, 20, 0.95, 0.5, 0.5, seed=11 + row)
        alone = Sampler(seeded, [prompts[row]], 300)
        own = [token for (token,) in draws(alone, logits[row : row + 1], 40)]
        assert own == [step[row] for step in steps]


def test_rows_that_leave_and_come_do_not_disturb_the_others() -> None:
    sampling = Sampling(1.0, None, None, 1.0, seed=3)
    logits, prompts = random_logits(4, 50, seed=9), [[1], [2, 2], [3], [4]]
    whole, part = (Sampler(sampling, prompts, 50) for _ in range(2))
    assert draws(whole, logits, 5) == draws(part, logits, 5)
    part.rows = [part.rows[3], part.rows[1]]
    expected = [[step[3], step[1]] for step in draws(whole, logits, 30)]
    assert draws(part, logits[[3, 1]], 30) == expected


def test_rows_of_different_rules_draw_as_among_their_own() -> None:
    rules = [
        Sampling(0.0),
        Sampling(1.0, 5, seed=1),
        Sampling(1.0, seed=2),
        Sampling(1.0, 5, seed=3),
    ]
    logits = random_logits(4, 50, seed=9)
    mixed = Sampler(PLAIN, [[]] * 4, 50)
    mixed.rows = [Sampler(rule, [[]], 50).rows[0] for rule in rules]
    steps = draws(mixed, logits, 20)
    for row, rule in enumerate(rules):
        own = draws(Sampler(rule, [[]], 50), logits[row : row + 1], 20)
        assert [step[row] for step in steps] == [token for (token,) in own]


def test_a_number_is_used_up_when_its_token_is_accepted() -> None:
    logits = random_logits(1, 1000)
    own, other = (sampler(Sampling(1.0, seed=4), 1, 1000) for _ in range(2))
    first = own.rows[0].uniform
    assert own.rows[0].uniform == first
    assert draws(own, logits, 5) == draws(other, logits, 5) and own.rows[0].uniform != first


def test_log_probabilities_are_those_of_the_model() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0, 3.0])
    expected = logits.double().log_softmax(-1)
    own, top = log_probabilities(logits, 2, 3)
    assert own == pytest.approx(float(expected[2]), abs=1e-6)
    assert [token for token, _ in top] == [1, 3, 2] and dict(top)[2] == own


@pytest.mark.parametrize("number", [0, 1, 7, 20, 64])
@pytest.mark.parametrize("step", [1.0, 1e-4])
def test_the_most_probable_tokens_are_the_first_of_all_sorted(number: int, step: float) -> None:
    """Of tokens that are equally probable, the ones of the least ids."""
    logits = (torch.randn(64, generator=torch.Generator().manual_seed(0)) / step).round() * step
    logits[3] = -math.inf
    logs = logits.log_softmax(-1).tolist()
    expected = sorted(range(64), key=lambda token: -logs[token])[:number]
    own, top = log_probabilities(logits, 5, number)
    assert own == logs[5] and top == [(token, logs[token]) for token in expected]


def counted_by_hand(
    logits: list[float], prompt: list[int], steps: int, sampling: Sampling
) -> list[int]:
    counts, drawn = dict.fromkeys(range(len(logits)), 0), []
    for token in [*prompt, *[None] * steps]:
        if token is None:
            scores = [
                logit - sampling.frequency_penalty * n - sampling.presence_penalty * (n > 0)
                for logit, n in zip(logits, counts.values(), strict=True)
            ]
            token = scores.index(max(scores))
            drawn.append(token)
        if token not in sampling.unpenalized_ids:
            counts[token] += 1
    return drawn


@pytest.mark.parametrize("frequency", [0.0, 0.75, -0.25])
@pytest.mark.parametrize("presence", [0.0, 1.5])
@pytest.mark.parametrize("unpenalized", [(), (2,), (0, 1)])
def test_prompt_and_output_are_counted(
    frequency: float, presence: float, unpenalized: tuple[int, ...]
) -> None:
    sampling = Sampling(0.0, None, None, frequency, presence, unpenalized_ids=unpenalized)
    logits = [[1.0, 2.5, 3.125, 0.5, 2.0625], [3.0, 1.0, 2.9375, 2.125, 0.0]]
    prompts = [[2, 2, 4], [0, 3]]
    own = Sampler(sampling, prompts, 5)
    steps = draws(own, torch.tensor(logits), 12)
    for row in range(2):
        expected = counted_by_hand(logits[row], prompts[row], 12, sampling)
        assert [step[row] for step in steps] == expected


def test_a_refused_step_counts_nothing() -> None:
    own = sampler(Sampling(0.0, frequency_penalty=1.0), 1, 2)
    with pytest.raises(UnsupportedModelError):
        own.draw(torch.tensor([[0.0, math.nan]]))
    assert draws(own, torch.tensor([[1.5, 1.0]]), 2) == [[0], [1]]


def test_sorting_is_only_for_filters(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("sorted")

    monkeypatch.setattr(torch.Tensor, "sort", refuse)
    for sampling in (Sampling(0.0, 5, 0.5), Sampling(1.0), Sampling(1.0, None, 1.0)):
        sampler(sampling, 5).draw(random_logits())
    with pytest.raises(AssertionError, match="sorted"):
        sampler(Sampling(1.0, 5), 5).draw(random_logits())


def test_a_sampler_made_in_inference_mode_draws_outside_it() -> None:
    with torch.inference_mode():
        own = sampler(Sampling(0.0, frequency_penalty=1.0), 1, 2)
    assert draws(own, torch.tensor([[1.5, 1.0]]), 3) == [[0], [1], [0]]


# ---- GLM's rule: top_p of what top_k leaves ------------------------------------------------------


TIED = (0.35, 0.25, 0.15, 0.15, 0.1)  # of the first four, their sum, .39, .28, .17 and .17


@pytest.mark.parametrize(
    ("shares", "top_k", "top_ps", "kept"),
    [
        # Top-k keeps all that tie with the last.
        ((1 / 16, 0.5, 3 / 16, 1 / 16, 3 / 16), 1, (None,), [1]),
        ((1 / 16, 0.5, 3 / 16, 1 / 16, 3 / 16), 2, (None,), [1, 2, 4]),
        ((1 / 16, 0.5, 3 / 16, 1 / 16, 3 / 16), 4, (None,), [0, 1, 2, 3, 4]),
        # A token goes when those before it exceed top_p.
        ((0.125, 0.5, 0.125, 0.25), None, (1e-9, 0.4999), [1]),
        ((0.125, 0.5, 0.125, 0.25), None, (0.5, 0.7), [1, 3]),
        ((0.125, 0.5, 0.125, 0.25), None, (0.75, 0.874), [0, 1, 3]),
        ((0.125, 0.5, 0.125, 0.25), None, (0.875, 1.0), [0, 1, 2, 3]),
        # Both: top_p is measured on what top_k leaves.
        (TIED, 3, (0.55, 0.62), [0, 1]),
        (TIED, 3, (0.68,), [0, 1, 2]),
        (TIED, 3, (0.84,), [0, 1, 2, 3]),
        (TIED, 2, (0.7,), [0, 1]),
        (TIED, None, (0.62,), [0, 1, 2]),
        (TIED, 1, (0.9,), [0]),
    ],
)
def test_top_k_and_then_top_p_of_what_it_leaves(
    shares: tuple[float, ...], top_k: int | None, top_ps: tuple[float | None, ...], kept: list[int]
) -> None:
    for top_p in top_ps:
        sampling = Sampling(1.0, top_k, top_p, filter=top_k_then_top_p)
        given = probabilities(logits_of(*shares), None, sampling)
        assert given[0].nonzero().flatten().tolist() == kept


def test_rows_are_filtered_each_for_itself() -> None:
    logits = 2 * torch.randn(30, 40, generator=torch.Generator().manual_seed(0)).round()  # ties
    for top_k, top_p in itertools.product([None, 1, 5, 40], [None, 0.3, 0.9, 1.0]):
        together = probabilities(logits, None, Sampling(1.0, top_k, top_p, filter=top_k_then_top_p))
        for own, row in zip(together, logits, strict=True):
            expected = in_turn_by_hand(row.tolist(), top_k, top_p)
            torch.testing.assert_close(own, torch.tensor(expected), rtol=1e-5, atol=1e-7)


def in_turn_by_hand(logits: list[float], top_k: int | None, top_p: float | None) -> list[float]:
    least = sorted(logits)[-(top_k or len(logits))]
    masses = torch.tensor([x if x >= least else -torch.inf for x in logits]).double().softmax(0)
    before, kept = 0.0, [0.0] * len(logits)
    for i in sorted(range(len(logits)), key=lambda i: (-logits[i], i)):
        if before <= (top_p or 1.0):
            kept[i] = float(masses[i])
        before += float(masses[i])
    return [mass / sum(kept) for mass in kept]


# ---- what stays from token to token --------------------------------------------------------------


def test_rows_that_sample_alike_have_one_rule_as_long_as_they_are_there() -> None:
    banning = [Sampling(banned_ids=tuple(range(9)), seed=seed) for seed in (1, 2, None)]
    rules = [rule_for(one, "cpu") for one in banning]
    assert rules[0] is rules[1] is rules[2] and rules[0].sampling.seed is None
    other = rule_for(Sampling(banned_ids=(1, 2)), "cpu")
    assert other is not rules[0] and len({id(rule) for rule in module._rules.values()}) >= 2
    before = len(module._rules)
    del rules, other
    gc.collect()
    assert len(module._rules) == before - 2


def test_what_is_banned_and_biased_is_sent_to_a_device_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent: list[int] = []
    send = module.on_device
    monkeypatch.setattr(
        module, "on_device", lambda to, values, dtype: (sent.append(1), send(to, values, dtype))[1]
    )
    own = sampler(Sampling(temperature=0, banned_ids=(3, 4), logit_bias=((7, 90.0),)), rows=3)
    num_sent = len(sent)
    assert draws(own, random_logits(3), steps=5) == [[7, 7, 7]] * 5
    assert len(sent) == num_sent == 3  # the banned ids, the biased ones, and the biases
