"""The command `bminf VERB ...`: one file a verb, imported only when its verb is chosen.

Exit codes: 0 done; 1 it failed, or a comparison came out unequal; 2 the command line is wrong;
130 it was interrupted (Ctrl-C).
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from bminf import __version__
from bminf.errors import ArgumentError, BMInfError

VERBS = {
    "convert": "pack a checkpoint of CPM-1, CPM-2, EVA or GLM into a folder that loads at once",
    "demo": "generate with everything resident, then under a limit, and compare the texts",
    "plan": "show what a memory limit keeps and what a token will cost, without loading weights",
}


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of the command line `argv`, that of the process by default.

    Raises SystemExit where argparse ends the run: --help and --version (0), wrong usage (2).
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    _print_anything()
    shown, warnings.formatwarning = warnings.formatwarning, _one_line
    try:
        arguments = _parser(argv).parse_args(argv)
        code = int(arguments.run(arguments))
        sys.stdout.flush()  # here, where an error can still be told
        return code
    except ArgumentError as error:
        return _fail(error, 2)
    except BrokenPipeError:  # whoever read the output has enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the last flush
        return 1
    except (BMInfError, OSError) as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        print("bminf: interrupted", file=sys.stderr)
        return 130  # 128 + SIGINT, as a shell has it
    finally:
        warnings.formatwarning = shown


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bminf", description="Run a model that is bigger than its memory limit."
    )
    parser.add_argument("--version", action="version", version=f"bminf {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for name, summary in VERBS.items():
        verb = verbs.add_parser(name, help=summary, description=summary)
        # Options stand behind the verb, so the first argument is the verb or there is none.
        if argv and argv[0] == name:
            module = import_module(f"bminf.cli.{name}")
            module.add_arguments(verb)
            verb.set_defaults(run=module.run)
    return parser


def _print_anything() -> None:
    """A terminal that lacks a character of a model's text shows "?" in its place."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _one_line(message: Warning | str, *_: Any, **__: Any) -> str:
    """A warning as the command line shows it: where in the code it came up is of no use there."""
    return f"bminf: {' '.join(str(message).split())}\n"


def _fail(error: Exception, code: int) -> int:
    """`code`, after the error was printed in one line."""
    print(f"bminf: error: {' '.join(str(error).split())}", file=sys.stderr)
    return code
