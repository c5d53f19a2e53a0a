"""A file that is read at given places, and never beyond its end."""

from __future__ import annotations

import json
import mmap
import os
from pathlib import Path
from typing import Any, BinaryIO

import torch

from bminf.errors import CheckpointError

_MOST_JSON_BYTES = 10**8


class BinaryFile:
    """A file opened for reading, to be used in a `with`.

    file: where it stands is the caller's affair.   nbytes: its size when it was opened.
    Raises CheckpointError where it is missing, no file, or not readable.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if not path.is_file():  # a pipe would be waited for
                raise OSError("no such file" if not path.exists() else "not a file")
            self.file: BinaryIO = open(path, "rb")
            self.nbytes = os.fstat(self.file.fileno()).st_size
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            raise CheckpointError(f"{path} cannot be opened: {error}") from error

    def __enter__(self) -> BinaryFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def at(self, offset: int, count: int, what: str) -> bytes:
        """`count` bytes from `offset` on; the file stands behind them.

        what: what these bytes are, for the CheckpointError if the file ends before.
        """
        self.check(offset, count, what)
        try:
            self.file.seek(offset)
            data = self.file.read(count)
        except OSError as error:
            raise CheckpointError(f"{self.path}: {what} cannot be read: {error}") from error
        if len(data) < count:
            raise CheckpointError(f"{self.path} became shorter while it was read")
        return data

    def check(self, offset: int, count: int, what: str) -> None:
        """Raise CheckpointError where `count` bytes from `offset` on are not all in the file."""
        if offset < 0 or count < 0 or offset + count > self.nbytes:
            raise CheckpointError(
                f"{self.path} is damaged or truncated: {what} should lie at bytes {offset} to "
                f"{offset + count}, but the file has {self.nbytes}; fetch it again"
            )

    def mapped(self, offset: int, count: int) -> torch.Tensor:
        """`count` checked bytes, (count,) uint8, as a private map: pages are read when touched."""
        begin = offset - offset % mmap.ALLOCATIONGRANULARITY
        try:
            region = mmap.mmap(
                self.file.fileno(), offset - begin + count, access=mmap.ACCESS_COPY, offset=begin
            )
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path} cannot be mapped: {error}") from error
        with torch.inference_mode(False):
            return torch.frombuffer(region, dtype=torch.uint8, offset=offset - begin, count=count)

    def copied(self, offset: int, count: int) -> torch.Tensor:
        """`count` checked bytes, (count,) uint8, in memory of their own."""
        with torch.inference_mode(False):
            data = torch.empty(count, dtype=torch.uint8)
        try:
            self.file.seek(offset)
            num_read = self.file.readinto(data.numpy())  # type: ignore[attr-defined]
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error}") from error
        if num_read < count:
            raise CheckpointError(f"{self.path} became shorter while it was read")
        return data


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.   Raises CheckpointError where it is anything else."""
    with BinaryFile(path) as file:
        return parse_json(file.at(0, min(file.nbytes, _MOST_JSON_BYTES), "JSON"), str(path))


def parse_json(text: bytes, where: str) -> dict[str, Any]:
    """The object in a JSON text; a key that comes twice is an error, not the last one's value."""
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} holds a {type(value).__name__}, not a JSON object")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} comes twice")
        found[key] = value
    return found
