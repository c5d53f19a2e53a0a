"""The tokenizer of GLM-10B-chinese and GLM-large-chinese: a sentencepiece model, cog-pretrain."""

from __future__ import annotations

from pathlib import Path

from bminf.tokenizers.base import CommandTokenizer, Detokenizer
from bminf.tokenizers.pieces import CONTROL_PIECES, PieceDetokenizer, PieceModel
from bminf.tokenizers.vocabulary import Vocabulary

_COMMANDS = {
    "<|endoftext|>": 0, "[SEP]": 1, "[CLS]": 2, "[MASK]": 3, "[UNK]": 4,
    "<|startofpiece|>": 6, "<|endofpiece|>": 7, "[gMASK]": 7, "[sMASK]": 8,
}  # fmt: skip
_FIXED_COMMANDS = {**_COMMANDS, "[gMASK]": 9}
_UNUSED = 5


class CogPretrainTokenizer(CommandTokenizer):
    """The tokenizer of GLM-10B-chinese and GLM-large-chinese.

    path: `cog-pretrain.model`, a sentencepiece model. Behind its n pieces stand `<|endoftext|>`
    (end of text, and padding), `[SEP]`, `[CLS]`, `[MASK]`, `[UNK]`, an unused id,
    `<|startofpiece|>`, `<|endofpiece|>` (n + 7) and `[sMASK]` (n + 8).
    fixed_commands: where `[gMASK]` is. False: n + 7, the id of `<|endofpiece|>`, as
    GLM-10B-chinese was trained. True: n + 9, as in GLM-large-chinese; also to use the row of its
    own that the Hugging Face copy of GLM-10B-chinese has for it.

    Text is what the model makes of it, with no other preparation. Decoding writes special tokens
    as they are spelled here; the id that two of them share reads `[gMASK]`.

    Raises CheckpointError for a file that is no such model.
    Source: THUDM/GLM, data_utils/tokenization.py.
    """

    # False unless told, because that is right for every GLM-10B-chinese: row n + 9 of the original
    # was never trained, and that of the copy is row n + 7 again. The copy asks one thing of its
    # reader either way: row n + 9, which scores as the end of a piece does, must not be drawn. It
    # is an unspoken id, or lies beyond the vocabulary.
    def __init__(self, path: str | Path, fixed_commands: bool = False) -> None:
        path = Path(path).absolute()
        self.settings = {"fixed_commands": fixed_commands}
        self._pieces = PieceModel(path)
        pieces = self._pieces.tokens
        Vocabulary(pieces, path, entry="piece").require({"<unk>": 0})
        first, offsets = len(pieces), _FIXED_COMMANDS if fixed_commands else _COMMANDS
        commands = {name: first + offset for name, offset in offsets.items()}
        self._texts = {token_id: name for name, token_id in commands.items()}
        behind = [self._texts.get(token_id, "") for token_id in range(first, max(self._texts) + 1)]
        gap = range(first + _UNUSED, first + _UNUSED + 1)
        control_ids = [token_id for token_id, piece in enumerate(pieces) if piece in CONTROL_PIECES]
        vocabulary = Vocabulary([*pieces, *behind], path, "piece", gap, "an unused row")
        super().__init__(vocabulary, commands, [*control_ids, *gap])

    def detokenizer(self) -> Detokenizer:
        return PieceDetokenizer(self._pieces, 0, self._texts)

    def _tokenize(self, text: str) -> list[int]:
        return self._pieces.encode(text)
