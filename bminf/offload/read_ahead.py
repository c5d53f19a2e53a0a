"""Blobs that wait in a file come through staging buffers in host memory, read before they are used.

A thread reads the next blobs as soon as a buffer is free, in the order learned from the last pass.
What is done with a blob, such as queueing its transfer to a device, is handed over as a job. Jobs
are done in the order they are given, also those that need nothing from the file: of two transfers
into one slot, the later one must be the last. A wrong guess costs one read that is waited for.

Nothing here knows of devices. A buffer is free again when a function says so by returning.
"""

from __future__ import annotations

import atexit
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from bminf.errors import OffloadError
from bminf.offload.backends.reader import Outcome, Reader
from bminf.offload.store import FileStore

NUM_STAGES = 2

_ENDED = "the streaming ended before this block was read"

Wait = Callable[[], object]
"""Returns once a staging buffer may be overwritten."""


class Staging:
    """Which blob is in which staging buffer, and which one is read next, into which.

    Blobs are numbered 0 .. num_blobs - 1 as in the file. Neither bytes, threads nor a clock.
    held: for each buffer the blob that is in it, or is being read into it.
    """

    def __init__(self, num_blobs: int) -> None:
        self.held: list[int | None] = [None] * NUM_STAGES
        self._by_age = list(range(NUM_STAGES))  # the buffer that was filled longest ago is first
        self._follows = {blob: (blob + 1) % num_blobs for blob in range(num_blobs)}
        self._last_asked = num_blobs - 1

    def ask(self, blob: int) -> None:
        """`blob` is asked for now; it is expected there the next time."""
        self._follows[self._last_asked] = blob
        self._last_asked = blob

    def next_read(self, waited_for: Iterable[int]) -> tuple[int, int] | None:
        """(buffer, blob) of the next read, which begins now; None when all is there that can be.

        waited_for: blobs that were asked for and not used yet, in order; they come first.
        """
        wanted = self._wanted(waited_for)
        missing = [blob for blob in wanted if blob not in self.held]
        if not missing:
            return None
        stage = next(at for at in self._by_age if self.held[at] not in wanted)
        self._by_age.remove(stage)
        self._by_age.append(stage)
        self.held[stage] = missing[0]
        return stage, missing[0]

    def forget(self, blob: int) -> None:
        """What a buffer holds of `blob` is out of date, or was not read."""
        self.held = [None if held == blob else held for held in self.held]

    def _wanted(self, waited_for: Iterable[int]) -> list[int]:
        """The different blobs that the buffers shall hold: one each at most."""
        wanted, blob = list(waited_for), self._last_asked
        for _ in range(NUM_STAGES):
            blob = self._follows[blob]
            wanted.append(blob)
        return list(dict.fromkeys(wanted))[:NUM_STAGES]


@dataclass
class _Order:
    """A job to be done in its turn. blob: that it needs and is called with, or None."""

    blob: int | None
    job: Callable[[Any], Any]
    done: Future[None] = field(default_factory=Future)


