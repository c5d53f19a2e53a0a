"""Worker processes, each ended and started anew when a class takes too long or ends it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from queue import Empty, SimpleQueue
from typing import Any

from tools.sweep.candidates import Candidate
from tools.sweep.check import NOT_BUILT, WRONG, Outcome

START_S = 300.0  # to import torch and transformers, where all cores are busy
PASSES_TO_COMPARE = 10  # and a little more; before that, one
JOBS_A_WORKER = 60  # what libraries keep does not add up for ever


class Worker:
    """One process of worker.py."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tools.sweep.worker"]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
        )
        self._lines: SimpleQueue[str] = SimpleQueue()
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()
        self.num_jobs = 0
        self.has_failed = False

    def ask(self, job: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """The outcome for a class; where the process gives none, that is the outcome."""
        assert self._process.stdin is not None
        self.num_jobs += 1
        if self.num_jobs == 1:
            self._is_ready()
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        silent, waits_s = NOT_BUILT, timeout_s  # until the class has run without bminf
        try:
            while line := self._lines.get(timeout=waits_s):
                answer: dict[str, Any] = json.loads(line)
                if answer:
                    return answer
                silent, waits_s = WRONG, PASSES_TO_COMPARE * timeout_s
            reason = f"the process ended with code {self._process.wait()}"
        except Empty:
            reason = f"no answer in {waits_s:.0f} s"
        self.has_failed = True
        return Outcome(silent, reason).as_json()

    def _is_ready(self) -> None:
        """Wait for the first line, which comes when it has imported what all classes need."""
        if not self._lines.get(timeout=START_S):
            raise RuntimeError("no worker starts; see `python -m tools.sweep.worker`")

    def stop(self) -> None:
        self._process.kill()
        self._reading.join()
        with contextlib.suppress(BrokenPipeError):
            self._process.__exit__(None, None, None)  # closes both pipes, and waits for its end

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")


def sweep(
    candidates: Sequence[Candidate],
    num_workers: int,
    timeout_s: float,
    quantization: str | bool,
    report: Callable[[Candidate, dict[str, Any]], None],
) -> None:
    """Check all candidates and report each as its outcome is known."""
    waiting: SimpleQueue[Candidate] = SimpleQueue()
    for candidate in candidates:
        waiting.put(candidate)
    lock = threading.Lock()

    def work() -> None:
        worker = Worker()
        while (candidate := _next(waiting)) is not None:
            if worker.has_failed or worker.num_jobs == JOBS_A_WORKER:
                worker.stop()
                worker = Worker()
            job = {"candidate": asdict(candidate), "quantization": quantization}
            outcome = worker.ask(job, timeout_s)
            with lock:
                report(candidate, outcome)
        worker.stop()

    threads = [threading.Thread(target=work) for _ in range(num_workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _next(waiting: SimpleQueue[Candidate]) -> Candidate | None:
    try:
        return waiting.get_nowait()
    except Empty:
        return None
