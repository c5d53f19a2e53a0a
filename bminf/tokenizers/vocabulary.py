"""A vocabulary: tokens, numbered from 0 in the order of the file they were read from."""

from __future__ import annotations

import codecs
import difflib
import operator
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from bminf.errors import ArgumentError, CheckpointError


class Vocabulary:
    """Tokens and their ids.

    tokens: the token of each id; an empty one is an id that no text has and that spells nothing.
    path: the file they came from, for messages.   entry: what that file calls one of them.
    gap, gap_name: ids that are no token, and what they are instead.   is_open: whether ids go on
    behind the last token, as rows of an embedding do that is larger; they spell nothing either.
    """

    def __init__(
        self, tokens: Iterable[str], path: Path, entry: str = "line",
        gap: range = range(0), gap_name: str = "", is_open: bool = False,
    ) -> None:  # fmt: skip
        self.tokens = tuple(tokens)
        self.path = path
        self.ids = {token: token_id for token_id, token in enumerate(self.tokens) if token}
        self._entry, self._gap, self._gap_name, self._is_open = entry, gap, gap_name, is_open

    @classmethod
    def read(cls, path: Path) -> Vocabulary:
        """The vocabulary of a text file: UTF-8, one token a line; an empty line counts, too.

        Line ends may be of any kind, and the last line may lack one. Spaces around a token are no
        part of it. Raises CheckpointError, with file and line, for a file that cannot be read, a
        line that is not UTF-8 and a token that stands twice.
        """
        lines = read_bytes(path).removeprefix(codecs.BOM_UTF8).splitlines()
        tokens: list[str] = []
        for i, line in enumerate(lines, 1):
            try:
                tokens.append(line.decode().strip())
            except UnicodeDecodeError as error:
                raise CheckpointError(
                    f"{path}, line {i}: not UTF-8 ({error.reason} at byte {error.start}); "
                    "save the file as UTF-8"
                ) from error
        vocabulary = cls(tokens, path)
        for token_id, token in enumerate(tokens):
            if token and vocabulary.ids[token] != token_id:
                raise CheckpointError(
                    f"{path}, line {vocabulary.ids[token] + 1}: {token!r} stands in line "
                    f"{token_id + 1} already; a token has one id, so it must stand once"
                )
        return vocabulary

    def __len__(self) -> int:
        return len(self.tokens)

    def require(self, tokens: Mapping[str, int]) -> None:
        """Raise CheckpointError where one of `tokens` (with their usual ids) is missing."""
        for token, usual in tokens.items():
            if token not in self.ids:
                found = repr(self.tokens[usual]) if usual < len(self.tokens) else "nothing"
                raise CheckpointError(
                    f"{self.path}, {self._entry} {usual + 1}: {found} where {token!r} is "
                    "expected, and it stands nowhere else; is this the right file?"
                )

    def token_id(self, token: str) -> int:
        """The id of exactly this token. Raises ArgumentError, naming near ones."""
        if not isinstance(token, str):
            raise ArgumentError(f"token={token!r} is a {type(token).__name__}; give a str")
        if token not in self.ids:
            near = difflib.get_close_matches(token, self.ids, n=4)
            hint = f"; near ones: {', '.join(map(repr, near))}" if near else ""
            raise ArgumentError(f"token={token!r} is not one of {self.path}{hint}")
        return self.ids[token]

    def token(self, token_id: int) -> str:
        """The token of an id that check_id() takes."""
        return self.tokens[token_id] if token_id < len(self.tokens) else ""

    def check_id(self, token_id: int) -> int:
        """The id as an int. Raises ArgumentError for what is none of this vocabulary."""
        try:
            index = operator.index(token_id)
        except TypeError as error:
            raise ArgumentError(
                f"id {token_id!r} is a {type(token_id).__name__}; give integers"
            ) from error
        if index < 0 or (index >= len(self.tokens) and not self._is_open):
            raise ArgumentError(
                f"id {index} is not one of {self.path}; its ids are 0 to {len(self.tokens) - 1}"
            )
        if index in self._gap:
            raise ArgumentError(
                f"id {index} of {self.path} is {self._gap_name} and has no text; leave it out"
            )
        return index

    def check_ids(self, ids: Sequence[int]) -> list[int]:
        if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
            raise ArgumentError(f"ids={ids!r} is a {type(ids).__name__}; give a sequence of int")
        return [self.check_id(token_id) for token_id in ids]


def read_bytes(path: Path) -> bytes:
    """All of a file. Raises CheckpointError where it cannot be read."""
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise CheckpointError(f"{path} cannot be read: {error}") from error
