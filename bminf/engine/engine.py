"""Requests decoded together: rows that each have a length, options and an end of their own.

A step is a sweep: one pass over the weights for all rows, for which streamed weights are copied
once. Newcomers' prompts ride in the sweep in which others decode.

No thread is started. Whoever waits for a token waits for the sweep that another thread is running,
and where none is, runs one, for all.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from bminf.checks import check_bool, check_ids, check_positive, non_finite_logits
from bminf.engine.request import Request, TokenLogprob
from bminf.engine.row_sampler import RowSampler, draw, log_probabilities
from bminf.engine.rows import FIXED_CHUNK, FIXED_TOKENS, Feed, RowModel, fixed_length
from bminf.errors import ArgumentError, UnsupportedModelError
from bminf.keywords import known_keywords
from bminf.offload.phase import NO_PHASE, Phase, PhaseTally, phase_between

CHUNK = 512
"""Tokens of prompts that are read in one step while others decode."""

MAX_KEPT = 16
"""Rows that stay when their request ends, see Request.keep."""

_PATIENCE_S = 1.0
"""For an iterator of another thread that is not asked and has the room that a newcomer needs."""

_FROM_WITHIN = "an engine cannot be stepped from within its own step"
_NOT_SCORED = (
    "num_prompt_logprobs is for models that read a prompt from its first token to its last; this "
    "one reads it in both directions, or with an encoder"
)
_PUSHED_OUT = (
    "another text was begun on this model and needed the room of this iterator before that was at "
    "its end; finish one text before the next, or load the model with a larger max_length or "
    "max_batch_size"
)


@dataclass(frozen=True)
class EngineStats:
    """Counted since the engine was made. Times in seconds.

    num_sweeps: passes over the weights.   num_rows: of all sweeps together.   num_tokens: drawn,
    over all rows.   busy_s: what sweeps took.
    num_requests: that have got their first token.   first_tokens_s: what they waited for it, from
    add() on, together.
    prefill, decode: sweeps in which a prompt was read, and those that did nothing but decode.
    """

    num_sweeps: int = 0
    num_rows: int = 0
    num_tokens: int = 0
    busy_s: float = 0.0
    num_requests: int = 0
    first_tokens_s: float = 0.0
    prefill: Phase = NO_PHASE
    decode: Phase = NO_PHASE

    @property
    def first_token_s(self) -> float:
        """The mean time to the first token."""
        return self.first_tokens_s / self.num_requests if self.num_requests else 0.0

    @property
    def bytes_copied(self) -> int:
        return self.prefill.bytes_copied + self.decode.bytes_copied

    @property
    def rows_per_sweep(self) -> float:
        return self.num_rows / self.num_sweeps if self.num_sweeps else 0.0

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.busy_s if self.busy_s else 0.0


@dataclass(eq=False)
class _Running:
    """A request with a row.   pending: what that is to be fed next.   fed: what it holds."""

    request: Request
    row: Any
    sampler: RowSampler
    pending: list[int]
    fed: list[int] = field(default_factory=list)


@dataclass(eq=False)
class _Reader:
    """An iterator over the tokens of a request.

    taken: how many it has given.   is_waiting: whether it is being asked.   thread, since: who
    asked it last, and when that was over.
    """

    taken: int = 0
    is_waiting: bool = False
    thread: int = 0
    since: float = 0.0


class Engine:
    """Decodes requests together on one model: `step` by `step`, or as they are waited for.

    model: one of the zoo, which has an engine of its own (`model.engine`), or one of transformers
        that generates text, wrapped or not; or a RowModel. One engine for all requests: two share
        neither passes nor, of transformers' models, the cache.
    max_length: the most tokens of prompt and answer together.   max_batch_size: how many such texts
        the cache has room for; more that are shorter. None is what wrapper() was told, which has
        set their room aside; without that, as many tokens as a fifth of the limit holds, or as
        have room in what its plan leaves, at least 512. Those of the zoo are set by loading.
    chunk: tokens of prompts that are read in one step while others decode.
    deterministic: a request gives the same tokens, and the same bits of logits, in any company and
        whenever it joins: each pass has the same number of tokens, and prompts are cut at the same
        places. Slower, above all for long prompts; of rows that are kept, prompts are, to a
        multiple of 16 tokens. Otherwise a row depends on the others, and on what it goes on from,
        by rounding, as everywhere where texts share a product.
    Raises ArgumentError, UnsupportedModelError, or BudgetError where the limit leaves no room.
    """

    @known_keywords
    def __init__(
        self,
        model: Any,
        max_length: int | None = None,
        max_batch_size: int | None = None,
        *,
        chunk: int = CHUNK,
        deterministic: bool = False,
    ) -> None:
        check_positive("chunk", chunk)
        check_bool("deterministic", deterministic)
        self._rows = _rows_of(model, max_length, max_batch_size, deterministic)
        self._chunk, self._is_fixed = chunk, deterministic
        self._max_rows = self._rows.max_rows
        if deterministic:
            self._max_rows = min(self._max_rows, FIXED_TOKENS - FIXED_CHUNK)
        self._changed = threading.Condition()  # guards what follows; not held within a pass
        self._sweeper: int | None = None  # the thread that may run passes
        self._num_waiting_threads = 0  # for it to stop
        self._queue: deque[Request] = deque()
        self._running: list[_Running] = []
        self._kept: list[_Running] = []  # ended, in case that another request goes on from them
        self._readers: dict[Request, _Reader] = {}
        self._closed: BaseException | None = None
        self._num_sweeps = self._num_rows = self._num_tokens_drawn = self._num_requests = 0
        self._first_tokens_s = 0.0
        self._prefill, self._decode = PhaseTally(), PhaseTally()

    # ---- what users call ------------------------------------------------------------------------

    def check(self, request: Request) -> None:
        """Raise ArgumentError for a request that could never run, or UnsupportedModelError."""
        if self._closed is not None:
            raise self._closed
        if request.clock.added is not None:
            raise ArgumentError("this request was added before; make another one")
        check_ids("input_ids", request.input_ids, self._rows.vocab_size)
        check_ids("start_ids", request.start_ids or (), self._rows.vocab_size)
        check_ids("stop_ids", request.stop_ids, self._rows.vocab_size)
        request.sampling.check(self._rows.vocab_size)
        if request.num_prompt_logprobs is not None and not self._rows.can_score:
            raise UnsupportedModelError(_NOT_SCORED)
        self._rows.check(request)

    def add(self, request: Request) -> Request:
        """Queue a request: it takes part from the next step on that has room for it.

        Raises as check().
        """
        with self._changed:  # no other thread may close, or add the same request, in between
            self.check(request)
            request.clock.added = time.perf_counter()
            self._queue.append(request)
        return request

    def step(self) -> bool:
        """Run one sweep for all that can go on; False where nothing can.

        An error of one row ends its request alone. KeyboardInterrupt leaves all as it was.
        """
        with self._sweeping(), torch.inference_mode():
            self._drop_done()
            self._admit()
            feeds = self._feeds()
            self._sweep(feeds)
            return bool(feeds)

    def cancel(self, request: Request) -> None:
        """End a request; its row is gone in the next pass. What has ended stays as it is."""
        request.finish("cancelled")

    def run(self, requests: Sequence[Request]) -> None:
        """Wait until all of these have ended, and raise the error of the first that failed.

        If the wait ends in an error or an interrupt, all of them are cancelled.
        """
        _check_added(requests)
        try:
            for request in requests:
                self._wait_until(lambda ended=request: ended.is_done)  # type: ignore[misc]
                if request.error is not None:
                    raise request.error
        finally:
            for request in requests:
                self.cancel(request)

    def tokens(self, request: Request) -> Iterator[int]:
        """The tokens of a request as they come; what is left of it is cancelled at the end.

        While it is not asked, its row goes one token ahead at the most, and others go on. Where
        others need its room then, it ends with an UnsupportedModelError.
        """
        _check_added([request])
        reader = self._readers[request] = _Reader()
        try:
            while True:
                self._ask(request, reader)
                if reader.taken < len(request.tokens):
                    reader.taken += 1
                    yield request.tokens[reader.taken - 1]
                elif request.error is not None:
                    raise request.error
                else:
                    return
        finally:
            self.cancel(request)
            self._readers.pop(request, None)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold up all sweeps while no request has a row: for passes that use the whole cache.

        Requests under way are run to their end first; idle iterators end.
        """
        with self._sweeping():
            if self._closed is not None:
                raise self._closed
            with torch.inference_mode():
                while self._has_rows():
                    self._advance(admits=False)
            # In the try: an interrupt comes after the call, never before it.
            try:
                self._changed.release()
                yield
            finally:
                self._changed.acquire()

    def close(self, error: BaseException | None = None) -> None:
        """End all requests; none can be added afterwards. Closing twice is no error."""
        with self._changed:  # not held within a pass: one that another thread runs is the last
            self._closed = self._closed or error or UnsupportedModelError("this engine was closed")
            for request in [*self._queue, *(one.request for one in self._running)]:
                request.finish("error", self._closed)
        with self._sweeping():
            self._drop_done()
            self._forget_kept()

    @property
    def stats(self) -> EngineStats:
        prefill, decode = self._prefill.phase, self._decode.phase
        return EngineStats(
            self._num_sweeps, self._num_rows, self._num_tokens_drawn,
            prefill.seconds + decode.seconds, self._num_requests, self._first_tokens_s,
            prefill, decode,
        )  # fmt: skip

    @property
    def num_running(self) -> int:
        """Requests that have a row."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests without a row yet."""
        return len(self._queue)

    # ---- waiting --------------------------------------------------------------------------------

    @contextmanager
    def _sweeping(self) -> Iterator[None]:
        """The right to run passes, and the lock."""
        with self._changed:
            if self._sweeper == threading.get_ident():
                raise ArgumentError(_FROM_WITHIN)
            while self._sweeper is not None:
                self._wait()
            self._sweeper = threading.get_ident()
            try:
                yield
            finally:
                self._stop_sweeping()

    def _wait_until(self, is_over: Callable[[], bool]) -> None:
        """Run steps for all, or wait for the thread that does."""
        with self._changed, torch.inference_mode():  # once, not in each step: it takes a while
            while not is_over():
                if self._sweeper is None:
                    self._sweeper = threading.get_ident()
                    try:
                        self._advance()
                    finally:
                        self._stop_sweeping()
                elif self._sweeper == threading.get_ident():
                    raise ArgumentError(_FROM_WITHIN)
                else:
                    self._wait()

    def _stop_sweeping(self) -> None:
        if self._sweeper == threading.get_ident():  # or another thread was let in, see _let_others
            self._sweeper = None
        if self._num_waiting_threads:
            self._changed.notify_all()

    def _wait(self, seconds: float | None = None) -> None:
        """For another thread to stop sweeping."""
        self._num_waiting_threads += 1
        try:
            self._changed.wait(seconds)
        finally:
            self._num_waiting_threads -= 1

    def _ask(self, request: Request, reader: _Reader) -> None:
        """Wait for one token more than the reader has taken, or the end."""
        reader.is_waiting, reader.thread = True, threading.get_ident()
        try:
            self._wait_until(lambda: len(request.tokens) > reader.taken or request.is_done)
        finally:
            reader.is_waiting, reader.since = False, time.perf_counter()

    def _advance(self, admits: bool = True) -> None:
        """A step for whoever waits; or room for them, where only idle iterators have it."""
        self._drop_done()
        is_blocked = not self._admit() if admits else bool(self._running)
        if is_blocked and all(self._is_idle(one) for one in self._running):
            self._push_out()
            return
        self._sweep(self._feeds())

    def _push_out(self) -> None:
        """End the iterator that was not asked for the longest time."""
        if not self._running:
            raise UnsupportedModelError(
                "another engine has all rows of this model; use one engine for all requests"
            )
        readers = [(self._readers.get(one.request), one.request) for one in self._running]
        asked = [(reader, request) for reader, request in readers if reader is not None]
        if not asked:
            return  # an iterator has been left meanwhile
        reader, request = min(asked, key=lambda both: both[0].since)
        left_s = reader.since + _PATIENCE_S - time.perf_counter()
        if reader.thread == threading.get_ident() or left_s <= 0:
            request.finish("error", UnsupportedModelError(_PUSHED_OUT))
        else:
            self._let_others(left_s)

    def _let_others(self, seconds: float) -> None:
        """Let other threads run steps for as long."""
        self._stop_sweeping()
        self._wait(seconds)
        while self._sweeper is not None:
            self._wait()
        self._sweeper = threading.get_ident()

    def _is_idle(self, one: _Running) -> bool:
        reader = self._readers.get(one.request)
        return reader is not None and not reader.is_waiting

    def _is_held(self, one: _Running) -> bool:
        """Whether its iterator has a token that was not asked for."""
        reader = self._readers.get(one.request)
        is_ahead = reader is not None and len(one.request.tokens) > reader.taken
        return is_ahead and self._is_idle(one)

    # ---- rows that come and go ------------------------------------------------------------------

    def _has_rows(self) -> bool:
        self._drop_done()
        self._forget_kept()
        return bool(self._running)

    def _drop_done(self) -> None:
        for one in self._running.copy():
            if one.request.finish_reason is not None:
                self._running.remove(one)
                self._drop(one)
        for request in self._queue.copy():
            if request.finish_reason is not None:
                self._queue.remove(request)

    def _drop(self, one: _Running) -> None:
        length = self._num_resumable(one)
        if one.request.keep and one.request.error is None and length:
            self._cut(one, length)
            self._kept.append(one)
            self._forget_kept(MAX_KEPT)
        else:
            self._rows.close(one.row)

    def _num_resumable(self, one: _Running) -> int:
        """How many tokens of its row another request may begin with."""
        if not self._rows.can_resume:
            return 0
        if not self._is_fixed:
            return len(one.fed)
        # What was read in whole pieces: so it would be read again, with the same bits.
        num_read = min(len(one.fed), len(self._rows.start_ids(one.request)))
        return num_read - num_read % FIXED_CHUNK

    def _cut(self, one: _Running, length: int) -> None:
        del one.fed[length:]
        self._rows.truncate(one.row, length)

    def _forget_kept(self, number: int = 0) -> None:
        """All but the last ones."""
        while len(self._kept) > number:
            self._rows.close(self._kept.pop(0).row)

    def _admit(self) -> bool:
        """Give rows to those that wait, first come, first served; whether none is left."""
        while self._queue:
            request = self._queue[0]
            is_full = len(self._running) >= self._max_rows
            one = None if is_full else self._begun(request)
            if one is None:
                return False
            self._queue.popleft()
            self._running.append(one)
        return True

    def _begun(self, request: Request) -> _Running | None:
        """With a kept row that it goes on from, or a new one; None where there is no room, though
        other kept rows are given up for it, the oldest first."""
        ids = list(self._rows.start_ids(request))
        is_scored = request.num_prompt_logprobs is not None  # which takes all of its tokens
        kept = None if is_scored else self._kept_for(ids)
        row = self._row_for(request, kept)
        while row is None and self._kept:
            self._rows.close(self._kept.pop(0).row)
            row = self._row_for(request, kept)
        if row is None:
            self._kept += [] if kept is None else [kept]
            return None
        fed = [] if kept is None else kept.fed
        return _Running(request, row, self._sampler(request), ids[len(fed) :], fed)

    def _row_for(self, request: Request, kept: _Running | None) -> Any:
        if kept is None:
            return self._rows.open(request)
        return kept.row if self._rows.widen(kept.row, request) else None

    def _kept_for(self, ids: Sequence[int]) -> _Running | None:
        """The kept row that holds most of what `ids` begin with, cut back to that and kept no more;
        None where it would lose more than half, which others may go on from."""
        found = max(self._kept, key=lambda one: self._num_common(one.fed, ids), default=None)
        length = 0 if found is None else self._num_common(found.fed, ids)
        if found is None or length == 0 or 2 * length < len(found.fed):
            return None
        self._cut(found, length)
        self._kept.remove(found)
        return found

    def _num_common(self, fed: Sequence[int], ids: Sequence[int]) -> int:
        """How many of `ids` need not be fed again; not the last, which is asked for its logits."""
        most = min(len(fed), len(ids) - 1)
        length = next((at for at in range(most) if fed[at] != ids[at]), most)
        return length - length % FIXED_CHUNK if self._is_fixed else length

    def _sampler(self, request: Request) -> RowSampler:
        device = self._rows.sampler_device()
        return RowSampler(request.sampling, request.input_ids, self._rows.vocab_size, device)

    # ---- a sweep --------------------------------------------------------------------------------

    def _feeds(self) -> list[tuple[_Running, Feed]]:
        """What each row that goes on is fed; prompts in parts where others decode."""
        feeds, reading = [], []
        for one in self._running:
            if not one.request.tokens:
                reading.append(one)
            elif not self._is_held(one):
                feeds.append((one, Feed(one.row, one.pending)))
        if not reading:
            return feeds
        if self._is_fixed:
            return self._fixed_feeds(feeds, reading)
        left = self._chunk if feeds else sum(len(one.pending) for one in reading)
        for one in reading:
            if left <= 0:
                break
            part = one.pending[:left] if self._rows.can_chunk else one.pending
            feeds.append((one, self._reading(one, part)))
            left -= len(part)
        return feeds

    def _reading(self, one: _Running, part: list[int]) -> Feed:
        """A part of its prompt."""
        is_scored = one.request.num_prompt_logprobs is not None
        score = partial(self._score, one) if is_scored else None
        return Feed(one.row, part, len(part) == len(one.pending), score)

    def _score(self, one: _Running, first: int, logits: torch.Tensor) -> None:
        """Of its prompt, the tokens behind those that these logits are of."""
        scores, number = one.request.prompt_logprobs, one.request.num_prompt_logprobs
        assert number is not None, "it was asked for"
        del scores[len(one.fed) + first :]  # of a pass that has failed
        for row, token in zip(logits, one.pending[first + 1 :], strict=False):
            scores.append(_logprob_of(row, token, number))
        if any(math.isnan(score.logprob) for score in scores[-len(logits) :]):
            one.request.finish("error", non_finite_logits([0]))

    def _fixed_feeds(
        self, feeds: list[tuple[_Running, Feed]], reading: list[_Running]
    ) -> list[tuple[_Running, Feed]]:
        """Beside rows that decode whole chunks of prompts, as many as the pass has room for; or one
        prompt that cannot be read in parts, in a pass of its own."""
        if reading and not self._rows.can_chunk:
            return [(reading[0], self._reading(reading[0], reading[0].pending))]
        left = FIXED_TOKENS - len(feeds)
        for one in reading:
            part = one.pending[:FIXED_CHUNK]
            if len(part) > left:
                break
            feeds.append((one, self._reading(one, part)))
            left -= len(part)
        return feeds

    def _num_tokens(self, feeds: list[tuple[_Running, Feed]]) -> int | None:
        """How many the pass is to have, see RowModel.forward()."""
        if not self._is_fixed:
            return None
        is_whole = not self._rows.can_chunk and not all(one.request.tokens for one, _ in feeds)
        return fixed_length(len(feeds[0][1].ids)) if is_whole else FIXED_TOKENS

    def _sweep(self, feeds: list[tuple[_Running, Feed]]) -> None:
        if not feeds:
            return
        start_s, before = time.perf_counter(), self._rows.offload_stats()
        reading: list[Request] = []
        for one, _ in feeds:
            if one.request.clock.begun is None:
                one.request.clock.begun = start_s
            if not one.request.tokens:
                reading.append(one.request)
        try:
            self._changed.release()  # so that others can add and cancel meanwhile
            tried = self._pass(feeds)
        finally:
            self._changed.acquire()
        for done, logits in tried:
            self._num_tokens_drawn += self._take(done, logits)
        self._drop_done()
        sweep = phase_between(before, self._rows.offload_stats(), time.perf_counter() - start_s)
        self._count(feeds, reading, sweep)

    def _count(
        self, feeds: list[tuple[_Running, Feed]], reading: Sequence[Request], sweep: Phase
    ) -> None:
        """A sweep is over.   reading: the requests whose prompts had a part in it."""
        for one, _ in feeds:
            clock = one.request.clock
            clock.num_sweeps += 1
            clock.num_rows += len(feeds)
            (clock.prefill if one.request in reading else clock.decode).add(sweep)
        self._num_sweeps += 1
        self._num_rows += len(feeds)
        (self._prefill if reading else self._decode).add(sweep)
        if not reading:
            return
        waited = [request.stats.first_token_s for request in reading if request.tokens]
        self._num_requests += len(waited)
        self._first_tokens_s += sum(first_s or 0.0 for first_s in waited)

    def _pass(
        self, feeds: list[tuple[_Running, Feed]]
    ) -> list[tuple[list[tuple[_Running, Feed]], torch.Tensor]]:
        """Feeds and their logits; where a pass fails each row is tried alone, and ends if it fails
        again."""
        try:
            num_tokens = self._num_tokens(feeds)
            return [(feeds, self._rows.forward([feed for _, feed in feeds], num_tokens))]
        except Exception as error:
            if len(feeds) == 1:
                feeds[0][0].request.finish("error", error)
                return []
        # Copies: the next pass may write to the same memory, as a CUDA graph does.
        return [(done, y.clone()) for one in feeds for done, y in self._pass([one])]

    def _take(self, feeds: list[tuple[_Running, Feed]], logits: torch.Tensor) -> int:
        """Draw, and let each row go on; how many tokens were drawn."""
        samplers = [one.sampler for one, feed in feeds if feed.has_logits]
        drawn = iter(draw(logits, samplers) if samplers else [])
        row = 0
        for one, feed in feeds:
            one.row.length += len(feed.ids)
            one.fed += feed.ids
            if not feed.has_logits:
                one.pending = one.pending[len(feed.ids) :]
                continue
            token = next(drawn)
            if one.request.finish_reason is None:  # it may have been cancelled meanwhile
                self._accept(one, token, logits, row)
            row += 1
        return len(samplers)

    def _accept(self, one: _Running, token: int | None, logits: torch.Tensor, row: int) -> None:
        request = one.request
        if token is None:
            request.finish("error", non_finite_logits([row]))
            return
        if request.max_new_tokens == 0:
            request.finish("length")
            return
        if request.num_logprobs is not None:
            request.logprobs.append(_logprob_of(logits[row], token, request.num_logprobs))
        one.sampler.accept(token)
        one.pending = [token]
        request.tokens.append(token)
        if request.clock.first_token is None:
            request.clock.first_token = time.perf_counter()
        self._end(request, token)

    def _end(self, request: Request, token: int) -> None:
        """End a request whose last token this is."""
        is_stopped = token in request.stop_ids
        try:
            is_stopped |= request.on_token is not None and bool(request.on_token(token))
        except Exception as error:
            request.finish("error", error)
        finally:  # also where Ctrl-C comes within the call: a row must not go on past its room
            if is_stopped:
                request.finish("stop")
            elif len(request.tokens) == request.max_new_tokens:
                request.finish("length")


def _rows_of(
    model: Any, max_length: int | None, max_batch_size: int | None, deterministic: bool
) -> RowModel:
    if isinstance(model, torch.nn.Module):
        from bminf.engine.wrapped import rows_of  # imports transformers

        return rows_of(model, max_length, max_batch_size, deterministic)
    if max_length is not None or max_batch_size is not None:
        raise ArgumentError("max_length and max_batch_size are set when the model is loaded")
    rows = getattr(model, "row_model", model)
    if not isinstance(rows, RowModel):
        raise ArgumentError(
            f"model is a {type(model).__name__}; give a model of the zoo or of transformers"
        )
    return rows


def _logprob_of(logits: torch.Tensor, token: int, num_top: int) -> TokenLogprob:
    logprob, top = log_probabilities(logits, token, num_top)
    return TokenLogprob(token, logprob, tuple(top))


def _check_added(requests: Sequence[Request]) -> None:
    if any(request.clock.added is None for request in requests):
        raise ArgumentError("a request is waited for that was not added; call add() first")
