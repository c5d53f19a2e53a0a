"""One step of sampling: logits to probabilities, and the token sampled from them.

Source: the sampler of BMInf 1.0.2, whose order of steps and filter rule CPM-1, CPM-2 and EVA use.
Unlike there everything is float32, temperature 0 is greedy, and padding is not counted as part of
the prompt.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from bminf.checks import (
    check_banned,
    check_ids,
    check_int,
    check_positive,
    is_number,
    make_plain,
)
from bminf.errors import ArgumentError
from bminf.keywords import known_fields

Filter = Callable[[torch.Tensor, int | None, float | None], torch.Tensor]
"""A filter rule: (probabilities (B, V) float32, top_k, top_p) -> the same, zero where dropped.

What is kept need not sum to 1. At least one token of a row is kept.
"""

_MASS_BITS = 52  # the masses of a row sum to about 2**52: exact as int64 and as float64
_TEMPERATURES = (1e-30, 1e30)  # beyond, float32 has neither the temperature nor its inverse


def top_k_and_top_p(
    probabilities: torch.Tensor, top_k: int | None, top_p: float | None
) -> torch.Tensor:
    """Keep tokens of each row that are among the `top_k` most probable, and among the most probable
    whose sum first exceeds `top_p`, both of the whole distribution.

    probabilities: (B, V) float32, rows sum to 1.   Ties are ordered by id.
    Returns (B, V) float32, zero where dropped.   Source: BMInf 1.0.2.
    """
    if top_k is None and (top_p is None or top_p == 1):
        return probabilities
    values, ids = probabilities.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        values[:, top_k:] = 0
    if top_p is not None and top_p < 1:
        values[_exclusive_cumsum(values) > top_p] = 0
    return torch.zeros_like(values).scatter_(-1, ids, values)


def top_k_then_top_p(
    probabilities: torch.Tensor, top_k: int | None, top_p: float | None
) -> torch.Tensor:
    """Keep the `top_k` most probable tokens of each row, with all ties of the last; then, of these,
    the most probable whose share of their sum first exceeds `top_p`.

    probabilities: (B, V) float32, rows sum to 1.   For `top_p`, ties are ordered by id.
    Returns (B, V) float32, zero where dropped.
    Source: Zeng et al. 2022, arXiv:2210.02414, the sampler of its code.
    """
    kept = probabilities
    if top_k is not None:
        kept = kept.masked_fill(kept < kept.topk(top_k).values[:, -1:], 0)
    if top_p is None or top_p == 1:
        return kept
    values, ids = kept.sort(dim=-1, descending=True, stable=True)
    whole = values.sum(-1, keepdim=True, dtype=torch.float64)
    values[_exclusive_cumsum(values) > top_p * whole] = 0
    return torch.zeros_like(values).scatter_(-1, ids, values)


def _exclusive_cumsum(values: torch.Tensor) -> torch.Tensor:
    """The sum of the values before each, (B, V) float64."""
    sums = values.cumsum(-1, dtype=torch.float64).roll(1, -1)
    sums[:, 0] = 0
    return sums


@known_fields
@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    temperature: logits are divided by it; 0 takes the most probable token (greedy).
    top_k: only this many of the most probable tokens (None: all).
    top_p: only the most probable tokens that together exceed this probability (None: all).
    frequency_penalty: subtracted from a token's logit for each occurrence, in prompt and output.
    presence_penalty: subtracted once if it occurred at all.
    banned_ids: never sampled.   unpenalized_ids: their occurrences are not counted.
    logit_bias: (token, what is added to its logit) pairs.
    seed: the same draws the same tokens; None for a random one.
    filter: how top_k and top_p are applied, which depends on the model family; None is
    top_k_and_top_p.
    Raises ArgumentError for anything else.
    """

    temperature: float = 0.9
    top_k: int | None = None
    top_p: float | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    banned_ids: tuple[int, ...] = ()
    unpenalized_ids: tuple[int, ...] = ()
    seed: int | None = None
    filter: Filter | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        make_plain(self)
        if not is_number(self.temperature) or self.temperature < 0:
            raise ArgumentError(
                f"temperature={self.temperature!r}; accepted: a finite number from 0 on "
                "(0 is greedy)"
            )
        check_positive("top_k", self.top_k, none="None for all tokens")
        if self.top_p is not None and not (is_number(self.top_p) and 0 < self.top_p <= 1):
            raise ArgumentError(
                f"top_p={self.top_p!r}; accepted: a number above 0 and up to 1, or None"
            )
        for name in ("frequency_penalty", "presence_penalty"):
            if not is_number(getattr(self, name)):
                raise ArgumentError(f"{name}={getattr(self, name)!r}; accepted: a finite number")
        check_int("seed", self.seed, minimum=0, none="None")
        if not all(is_number(bias) for _, bias in self.logit_bias):
            raise ArgumentError(f"logit_bias={self.logit_bias!r}; accepted: finite numbers")

    def check(self, vocab_size: int) -> None:
        """Raise ArgumentError for values that do not fit a vocabulary of this size."""
        if self.top_k is not None and self.top_k > vocab_size:
            raise ArgumentError(
                f"top_k (or top_n)={self.top_k} is more than the {vocab_size} tokens of the "
                "vocabulary; accepted: at most that many, or None for all"
            )
        check_banned(self.banned_ids, vocab_size)
        check_ids("unpenalized_ids", self.unpenalized_ids, vocab_size)
        check_ids("logit_bias", [token for token, _ in self.logit_bias], vocab_size)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0


