"""The tokenizer of BLOOM: byte pairs of a tokenizer.json, as the package tokenizers cuts them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bminf.errors import ArgumentError, CheckpointError
from bminf.tokenizers.base import Detokenizer, VocabularyTokenizer
from bminf.tokenizers.gpt2 import BYTES, ByteDetokenizer, check_byte_entries
from bminf.tokenizers.vocabulary import Vocabulary, read_bytes

TOKENIZER = "tokenizer.json"
_BESIDE = ("tokenizer_config.json", "special_tokens_map.json")
_SPECIALS = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3}
_PROBE = " é中"


class BloomTokenizer(VocabularyTokenizer):
    """The tokenizer of BLOOM and BLOOMZ, and of models that were trained on from them.

    path: `tokenizer.json`, or a folder with it. `tokenizer_config.json` and
    `special_tokens_map.json` beside it are not read; a converted folder carries them.

    Nothing is put before or behind a text. Other than with the other tokenizers here, a special
    token that is written in a text, such as `</s>`, becomes its id, as it does in BLOOM's own code:
    take it out of texts that others write where that matters. Any text comes back from its ids.

    Ids behind the last token are those of rows that the model's embedding has beyond the
    vocabulary: they have no text, an empty token, and no upper bound. Decoding writes special
    tokens as they are spelled, and U+FFFD for bytes that are no UTF-8.

    Raises CheckpointError for a file that is none of byte pairs, ArgumentError where the package
    tokenizers cannot be imported.
    Source: the tokenizer.json of bigscience/bloom, as huggingface/tokenizers reads it.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path).absolute()
        file = path / TOKENIZER if path.is_dir() else path
        self._bpe = _read(file)
        tokens = _by_id(self._bpe.get_vocab(with_added_tokens=True), file)
        super().__init__(Vocabulary(tokens, file, entry="token", is_open=True))
        self._vocabulary.require(_SPECIALS)
        self.files = (file, *filter(Path.is_file, map(file.with_name, _BESIDE)))
        self.eos_id, self.pad_id = (self.token_id(name) for name in ("</s>", "<pad>"))
        added = self._bpe.get_added_tokens_decoder()
        self._texts: Mapping[int, str] = {token_id: t.content for token_id, t in added.items()}
        self._bytes = [
            b"" if token_id in self._texts else bytes(map(BYTES.__getitem__, token))
            for token_id, token in enumerate(tokens)
        ]

    def detokenizer(self) -> Detokenizer:
        return _Detokenizer(self._bytes, self._texts)

    def _tokenize(self, text: str) -> list[int]:
        ids: list[int] = self._bpe.encode(text, add_special_tokens=False).ids
        return ids


class _Detokenizer(ByteDetokenizer):
    """As ByteDetokenizer, of ids that go on behind the last token: those have no text."""

    def add(self, token_id: int) -> str:
        return super().add(token_id) if token_id < len(self._token_bytes) else ""


def _read(path: Path) -> Any:
    """What the package makes of the file.   Raises as BloomTokenizer."""
    tokenizers = _import_tokenizers()
    try:
        content = json.loads(read_bytes(path))
        _check_byte_pairs(content)
        made = tokenizers.Tokenizer.from_str(json.dumps(content))
        _check_bytes(made)
        check_byte_entries(content["model"]["vocab"], path)
    except CheckpointError:
        raise
    except Exception as error:  # the package has no class of its own for it
        raise CheckpointError(
            f"{path} is no tokenizer.json of byte pairs as BLOOM's, or damaged: {error}; "
            "is this the right file?"
        ) from error
    # Some were saved with the length or the padding of a training.
    made.no_truncation()
    made.no_padding()
    return made


def _check_byte_pairs(content: Any) -> None:
    """Raise ValueError or another error for a file of another kind, and for what makes the package
    end the process: prefixes that cut a character in two."""
    kinds = {part: content[part]["type"] for part in ("model", "decoder")}
    if kinds != {"model": "BPE", "decoder": "ByteLevel"}:
        raise ValueError(f"model and decoder are {kinds}")
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if content["model"].get(name):
            raise ValueError(f"its model has a {name}")


def _check_bytes(made: Any) -> None:
    """Raise ValueError where it does not make bytes of a text first."""
    pieces = made.pre_tokenizer.pre_tokenize_str(_PROBE) if made.pre_tokenizer else []
    characters = "".join(piece for piece, _ in pieces)
    if [BYTES.get(c) for c in characters] != [*_PROBE.encode()]:
        raise ValueError(f"a text is cut into {characters!r}, which are not its bytes")


def _by_id(ids: Mapping[str, int], path: Path) -> list[str]:
    """The tokens in the order of their ids."""
    tokens = sorted(ids, key=ids.__getitem__)
    if [ids[token] for token in tokens] != [*range(len(tokens))]:
        raise CheckpointError(
            f"{path} does not give its {len(tokens)} tokens the ids from 0 on, without gaps; is "
            "this the right file?"
        )
    return tokens


def _import_tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ArgumentError(
            f"the package tokenizers reads {TOKENIZER}, and importing it failed: {error}; "
            "pip install tokenizers"
        ) from error
    return tokenizers
