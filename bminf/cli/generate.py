"""`bminf generate`: continues a text, and prints the continuation as it comes."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from bminf.cli import flags, ranks
from bminf.cli.session import Answer, Options, Session, find


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of this verb."""
    flags.add_model(parser)
    parser.add_argument("prompt", nargs="?", metavar="PROMPT",
        help="the text to continue, in quotes; - reads it from stdin")  # fmt: skip
    flags.add_sampling(parser)
    flags.add_stop(parser)
    parser.add_argument("--deterministic", action="store_true", default=None,
        help="the same bits whatever shares its passes (built-in models)")  # fmt: skip
    ranks.add_ranks(parser)
    flags.add_output(parser, "one JSON object, once the text is complete")


def run(arguments: argparse.Namespace) -> int:
    """Print the continuation; returns 0, or the exit code of a rank that failed."""
    if ranks.are_to_be_started(arguments):
        return ranks.start(arguments)
    if ranks.is_other():
        return ranks.follow(arguments)
    text = flags.text_of(arguments.prompt, "PROMPT")
    options = flags.sampling_of(arguments)
    with find(arguments) as session:
        prompt = session.prompt(text)
        session.load(session.length_for(prompt, options))
        if arguments.verbose:
            print(session.plan_text, session.room_line, sep="\n", file=sys.stderr, flush=True)
        answer = _answer(session, prompt, options, arguments.json)
    if arguments.json:
        print(json.dumps({"model": arguments.model, "prompt": text, **answer.as_json()}))
    else:
        print()
    if arguments.verbose:
        print(answer.stats, file=sys.stderr)
    return 0


def _answer(session: Session, prompt: Any, options: Options, is_silent: bool) -> Answer:
    if is_silent:
        return session.answer(prompt, options, flags.ignore)
    try:
        return session.answer(prompt, options, flags.show)
    except KeyboardInterrupt:
        print()  # what is printed next begins a line
        raise
