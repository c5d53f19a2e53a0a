"""The beam search of GLM-130B: its own candidates, its own penalty for length, its own end.

It differs from beam.py in that candidates may be sampled, that a length counts the context,
that stop tokens at any rank finish a sequence, and that beams which run out of steps are ranked
with those that stopped. A beam that does not exist has no score, and a banned token is never
generated, so there can be fewer results but none without a probability.
Source: the rules of BeamSearchStrategy in THUDM/GLM-130B, with consider_end.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from bminf.checks import check_banned, check_ids, non_finite_logits
from bminf.engine.beam import (
    NEG_INF,
    Beam,
    BeamConfig,
    Candidate,
    Decoder,
    Hypothesis,
    Search,
    best_candidates,
    run,
)
from bminf.errors import ArgumentError

_MASKED_LOGIT = -65504.0  # the logit of what is banned: the least that half precision holds
_MIN_UNIFORM = 2.0**-54  # half of the smallest above 0, in place of 0, which has no logarithm


@torch.no_grad()
def glm_beam_search(
    decoder: Decoder,
    start: torch.Tensor,
    contexts: Sequence[Sequence[int]],
    num_beams: int,
    stop_ids: Collection[int],
    max_new_tokens: int,
    *,
    length_penalty: float = 0.0,
    no_repeat_ngram_size: int = 0,
    min_length: int = 0,
    is_deterministic: bool = False,
    seed: int | None = None,
    banned_ids: Collection[int] = (),
) -> list[list[Hypothesis]]:
    """The best sequences for each prompt, best first: num_beams, or fewer where there are fewer.

    decoder: has been fed nothing that `start` holds. It is called with `start`, (B, T) int64, once;
    then each step begins with `select`, which makes num_beams rows of every prompt still searched.
    contexts: of each prompt all ids up to sop, included. In the authors' batches the padding behind
    it counts, too: include it to get the same scores.
    length_penalty: a score is the sum of log-probabilities over ((5 + n) / 6) ** length_penalty,
    where n counts the context, what was generated, and the stop token.
    no_repeat_ngram_size: n-grams of this many ids are generated only once (they may start in the
    context); 0 for no such rule. The authors' code fails for 1; here no token is generated twice.
    min_length: no stop token before so many other tokens.
    is_deterministic: continue with the best continuations of all beams. Otherwise as many are
    sampled without replacement, by their probability, and the best of these continue.
    seed: prompt i is sampled with seed + i; None for a random seed.
    banned_ids: never chosen, and as in the authors' code the others share their probability; the
    same holds for all tokens that are ruled out.

    A prompt is done when num_beams sequences have finished and its best running one, at its present
    length, is no better than the worst of them; or after max_new_tokens, or when no token is left,
    and then the running ones are ranked with the finished ones.
    Numbers are those of a GLMOptions, which has checked them.
    Raises ArgumentError, UnsupportedModelError where logits are not finite numbers.
    """
    config = _GLMBeamConfig(
        num_beams, frozenset(stop_ids), max_new_tokens, length_penalty, no_repeat_ngram_size,
        min_length, is_deterministic, frozenset(banned_ids),
    )  # fmt: skip
    longest = max(map(len, contexts)) + max_new_tokens
    config.check_penalty(longest, "tokens, context included", usual="0 to 1")
    searches = [
        _GLMSearch(config, tuple(context), generator)
        for context, generator in zip(contexts, _generators(len(contexts), seed), strict=True)
    ]
    logits = decoder(start)
    _check_vocabulary(config, logits.shape[1])
    return run(decoder, logits, start.device, searches, partial(_candidates, config))


@dataclass(frozen=True)
class _GLMBeamConfig(BeamConfig):
    no_repeat_ngram_size: int
    min_length: int
    is_deterministic: bool
    banned_ids: frozenset[int]

    def length(self, num_tokens: int) -> float:
        return (5 + num_tokens) / 6

    def excluded_ids(self, num_generated: int) -> frozenset[int]:
        """The ids that no beam may generate after so many tokens."""
        if num_generated < self.min_length:
            return self.banned_ids | self.stop_ids
        return self.banned_ids


class _GLMSearch(Search):
    """generator: of this prompt; on the CPU, so that all devices draw the same."""

    _config: _GLMBeamConfig

    def __init__(
        self, config: _GLMBeamConfig, context: tuple[int, ...], generator: torch.Generator
    ) -> None:
        super().__init__(config, len(context))
        self._context, self.generator = context, generator

    def advance(self, candidates: list[Candidate]) -> None:
        if candidates:
            self.beams, ended = self._extend(candidates)
            self._finish(ended)
        running = [self._hypothesis(beam.score, beam.ids, False) for beam in self.beams]
        is_full = len(self.finished) == self._config.num_beams
        self.is_done = not running or (is_full and self.finished[-1].score >= running[0].score)
        if self.is_done:
            return
        if not candidates or len(running[0].ids) == self._config.max_new_tokens:
            self._finish(running)
            self.is_done = True

    def repeats(self, beam: Beam) -> set[int]:
        """The ids that would end an n-gram whose end `beam` has generated before."""
        size, whole = self._config.no_repeat_ngram_size, (*self._context, *beam.ids)
        if size == 0 or len(whole) <= size:
            return set()
        ends = range(max(len(self._context), size - 1), len(whole))
        prefix = whole[len(whole) - size + 1 :]
        return {whole[end] for end in ends if whole[end - size + 1 : end] == prefix}

    def _extend(self, candidates: list[Candidate]) -> tuple[list[Beam], list[Hypothesis]]:
        """The running and the finished sequences, up to the first that exceeds num_beams."""
        running: list[Beam] = []
        ended: list[Hypothesis] = []
        for score, beam, token in candidates:
            ids = (*self.beams[beam].ids, token)
            if token in self._config.stop_ids:
                ended.append(self._hypothesis(score, ids, True))
            elif len(running) < self._config.num_beams:
                running.append(Beam(score, beam, ids))
            else:
                break
        return running, ended


def _candidates(
    config: _GLMBeamConfig,
    logits: torch.Tensor,
    scores: torch.Tensor,
    searches: Sequence[_GLMSearch],
) -> list[list[Candidate]]:
    """logits: (B * beams, V).   scores: (B, beams) float32."""
    _check_numbers(logits, len(searches))
    is_excluded = _excluded(config, logits, searches)
    # Before the softmax, so that others share the probability; after it, so that none is taken.
    masked = logits.float().masked_fill(is_excluded, _MASKED_LOGIT)
    steps = masked.log_softmax(-1).masked_fill_(is_excluded, NEG_INF)
    noise = None
    if not config.is_deterministic:
        noise = _gumbel_noise(searches, scores.shape[1] * logits.shape[1]).to(logits.device)
    best = best_candidates(steps, scores, config.num_candidates, noise)
    return [sorted(found, key=lambda candidate: -candidate.score) for found in best]


def _excluded(
    config: _GLMBeamConfig, logits: torch.Tensor, searches: Sequence[_GLMSearch]
) -> torch.Tensor:
    """(B * beams, V) bool."""
    rows_each = len(logits) // len(searches)
    repeated = [
        (i * rows_each + row, token)
        for i, search in enumerate(searches)
        for row, beam in enumerate(search.beams)
        for token in search.repeats(beam)
    ]
    is_excluded = torch.zeros_like(logits, dtype=torch.bool)
    is_excluded[:, list(config.excluded_ids(len(searches[0].beams[0].ids)))] = True
    if repeated:
        rows, ids = torch.tensor(repeated, device=logits.device).T
        is_excluded[rows, ids] = True
    return is_excluded


def _gumbel_noise(searches: Sequence[_GLMSearch], size: int) -> torch.Tensor:
    """(B, size) float64 of the Gumbel distribution: the largest sums of it and log-probabilities
    are a sample without replacement (Kool et al. 2019, arXiv:1903.06059, section 2)."""
    uniforms = [
        torch.rand(size, generator=search.generator, dtype=torch.float64, device="cpu")
        for search in searches
    ]
    return torch.stack(uniforms).clamp_min_(_MIN_UNIFORM).log_().neg_().log_().neg_()


def _generators(num_prompts: int, seed: int | None) -> list[torch.Generator]:
    first = random.SystemRandom().getrandbits(64) if seed is None else seed
    # torch's generator uses 32 bits of its seed; these depend on all bits of `seed`.
    seeds = [random.Random(first + prompt).getrandbits(32) for prompt in range(num_prompts)]
    return [torch.Generator().manual_seed(prompt_seed) for prompt_seed in seeds]


def _check_numbers(logits: torch.Tensor, num_prompts: int) -> None:
    """Before tokens are ruled out: next to those, a row of -infinity would look like a choice."""
    is_finite = logits.amax(-1).isfinite().view(num_prompts, -1).all(-1)
    if not is_finite.all():
        raise non_finite_logits((~is_finite).nonzero().flatten().tolist())


def _check_vocabulary(config: _GLMBeamConfig, vocab_size: int) -> None:
    check_ids("stop_ids", config.stop_ids, vocab_size)
    check_banned(config.banned_ids, vocab_size)
    if len(config.excluded_ids(0)) == vocab_size:
        raise ArgumentError(
            f"banned_ids and stop_ids hold all {vocab_size} ids of the vocabulary, and with "
            f"min_length={config.min_length} none can come first; leave one, or set it to 0"
        )
