"""The distribution that a Sampler draws from."""

from __future__ import annotations

import torch

from bminf.checks import non_finite_logits
from bminf.engine.sampling import Sampling, filtered, rule_for, scores_of


def probabilities(
    logits: torch.Tensor, counts: torch.Tensor | None, sampling: Sampling
) -> torch.Tensor:
    """(B, V) float32, rows sum to 1.   counts: (B, V), how often each token occurred, or None.

    At temperature 0 all is with the highest of the scores, the lowest id among equals.
    """
    sampling.check(logits.shape[1])
    scores = scores_of(logits, counts, rule_for(sampling, logits.device))
    is_finite = scores.amax(-1).isfinite()
    if not is_finite.all():
        raise non_finite_logits((~is_finite).nonzero().flatten().tolist())
    if sampling.is_greedy:
        return torch.zeros_like(scores).scatter_(1, scores.argmax(-1, keepdim=True), 1)
    kept = filtered(scores, sampling)
    return kept / kept.sum(-1, keepdim=True)
