"""A process that checks one class after another: a line of JSON in, a line of JSON out."""

from __future__ import annotations

import json
import os
import resource
import sys
import warnings
from collections.abc import Iterator
from typing import Any, TextIO

MOST_BYTES = 8 * 2**30


def main() -> None:
    answers = _own_stdout()
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_BYTES, MOST_BYTES))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(1)
    _quiet()
    answers.write("{}\n")  # ready
    answers.flush()
    for line in sys.stdin:
        for answer in _answers(json.loads(line)):
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


def _own_stdout() -> TextIO:
    """What libraries print goes to stderr, so that answers are alone."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def _answers(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Nothing but a sign of life once the class runs by itself; then its outcome."""
    from tools.sweep.candidates import Candidate, builders
    from tools.sweep.check import NOT_BUILT, Outcome, check, prepare

    candidate = Candidate(**job["candidate"])
    try:
        builds, inputs = builders(candidate)
    except Exception as error:
        yield Outcome(NOT_BUILT, f"{type(error).__name__}: {error}").as_json()
        return
    prepared = prepare(builds, inputs)
    if not isinstance(prepared, Outcome):
        yield {}
        prepared = check(*prepared, job["quantization"])
    yield prepared.as_json()


def _quiet() -> None:
    import transformers
    import transformers.modeling_utils  # most of what takes long to import

    transformers.logging.set_verbosity_error()


if __name__ == "__main__":
    main()
