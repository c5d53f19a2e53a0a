"""The special tokens of the smaller GLMs, which their authors call commands."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from bminf.tokenizers.base import VocabularyTokenizer
from bminf.tokenizers.vocabulary import Vocabulary


class CommandTokenizer(VocabularyTokenizer):
    """What the tokenizers of GLM-10B share, English and Chinese; see GLMTokenizer.

    commands: the id of each special token, by how it is spelled. Under that name it is found before
    a token of the vocabulary that is spelled alike.   textless: other ids that are no text.
    """

    def __init__(
        self, vocabulary: Vocabulary, commands: Mapping[str, int], textless: Iterable[int] = ()
    ) -> None:
        super().__init__(vocabulary)
        vocabulary.ids.update(commands)
        self.eos_id = self.pad_id = commands["<|endoftext|>"]
        self.sop_id, self.eop_id = commands["<|startofpiece|>"], commands["<|endofpiece|>"]
        self.masks: Mapping[str, int] = {
            name: commands[name] for name in ("[MASK]", "[sMASK]", "[gMASK]")
        }
        self.prefix_ids: tuple[int, ...] = (commands["[CLS]"],)
        self.strips_before_masks = True
        unspoken = {*commands.values(), *textless} - {self.eos_id, self.eop_id}
        self.unspoken_ids = tuple(sorted(unspoken))
