"""`bminf bench`: how fast a model reads a prompt and generates, and what is copied for a token.

With --table, tables that other authors have published, see cli/tables/.
"""

from __future__ import annotations

import argparse
import bisect
import json
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

from bminf.cli import flags, ranks
from bminf.cli.session import AnswerStats, Session, find
from bminf.errors import ArgumentError
from bminf.offload.phase import NO_PHASE, Phase
from bminf.progress import progress_bar
from bminf.units import format_bytes

OF_TABLES = ("size", "layers", "batch_sizes", "lengths", "gpu", "predict_only", "stream_all")
"""Options that only --table has."""

_WORDS = "the sun was low and a cold wind came over the hills from far away".split()
_MEASURED = (
    *("prefill_tokens_per_s", "decode_tokens_per_s", "time_to_first_token_s"),
    *("bytes_copied_per_token", "new_tokens"),
)
_PHASES = ("prefill", "decode")


class Default(int):
    """A number that was not given on the command line, so that a table has its own."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of this verb."""
    flags.add_model(parser, is_optional=True)
    add = parser.add_argument
    add("--prompt-tokens", type=flags.positive, default=Default(128), metavar="N",
        help="tokens of the prompt, at most; default: 128")  # fmt: skip
    add("--max-new-tokens", type=flags.above_one, default=Default(32), metavar="N",
        help="tokens to generate; default: 32, of a table 100")  # fmt: skip
    add("--runs", type=flags.positive, default=Default(3), metavar="N",
        help="the median of so many is printed; default: 3; of a table the mean, "
        "default: 1")  # fmt: skip
    ranks.add_ranks(parser)
    flags.add_output(parser, "one JSON object, with each run")
    _add_table(parser)


