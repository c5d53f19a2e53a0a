"""How well a model predicts a text that is given, window by window."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from bminf.errors import ArgumentError

_MAX_LOSS = 20.0  # exp of more tells nothing; published evaluations stop there, too
_SCORED_AT_ONCE = 32  # positions whose logits are computed together: as sampling has room for

Ids = TypeVar("Ids", list[int], torch.Tensor)


def windows(ids: Ids, length: int, stride: int) -> Iterator[tuple[Ids, int]]:
    """(tokens, how many of them the window before had) for windows of at most `length` tokens.

    Each starts `stride` tokens after the one before it, so that this many are new.
    Raises ArgumentError for a stride that is not from 1 to `length`.
    """
    if not 1 <= stride <= length:
        raise ArgumentError(f"stride={stride}; accepted: 1 to the {length} tokens of a window")
    for start in range(0, max(0, len(ids) - length) + stride, stride):
        yield ids[start : start + length], length - stride if start > 0 else 0


def window_losses(
    logits: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor, length: int, stride: int
) -> Iterator[torch.Tensor]:
    """The negative log-likelihood of each new token of each window, (n,) in nats; see windows().

    logits: token ids (1, T) -> (1, T, V), of any language model.   ids: (T,) int64, on its device.
    A token that nothing stands before, the first one, is not predicted.
    """
    for tokens, num_known in windows(ids, length, stride):
        log_probs = logits(tokens[None])[0, :-1].log_softmax(-1)
        losses = -log_probs.gather(1, tokens[1:, None]).view(-1)
        yield losses[max(0, num_known - 1) :]


def log_probabilities(
    head: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, ids: Sequence[int]
) -> torch.Tensor:
    """Of token ids[i] after the hidden state x[i]: (T, C) -> (T,) float64 on the CPU.

    head: (N, C) -> logits (N, V). It gets some rows at a time: no memory is reserved for the logits
    of all.
    """
    return token_scores(head, x, ids)[0]


def token_scores(
    head: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, ids: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """log_probabilities(), and whether each token is the most probable one: (T,) bool."""
    targets = torch.tensor(ids, device=x.device).view(-1, 1)
    logs, best = [], []
    for part, own in zip(x.split(_SCORED_AT_ONCE), targets.split(_SCORED_AT_ONCE), strict=True):
        log_probs = head(part).log_softmax(-1)
        logs.append(log_probs.gather(1, own))
        best.append(logs[-1] >= log_probs.amax(-1, keepdim=True))
    return torch.cat(logs).view(-1).double().cpu(), torch.cat(best).view(-1).cpu()


def perplexity(loss: float, count: int) -> float:
    """exp of the mean of a loss that is summed over `count` tokens, or words."""
    return math.exp(min(_MAX_LOSS, loss / count))
