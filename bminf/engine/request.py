"""What is asked of an engine, and what has come of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bminf.checks import check_int, plain
from bminf.engine.sampling import Sampling
from bminf.errors import ArgumentError
from bminf.keywords import known_keywords
from bminf.offload.phase import NO_PHASE, Phase, PhaseTally

FinishReason = Literal["stop", "length", "cancelled", "error"]

MAX_LOGPROBS = 20
"""Of the tokens beside the drawn one whose log-probabilities are kept."""


@dataclass(frozen=True)
class Usage:
    """Tokens of a request.   completion_tokens: all that were drawn, with the one that ended it."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class TokenLogprob:
    """The natural logarithm of the probability that the model itself gave a token, before
    temperature, penalties and filters.   top: (token, logprob) of the most probable, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class RequestStats:
    """Times in seconds, from add() on.

    queued_s: until its first sweep.   first_token_s: until its first token; None before.
    total_s: until its end, or until now.   num_sweeps: in which it had a part, which counts sweeps
    that are over.   num_rows: of all these sweeps together.
    prefill, decode: the sweeps up to its first token, and those behind; each is counted as a whole
    for every request in it.
    """

    queued_s: float
    first_token_s: float | None
    total_s: float
    num_sweeps: int
    num_tokens: int
    num_rows: int = 0
    prefill: Phase = NO_PHASE
    decode: Phase = NO_PHASE

    @property
    def rows_per_sweep(self) -> float:
        return self.num_rows / self.num_sweeps if self.num_sweeps else 0.0

    @property
    def bytes_copied(self) -> int:
        """In its sweeps, for all rows of each."""
        return self.prefill.bytes_copied + self.decode.bytes_copied

    @property
    def tokens_per_s(self) -> float:
        """Behind the first token."""
        if self.first_token_s is None or self.num_tokens < 2:
            return 0.0
        return (self.num_tokens - 1) / max(self.total_s - self.first_token_s, 1e-9)


class Request:
    """A text to go on with, token ids only; made once, and added to one engine.

    input_ids: the prompt; of an encoder-decoder model, what its encoder reads.
    max_new_tokens: the most tokens of the answer.   sampling: how each of them is chosen; None is
        as Sampling() says.
    stop_ids: tokens that end the answer; the one that did is its last.
    num_logprobs: None, or how many of the most probable tokens are kept for each, beside its own.
    num_prompt_logprobs: the same for the tokens of the prompt, which is then read from its first
        one; not for models that read it in both directions. max_new_tokens may be 0 with it.
    on_token: called with each token, in the thread that happens to run the sweep; what is true of
        its return ends the answer ("stop"), and an exception ends it with that error.
    start_ids: what the decoder begins with; None is what the model's configuration says, or the
        prompt.
    keep: whether its row stays when it ends, for a request that begins with at least half of its
        tokens and goes on (a chat), which are not read again; it is given up where others need the
        room. Not for encoders, GLM, and models that are decoded row by row.
    prompt: what a built-in model knows of the prompt beside its ids.
    Raises ArgumentError.

    tokens: what has come, with the token that ended it.   logprobs: one for each of them.
    prompt_logprobs: one for each token of the prompt but the first; all are there before a token.
    finish_reason: None while it is under way; then "stop", "length", "cancelled", or "error" with
    the error in `error`.
    """

    @known_keywords
    def __init__(
        self,
        input_ids: Sequence[int],
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        stop_ids: Collection[int] = (),
        *,
        num_logprobs: int | None = None,
        num_prompt_logprobs: int | None = None,
        on_token: Callable[[int], object] | None = None,
        start_ids: Sequence[int] | None = None,
        keep: bool = False,
        prompt: Any = None,
    ) -> None:
        max_new_tokens = plain(max_new_tokens)
        num_logprobs, num_prompt_logprobs = plain(num_logprobs), plain(num_prompt_logprobs)
        _check_logprobs("num_logprobs", num_logprobs)
        _check_logprobs("num_prompt_logprobs", num_prompt_logprobs)
        check_int("max_new_tokens", max_new_tokens, minimum=int(num_prompt_logprobs is None))
        stops = [plain(token) for token in _listed("stop_ids", stop_ids)]
        if not all(type(token) is int for token in stops):
            raise ArgumentError(f"stop_ids={_shown(stops)}; give token ids, ints from 0 on")
        if not isinstance(sampling, Sampling | None):
            raise ArgumentError(f"sampling is a {type(sampling).__name__}; give a Sampling")
        self.input_ids = _checked_ids("input_ids", input_ids)
        self.start_ids = None if start_ids is None else _checked_ids("start_ids", start_ids)
        self.max_new_tokens, self.sampling, self.stop_ids = (
            max_new_tokens, Sampling() if sampling is None else sampling, frozenset(stops),
        )  # fmt: skip
        self.num_logprobs, self.num_prompt_logprobs = num_logprobs, num_prompt_logprobs
        self.on_token, self.keep, self.prompt = on_token, keep, prompt
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: list[TokenLogprob] = []
        self.finish_reason: FinishReason | None = None
        self.error: BaseException | None = None
        self.clock = _Clock()

    @property
    def is_done(self) -> bool:
        return self.finish_reason is not None

    @property
    def usage(self) -> Usage:
        return Usage(len(self.input_ids), len(self.tokens))

    @property
    def stats(self) -> RequestStats:
        clock = self.clock
        now = time.perf_counter() if clock.ended is None else clock.ended
        added = now if clock.added is None else clock.added
        first = None if clock.first_token is None else clock.first_token - added
        begun = now if clock.begun is None else clock.begun
        return RequestStats(
            begun - added, first, now - added, clock.num_sweeps, len(self.tokens),
            clock.num_rows, clock.prefill.phase, clock.decode.phase,
        )  # fmt: skip

    def finish(self, reason: FinishReason, error: BaseException | None = None) -> None:
        """For the engine: nothing more will come."""
        if self.finish_reason is None:
            self.finish_reason, self.error = reason, error
            self.clock.ended = time.perf_counter()


class _Clock:
    """When things happened, by time.perf_counter(), and what its sweeps took."""

    def __init__(self) -> None:
        self.added: float | None = None
        self.begun: float | None = None
        self.first_token: float | None = None
        self.ended: float | None = None
        self.num_sweeps = self.num_rows = 0
        self.prefill, self.decode = PhaseTally(), PhaseTally()


def _check_logprobs(name: str, number: int | None) -> None:
    check_int(name, number, minimum=0, none="None")
    if number is not None and number > MAX_LOGPROBS:
        raise ArgumentError(f"{name}={number}; accepted: at most {MAX_LOGPROBS}")


def _checked_ids(name: str, ids: Sequence[int]) -> list[int]:
    listed = [plain(token) for token in _listed(name, ids)]
    if not listed or not all(type(token) is int and token >= 0 for token in listed):
        raise ArgumentError(f"{name}={_shown(listed)}; give at least one token id, ints from 0 on")
    return listed


def _listed(name: str, ids: Collection[int]) -> list[int]:
    try:
        return list(ids)
    except TypeError as error:
        raise ArgumentError(f"{name} is a {type(ids).__name__}; give token ids") from error


def _shown(ids: Sequence[object]) -> str:
    return repr(list(ids[:8])) if len(ids) <= 8 else f"{list(ids[:8])!r} and {len(ids) - 8} more"
