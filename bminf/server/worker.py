"""The one thread that owns a model: it loads it, and runs its sweeps while something is asked."""

from __future__ import annotations

import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Sequence

from bminf.engine.request import Request
from bminf.server.choice import Choice
from bminf.server.errors import ApiError, unavailable
from bminf.server.texts import Texts

logger = logging.getLogger("bminf")

MAX_WAITING = 256
"""Answers without a row that are kept; beyond, requests are refused."""

_USUAL_S = 5.0  # an answer takes, for all that is known before there was one
_MEMORY = 0.8  # of the mean time of an answer, against the last one
_LOADING = "the model is being loaded; ask again in a moment"
_STOPPING = "the server is stopping"


class Worker:
    """load: called in the thread.   on_end: called with each request that has ended, there.

    texts: None until it is loaded.   error: why it could not be.   Thread-safe.
    """

    def __init__(
        self,
        load: Callable[[], Texts],
        max_waiting: int = MAX_WAITING,
        on_end: Callable[[Request], object] = lambda request: None,
    ) -> None:
        self._load, self._on_end = load, on_end
        self.max_waiting = max_waiting
        self.texts: Texts | None = None
        self.error: BaseException | None = None
        self.on_failure: Callable[[], object] = lambda: None
        self._changed = threading.Condition()
        self._inbox: deque[Choice] = deque()  # not seen by the thread yet
        self._choices: list[Choice] = []  # with the engine
        self._is_stopping = self._is_ending = self._is_closed = False
        self._mean_s = _USUAL_S
        self._thread = threading.Thread(target=self._run, name="bminf-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def state(self) -> str:
        """ "loading", "ready", "stopping" or "failed"."""
        if self.error is not None:
            return "failed"
        if self._is_stopping:
            return "stopping"
        return "loading" if self.texts is None else "ready"

    def ready(self) -> Texts:
        """The model.   Raises ApiError 503 while there is none."""
        if self._is_stopping:
            raise unavailable(_STOPPING)
        if self.texts is None:
            raise unavailable("the model could not be loaded" if self.error else _LOADING)
        return self.texts

    @property
    def num_running(self) -> int:
        return 0 if self.texts is None else self.texts.engine.num_running

    @property
    def num_waiting(self) -> int:
        return len(self._inbox) + (0 if self.texts is None else self.texts.engine.num_waiting)

    def submit(self, choices: Sequence[Choice], is_continued: bool = False) -> None:
        """Queue answers.   is_continued: of a reply of which others were queued before.

        Raises ApiError: 400 for more than are ever kept, 429 for more than are now, 503.
        """
        with self._changed:
            self.ready()
            if len(choices) > self.max_waiting:
                raise ApiError(
                    400, f"{len(choices)} answers are asked for at once; accepted: at most "
                    f"{self.max_waiting}", "n",
                )  # fmt: skip
            if not is_continued and self.num_waiting + len(choices) > self.max_waiting:
                raise self._full()
            self._inbox.extend(choices)
            self._changed.notify_all()

    def cancel(self, choices: Sequence[Choice]) -> None:
        """Their rows are gone in the next sweep."""
        for choice in choices:
            choice.request.finish("cancelled")
        with self._changed:
            self._changed.notify_all()

    def stop_admission(self) -> None:
        """Refuse what is asked from now on; safe in the handler of a signal."""
        self._is_stopping = True

    def end_all(self) -> None:
        """End what is under way with an error, once the sweep under way is over."""
        with self._changed:
            self._is_stopping = self._is_ending = True
            self._changed.notify_all()

    def close(self) -> None:
        """End all, and the thread; waits for the sweep it is in, but for no load."""
        with self._changed:
            self._is_closed = True
        self.end_all()
        if self.texts is not None:
            self._thread.join()

    # ---- the thread -----------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self.texts = self._load()
        except BaseException as error:
            self.error = error
            self.on_failure()
            return
        while self._has_work():
            self._admit()
            if self._is_ending:
                self._fail_all(unavailable(_STOPPING))
            self._sweep(self.texts)
            self._end_done()

    def _has_work(self) -> bool:
        """Wait for some; False once the worker is closed and nothing is left."""
        with self._changed:
            while not (self._inbox or self._choices):
                if self._is_closed:
                    return False
                self._changed.wait()
            return True

    def _admit(self) -> None:
        """Give what has come to the engine."""
        while self._inbox:
            self._add(self._inbox.popleft())

    def _add(self, choice: Choice) -> None:
        self._choices.append(choice)
        if choice.request.is_done:
            return
        if choice.is_empty:
            choice.request.finish("length")
            return
        assert self.texts is not None
        try:
            self.texts.engine.add(choice.request)
        except Exception as error:
            choice.fail(error)

    def _sweep(self, texts: Texts) -> None:
        try:
            texts.engine.step()
        except Exception as error:  # of no row: the engine goes on without those under way
            logger.exception("a sweep has failed")
            self._fail_all(error)

    def _fail_all(self, error: BaseException) -> None:
        for choice in self._choices:
            choice.fail(error)

    def _end_done(self) -> None:
        for choice in self._choices.copy():
            if choice.request.is_done:
                self._choices.remove(choice)
                choice.end()
                self._count(choice.request)

    def _count(self, request: Request) -> None:
        if request.finish_reason in ("stop", "length"):
            stats = request.stats
            taken_s = stats.total_s - stats.queued_s
            self._mean_s = _MEMORY * self._mean_s + (1 - _MEMORY) * taken_s
        self._on_end(request)

    def _full(self) -> ApiError:
        wait_s = self._mean_s * self.num_waiting / max(1, self.num_running)
        seconds = min(max(math.ceil(wait_s), 1), 120)
        return ApiError(
            429, f"{self.num_waiting} answers are waiting; ask again in {seconds} s",
            code="queue_full", headers={"Retry-After": str(seconds)},
        )  # fmt: skip