class ReadAhead:
    """Jobs in order, some of them with a blob out of `store` in a staging buffer.

    buffers: NUM_STAGES times (bytes of the largest blob,) uint8 on the CPU.
    reader: a thread for nothing else; it is ended by close() or release().
    """

    def __init__(
        self,
        store: FileStore,
        blob_bytes: Sequence[int],
        buffers: Sequence[torch.Tensor],
        reader: Reader,
    ) -> None:
        self._store, self._reader = store, reader
        self._blob_bytes, self._buffers = list(blob_bytes), list(buffers)
        self._is_free: list[Wait] = [_at_once] * NUM_STAGES  # returns when the last use has ended
        self._staging = Staging(len(self._blob_bytes))
        self._reading: int | None = None  # the buffer that is being filled
        self._orders: deque[_Order] = deque()
        self._lock = threading.Lock()  # of all the above; held while a job is done, never to read
        self._is_closed = False  # set without the lock, for finalizers
        self._at_exit = partial(_close, weakref.ref(self))
        atexit.register(self._at_exit)

    def fetch(self, blob: int, use: Callable[[torch.Tensor], Wait]) -> Future[None]:
        """Have use(buffer) called, once the buffer holds `blob` and all earlier jobs are done.

        use: gets (bytes of the blob,) uint8 and returns what waits until it need not be kept; uses
        of one buffer end in the order they began. It is called by this thread or by the reader.
        The future has its error, or OffloadError for a read that failed.
        """
        order = _Order(blob, use)
        with self._lock:
            self._staging.ask(blob)
            # One a fetch: a failed read ends its round, and whoever still waits has a round to
            # come. Before the order is given, so that an interrupt leaves no order without one.
            self._reader.submit(self._read_ahead)
            self._give(order)
        return order.done

    def do(self, job: Callable[[], object]) -> Future[None]:
        """Have job() called after all earlier jobs: now, unless one of those waits for its blob."""
        order = _Order(None, lambda _: job())
        with self._lock:
            self._give(order)
        return order.done

    def write(self, blob: int, data: torch.Tensor, begin: int = 0) -> None:
        """Keep new bytes of `blob`, from byte `begin` on, in the file. data: (bytes,) uint8, CPU.

        Jobs that were given before may still see the old ones.
        """
        try:
            self._store.write(blob, data, begin)
        finally:
            with self._lock:
                self._staging.forget(blob)  # also if it is being read just now: see _end_read

    def close(self, finish: Callable[[], None]) -> None:
        """As release(), and wait until that is done. Raises what finish() raises."""
        finished = self.release(finish)
        self._reader.join()
        if finished.done():  # not where this was done before: the thread has ended
            finished.result()

    def release(self, finish: Callable[[], None]) -> Outcome:
        """Do no more jobs, then call finish() in the reader's thread; neither is waited for.

        For finalizers: it takes no lock. The file is closed, what waits gets an OffloadError. An
        interrupted call may be repeated, so finish() may be called twice.
        """
        self._is_closed = True
        finished = self._reader.submit(partial(self._finish, finish))
        self._reader.stop()
        return finished

    # ---- with the lock held ---------------------------------------------------------------------

    def _give(self, order: _Order) -> None:
        if self._is_closed:
            order.done.set_exception(OffloadError(_ENDED))
            return
        self._orders.append(order)
        self._do_what_can_be_done()

    def _do_what_can_be_done(self) -> None:
        while self._orders and not self._is_closed and self._is_ready(self._orders[0]):
            self._carry_out(self._orders[0])

    def _is_ready(self, order: _Order) -> bool:
        held = self._staging.held
        return order.blob is None or (
            order.blob in held and held.index(order.blob) != self._reading
        )

    def _carry_out(self, order: _Order) -> None:
        try:
            if order.blob is None:
                order.job(None)
            else:
                stage = self._staging.held.index(order.blob)
                self._is_free[stage] = order.job(self._blob_in(stage, order.blob))
            order.done.set_result(None)
        except BaseException as error:  # an interrupt, too, must not leave anybody waiting
            if not order.done.done():
                order.done.set_exception(_as_offload_error(error))
            if not isinstance(error, Exception):
                raise
        finally:
            self._orders.popleft()

    def _fail(self, error: Exception, blob: int | None = None) -> None:
        """Give up the jobs that wait for `blob`; None: all."""
        failed = [order for order in self._orders if blob is None or order.blob == blob]
        for order in failed:
            self._orders.remove(order)
            order.done.set_exception(error)

    def _blob_in(self, stage: int, blob: int) -> torch.Tensor:
        return self._buffers[stage][: self._blob_bytes[blob]]

    # ---- in the reader's thread -----------------------------------------------------------------

    def _read_ahead(self) -> None:
        """Read until the buffers hold all they can; a failure ends it, so that none is repeated."""
        while (task := self._begin_read()) is not None:
            stage, blob = task
            try:
                self._is_free[stage]()
                self._is_free[stage] = _at_once  # nobody uses a buffer that is being filled
                self._store.read_into(blob, self._blob_in(stage, blob))
            except Exception as error:
                self._end_read(blob, error)
                return
            self._end_read(blob)

    def _begin_read(self) -> tuple[int, int] | None:
        with self._lock:
            if self._is_closed:
                return None
            task = self._staging.next_read(
                order.blob for order in self._orders if order.blob is not None
            )
            if task is not None:
                self._reading = task[0]
            return task

    def _end_read(self, blob: int, error: Exception | None = None) -> None:
        with self._lock:
            # A blob that was written meanwhile is not held any more, and read anew if it is wanted.
            self._reading = None
            if error is not None:
                self._staging.forget(blob)
                self._fail(error, blob)
            self._do_what_can_be_done()

    def _finish(self, finish: Callable[[], None]) -> None:
        with self._lock:
            self._fail(OffloadError(_ENDED))
        try:
            finish()
        finally:
            self._store.close()
            atexit.unregister(self._at_exit)


def _close(ahead: weakref.ref[ReadAhead]) -> None:
    # A thread that is inside a driver's call while the interpreter ends brings the process down.
    if (living := ahead()) is not None:
        living.close(_at_once)


def _at_once() -> None:
    """The wait for a buffer that is free."""


def _as_offload_error(error: BaseException) -> Exception:
    # An interrupt is for the thread it came to; who waits for the blob is to try again.
    if isinstance(error, Exception):
        return error
    return OffloadError(f"handing over a streamed block was cut short by {type(error).__name__}")
