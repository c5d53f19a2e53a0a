"""JSON files of ours that say what they and the small files beside them have to be.

A wrong number in a configuration makes another model, and nobody would know. Under "checksums" a
description has a hash of each file beside it, and under its own name one of its other fields, of
whatever form. What has no hash there is not compared: who means to edit a file takes out its line.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bminf.checkpoint.binary_file import BinaryFile
from bminf.errors import CheckpointError

_KEY = "checksums"


def write_sealed(path: Path, fields: Mapping[str, Any], beside: Iterable[str] = ()) -> None:
    """Write a JSON object, with hashes of it and of the files of these names in its folder."""
    files = {name: _hash((path.parent / name).read_bytes()) for name in sorted(beside)}
    written = {**fields, _KEY: {path.name: _hash_of_fields(fields), **files}}
    path.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


def check_sealed(path: Path, fields: Mapping[str, Any]) -> None:
    """Raise CheckpointError where it, or a file beside it, is not as it was written.

    fields: what has been read from `path`, its hashes included, if it has any.
    """
    hashes = fields.get(_KEY, {})
    if not isinstance(hashes, Mapping):
        raise CheckpointError(f'{path}: "{_KEY}" is {hashes!r}, no object; fetch it again')
    own = {name: value for name, value in fields.items() if name != _KEY}
    for name, expected in hashes.items():
        found = _hash_of_fields(own) if name == path.name else _hash_of_file(path, name)
        if found != expected:
            raise CheckpointError(
                f"{path.parent / name} is not as it was written: it is damaged, or was edited; "
                f'fetch it again, or, if it was meant, take {name!r} out of "{_KEY}" in {path.name}'
            )


def _hash_of_file(path: Path, name: str) -> str:
    if not name or set(name) & {"/", "\\", "\0"}:  # a path out of the folder
        raise CheckpointError(f"{path} has a checksum of {name!r}, which is no file beside it")
    file = BinaryFile(path.with_name(name))  # whose errors say that it is missing
    return _hash(file.at(0, file.nbytes, "all of it"))


def _hash_of_fields(fields: Mapping[str, Any]) -> str:
    fields = json.loads(json.dumps(fields))  # names of other types are text now
    return _hash(json.dumps(fields, sort_keys=True).encode())


def _hash(data: bytes) -> str:
    text = data.removeprefix(codecs.BOM_UTF8)  # which an editor adds, and readers leave out
    return hashlib.blake2b(text, digest_size=16).hexdigest()
