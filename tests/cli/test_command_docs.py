"""docs/command-line.md has what `bminf VERB --help` says.

BMINF_REWRITE_SNAPSHOTS=1 writes it there anew.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from snapshot_files import REWRITE

from bminf.cli import VERBS, main
from bminf.cli.chat import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "command-line.md"


def help_of(verb: str, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize("verb", VERBS)
def test_the_page_has_the_help_of(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    shown = help_of(verb, capsys)
    block = re.compile(rf"^(```text\n\$ bminf {verb} --help\n)(.*?)(```)$", re.M | re.S)
    if os.environ.get(REWRITE) == "1":
        text = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(block.sub(lambda m: m[1] + shown + m[3], text), encoding="utf-8")
    (found,) = block.finditer(PAGE.read_text(encoding="utf-8"))
    # Versions of Python break lines at other places.
    assert found[2].split() == shown.split(), f"set {REWRITE}=1 where this is meant"


def test_the_page_names_each_command_of_chat() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert [name for name in COMMANDS if f"`{name}`" not in text] == []
