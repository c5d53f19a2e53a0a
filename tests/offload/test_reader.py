"""The thread that does what it is handed, and the outcome of each job."""

from __future__ import annotations

import threading

import pytest

from bminf.offload.disk import Outcome, Reader

SOON_S = 60.0  # what is waited for takes milliseconds


def test_a_job_is_waited_for_by_all_who_ask() -> None:
    reader, may_end = Reader("test-reader"), threading.Event()
    outcome = reader.submit(lambda: may_end.wait(SOON_S))
    with pytest.raises(TimeoutError):
        outcome.wait(0.001)
    assert not outcome.done()
    waiting = [threading.Thread(target=outcome.result, args=(SOON_S,)) for _ in range(3)]
    for thread in waiting:
        thread.start()
    may_end.set()
    for thread in waiting:
        thread.join(SOON_S)
    assert outcome.done() and not any(thread.is_alive() for thread in waiting)
    outcome.wait()
    reader.stop()
    reader.join()


def test_a_reader_is_idle_once_all_jobs_have_ended() -> None:
    reader, may_end = Reader("test-reader"), threading.Event()
    assert reader.is_idle()
    for job in (lambda: may_end.wait(SOON_S), lambda: None):
        outcome = reader.submit(job)
    assert not reader.is_idle()
    may_end.set()
    outcome.result(SOON_S)
    assert reader.is_idle()
    reader.stop()
    reader.join()


def test_a_reader_is_not_idle_where_handing_over_was_interrupted() -> None:
    """The job may have been put; whoever asks is not to do another one before it."""

    class Interrupted:
        def put(self, job: object) -> None:
            raise KeyboardInterrupt

    reader = Reader("test-reader")
    jobs, reader._jobs = reader._jobs, Interrupted()
    with pytest.raises(KeyboardInterrupt):
        reader.submit(lambda: None)
    assert not reader.is_idle()
    reader._jobs = jobs
    reader.submit(lambda: None).result(SOON_S)
    assert reader.is_idle()
    reader.stop()
    reader.join()


def test_the_error_of_a_job_is_raised_each_time_it_is_asked_for() -> None:
    def fail() -> None:
        raise OSError("the disk is gone")

    reader = Reader("test-reader")
    failed, after = reader.submit(fail), reader.submit(lambda: None)
    after.result(SOON_S)  # the thread goes on
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            failed.result()
    reader.stop()
    reader.join()


def test_a_wait_that_is_interrupted_leaves_nobody_waiting() -> None:
    """Between taking the lock and giving it back: whoever asks later must not wait for it."""

    class Interrupted:
        def acquire(self, timeout: float) -> bool:
            outcome.end()
            raise KeyboardInterrupt

        def release(self) -> None:
            """The job's, which has ended."""

    outcome = Outcome()
    outcome._in_progress = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        outcome.wait()
    outcome.result()
    assert outcome.done()
