"""Every measured or predicted number of the pages stands between marks (tools/marked.py)."""

from __future__ import annotations

import re
from typing import Any

import pytest
from pages import PAGES, read, without_code

from tools.marked import filled, number_at, without_marked

# What is measured or predicted: speeds, sizes, times, and ratios of perplexities. What is set or
# given, such as a memory limit or the size of a card, is written as code.
_UNIT = re.compile(
    r"(?<![\w.])\d[\d.,]*\s?(tokens/s|tokens a second|[kKMGT]i?B(/s)?|gigabytes?|megabytes?"
    r"|[mµun]s|s|seconds?|minutes?|hours?|毫秒|秒|分钟|小时)(?![\w-])"
    r"|(?<![\w.])[01]\.\d{4}(?!\d)"
)
# One table, which `python -m tools.sweep.table` writes; its page says so.
_WRITTEN_WHOLE = "docs/compatibility.md"


@pytest.mark.parametrize("page", [page for page in PAGES if page != _WRITTEN_WHOLE])
def test_numbers_with_units_are_marked(page: str) -> None:
    prose = without_code(without_marked(read(page)))
    found = [line for line in prose.splitlines() if _UNIT.search(line)]
    assert found == [], "mark it with its JSON file, or write it as code where it is a setting"


@pytest.mark.parametrize(
    "text", ["takes 3.4 GB", "at 25 GB/s", "43 tokens/s", "1.8 seconds", "12 µs each", "is 1.0018"]
)
def test_what_counts_as_a_number(text: str) -> None:
    assert _UNIT.search(text)


@pytest.mark.parametrize(
    "text", ["BMInf 1.x", "GLM-130B in 4 bits", "compute capability 6.1", "8 to 46%", "GTX 10xx"]
)
def test_what_does_not(text: str) -> None:
    assert not _UNIT.search(text)


CONTENT: Any = {
    "results": [{"name": "a, b", "prediction": {"tokens_per_s": 43.21, "pass_s": 0.0123}}],
    "figures": {"x_bytes": 65.3e9, "y_bytes": 12.3e6, "z_s": 1.84, "n": 7.5},
    "own": {"ratio": {"median": 1.00180}},
}


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("results/a, b/prediction/tokens_per_s", "43 tokens/s"),
        ("results/a, b/prediction/pass_s", "12 ms"), ("figures/x_bytes", "65 GB"),
        ("figures/y_bytes", "12 MB"), ("figures/z_s", "1.8 seconds"), ("figures/n", "7.50"),
        ("own/ratio/median", "1.0018"),
    ],
)  # fmt: skip
def test_a_number_is_found_by_its_path_and_gets_its_unit(path: str, text: str) -> None:
    assert number_at(CONTENT, path) == text


@pytest.mark.parametrize("path", ["figures/w", "results/c/prediction"])
def test_a_path_that_leads_nowhere_names_what_there_is(path: str) -> None:
    with pytest.raises(KeyError, match="only"):
        number_at(CONTENT, path)


def test_marks_are_filled_and_nothing_else() -> None:
    page = "<!-- f.json -->\nold\n<!-- end -->\n<!-- f.json few -->\n<!-- end -->\n"
    page += "is <!-- f.json figures/x_bytes -->1 GB<!-- end -->, 2 GB\n"
    shown = filled(page, lambda name: CONTENT, lambda content, view: f"table {view}\n")
    assert shown == (
        "<!-- f.json -->\ntable \n<!-- end -->\n<!-- f.json few -->\ntable few\n<!-- end -->\n"
        "is <!-- f.json figures/x_bytes -->65 GB<!-- end -->, 2 GB\n"
    )
    assert without_marked(shown) == "\n\nis , 2 GB\n"