def _add_table(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("tables", "in place of MODEL, with random weights").add_argument
    add("--table", choices=("bloom", "glm130b", "cpm2", "binds"),
        help="that of BLOOM-176B, GLM-130B or CPM-2: measured, predicted and published; or what "
        "binds the first two on cards of 24, 48 and 80 GB")  # fmt: skip
    add("--size", metavar="NAME", help="another BLOOM, such as bloom-560m")
    add("--layers", type=flags.positive, metavar="N",
        help="that are measured, of each stack; default: as many as memory holds")  # fmt: skip
    add("--batch-sizes", type=flags.positive, nargs="+", metavar="N",
        help="texts at once that are measured; default: 1 8 16 32 64 128")  # fmt: skip
    add("--lengths", type=flags.above_one, nargs="+", metavar="N",
        help="tokens that are measured; default: those that are published")  # fmt: skip
    add("--stream-all", action="store_true",
        help="the least memory limit that does, in place of --memory-limit")  # fmt: skip
    add("--gpu", metavar="NAME", help="the GPU that the whole model is predicted for; default: "
        "A100 80GB, for glm130b RTX 3090, for cpm2 GTX 1060")  # fmt: skip
    add("--predict-only", action="store_true", help="measure nothing: this takes seconds")


def run(arguments: argparse.Namespace) -> int:
    """Measure, and print; returns 0, or the exit code of a rank that failed."""
    if (arguments.model is None) == (arguments.table is None):
        raise ArgumentError("give a MODEL or --table, one of the two")
    if arguments.table is not None and arguments.tp is not None:
        raise ArgumentError("--tp is for a MODEL; leave it out")
    if arguments.table is not None:
        from bminf.cli.tables import command

        return command.run(arguments)
    for name in OF_TABLES:
        if getattr(arguments, name) not in (None, False):
            raise ArgumentError(f"--{name.replace('_', '-')} is for --table; leave it out")
    return _measure_model(arguments)


def _measure_model(arguments: argparse.Namespace) -> int:
    if ranks.are_to_be_started(arguments):
        return ranks.start(arguments)
    if ranks.is_other():
        return ranks.follow(arguments)
    with find(arguments) as session:
        start_s = time.perf_counter()
        session.load(arguments.prompt_tokens + arguments.max_new_tokens)
        load_s = time.perf_counter() - start_s
        if arguments.verbose:
            print(session.plan_text, session.room_line, sep="\n", file=sys.stderr, flush=True)
        prompt = session.prompt(_text(session, arguments.prompt_tokens))
        try:
            runs = list(_runs(session, prompt, arguments))
        except ArgumentError as error:
            raise ArgumentError(f"{error}; --prompt-tokens says how long the text is") from error
        report = {
            "model": arguments.model,
            "device": session.device,
            "memory_limit": arguments.memory_limit,
            "quantization": arguments.quantization or "default",
            "resident_bytes": session.plan.resident_bytes,
            "streamed_bytes": session.plan.streamed_bytes,
            "load_s": load_s,
            "prompt_tokens": session.count(prompt),
            **{name: _median([getattr(one, name) for one in runs]) for name in _MEASURED},
            **{name: _together(getattr(one, name) for one in runs) for name in _PHASES},
            "runs": [one.as_json() for one in runs],
        }
    print(json.dumps(report, indent=2) if arguments.json else "\n".join(_lines(report)))
    return 0


def _text(session: Session, num_tokens: int) -> str:
    """As many words as make at most so many tokens; one at least."""

    def words(number: int) -> str:
        return " ".join(islice(cycle(_WORDS), number))

    number = bisect.bisect_right(
        range(1, num_tokens + 1), num_tokens, key=lambda n: session.count(session.prompt(words(n)))
    )
    return words(max(number, 1))


@dataclass(frozen=True)
class _Run:
    """What was measured once; see docs/command-line.md."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float | None
    time_to_first_token_s: float
    bytes_copied_per_token: float | None
    new_tokens: int
    prefill: Phase
    decode: Phase

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), **{name: getattr(self, name).as_json() for name in _PHASES}}


def _runs(session: Session, prompt: Any, arguments: argparse.Namespace) -> Iterator[_Run]:
    _measure(session, prompt, 2)  # the first passes of a process are slower than others
    for _ in progress_bar(range(arguments.runs), desc="measuring", leave=False):
        yield _measure(session, prompt, arguments.max_new_tokens)


def _measure(session: Session, prompt: Any, num_tokens: int) -> _Run:
    """Answers of one token, which is all prefill, and of `num_tokens`."""

    def stats_of(number: int) -> AnswerStats:
        options = {"max_new_tokens": number, "temperature": 0}
        return session.answer(prompt, options, flags.ignore, ignores_end=True).stats

    first, whole = stats_of(1), stats_of(num_tokens)
    return _Run(
        first.prompt_tokens / first.total_s,
        whole.decode_tokens_per_s,
        first.total_s,
        whole.decode_bytes_per_token,
        whole.new_tokens,
        first.prefill + first.decode,
        whole.decode,
    )


def _median(values: list[float | None]) -> float | None:
    """None where it was not measured: a tokenizer may give all of its text at the end."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _together(phases: Iterable[Phase]) -> dict[str, Any]:
    return sum(phases, NO_PHASE).as_json()


def _lines(report: dict[str, Any]) -> Iterator[str]:
    resident, streamed = (format_bytes(report[f"{x}_bytes"]) for x in ("resident", "streamed"))
    yield f"{report['model']}: {resident} resident, {streamed} streamed"
    yield f"prefill              {_rate(report, 'prefill')}, {report['prompt_tokens']} tokens"
    yield f"decode               {_rate(report, 'decode')}, {report['new_tokens']:g} tokens"
    yield f"time to first token  {report['time_to_first_token_s']:.3f} s"
    copied = report["bytes_copied_per_token"]
    yield f"copied a token       {'not measured' if copied is None else format_bytes(copied)}"
    for name in _PHASES:
        yield f"{f'bound of {name}':<21}{_bound(report[name])}"
    decode = report["decode"]
    if wanted := decode["expert_hits"] + decode["expert_misses"]:
        hit = decode["expert_hits"] / wanted
        yield f"experts hit          {hit:.0%} of {wanted} wanted while decoding"


def _bound(phase: dict[str, Any]) -> str:
    if phase["bound"] is None:
        return "not measured"
    waited = phase["waited_s"] / phase["seconds"]
    return f"{phase['bound']}; {waited:.0%} of the time was waiting for copies"


def _rate(report: dict[str, Any], phase: str) -> str:
    rate = report[f"{phase}_tokens_per_s"]
    return "not measured" if rate is None else f"{rate:.1f} tokens/s"
