"""One thread that does what it is handed, in order."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue

_Job = tuple[Callable[[], None], "Future[None]"]


class Reader:
    """A daemon thread with a queue.

    No executor: all executors of a process share a lock, and hold it while they start a thread.
    The garbage collector may find a dead model in just that moment, and its finalizer would wait
    for that lock forever. SimpleQueue.put is made for finalizers: stop() never waits.
    """

    def __init__(self, name: str) -> None:
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        # The thread knows the queue only, so that a model that nobody holds can be collected.
        self._thread = threading.Thread(target=_work, args=(self._jobs,), name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], None]) -> Future[None]:
        """Do `job` after all that was submitted before; the future holds its error."""
        future: Future[None] = Future()
        self._jobs.put((job, future))
        return future

    def stop(self) -> None:
        """End the thread once all jobs are done; it is not waited for."""
        self._jobs.put(None)

    def join(self) -> None:
        """Wait until the thread has ended."""
        self._thread.join()


def _work(jobs: SimpleQueue[_Job | None]) -> None:
    while (job := jobs.get()) is not None:
        _do(*job)
        del job  # an idle thread keeps nothing alive


def _do(job: Callable[[], None], future: Future[None]) -> None:
    try:
        job()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(None)
