"""docs/compatibility.md, made from the results: `python -m tools.sweep.table FILE.json`."""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.sweep.check import NOT_BUILT, OK, REFUSED, RESIDENT, WRONG

Results = Mapping[str, Mapping[str, Any]]
_COLUMNS = (OK, RESIDENT, REFUSED, WRONG, NOT_BUILT)


def table(document: Mapping[str, Any]) -> str:
    """The whole page."""
    return "\n".join(_page(document["versions"], document["results"])) + "\n"


def _page(versions: Mapping[str, str], results: Results) -> Iterator[str]:
    names = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    yield "# Compatibility\n"
    yield (
        "Made by `python -m tools.sweep.table` from what `python -m tools.sweep` found\n"
        f"({names}).\n"
        "Every class is built small with random weights, wrapped on the CPU with\n"
        "`quantization=False` and the least limit there is, and compared with a copy that is not\n"
        "wrapped: two passes and, where it generates, greedy tokens, bit for bit; the bytes that\n"
        "the plan counts and that were copied; the weights after `bminf.unwrap`.\n"
    )
    yield (
        "*ok*: streamed, and all of that held. *resident*: the same, but two slots hold all of\n"
        "it, so nothing streams. *refused*: an error of bminf's, listed below. *WRONG*: anything\n"
        "else. *not built*: it does not run small without bminf either, or its inputs are not\n"
        "known to the sweep.\n"
    )
    yield from _totals(results)
    yield from _reasons(results, WRONG, "Wrong")
    yield from _reasons(results, REFUSED, "Refused")
    for library in dict.fromkeys(key.split(":")[0] for key in results):
        yield from _families(library, results)
    yield from _untried(results)


def _totals(results: Results) -> Iterator[str]:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for key, outcome in results.items():
        counts[key.split(":")[0]][outcome["outcome"]] += 1
    yield f"| library | {' | '.join(_COLUMNS)} |"
    yield "|---" * (len(_COLUMNS) + 1) + "|"
    for library, numbers in counts.items():
        yield f"| {library} | {' | '.join(str(numbers[column]) for column in _COLUMNS)} |"
    yield ""


def _reasons(results: Results, kind: str, title: str) -> Iterator[str]:
    found = {k: o["reason"] for k, o in sorted(results.items()) if o["outcome"] == kind}
    if not found:
        return
    yield f"## {title}\n\n| class | reason |\n|---|---|"
    for key, reason in found.items():
        yield f"| {key.split(':')[2]} | {_escaped(reason)} |"
    yield ""


def _families(library: str, results: Results) -> Iterator[str]:
    """A row a family: its classes that ran, and how small the limit may be."""
    families: dict[str, list[tuple[str, Mapping[str, Any]]]] = defaultdict(list)
    for key, outcome in sorted(results.items()):
        where, family, name = key.split(":")
        if where == library and outcome["outcome"] in (OK, RESIDENT):
            families[family].append((name, outcome))
    if not families:
        return
    yield f"## {library}\n\n| family | classes | generates | least limit |\n|---|---|---|---|"
    for family, ran in families.items():
        names = ", ".join(f"{n} (resident)" if o["outcome"] == RESIDENT else n for n, o in ran)
        generates = "yes" if any(outcome["generates"] for _, outcome in ran) else ""
        least = min(outcome["least_part"] for _, outcome in ran)
        yield f"| {family} | {names} | {generates} | {min(least, 1):.0%} |"
    yield (
        "\nThe least limit is that of the small model, as a part of all its bytes: published\n"
        "models have more layers, so theirs is smaller.\n"
    )


def _untried(results: Results) -> Iterator[str]:
    found = defaultdict(list)
    for key, outcome in sorted(results.items()):
        if outcome["outcome"] == NOT_BUILT:
            found[key.split(":")[0]].append(key.split(":")[2])
    if found:
        yield "## Not built\n"
    for library, names in found.items():
        yield f"{library}: {', '.join(names)}.\n"


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
