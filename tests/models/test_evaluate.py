"""Texts read in windows, and what a model's logits say of them."""

from __future__ import annotations

import math

import pytest
import torch

from bminf.errors import ArgumentError
from bminf.models import evaluate
from bminf.models.evaluate import log_probabilities, perplexity, window_losses, windows

VOCABULARY = 7


def bigram() -> torch.Tensor:
    """(V, V): logits that depend on the last token alone."""
    return torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("count", "length", "stride"), [(3, 5, 2), (5, 5, 2), (9, 5, 2), (12, 4, 4)]
)
def test_windows_bring_each_token_once_after_as_many_as_there_is_room_for(
    count: int, length: int, stride: int
) -> None:
    found = list(windows(list(range(count)), length, stride))
    new = [token for tokens, num_known in found for token in tokens[num_known:]]
    assert new == list(range(count))
    assert all(num_known < len(tokens) <= length for tokens, num_known in found)
    assert [num_known for _, num_known in found] == [0] + [length - stride] * (len(found) - 1)


@pytest.mark.parametrize("stride", [0, 6])
def test_a_stride_that_leaves_tokens_out_is_refused(stride: int) -> None:
    with pytest.raises(ArgumentError, match="accepted: 1 to the 5 tokens of a window"):
        list(windows([1, 2, 3], 5, stride))


@pytest.mark.parametrize(("length", "stride"), [(50, 50), (5, 2), (4, 4)])
def test_losses_are_those_of_the_tokens_that_are_new(length: int, stride: int) -> None:
    table = bigram()
    ids = torch.randint(0, VOCABULARY, (12,), generator=torch.Generator().manual_seed(1))
    losses = torch.cat(list(window_losses(lambda own: table[own], ids, length, stride)))
    every = -table.log_softmax(-1)[ids[:-1], ids[1:]]
    # Where windows do not overlap, nothing stands before the first token of each.
    predicted = [i for i in range(1, 12) if stride < length or i % length]
    assert torch.equal(losses, every[[i - 1 for i in predicted]])


def test_log_probabilities_are_the_same_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    table, x, ids = bigram(), torch.eye(VOCABULARY), [3, 1, 4, 1, 5, 2, 6]
    whole = log_probabilities(lambda own: own @ table, x, ids)
    monkeypatch.setattr(evaluate, "_SCORED_AT_ONCE", 2)
    assert torch.equal(log_probabilities(lambda own: own @ table, x, ids), whole)
    assert whole.tolist() == pytest.approx(
        [table.log_softmax(-1)[i, token].item() for i, token in enumerate(ids)]
    )


def test_perplexity_is_exp_of_the_mean_and_has_an_end() -> None:
    assert perplexity(6.0, 3) == math.exp(2.0)
    assert perplexity(1e6, 3) == math.exp(20.0)
