"""One thread that does what it is handed, in order."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue


class Outcome:
    """Whether a job has ended, and with which error.

    As concurrent.futures.Future, of which it has what is used here: one is made for every copy, and
    that one takes 17 Python calls where this takes four.
    """

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self._is_done = False
        self._under_way = threading.Lock()
        self._under_way.acquire()

    def end(self, error: BaseException | None = None) -> None:
        """The job has ended; called once."""
        self.error = error
        self._is_done = True  # first, so that an interrupt in wait() leaves nobody waiting
        self._under_way.release()

    def done(self) -> bool:
        return self._is_done

    def wait(self, timeout_s: float = -1) -> None:
        """Return when the job has ended. Raises TimeoutError."""
        if self._is_done:
            return
        if not self._under_way.acquire(timeout=timeout_s):
            raise TimeoutError
        self._under_way.release()

    def result(self, timeout_s: float = -1) -> None:
        """As wait(), and raise what the job raised."""
        if not self._is_done:
            self.wait(timeout_s)
        if self.error is not None:
            raise self.error


_Job = tuple[Callable[[], None], Outcome]


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

    def submit(self, job: Callable[[], None]) -> Outcome:
        """Do `job` after all that was submitted before; the outcome holds its error."""
        outcome = Outcome()
        self._jobs.put((job, outcome))
        return outcome

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


def _do(job: Callable[[], None], outcome: Outcome) -> None:
    try:
        job()
    except BaseException as error:
        outcome.end(error)
    else:
        outcome.end()
