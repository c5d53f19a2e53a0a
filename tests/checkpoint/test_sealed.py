"""JSON files with hashes of themselves and of the files beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bminf.checkpoint.binary_file import read_json
from bminf.checkpoint.sealed import check_sealed, write_sealed
from bminf.errors import CheckpointError

FIELDS: dict[str, Any] = {"a": 1, "b": {"c": [1.5, None, "ä"]}, "d": (1, 2), "e": {7: True}}


def write(folder: Path) -> Path:
    (folder / "words.txt").write_text("one two")
    (folder / "more.json").write_text("{}")
    path = folder / "sealed.json"
    write_sealed(path, FIELDS, ["words.txt", "more.json"])
    return path


def check(path: Path) -> dict[str, Any]:
    fields = read_json(path)
    check_sealed(path, fields)
    return fields


def test_what_is_as_it_was_written_passes(tmp_path: Path) -> None:
    path = write(tmp_path)
    fields = check(path)
    assert fields.pop("checksums").keys() == {"sealed.json", "words.txt", "more.json"}
    assert fields == json.loads(json.dumps(FIELDS))
    path.write_text(json.dumps(json.loads(path.read_text()), indent=7, sort_keys=True))
    check(path)  # of another form


def test_whatever_byte_changes_is_an_error_or_changes_nothing(tmp_path: Path) -> None:
    path = write(tmp_path)
    content, expected = path.read_bytes(), check(path)
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        try:
            found = check(path)
        except CheckpointError as error:
            assert str(tmp_path) in str(error)
            continue
        assert {key: found[key] for key in FIELDS} == {key: expected[key] for key in FIELDS}


@pytest.mark.parametrize("name", ["words.txt", "more.json"])
def test_a_file_beside_it_that_changed_is_named(name: str, tmp_path: Path) -> None:
    path = write(tmp_path)
    (tmp_path / name).write_text("one too")
    with pytest.raises(CheckpointError, match=rf"{name} is not as it was .* take '{name}' out of"):
        check(path)
    written = json.loads(path.read_text())
    del written["checksums"][name]
    path.write_text(json.dumps(written))
    check(path)
    (tmp_path / name).unlink()
    check(path)


def test_a_file_beside_it_that_is_missing_is_named(tmp_path: Path) -> None:
    path = write(tmp_path)
    (tmp_path / "words.txt").unlink()
    with pytest.raises(CheckpointError, match=r"words\.txt cannot be read: no such file"):
        check(path)


@pytest.mark.parametrize(
    ("hashes", "message"),
    [
        ([1], r'"checksums" is \[1\], no object'),
        ({"../words.txt": ""}, "of '../words.txt', which is no file beside"),
        ({"": ""}, "of '', which is no file beside"),
        ({"..": ""}, "cannot be read: not a file"),
        ({"words.txt": 5}, "is not as it was written"),
    ],
)
def test_hashes_of_no_meaning_are_refused(hashes: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path)
    path.write_text(json.dumps({**FIELDS, "checksums": hashes}))
    with pytest.raises(CheckpointError, match=message):
        check(path)
