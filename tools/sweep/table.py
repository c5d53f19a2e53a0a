"""docs/compatibility.md, made from the results: `python -m tools.sweep.table FILE.json`."""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.sweep.check import NOT_BUILT, OK, REFUSED, RESIDENT, WRONG

Found = list[tuple[str, str, Mapping[str, Any]]]  # family, class, outcome
_COLUMNS = (OK, RESIDENT, REFUSED, WRONG, NOT_BUILT)
_HEAD = """\
# Compatibility

Made by `python -m tools.sweep.table` from what `python -m tools.sweep` found
({versions}).
Every class is built small with random weights, wrapped on the CPU with
`quantization=False` and the least limit there is, and compared with a copy that is not
wrapped: two passes and, where it generates, greedy tokens, bit for bit; the bytes that
the plan counts and that were copied; the weights after `bminf.unwrap`.

*ok*: streamed, and all of that held. *resident*: the same, but two slots hold all of
it, so nothing streams. *refused*: an error of bminf's, listed below. *WRONG*: anything
else. *not built*: it does not run small without bminf either, or its inputs are not
known to the sweep.
"""


def table(document: Mapping[str, Any]) -> str:
    """The whole page."""
    versions = (f"{name} {version}" for name, version in sorted(document["versions"].items()))
    libraries: dict[str, Found] = defaultdict(list)
    for key, outcome in sorted(document["results"].items()):
        library, family, name = key.split(":")
        libraries[library].append((family, name, outcome))
    head = _HEAD.format(versions=", ".join(versions))
    return "\n".join([head, *_sections(libraries)]) + "\n"


def _sections(libraries: Mapping[str, Found]) -> Iterator[str]:
    yield from _totals(libraries)
    everything = [each for found in libraries.values() for each in found]
    yield from _reasons("Wrong", _of(everything, WRONG))
    yield from _reasons("Refused", _of(everything, REFUSED))
    for library, found in libraries.items():
        yield from _families(library, _of(found, OK, RESIDENT))
    untried = {library: _of(found, NOT_BUILT) for library, found in libraries.items()}
    if any(untried.values()):
        yield "## Not built\n"
    for library, found in untried.items():
        if found:
            yield f"{library}: {', '.join(name for _, name, _ in found)}.\n"


def _of(found: Found, *kinds: str) -> Found:
    return [each for each in found if each[2]["outcome"] in kinds]


def _totals(libraries: Mapping[str, Found]) -> Iterator[str]:
    yield f"| library | {' | '.join(_COLUMNS)} |"
    yield "|---" * (len(_COLUMNS) + 1) + "|"
    for library, found in libraries.items():
        counts = Counter(outcome["outcome"] for _, _, outcome in found)
        yield f"| {library} | {' | '.join(str(counts[column]) for column in _COLUMNS)} |"
    yield ""


def _reasons(title: str, found: Found) -> Iterator[str]:
    if not found:
        return
    yield f"## {title}\n\n| class | reason |\n|---|---|"
    for _, name, outcome in found:
        yield f"| {name} | {_escaped(outcome['reason'])} |"
    yield ""


def _families(library: str, found: Found) -> Iterator[str]:
    """A row a family: its classes that ran, and how small the limit may be."""
    if not found:
        return
    yield f"## {library}\n\n| family | classes | generates | least limit |\n|---|---|---|---|"
    for family in dict.fromkeys(family for family, _, _ in found):
        ran = [(name, outcome) for of, name, outcome in found if of == family]
        names = ", ".join(f"{n} (resident)" if o["outcome"] == RESIDENT else n for n, o in ran)
        generates = "yes" if any(outcome["generates"] for _, outcome in ran) else ""
        least = min(outcome["least_part"] for _, outcome in ran)
        yield f"| {family} | {names} | {generates} | {min(least, 1):.0%} |"
    yield (
        "\nThe least limit is that of the small model, as a part of all its bytes: published\n"
        "models have more layers, so theirs is smaller.\n"
    )


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.sweep.table")
    parser.add_argument("file", type=Path, help="what the sweep wrote with --out")
    parser.add_argument("--out", type=Path, default=Path("docs/compatibility.md"))
    options = parser.parse_args(arguments)
    options.out.write_text(table(json.loads(options.file.read_text())).rstrip("\n") + "\n")


if __name__ == "__main__":
    main()
