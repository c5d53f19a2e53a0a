"""What stands in the documents between two comments, out of the JSON files of benchmarks/results.

`<!-- FILE.json -->` and `<!-- end -->` on lines of their own hold the table of that file,
`<!-- FILE.json VIEW -->` another one of it. `<!-- FILE.json PATH -->` and `<!-- end -->` within a
line hold one number: PATH leads through the file by keys, and through its results by their names,
with slashes between them. The last key says what the number is: NAME_bytes, NAME_s, tokens_per_s,
anything else is a number without a unit; "ratio" on the way makes it one of perplexities.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from bminf.cli.tables.text import digits

_TABLE = re.compile(r"<!-- (\S+\.json)( \w+)? -->\n.*?<!-- end -->", re.DOTALL)
_NUMBER = re.compile(r"<!-- (\S+\.json) (\S.*?) -->[^\n]*?<!-- end -->")


def filled(text: str, read: Callable[[str], Any], table: Callable[[Any, str], str]) -> str:
    """`text` with what belongs between its marks.

    read: the content of a file by its name.   table: that of a content and a view, in Markdown; ""
    is the usual view.
    Raises KeyError for a path that leads nowhere.
    """

    def block(mark: re.Match[str]) -> str:
        view = mark[2] or ""
        return f"<!-- {mark[1]}{view} -->\n{table(read(mark[1]), view.strip())}<!-- end -->"

    text = _TABLE.sub(block, text)
    return _NUMBER.sub(
        lambda m: f"<!-- {m[1]} {m[2]} -->{number_at(read(m[1]), m[2])}<!-- end -->", text
    )


def without_marked(text: str) -> str:
    """`text` without what its marks hold."""
    return _NUMBER.sub("", _TABLE.sub("", text))


def number_at(content: Any, path: str) -> str:
    """The number at `path`, with its unit.   Raises KeyError."""
    value = content
    for key in path.split("/"):
        value = _step(value, key, path)
    return f"{value:.4f}" if "/ratio/" in path else _with_unit(path.rpartition("/")[2], value)


def _step(value: Any, key: str, path: str) -> Any:
    if isinstance(value, list):
        value = {each["name"]: each for each in value}
    if key not in value:
        raise KeyError(f"{path}: there is no {key!r}, only {', '.join(map(repr, value))}")
    return value[key]


def _with_unit(key: str, value: float) -> str:
    if key.endswith("_bytes"):
        return f"{_short(value / 1e9)} GB" if value >= 1e8 else f"{_short(value / 1e6)} MB"
    if key.endswith("tokens_per_s"):
        return f"{_short(value)} tokens/s"
    if key.endswith("_s"):
        return f"{_short(value)} seconds" if value >= 1 else f"{_short(value * 1e3)} ms"
    return digits(value)


def _short(value: float) -> str:
    """Two digits, and all before the point."""
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"
