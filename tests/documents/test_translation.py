"""README-ZH.md says what README.md says: the same code, numbers, links and headings, in Chinese."""

from __future__ import annotations

import re

from pages import READMES, blocks, read, without_code

from tools.marked import without_marked

ENGLISH, CHINESE = map(read, READMES)
_MARKS = re.compile(r"<!-- (\S+\.json[^\n]*?) -->")
_LINKS = re.compile(r"\]\(([^)#]+)[^)]*\)")


def test_the_same_code() -> None:
    assert [block[2:] for block in blocks("README-ZH.md")] == [b[2:] for b in blocks("README.md")]


def test_the_same_numbers() -> None:
    assert _MARKS.findall(CHINESE) == _MARKS.findall(ENGLISH)


def test_as_many_headings() -> None:
    levels = [
        [len(mark) for mark in re.findall(r"^(#+) ", text, re.M)] for text in (ENGLISH, CHINESE)
    ]
    assert levels[0] == levels[1]


def test_the_same_pages_are_linked() -> None:
    english, chinese = (set(_LINKS.findall(text)) for text in (ENGLISH, CHINESE))
    # Of the limits the Chinese page has the first, and a link to all.
    only_english = english - chinese - {"README-ZH.md", "docs/compatibility.md"}
    assert (only_english, chinese - english) == (set(), {"README.md"})


def test_its_prose_is_chinese() -> None:
    prose = without_code(without_marked(CHINESE))
    assert len(re.findall(r"[\u4e00-\u9fff]", prose)) > 800
