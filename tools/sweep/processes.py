"""Each class in a process of its own, which may take too long or end."""

from __future__ import annotations

import multiprocessing
import os
import resource
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from multiprocessing.connection import Connection

from tools.sweep.candidates import Candidate, builders
from tools.sweep.check import NOT_BUILT, WRONG, Outcome, check, prepare

MOST_BYTES = 8 * 2**30
PASSES_TO_COMPARE = 10  # and a little more; before that, one
# What libraries keep of one class, the next one does not see. Their import takes long: it is done
# once, by the process that all others are copies of.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["transformers.modeling_utils"])


def outcomes(
    candidates: Sequence[Candidate], num_workers: int, timeout_s: float, quantization: str | bool
) -> Iterator[tuple[Candidate, Outcome]]:
    """Every candidate with its outcome, as soon as that is known.

    timeout_s: for a first pass without bminf; what follows has PASSES_TO_COMPARE times as long.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    outcome = partial(_outcome, timeout_s=timeout_s, quantization=quantization)
    with ThreadPoolExecutor(num_workers) as threads:
        waiting = {threads.submit(outcome, candidate): candidate for candidate in candidates}
        for done in as_completed(waiting):
            yield waiting[done], done.result()


def _outcome(candidate: Candidate, timeout_s: float, quantization: str | bool) -> Outcome:
    """The outcome for a class; where its process gives none, that is the outcome."""
    answers, answering = _PROCESSES.Pipe(duplex=False)
    process = _PROCESSES.Process(target=_answer, args=(answering, candidate, quantization))
    process.start()
    answering.close()
    silent, waits_s = NOT_BUILT, timeout_s  # until the class has run without bminf
    try:
        while answers.poll(waits_s):
            answer: Outcome | None = answers.recv()
            if answer is not None:
                process.join(timeout_s)
                return answer
            silent, waits_s = WRONG, PASSES_TO_COMPARE * timeout_s
        return Outcome(silent, f"no answer in {waits_s:.0f} s")
    except EOFError:
        process.join()
        return Outcome(silent, f"the process ended with code {process.exitcode}")
    finally:
        process.kill()
        process.join()


def _answer(answers: Connection, candidate: Candidate, quantization: str | bool) -> None:
    """None as a sign of life once the class runs by itself; then its outcome."""
    _be_quiet()
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_BYTES, MOST_BYTES))
    try:
        builds, inputs = builders(candidate)
    except Exception as error:
        answers.send(Outcome(NOT_BUILT, f"{type(error).__name__}: {error}"))
        return
    prepared = prepare(builds, inputs)
    if not isinstance(prepared, Outcome):
        answers.send(None)
        prepared = check(*prepared, quantization)
    answers.send(prepared)


def _be_quiet() -> None:
    import transformers

    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
