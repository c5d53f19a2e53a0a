"""Blocks of code say what they are, and few are left out of the tests; pages.py."""

from __future__ import annotations

import re

import pytest
from pages import BLOCKS, NOT_RUN, Block

MOST_NOT_RUN = 8


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_block_says_what_it_is(block: Block) -> None:
    assert block.language in ("python", "bash", "text")
    if block.language == "text" and not block.text.startswith("$ bminf "):
        assert not re.search(
            r"^(\$ |>>> |import |from \w+ import|pip |python |bminf )", block.text, re.M
        )


def test_few_blocks_are_not_run() -> None:
    reasons = [f"{block!s}: {block.reason}" for block in BLOCKS if block.reason]
    assert len(reasons) <= MOST_NOT_RUN, reasons
    assert all(len(reason.partition(": ")[2]) > 8 for reason in reasons), reasons


def test_a_reason_stands_in_the_first_line_alone() -> None:
    hidden = [str(block) for block in BLOCKS if NOT_RUN.strip() in block.text.partition("\n")[2]]
    assert hidden == []
