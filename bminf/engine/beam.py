"""Beam search: the sequences with the highest scores among `num_beams` per prompt.

The meaning is that of `generate(num_beams=..., early_stopping=True)` in transformers 5: what counts
as a candidate, when a sequence is finished, and when a search is done. Unlike there a beam that
does not exist has no score, so there can be fewer results but none without a probability.
What is public here is shared with glm_beam.py.
Source: transformers/generation/utils.py, `GenerationMixin._beam_search`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import torch

from bminf.checks import check_banned, check_ids, non_finite_logits
from bminf.errors import ArgumentError

NEG_INF = -math.inf
"""The score of what is banned, or does not exist."""

_LARGEST_EXPONENT = 700.0  # of e, in float64


class Decoder(Protocol):
    """One batch: a model, and the caches of what its rows have been fed."""

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The logits (B, V) after the last of `input_ids`, (B, T) int64; caches grow by T."""
        ...

    def select(self, rows: torch.Tensor) -> None:
        """Keep the caches of `rows`, (n,) int64, in this order; a row may come several times."""
        ...


@dataclass(frozen=True)
class Hypothesis:
    """A finished sequence.

    ids: the generated tokens, with the stop token that ended them, if one did.
    score: the sum of their log-probabilities, divided by the search's function of their length:
    len(ids) ** length_penalty in `beam_search`.
    stopped: whether a stop token ended it; otherwise max_new_tokens did, or, in a search that
    excludes tokens, no token was left.
    """

    ids: tuple[int, ...]
    score: float
    stopped: bool


@torch.no_grad()
def beam_search(
    decoder: Decoder,
    start: torch.Tensor,
    num_beams: int,
    stop_ids: Collection[int],
    max_new_tokens: int,
    length_penalty: float = 1.0,
    banned_ids: Collection[int] = (),
) -> list[list[Hypothesis]]:
    """The best sequences for each prompt, best first: num_beams, or fewer where there are fewer.

    decoder: has been fed nothing that `start` holds. It is called with `start`, (B, T) int64, once;
    then each step begins with `select`, which makes num_beams rows of every prompt still searched.
    A prompt is done when it has num_beams finished sequences.
    length_penalty: above 0 it favours long sequences, below 0 short ones.
    banned_ids: never chosen; the others' probabilities stay as they are.
    Numbers are those of an Options, which has checked them.
    Raises ArgumentError, UnsupportedModelError where logits are not finite numbers.
    """
    config = BeamConfig(num_beams, frozenset(stop_ids), max_new_tokens, length_penalty)
    config.check_penalty(max_new_tokens, "tokens", usual="0 to 2")
    searches = [Search(config) for _ in range(len(start))]
    logits = decoder(start)
    check_ids("stop_ids", config.stop_ids, logits.shape[1])
    check_banned(banned_ids, logits.shape[1])
    banned = torch.tensor(sorted(banned_ids), dtype=torch.int64, device=logits.device)

    def candidates(
        logits: torch.Tensor, scores: torch.Tensor, _: Sequence[Search]
    ) -> list[list[Candidate]]:
        steps = logits.float().log_softmax(-1).index_fill_(1, banned, NEG_INF)
        return best_candidates(steps, scores, config.num_candidates)

    return run(decoder, logits, start.device, searches, candidates)


class Candidate(NamedTuple):
    """A running sequence with one token more. score: the sum of log-probabilities, all included."""

    score: float
    beam: int
    token: int


class Beam(NamedTuple):
    """A running sequence. row: where its cache lies, among the rows of its prompt."""

    score: float
    row: int
    ids: tuple[int, ...]


@dataclass(frozen=True)
class BeamConfig:
    """The arguments of a search, see `beam_search`."""

    num_beams: int
    stop_ids: frozenset[int]
    max_new_tokens: int
    length_penalty: float

    @property
    def num_candidates(self) -> int:
        """So many that num_beams of them go on even if every beam's likeliest tokens are stops."""
        return (max(1, len(self.stop_ids)) + 1) * self.num_beams

    def length(self, num_tokens: int) -> float:
        """The base of the length penalty: a score is divided by it to that power."""
        return num_tokens

    def check_penalty(self, longest: int, counted: str, usual: str) -> None:
        """Raise ArgumentError where a sequence of `longest` tokens would have no finite score."""
        penalty, length = self.length_penalty, self.length(longest)
        if abs(penalty) * math.log(length) > _LARGEST_EXPONENT:
            raise ArgumentError(
                f"length_penalty={penalty!r}; accepted: a number, so small that {length:g} (for "
                f"{longest} {counted}) to its power is one; usual are {usual}"
            )


