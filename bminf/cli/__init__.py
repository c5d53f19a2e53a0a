"""The command `bminf VERB ...`: one file per verb, imported only when the verb is used.

Exit codes: 0 success; 1 failure, or a comparison with different results; 2 wrong command line;
130 interrupted (Ctrl-C).
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from typing import Any, NoReturn

from bminf import __version__
from bminf.cli.wording import Flag, Flags, flags_of, one_line
from bminf.errors import ArgumentError, BMInfError

VERBS = {
    "bench": "measure how fast a model reads and generates, and what is copied for a token",
    "chat": "talk to a model, on a terminal or with lines from a pipe",
    "convert": "quantize a checkpoint into a folder that loads faster",
    "demo": "generate with everything resident, then under a limit, and compare the texts",
    "doctor": "measure this machine, and predict what models would give on it",
    "eval": "run tasks of lm-evaluation-harness, or tell what packing the weights costs",
    "fill": "fill the blanks of a text, with CPM-2 or GLM",
    "generate": "continue a text, and print it as it comes",
    "plan": "show which blocks a memory limit keeps resident, and predict the time per token",
    "serve": "answer OpenAI's clients over HTTP, and show a page to write on",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv`, by default that of the process; returns the exit code.

    Raises SystemExit where argparse exits: --help and --version (0), wrong usage (2).
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    _print_anything()
    flags: dict[str, Flag] = {}  # of the verb, once it is known
    shown, warnings.formatwarning = warnings.formatwarning, partial(_warning, flags)
    try:
        arguments = _parser(argv).parse_args(argv)
        flags |= arguments.flags
        code = int(arguments.run(arguments))
        _flush()
        return code
    except ArgumentError as error:
        return _fail(error, flags, 2)
    except BrokenPipeError:  # the reader of the output has closed it, as `head` does
        return 0
    except SystemExit:
        try:
            _flush()  # of --help and --version
        except OSError as error:
            return _fail(error, flags, 1)
        raise
    except (BMInfError, OSError) as error:
        return _fail(error, flags, 1)
    except KeyboardInterrupt:
        if "RANK" not in os.environ:  # whoever has started the ranks says it
            print("bminf: interrupted", file=sys.stderr)
        return 130  # 128 + SIGINT, as a shell has it
    finally:
        warnings.formatwarning = shown
        _give_up_output()


class _Parser(argparse.ArgumentParser):
    """Tells wrong usage in one line, as all other errors are."""

    def error(self, message: str) -> NoReturn:
        has_text = any(action.dest in ("prompt", "text") for action in self._actions)
        if message.startswith("unrecognized arguments") and " -" not in message and has_text:
            message += "; put a text of several words in quotes"
        self.exit(2, f"bminf: error: {message}; see {self.prog} --help\n")


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    parser = _Parser(prog="bminf", description="Run a model that is bigger than its memory limit.")
    parser.add_argument("--version", action="version", version=f"bminf {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for name, summary in VERBS.items():
        verb = verbs.add_parser(name, help=summary, description=summary)
        # Options come after the verb, so the first argument is the verb or there is none.
        if argv and argv[0] == name:
            module = import_module(f"bminf.cli.{name}")
            module.add_arguments(verb)
            verb.set_defaults(run=module.run, flags=flags_of(verb), argv=[*argv])
            parser.error = verb.error  # type: ignore[method-assign]  # tells of the verb's help
    return parser


def _print_anything() -> None:
    """Replace characters that the terminal cannot show by "?"."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _flush() -> None:
    """Write what was printed, here, where an error can still be reported."""
    if sys.stdout is not None:  # closed by `>&-`
        sys.stdout.flush()


def _give_up_output() -> None:
    """What cannot be written now cannot at the end of the process either, where Python would say so
    once more, and choose the exit code."""
    try:
        _flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _warning(flags: Flags, message: Warning | str, *_: Any, **__: Any) -> str:
    """A warning as the command line shows it, without the place in the code; on rank 0 alone."""
    if os.environ.get("RANK", "0") != "0":
        return ""
    return f"bminf: {one_line(message, flags)}\n"


def _fail(error: Exception, flags: Flags, code: int) -> int:
    """Print the error in one line, and return `code`. Of several ranks, the first does."""
    if os.environ.get("RANK", "0") == "0":
        print(f"bminf: error: {one_line(error, flags)}", file=sys.stderr)
    return code
