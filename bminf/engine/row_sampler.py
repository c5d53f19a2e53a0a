"""The next tokens of rows that each have options, counts and random numbers of their own."""

from __future__ import annotations

import random
import secrets
from collections.abc import Sequence

import torch

from bminf.checks import check_ids
from bminf.engine.sampling import (
    Rule,
    Sampling,
    filtered,
    inverse_cdf,
    on_device,
    rule_for,
    scores_of,
)


class RowSampler:
    """Draws the tokens of one row, and counts them for its penalties.

    prompt: token ids, without padding, which are counted, too.
    Its random numbers depend on the seed alone, and a number is used up only when its token is
    accepted: a pass that is repeated draws the same token.
    Raises ArgumentError (see Sampling.check; a prompt with ids outside the vocabulary).
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int],
        vocab_size: int,
        device: torch.device | str,
    ) -> None:
        sampling.check(vocab_size)
        check_ids("prompt", prompt, vocab_size)
        self.rule = rule_for(sampling, device)
        seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
        self._random = random.Random(seed)
        self._uniform: float | None = None
        self.counts: torch.Tensor | None = None
        if sampling.frequency_penalty or sampling.presence_penalty:
            self._uncounted = frozenset(sampling.unpenalized_ids)
            ids = [token for token in prompt if token not in self._uncounted]
            with torch.inference_mode(False):  # it is written to in either mode
                counts = torch.tensor(ids, dtype=torch.int64, device="cpu").bincount(
                    minlength=vocab_size
                )
                self.counts = counts.float().to(device)

    @property
    def uniform(self) -> float:
        """The random number of the next token, in [0, 1)."""
        if self._uniform is None:
            self._uniform = self._random.random()
        return self._uniform

    def accept(self, token: int) -> None:
        """The row goes on with this token."""
        self._uniform = None
        if self.counts is not None and token not in self._uncounted:
            self.counts[token].add_(1)  # in place: an assignment would copy the number to itself


def draw(logits: torch.Tensor, samplers: Sequence[RowSampler]) -> list[int | None]:
    """The next token of each row; None where its logits are not finite numbers.

    logits: (R, V) floating point.   Rows whose rules are equal are drawn together; the device is
    waited for once, at the end.
    """
    if len(samplers) == 1:
        (token,) = _draw_alike(logits, samplers).tolist()
        return [token if token >= 0 else None]
    groups: dict[Rule, list[int]] = {}
    for row, sampler in enumerate(samplers):
        groups.setdefault(sampler.rule, []).append(row)
    drawn = [
        _draw_alike(_rows_of(logits, rows), [samplers[row] for row in rows])
        for rows in groups.values()
    ]
    tokens = (torch.cat(drawn) if len(drawn) > 1 else drawn[0]).tolist()
    result: list[int | None] = [None] * len(samplers)
    for row, token in zip((row for rows in groups.values() for row in rows), tokens, strict=True):
        result[row] = token if token >= 0 else None
    return result


def log_probabilities(
    logits: torch.Tensor, token: int, num_top: int
) -> tuple[float, list[tuple[int, float]]]:
    """That of `token`, and the most probable (token, log-probability), best first, ties by id.

    logits: (V,), of one row, as the model gave them: neither temperature nor penalties.
    """
    logs = logits.detach().float().log_softmax(-1)
    if num_top == 0:
        return float(logs[token]), []
    least = logs.topk(min(num_top, len(logs))).values[-1]
    ids = (logs >= least).nonzero().view(-1)  # with those that tie with the last: few, to be sorted
    values, order = logs[ids].sort(descending=True, stable=True)
    top = zip(ids[order[:num_top]].tolist(), values[:num_top].tolist(), strict=True)
    return float(logs[token]), list(top)


def _rows_of(logits: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    return (
        logits if len(rows) == len(logits) else logits[on_device(logits.device, rows, torch.int64)]
    )


def _counts_of(samplers: Sequence[RowSampler]) -> torch.Tensor | None:
    """(R, V); None where no row counts."""
    counted = [sampler.counts for sampler in samplers if sampler.counts is not None]
    if len(counted) == 1:
        return counted[0].unsqueeze(0)
    return torch.stack(counted) if counted else None


def _draw_alike(logits: torch.Tensor, samplers: Sequence[RowSampler]) -> torch.Tensor:
    """(R,) int64 on the logits' device, -1 for rows without a choice."""
    rule = samplers[0].rule
    scores = scores_of(logits, _counts_of(samplers), rule)
    if rule.sampling.is_greedy:
        most, tokens = scores.max(-1)  # the first of equal ones
    else:
        uniforms = [sampler.uniform for sampler in samplers]
        weights, most = filtered(scores, rule.sampling), scores.amax(-1)
        tokens = inverse_cdf(weights, on_device(logits.device, uniforms, torch.float64))
    # The maximum of a row is NaN where the row has one; and only a finite one is 0 less itself.
    return tokens.masked_fill_(most - most != 0, -1)