class Rule:
    """A Sampling without its seed, and what it says of single tokens, on a device; see rule_for().

    banned: (n,) int64.   biases: tokens (n,) int64 and what is added to each, (n,) float32.   None
    where there are none.
    """

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self.sampling = sampling
        self.banned: torch.Tensor | None = None
        self.biases: tuple[torch.Tensor, torch.Tensor] | None = None
        with torch.inference_mode(False):  # it is read in either mode
            if sampling.banned_ids:
                self.banned = on_device(device, sampling.banned_ids, torch.int64)
            if sampling.logit_bias:
                ids, biases = zip(*sampling.logit_bias, strict=True)
                added = on_device(device, biases, torch.float32)
                self.biases = on_device(device, ids, torch.int64), added


_rules: weakref.WeakValueDictionary[tuple[Sampling, torch.device], Rule] = (
    weakref.WeakValueDictionary()
)


def rule_for(sampling: Sampling, device: torch.device | str) -> Rule:
    """The same one for all that sample alike: a model may ban thousands of tokens, which would take
    longer to compare, or to send to a device, for each token than to draw it."""
    key = replace(sampling, seed=None), torch.device(device)
    found = _rules.get(key)
    if found is None:
        found = _rules[key] = Rule(*key)
    return found


def scores_of(logits: torch.Tensor, counts: torch.Tensor | None, rule: Rule) -> torch.Tensor:
    """(B, V) float32 whose softmax, or at temperature 0 whose maximum, is to be taken."""
    scores, sampling = logits.detach().float(), rule.sampling
    if rule.biases is not None:
        ids, added = rule.biases
        scores = scores.index_add(1, ids, added.expand(len(scores), -1))
    if not sampling.is_greedy:
        # Of the differences, which are all that counts, no small temperature can make a NaN.
        low, high = _TEMPERATURES
        divisor = min(max(sampling.temperature, low), high)
        scores = (scores - scores.amax(-1, keepdim=True)) / divisor
    if counts is not None:
        if sampling.frequency_penalty:
            scores = scores - sampling.frequency_penalty * counts
        if sampling.presence_penalty:
            scores = scores - sampling.presence_penalty * (counts > 0)
    if rule.banned is not None:
        scores = scores.index_fill(1, rule.banned, -math.inf)
    return scores


def filtered(scores: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Probabilities after the filter, not yet to sum 1."""
    rule = sampling.filter or top_k_and_top_p
    return rule(scores.softmax(-1), sampling.top_k, sampling.top_p)


def inverse_cdf(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Inverse transform sampling: the tokens (B,) at which the CDF of `weights` passes `uniforms`.

    weights: (B, V) from 0 to 1.   uniforms: (B,) float64 in [0, 1).
    The sums are of integers, so that no order of adding can change them: a parallel sum of floats
    differs between devices, and may even rise where a weight is zero.
    """
    masses = (weights.double() * 2.0**_MASS_BITS).round().long()
    cdf = masses.cumsum(-1)
    targets = (uniforms * cdf[:, -1]).long()
    return torch.searchsorted(cdf, targets.unsqueeze(1), right=True).squeeze(1)


def on_device(device: torch.device, values: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
    """`values` on `device`, without waiting for what that is still computing."""
    return torch.tensor(values, dtype=dtype, device="cpu").to(device, non_blocking=True)
