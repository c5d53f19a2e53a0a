"""The distribution that a Sampler draws from."""

from __future__ import annotations

import torch

from bminf.engine.sampling import Sampling, _check_scores, filtered, scores_of


def probabilities(
    logits: torch.Tensor, counts: torch.Tensor | None, sampling: Sampling
) -> torch.Tensor:
    """(B, V) float32, rows sum to 1.   counts: (B, V), how often each token occurred, or None.

    At temperature 0 all is with the highest of the scores, the lowest id among equals.
    """
    sampling.check(logits.shape[1])
    scores = scores_of(logits, counts, sampling)
    _check_scores(scores)
    if sampling.is_greedy:
        return torch.zeros_like(scores).scatter_(1, scores.argmax(-1, keepdim=True), 1)
    kept = filtered(scores, sampling)
    return kept / kept.sum(-1, keepdim=True)
