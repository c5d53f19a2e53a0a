"""`bminf fill`: fills the blanks of a text."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from bminf.cli import flags
from bminf.cli.session import find

_BLANK = re.compile(r"<span>|\[s?MASK\]|\[gMASK\]")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of this verb."""
    flags.add_model(parser)
    parser.add_argument("text", nargs="?", metavar="TEXT",
        help="the text, in quotes; - reads it from stdin. Blanks of CPM-2 are written <span>, of "
        "GLM [MASK] (a word or a few), [sMASK] (a sentence) or [gMASK] (the rest)")  # fmt: skip
    flags.add_sampling(parser)
    flags.add_output(parser, "one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Print the text with its blanks filled; returns 0."""
    text = flags.text_of(arguments.text, "TEXT")
    with find(arguments) as session:
        prompt = session.blanks(text)
        session.load(None)
        if arguments.verbose:
            print(session.plan_text, session.room_line, sep="\n", file=sys.stderr, flush=True)
        blanks, stats = session.fill(prompt, flags.sampling_of(arguments))
    filled = _filled(text, blanks)
    if arguments.json:
        report = {"model": arguments.model, "text": filled, "blanks": blanks}
        print(json.dumps({**report, "stats": stats.as_json()}))
    else:
        print(filled)
    if arguments.verbose:
        print(stats, file=sys.stderr)
    return 0


def _filled(text: str, blanks: Sequence[Mapping[str, Any]]) -> str:
    """blanks: {"position", "text"} of each, in order. One that a GLM adds is at the end."""
    parts, end = [], 0
    for blank in blanks:
        parts += [text[end : blank["position"]], blank["text"]]
        found = _BLANK.match(text, blank["position"])
        end = blank["position"] if found is None else found.end()
    return "".join([*parts, text[end:]])
