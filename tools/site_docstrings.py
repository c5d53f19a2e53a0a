"""Docstrings of this project as Markdown, for the page of the API; mkdocs.yml names this file.

A line `name: what it is` begins a point of a list, to which the indented lines below belong, and so
does `other: what that is` behind three blanks; a line that begins with Raises or Returns is a
paragraph.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_POINT = re.compile(r"^([a-z][\w.]*(?:, [\w.]+)*): ")
_PARAGRAPH = re.compile(r"^(Raises|Returns) ")
_WITHIN = re.compile(r"(?<=\S)   (?=[a-z][\w.]*(?:, [\w.]+)*: |Raises |Returns )")


class ListedParameters(griffe.Extension):
    """Changes each docstring as it is read."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(docstring: str) -> str:
    """`docstring` with its parameters as a list."""
    lines: list[str] = []
    for line in _WITHIN.sub("\n", docstring).split("\n"):
        if point := _POINT.match(line):
            line = f"- **{point[1]}**: {line[point.end() :]}"
            if lines and not lines[-1].startswith(("- ", "    ")):
                line = f"\n{line}"
        elif _PARAGRAPH.match(line):
            line = f"\n{line}"
        lines.append(line)
    return "\n".join(lines)
