"""Sentencepiece models, and their pieces back into text, one at a time."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from bminf.errors import CheckpointError
from bminf.tokenizers.vocabulary import read_bytes

_BYTE = re.compile("<0x[0-9A-F]{2}>")

CONTROL_PIECES = ("<unk>", "<s>", "</s>", "<pad>")
"""Pieces that are no text: sentencepiece's own names for them."""


class Pieces(Protocol):
    """A sentencepiece model; ids are from 0 on. tokens: the piece of each id."""

    @property
    def tokens(self) -> Sequence[str]: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class PieceModel:
    """The sentencepiece model of a file. Raises CheckpointError for a file that is none."""

    def __init__(self, path: Path) -> None:
        self._processor, content = sentencepiece().SentencePieceProcessor(), read_bytes(path)
        try:
            self._processor.LoadFromSerializedProto(content)
        except (RuntimeError, OSError, ValueError) as error:
            raise CheckpointError(
                f"{path} is not a sentencepiece model, or damaged: {error}; get the file anew"
            ) from error
        count = self._processor.get_piece_size()
        self.tokens: Sequence[str] = self._processor.id_to_piece(list(range(count)))

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(text)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._processor.decode(list(ids))
        return text


class PieceDetokenizer:
    """The detokenizer of pieces with special tokens between them.

    pieces: the model.   offset: the id of its first piece.   specials: the text of each other id.

    The model joins what stands between two special tokens by itself, so that the first word behind
    one has no blank before it. A run of bytes waits for its end.
    """

    def __init__(self, pieces: Pieces, offset: int, specials: Mapping[int, str]) -> None:
        self._pieces, self._offset, self._specials = pieces, offset, specials
        # The first piece that has text even alone: `<unk>`, as a rule.
        texts = (i for i, t in enumerate(pieces.tokens) if not is_byte(t) and pieces.decode([i]))
        self._visible = next(texts, 0)
        self._before: list[int] = []
        self._held: list[int] = []

    def add(self, token_id: int) -> str:
        if token_id in self._specials:
            text = self._release()
            self._before = []
            return text + self._specials[token_id]
        self._held.append(token_id - self._offset)
        return "" if is_byte(self._pieces.tokens[self._held[-1]]) else self._release()

    def end(self) -> str:
        return self._release()

    def _release(self) -> str:
        """The text of what is held, as it stands behind what came before it.

        Behind any text a piece always reads alike, so one piece stands for all before it. Of pieces
        without text (U+2581, `<s>`) it matters which there were, not how often.
        """
        ids = [*self._before, *self._held]
        text = self._pieces.decode(ids)[len(self._pieces.decode(self._before)) :]
        self._before = [self._visible] if text else [*dict.fromkeys(ids)]
        self._held = []
        return text


def is_byte(token: str) -> bool:
    """Whether a piece stands for one byte."""
    return _BYTE.fullmatch(token) is not None


@functools.cache
def sentencepiece() -> Any:
    """sentencepiece, without the warnings that newer Pythons give of any module made by SWIG."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="builtin type (SwigPy|swigvar)")
        import sentencepiece

    return sentencepiece
