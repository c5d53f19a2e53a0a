"""bminf/generation/sampling.py: GLM's filter rule, by its words."""

from __future__ import annotations

import itertools

import pytest
import torch
from distribution import probabilities

from bminf.generation.sampling import Sampler, Sampling, top_k_then_top_p


def _logits(*shares: float) -> torch.Tensor:
    """One row whose softmax is `shares`: powers of two, so that their sums are exact."""
    return torch.tensor([shares]).log()


def _kept(logits: torch.Tensor, top_k: int | None, top_p: float | None) -> list[int]:
    sampling = Sampling(1.0, top_k, top_p, filter=top_k_then_top_p)
    return probabilities(logits, None, sampling)[0].nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("top_k", "kept"), [(1, [1]), (2, [1, 2, 4]), (3, [1, 2, 4]), (4, [0, 1, 2, 3, 4])]
)
def test_top_k_keeps_all_that_tie_with_the_last(top_k: int, kept: list[int]) -> None:
    assert _kept(_logits(1 / 16, 0.5, 3 / 16, 1 / 16, 3 / 16), top_k, None) == kept


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(1e-9, [1]), (0.4999, [1]), (0.5, [1, 3]), (0.7, [1, 3]), (0.75, [0, 1, 3]),
     (0.874, [0, 1, 3]), (0.875, [0, 1, 2, 3]), (1.0, [0, 1, 2, 3])],
)  # fmt: skip
def test_a_token_goes_when_those_before_exceed_top_p(top_p: float, kept: list[int]) -> None:
    assert _kept(_logits(0.125, 0.5, 0.125, 0.25), None, top_p) == kept


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [(3, 0.55, [0, 1]), (3, 0.62, [0, 1]), (3, 0.68, [0, 1, 2]), (3, 0.84, [0, 1, 2, 3]),
     (2, 0.7, [0, 1]), (None, 0.62, [0, 1, 2]), (1, 0.9, [0])],
)  # fmt: skip
def test_top_p_is_measured_on_what_top_k_leaves(
    top_k: int | None, top_p: float, kept: list[int]
) -> None:
    """Top-k 3 leaves 4, of which two tie: 0.35, 0.25, 0.15, 0.15 of 0.9 are .39, .28, .17, .17."""
    logits = torch.tensor([[0.35, 0.25, 0.15, 0.15, 0.1]]).log()
    assert _kept(logits, top_k, top_p) == kept


def test_rows_are_filtered_each_for_itself() -> None:
    logits = 2 * torch.randn(30, 40, generator=torch.Generator().manual_seed(0)).round()  # ties
    for top_k, top_p in itertools.product([None, 1, 5, 40], [None, 0.3, 0.9, 1.0]):
        together = probabilities(logits, None, Sampling(1.0, top_k, top_p, filter=top_k_then_top_p))
        for own, row in zip(together, logits, strict=True):
            expected = _by_hand(row.tolist(), top_k, top_p)
            torch.testing.assert_close(own, torch.tensor(expected), rtol=1e-5, atol=1e-7)


def _by_hand(logits: list[float], top_k: int | None, top_p: float | None) -> list[float]:
    least = sorted(logits)[-(top_k or len(logits))]
    masses = torch.tensor([x if x >= least else -torch.inf for x in logits]).double().softmax(0)
    before, kept = 0.0, [0.0] * len(logits)
    for i in sorted(range(len(logits)), key=lambda i: (-logits[i], i)):
        if before <= (top_p or 1.0):
            kept[i] = float(masses[i])
        before += float(masses[i])
    return [mass / sum(kept) for mass in kept]


def test_the_rule_leaves_its_input_as_it_is() -> None:
    given = torch.tensor([[0.125, 0.5, 0.25, 0.125], [0.25, 0.25, 0.25, 0.25]])
    before = given.clone()
    assert top_k_then_top_p(given, None, None) is given
    assert top_k_then_top_p(given, 2, 1.0).tolist() == [[0, 0.5, 0.25, 0], [0.25] * 4]
    assert top_k_then_top_p(given, 3, 0.5).tolist() == [[0, 0.5, 0.25, 0], [0.25, 0.25, 0.25, 0]]
    assert torch.equal(given, before)


def test_what_is_drawn_was_kept() -> None:
    sampling = Sampling(1.0, 2, 0.7, seed=0, filter=top_k_then_top_p)
    logits = _logits(0.125, 0.5, 0.125, 0.25).expand(200, 4)
    assert set(Sampler(sampling, [[]] * 200, 4, "cpu").draw(logits).tolist()) == {1, 3}
