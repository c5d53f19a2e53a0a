"""The tokenizer of GLM-130B: the text half of icetk, and the special tokens behind it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bminf.errors import ArgumentError
from bminf.tokenizers.base import CommandTokenizer, Detokenizer
from bminf.tokenizers.pieces import CONTROL_PIECES, PieceDetokenizer, PieceModel, Pieces
from bminf.tokenizers.vocabulary import Vocabulary

_SPECIALS = ("[MASK]", "[gMASK]", "[sMASK]", "eod", "sop", "eop", "ENC", "dBLOCK")
_EOS = "</s>"
_LINE_BREAK = "<n>"


class _IceText(CommandTokenizer):
    """What both forms of this tokenizer share. pieces: the model.   path: of its file."""

    strips_before_masks = False
    _names = "eos", "sop", "eop"

    def __init__(
        self, pieces: Pieces, path: Path, image_offset: int, ignore_linebreak: bool
    ) -> None:
        line_break = {} if ignore_linebreak else {_LINE_BREAK: 4}
        needed = {"<unk>": 0, _EOS: 2, "<pad>": 3, **line_break}
        Vocabulary(pieces.tokens, path, entry="piece").require(needed)
        tokens = [*[""] * image_offset, *pieces.tokens, *_SPECIALS]
        gap = range(image_offset)
        vocabulary = Vocabulary(tokens, path, "piece", gap, "an image token")
        ids = vocabulary.ids
        commands = {name: ids[name] for name in _SPECIALS}
        self._texts = {ids[name]: f"[{name}]" for name in (*_SPECIALS, _EOS)}
        control_ids = [*gap, *(ids[name] for name in CONTROL_PIECES if name in ids)]
        super().__init__(vocabulary, {**commands, "eos": ids[_EOS]}, control_ids)
        self.pad_id = ids["<pad>"]
        self._pieces, self._image_offset = pieces, image_offset
        self._ignores_linebreak = ignore_linebreak
        self.settings = {"image_offset": image_offset, "ignore_linebreak": ignore_linebreak}

    def detokenizer(self) -> Detokenizer:
        return _LineBreaks(PieceDetokenizer(self._pieces, self._image_offset, self._texts))

    def _tokenize(self, text: str) -> list[int]:
        if not self._ignores_linebreak:
            text = text.replace("\n", _LINE_BREAK)
        return [token_id + self._image_offset for token_id in self._pieces.encode(text)]


class IceTokenizer(_IceText):
    """GLM-130B's tokenizer on a local file.

    path: `ice_text.model`, a sentencepiece model.   image_offset: the number of image tokens, whose
    ids come first; the pieces follow, and then eight special tokens.   ignore_linebreak: whether
    a line break is a blank like others, as in GLM-130B; else it is the piece `<n>`.

    Decoding writes a special token as its name in brackets: `[[MASK]]`, `[sop]`, `[</s>]`. A
    special token is found by its name before a piece that is spelled alike; "eos" is `</s>`.

    Raises CheckpointError for a file that is no such model, ArgumentError for a wrong offset.
    Source: THUDM/icetk 0.0.7, and SwissArmyTransformer 0.2.12, tokenization/icetk_glm_130B.
    """

    def __init__(
        self, path: str | Path, image_offset: int = 20000, ignore_linebreak: bool = True
    ) -> None:
        if type(image_offset) is not int or image_offset < 0:
            raise ArgumentError(
                f"image_offset={image_offset!r}; give the number of image tokens, an int from 0 on"
            )
        path = Path(path).absolute()
        super().__init__(PieceModel(path), path, image_offset, ignore_linebreak)


class IcetkPackageTokenizer(_IceText):
    """GLM-130B's tokenizer on the package icetk, which fetches its model by itself.

    Ids and text are those of IceTokenizer on the same model.
    Raises ArgumentError where the package is not installed, or cannot be imported.
    """

    def __init__(self, ignore_linebreak: bool = True) -> None:
        package = _import_icetk()
        path = Path(package.path, "ice_text.model").absolute()
        super().__init__(_PackagePieces(package), path, package.num_image_tokens, ignore_linebreak)


class _PackagePieces:
    """The package's text pieces, counted from 0 on."""

    def __init__(self, package: Any) -> None:
        self._package, self._first = package, package.num_image_tokens
        self.tokens = [package[self._first + index] for index in range(package.num_text_tokens)]

    def encode(self, text: str) -> list[int]:
        return [token_id - self._first for token_id in self._package.encode(text)]

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._package.decode([token_id + self._first for token_id in ids])
        return text


class _LineBreaks:
    """The text of a detokenizer, with line breaks for "<n>".

    As the authors put them: into the text, so that "<", "n" and ">" make one, too. What may
    become one is held back.
    """

    def __init__(self, detokenizer: Detokenizer) -> None:
        self._detokenizer = detokenizer
        self._held = ""

    def add(self, token_id: int) -> str:
        text = (self._held + self._detokenizer.add(token_id)).replace(_LINE_BREAK, "\n")
        held = next((start for start in ("<n", "<") if text.endswith(start)), "")
        self._held = held
        return text.removesuffix(held)

    def end(self) -> str:
        return (self._held + self._detokenizer.end()).replace(_LINE_BREAK, "\n")


def _import_icetk() -> Any:
    try:
        from icetk import icetk
    except (ImportError, TypeError) as error:  # TypeError: a protobuf too new for its messages
        raise ArgumentError(
            f"tokenizer='icetk' asks for the package icetk, and importing it failed: {error}; "
            'pip install "bminf[icetk]", or give the path of ice_text.model, which needs no package'
        ) from error
    return icetk
