"""The tokenizer of GLM-10B and GLM-2B: the byte-level BPE of GPT-2."""

from __future__ import annotations

import codecs
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from bminf.errors import CheckpointError
from bminf.tokenizers.base import CommandTokenizer, Detokenizer
from bminf.tokenizers.vocabulary import Vocabulary, read_bytes

VOCAB, MERGES = "vocab.json", "merges.txt"
PREFIXES = ("", "gpt2-")
"""What may stand before both names; the first pair that a folder has is read."""

_END = "<|endoftext|>"
_COMMANDS = {
    _END: -1, "<|startofpiece|>": 0, "<|endofpiece|>": 1, "[CLS]": 2, "[MASK]": 3, "[SEP]": 4,
    "[UNK]": 5, "[gMASK]": 6, "[sMASK]": 7,
}  # fmt: skip


class GPT2Tokenizer(CommandTokenizer):
    """The tokenizer of GLM-10B and GLM-2B.

    path: a folder with `vocab.json` and `merges.txt`, or with both under the prefix `gpt2-`; or
    one of the two files, the other lying beside it under the same prefix.

    Behind the n entries, the last of which is `<|endoftext|>` (end of text, and padding), stand
    `<|startofpiece|>`, `<|endofpiece|>`, `[CLS]`, `[MASK]`, `[SEP]`, `[UNK]`, `[gMASK]` and
    `[sMASK]`. Any text comes back from its ids as it was. Decoding writes special tokens as they
    are spelled here, and U+FFFD for bytes that are no UTF-8.

    Raises CheckpointError for files that are missing, or no such vocabulary.
    Source: THUDM/GLM, data_utils/tokenization.py and tokenization_gpt2.py.
    """

    def __init__(self, path: str | Path) -> None:
        vocab_file, merges_file = _files(Path(path).absolute())
        entries = _read_entries(vocab_file)
        commands = {name: len(entries) + offset for name, offset in _COMMANDS.items()}
        tokens = [*entries, *list(commands)[1:]]
        super().__init__(Vocabulary(tokens, vocab_file, entry="entry"), commands)
        self.files = (vocab_file, merges_file)
        self._entry_bytes = [bytes(map(BYTES.__getitem__, entry)) for entry in entries[:-1]]
        self._texts = {token_id: name for name, token_id in commands.items()}
        self._bpe = _make_bpe(entries, _read_merges(merges_file, set(entries)))

    def detokenizer(self) -> Detokenizer:
        return ByteDetokenizer(self._entry_bytes, self._texts)

    def _tokenize(self, text: str) -> list[int]:
        ids: list[int] = self._bpe.encode(text, add_special_tokens=False).ids
        return ids


class ByteDetokenizer:
    """The detokenizer of tokens that are bytes: it holds back a character until it is whole.

    token_bytes: of each id.   specials: the text of each other id; no character goes across one.
    """

    def __init__(self, token_bytes: Sequence[bytes], specials: Mapping[int, str]) -> None:
        self._token_bytes, self._specials = token_bytes, specials
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token_id: int) -> str:
        if token_id in self._specials:
            return self.end() + self._specials[token_id]
        return self._decoder.decode(self._token_bytes[token_id])

    def end(self) -> str:
        return self._decoder.decode(b"", final=True)


def gpt2_files(folder: Path) -> tuple[Path, Path] | None:
    """The vocabulary and the merges of a folder; None where it has no pair of them."""
    for prefix in PREFIXES:
        pair = folder / f"{prefix}{VOCAB}", folder / f"{prefix}{MERGES}"
        if all(file.is_file() for file in pair):
            return pair
    return None


def _files(path: Path) -> tuple[Path, Path]:
    if path.is_dir():
        pair = gpt2_files(path)
        if pair is None:
            names = " or ".join(f"{prefix}{VOCAB} and {prefix}{MERGES}" for prefix in PREFIXES)
            raise CheckpointError(f"{path} has no vocabulary of GPT-2; it needs {names}")
        return pair
    for name in (VOCAB, MERGES):
        if path.name.endswith(name):
            prefix = path.name.removesuffix(name)
            return path.with_name(prefix + VOCAB), path.with_name(prefix + MERGES)
    raise CheckpointError(
        f"{path} is no file of a GPT-2 vocabulary by its name; give the folder, *{VOCAB} or "
        f"*{MERGES}, so that the other one is found beside it"
    )


def _read_entries(path: Path) -> list[str]:
    """The entries of a vocab.json, by their ids."""
    try:
        ids = json.loads(read_bytes(path))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON, or damaged: {error}") from error
    values = [*ids.values()] if isinstance(ids, dict) else []
    are_ints = all([type(value) is int for value in values])
    if not values or not are_ints or sorted(values) != [*range(len(values))]:
        raise CheckpointError(
            f"{path} is no vocabulary: an object is expected that gives each entry one of the ids "
            "from 0 on, without gaps"
        )
    entries = sorted(ids, key=ids.__getitem__)
    _check_entries(entries, path)
    return entries


def _check_entries(entries: list[str], path: Path) -> None:
    if entries[-1] != _END:
        raise CheckpointError(
            f"{path}: the last entry is {entries[-1]!r}, and GPT-2's is {_END!r}, behind which the "
            "special tokens of GLM have their ids; is this the right file?"
        )
    check_byte_entries(entries[:-1], path)


def check_byte_entries(entries: Collection[str], path: Path) -> None:
    """Raise CheckpointError where they are not made of the characters in BYTES, or lack one."""
    known = frozenset(BYTES)
    for entry in entries:
        if not known.issuperset(entry):
            raise CheckpointError(
                f"{path}: entry {entry!r} has {min(set(entry) - known)!r}, which stands for no "
                "byte; is this the right file?"
            )
    missing = known - set(entries)
    if missing:
        raise CheckpointError(
            f"{path} has no entry for {len(missing)} of the 256 bytes ({min(missing)!r}), so some "
            "text would be lost; is this the right file?"
        )


def _read_merges(path: Path, entries: set[str]) -> list[tuple[str, str]]:
    try:
        lines = read_bytes(path).decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8, or damaged: {error}") from error
    merges = []
    for line_number, line in enumerate(lines, 1):
        parts = line.removesuffix("\r").split(" ")
        if parts == [""] or (line_number == 1 and line.startswith("#version")):
            continue
        if len(parts) != 2 or not entries.issuperset([*parts, "".join(parts)]):
            raise CheckpointError(
                f"{path}, line {line_number}: {line!r} is not two entries of the vocabulary that "
                "make a third; do both files belong together?"
            )
        merges.append((parts[0], parts[1]))
    return merges


def _make_bpe(entries: list[str], merges: list[tuple[str, str]]) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    ids = {entry: token_id for token_id, entry in enumerate(entries)}
    bpe = Tokenizer(models.BPE(vocab=ids, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return bpe


def _byte_characters() -> dict[str, int]:
    """The byte that each character of the vocabulary stands for.

    A byte that is a printable character of Latin-1 is that character; the others, in their order,
    are the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + index): byte for index, byte in enumerate(others)
    }


BYTES = _byte_characters()
"""Character -> byte, of all vocabularies that came of GPT-2's."""
