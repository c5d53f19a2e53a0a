"""What the verbs that run a model have in common on the command line: its options, and texts."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bminf.cli import sources
from bminf.errors import ArgumentError
from bminf.units import parse_bytes

MODEL_HELP = (
    "a folder or hub id of transformers or of CPM-1, CPM-2, EVA, GLM or BLOOM, a folder of "
    "bminf.save() or bminf convert, or a .gguf file"
)

_SAMPLING = (
    *("max_new_tokens", "temperature", "top_k", "top_p", "frequency_penalty"),
    *("presence_penalty", "repetition_penalty", "seed", "stop"),
)


def add_model(parser: argparse.ArgumentParser, is_optional: bool = False) -> None:
    """MODEL, and how it is loaded."""
    add = parser.add_argument
    add("model", metavar="MODEL", nargs="?" if is_optional else None, help=MODEL_HELP)
    add("--memory-limit", type=size, metavar="SIZE",
        help='such as "6GB"; default: 90%% of the free memory')  # fmt: skip
    add("--quantization", choices=("int8", "int4", "int4-row", "none"),
        help=sources.QUANTIZATION_HELP)  # fmt: skip
    add("--device", metavar="DEVICE", help='"cpu", "cuda", "cuda:1"; default: the GPU, if any')
    add("--offload-dir", metavar="DIR", help="folder for the file of streamed blocks")
    add("--max-length", type=positive, metavar="N",
        help="tokens of prompt and answer together that memory is set aside for")  # fmt: skip
    add("--model", dest="built_in", choices=sources.BUILT_IN,
        help="the built-in model, where the files do not determine it")  # fmt: skip
    add("--trust-remote-code", action="store_true", help="run the code that the folder contains")
    add("--no-fused-kernels", action="store_true", default=None,
        help="on a GPU, torch's operators for norms, positions and attention, in place of kernels "
        "of bminf (built-in models)")  # fmt: skip
    parser.set_defaults(max_batch_size=1)  # of most verbs


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """How a text is generated; the names are those of the Python functions."""
    add = parser.add_argument
    add("--max-new-tokens", type=positive, metavar="N",
        help="the most tokens of an answer; default: 256, of a built-in model 128")  # fmt: skip
    add("--temperature", type=not_negative, metavar="X",
        help="0 always takes the most probable token; default: that of the model")  # fmt: skip
    add("--top-k", type=positive, metavar="N", help="sample from the N most probable tokens")
    add("--top-p", type=fraction, metavar="X",
        help="sample from the most probable tokens that together exceed X")  # fmt: skip
    add("--frequency-penalty", type=number, metavar="X",
        help="for each occurrence of a token (built-in models)")  # fmt: skip
    add("--presence-penalty", type=number, metavar="X",
        help="for tokens that occurred (built-in models)")  # fmt: skip
    add("--repetition-penalty", type=above_zero, metavar="X",
        help="above 1, for tokens that occurred (models of transformers)")  # fmt: skip
    add("--seed", type=whole, metavar="N", help="the same seed gives the same text")


def add_stop(parser: argparse.ArgumentParser) -> None:
    """Texts that end an answer."""
    parser.add_argument("--stop", type=not_empty, action="append", metavar="TEXT",
        help="end the answer before this text; may be given up to 64 times")  # fmt: skip


def add_output(parser: argparse.ArgumentParser, what: str) -> None:
    """--json and --verbose.   what: is printed as JSON."""
    parser.add_argument("--json", action="store_true", help=f"print {what}")
    parser.add_argument("--verbose", action="store_true",
        help="print the plan, and the speed of each answer, to stderr")  # fmt: skip


def add_template(parser: argparse.ArgumentParser) -> None:
    """Of messages."""
    parser.add_argument("--chat-template", metavar="FILE",
        help="a Jinja template, in place of that of the tokenizer")  # fmt: skip


def template_of(arguments: argparse.Namespace) -> str | None:
    """The text of the template that was given.   Raises ArgumentError."""
    file = arguments.chat_template
    if file is None:
        return None
    try:
        return Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(f"--chat-template={file!r} cannot be read: {error}") from error


def sampling_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of add_sampling() and add_stop() that were given, under the names of the Python
    functions.   Raises ArgumentError."""
    from bminf.tokenizers.stop_strings import check_stop

    given = {name: getattr(arguments, name, None) for name in _SAMPLING}
    check_stop(given["stop"])
    return {name: value for name, value in given.items() if value is not None}


def text_of(given: str | None, name: str) -> str:
    """The text `given`; that of stdin for "-", and for None where stdin is no terminal.

    name: of the argument, for messages.   Raises ArgumentError.
    """
    if given is None and is_terminal(sys.stdin):
        raise ArgumentError(f"no {name} is given; write a text in quotes, or - to read stdin")
    text = _stdin() if given is None or given == "-" else given
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ArgumentError(f"{name} is not UTF-8; give a text in UTF-8") from error
    if not text:
        raise ArgumentError(f"{name} is empty; give a text")
    return text


def show(text: str) -> None:
    """Print a piece of a text at once."""
    print(text, end="", flush=True)


def ignore(text: str) -> None:
    """Print nothing, because the whole text is printed later."""


def is_terminal(stream: Any) -> bool:
    """Whether a person is at the other end; a program without a console has no streams at all."""
    return stream is not None and stream.isatty()


def _stdin() -> str:
    """All of stdin, without the newline that ends its last line."""
    try:
        text = "" if sys.stdin is None else sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ArgumentError("stdin is not UTF-8; give a text in UTF-8") from error
    return text.removesuffix("\n")


# ---- values --------------------------------------------------------------------------------------


def size(text: str) -> int:
    """Bytes, from a number with a unit."""
    try:
        return parse_bytes(text)
    except ArgumentError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("size=")) from error


def not_empty(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("it is empty; give a text")
    return text


def _numbers(
    kind: type[int] | type[float], accepted: str, is_accepted: Callable[[Any], bool]
) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan  # which no comparison accepts
        if not is_accepted(value):
            raise argparse.ArgumentTypeError(f"{text!r}; accepted: {accepted}")
        return value

    return parse


positive = _numbers(int, "a whole number above 0", lambda n: n > 0)
above_one = _numbers(int, "a whole number above 1", lambda n: n > 1)
whole = _numbers(int, "a whole number from 0 to 2**63 - 1", lambda n: 0 <= n < 2**63)
number = _numbers(float, "a number", math.isfinite)
port = _numbers(int, "a port, 0 to 65535", lambda n: 0 <= n < 65536)
not_negative = _numbers(float, "a number from 0 on", lambda x: 0 <= x < math.inf)
above_zero = _numbers(float, "a number above 0", lambda x: 0 < x < math.inf)
fraction = _numbers(float, "a number above 0 and up to 1", lambda x: 0 < x <= 1)