class Search:
    """The beams of one prompt: at first one, with nothing generated.

    num_context: tokens that a sequence's length counts beside its own.
    beams: the running ones, best first.   finished: at most num_beams, best first.
    """

    def __init__(self, config: BeamConfig, num_context: int = 0) -> None:
        self._config, self._num_context = config, num_context
        self.beams = [Beam(0.0, 0, ())]
        self.finished: list[Hypothesis] = []
        self.is_done = False

    def advance(self, candidates: list[Candidate]) -> None:
        """Take a step: set `beams` and `is_done`. candidates: best first, of all beams."""
        config, running, ended = self._config, [], []
        for rank, (score, beam, token) in enumerate(candidates):
            ids, stopped = (*self.beams[beam].ids, token), token in config.stop_ids
            if not stopped and len(ids) < config.max_new_tokens:
                running.append(Beam(score, beam, ids))
            elif rank < config.num_beams:  # the other candidates only fill the beams
                ended.append(self._hypothesis(score, ids, stopped))
        self.beams = running[: config.num_beams]
        self._finish(ended)
        self.is_done = not self.beams or len(self.finished) == config.num_beams

    def padded_beams(self) -> list[Beam]:
        """num_beams of them: missing ones are copies of the first without a score."""
        missing = self._config.num_beams - len(self.beams)
        return self.beams + [self.beams[0]._replace(score=NEG_INF)] * missing

    def _finish(self, ended: list[Hypothesis]) -> None:
        """Keep the best of these and of those that had finished before."""
        self.finished += ended
        self.finished.sort(key=lambda hypothesis: hypothesis.score, reverse=True)
        del self.finished[self._config.num_beams :]

    def _hypothesis(self, score: float, ids: tuple[int, ...], stopped: bool) -> Hypothesis:
        length = self._config.length(self._num_context + len(ids))
        return Hypothesis(ids, score / math.pow(length, self._config.length_penalty), stopped)


_AnySearch = TypeVar("_AnySearch", bound=Search)


def run(
    decoder: Decoder,
    logits: torch.Tensor,
    device: torch.device,
    searches: Sequence[_AnySearch],
    choose: Callable[[torch.Tensor, torch.Tensor, Sequence[_AnySearch]], Sequence[list[Candidate]]],
) -> list[list[Hypothesis]]:
    """The finished sequences of each search, after as many passes as it takes.

    logits: (B, V) of the first pass, a row for each search.   device: of the decoder's input.
    choose: returns the candidates of each search, best first, from logits (B * beams, V), scores
    (B, beams) float32 and the B unfinished searches. `beams` is 1 in the first step, num_beams in
    the others.
    """
    every, scores = searches, torch.zeros(len(searches), 1, device=logits.device)
    while True:
        for search, best in zip(searches, choose(logits, scores, searches), strict=True):
            search.advance(best)
        rows, last, next_scores = _next_rows(searches, beams_before=scores.shape[1])
        if not rows:
            return [search.finished for search in every]
        searches = [search for search in searches if not search.is_done]
        scores = torch.tensor(next_scores, device=logits.device)
        decoder.select(torch.tensor(rows, device=logits.device))
        logits = decoder(torch.tensor(last, device=device))


def best_candidates(
    steps: torch.Tensor, scores: torch.Tensor, limit: int, noise: torch.Tensor | None = None
) -> list[list[Candidate]]:
    """The `limit` best continuations of each prompt, best first, ties by beam and id. Those
    without a score are left out.

    steps: (B * beams, V) float32, the log-probability of each token.   scores: (B, beams) float32.
    noise: (B, beams * V) float64; if given, they are ranked by the sum of score and noise.
    Raises UnsupportedModelError where log-probabilities are not numbers.
    """
    vocab_size = steps.shape[1]
    sums = (steps.view(*scores.shape, vocab_size) + scores.unsqueeze(-1)).flatten(1)
    keys = sums if noise is None else sums + noise
    indices = keys.argsort(dim=-1, descending=True, stable=True)[:, :limit]
    # float64 holds both exactly, and one transfer is one wait.
    both = torch.stack([sums.gather(1, indices).double(), indices.double()], -1).tolist()
    wrong = [prompt for prompt, best in enumerate(both) if math.isnan(best[0][0])]
    if wrong:
        raise non_finite_logits(wrong)
    return [
        [Candidate(v, *divmod(int(index), vocab_size)) for v, index in best if v > NEG_INF]
        for best in both
    ]


def _next_rows(
    searches: Sequence[Search], beams_before: int
) -> tuple[list[int], list[list[int]], list[list[float]]]:
    """Of the unfinished searches: each beam's row in the cache, its last token, and its score."""
    rows, last, scores = [], [], []
    for i, search in enumerate(searches):
        if not search.is_done:
            beams = search.padded_beams()
            rows += [i * beams_before + beam.row for beam in beams]
            last += [[beam.ids[-1]] for beam in beams]
            scores.append([beam.score for beam in beams])
    return rows, last, scores
