"""Messages of the library in the words of the command line: memory_limit is --memory-limit here."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass

_ALIASES = {"max_tokens": "max_new_tokens", "top_n": "top_k", "degree": "tp"}
"""Other names of options in Python."""

_BARE = ("quantization",)
"""Names that are no word of a sentence, though they have no underscore."""

_ADVISED = ("blocks", "quantization")
"""Arguments that messages advise, and that not every verb has an option for."""

_MORE_TEXTS = re.compile(r" (?:or|and) max_batch_size(?:=\d+)?")
"""Beside max_length, in messages to verbs that have one text."""

# A call, as an example in Python, stays as it is. The value of a keyword ends before a comma.
_TOKENS = re.compile(
    r"(?P<call>[\w.]+\([^()]*\w=[^()]*\))"
    r"|(?P<name>(?<![\w./-])[a-z]+(?:_[a-z]+)*)"
    r"(?:=(?P<value>\"[^\"]*\"|'[^']*'|\[[^\]]*\]|\.\.\.|[\w.+-]*\w|))?(?![\w/-])"
)


_TWICE = re.compile(r"(--[\w-]+) \(or \1\)(?:=(?=\S))?")
"""Two names that are one option here."""


@dataclass(frozen=True)
class Flag:
    """An option, such as --config; for people, its value is shown as `metavar`, None where it has
    none."""

    name: str
    metavar: str | None


Flags = Mapping[str, Flag]
"""By the names that the options have in Python."""


def flags_of(parser: argparse.ArgumentParser) -> dict[str, Flag]:
    """Those of a verb."""
    found = {}
    for action in parser._actions:
        for option in action.option_strings:
            if option.startswith("--"):
                metavar = action.metavar if isinstance(action.metavar, str) else None
                has_value = action.nargs != 0
                shown = (metavar or action.dest.upper()) if has_value else None
                found[option[2:].replace("-", "_")] = Flag(option, shown)
    return found | {alias: found[name] for alias, name in _ALIASES.items() if name in found}


def in_flags(text: str, flags: Flags) -> str:
    """`text` with the options of the verb at hand in place of the arguments of functions."""

    def flag_for(match: re.Match[str]) -> str:
        name, value = match["name"], match["value"]
        flag = flags.get(name or "")
        if flag is None:
            return f"{match[0]} in Python" if value is not None and name in _ADVISED else match[0]
        if value is None and "_" not in name and name not in _BARE:
            return match[0]
        return flag.name if not value or flag.metavar is None else _with_value(flag, value)

    if "max_batch_size" not in flags:
        text = _MORE_TEXTS.sub("", text)
    return _TWICE.sub(_once, _TOKENS.sub(flag_for, text))


def _once(match: re.Match[str]) -> str:
    return f"{match[1]} " if match[0].endswith("=") else match[1]


def _with_value(flag: Flag, value: str) -> str:
    if value == "..." or value.startswith("["):
        value = flag.metavar or ""
    elif value in ("None", "False") and flag.name.endswith("quantization"):
        value = "none"
    elif not re.search(r"\s", value):
        value = value.strip("\"'")
    return f"{flag.name} {value}"


def one_line(message: object, flags: Flags) -> str:
    """What an error or a warning says, as it is printed."""
    return in_flags(" ".join(str(message).split()), flags)
