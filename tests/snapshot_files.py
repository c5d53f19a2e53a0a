"""What a file of tests/snapshots/ holds, against what the code gives now.

`BMINF_REWRITE_SNAPSHOTS=1 pytest tests/test_public_names.py` writes the files of a test anew. The
change then stands in the diff of the commit, where it is reviewed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "snapshots"
Entries = Mapping[str, Any]
REWRITE = "BMINF_REWRITE_SNAPSHOTS"


def check(name: str, now: Entries, compared: Callable[[Entries], Entries] = dict) -> None:
    """Fail where the entries `now` are not those of the file `name`, and say which they are.

    compared: what of the entries is looked at; all, unless it is given.
    """
    before = recorded(name, now)
    found = list(differences(compared(before), compared(json.loads(json.dumps(now)))))
    assert not found, "\n".join([f"{name}: set {REWRITE}=1 where this is meant", *found])


def recorded(name: str, now: Entries) -> dict[str, Any]:
    """The entries of the file, which are `now` where it was asked to be written anew."""
    path = FOLDER / name
    if os.environ.get(REWRITE) == "1":
        path.write_text(as_text(now), encoding="utf-8")
    entries: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return entries


def differences(before: Entries, now: Entries) -> Iterator[str]:
    """A line for each entry that went, came or changed."""
    yield from (f"went     {key}: {before[key]}" for key in before if key not in now)
    yield from (f"came     {key}: {now[key]}" for key in now if key not in before)
    for key, value in before.items():
        if key in now and now[key] != value:
            yield f"changed  {key}: {value}\n      to {' ' * len(key)}  {now[key]}"


def as_text(entries: Entries) -> str:
    """JSON with a line for each entry, so that a diff shows what changed and no more."""
    lines = (
        f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}"
        for key, value in entries.items()
    )
    return "{\n" + ",\n".join(lines) + "\n}\n"
