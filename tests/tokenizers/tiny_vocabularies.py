"""Vocabularies of some hundred tokens, the special ones in their usual places."""

# ruff: noqa: RUF001 - odd characters are what many tests are about

from __future__ import annotations

import functools
import io
import json
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bminf.tokenizers.pieces import sentencepiece

SPECIAL = ["<unk>", "<s>", "</s>", "▃", "<sep>", "<pad>", "<mask>", "<eod>", "▁", ",", "▂"]
CHARACTERS = list(
    "中国北京大学人工智能天安门的是我你好。、了在abcdefgABC0123456789.!?'\"()<>_#%+-/:;~"
)
WORDS = "中国 北京 北京大学 大学 人工 智能 天安门 ab abc bc 12 ... --".split()
SENTINELS = [f"<s_{k}>" for k in range(190)]

CHINESE = list(dict.fromkeys([*SPECIAL, *CHARACTERS, *WORDS, *SENTINELS]))
"""Of CPM-2."""

DIALOGUE = ["" if token == "▁" else token for token in CHINESE]
"""Of EVA: its ninth line is empty."""

BILINGUAL = list(
    dict.fromkeys(
        [*SPECIAL[:7], "<go>", *SPECIAL[7:], *CHARACTERS, *WORDS]
        + [f"##{token}" for token in [*CHARACTERS, *WORDS] if token.isascii()]
        + SENTINELS[:185]
    )
)
"""Of the Chinese and English CPM-2: ids are one higher from 7 on."""

PIECES = list(
    dict.fromkeys([*SPECIAL, *[f"▁{word}" for word in WORDS], "▁中", *CHARACTERS, *WORDS])
)
"""Of CPM-1: U+2581 begins a word."""


def write_lines(path: Path, tokens: Iterable[str]) -> Path:
    path.write_bytes("".join(f"{token}\n" for token in tokens).encode())
    return path


def write_piece_model(path: Path, pieces: Iterable[str] = PIECES, has_bytes: bool = False) -> Path:
    """A sentencepiece unigram model with an identity normaliser; longer pieces score higher.

    has_bytes: whether 256 pieces for single bytes follow.
    Format: sentencepiece_model.proto, written by hand, because protobuf need not be installed.
    """
    parts = [_field(1, _piece(piece)) for piece in pieces]
    if has_bytes:
        parts += [_field(1, _piece(f"<0x{byte:02X}>", kind=6)) for byte in range(256)]
    kind, unknown, start, end = _number(3, 1), _number(40, 0), _number(41, 1), _number(42, 2)
    parts.append(_field(2, kind + _number(35, has_bytes) + unknown + start + end))
    parts.append(_field(3, _field(1, b"identity")))
    path.write_bytes(b"".join(parts))
    return path


_KINDS = {"<unk>": 2} | dict.fromkeys(["<s>", "</s>", "<sep>", "<pad>", "<mask>"], 3)


def _piece(piece: str, kind: int = 1) -> bytes:
    """kind: 1 normal, 2 unknown, 3 control, 6 a byte."""
    score = _varint(2 << 3 | 5) + struct.pack("<f", len(piece) - 20.0)
    return _field(1, piece.encode()) + score + _number(3, _KINDS.get(piece, kind))


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    head = b""
    while value > 127:
        head, value = head + bytes([value & 127 | 128]), value >> 7
    return head + bytes([value])


# ---- sentencepiece models that are trained, and GPT-2's vocabulary ------------------------------

LINES = [
    "The weights of a layer wait on the host, and come over the bus when it is their turn.",
    "one two three four five six seven eight nine ten eleven twelve, eop and sop",
    "床前明月光，疑是地上霜。举头望明月，低头思故乡。",
]
ODD_TEXTS = [
    *["", " ", "\n", "\r\n\t ", "a\nb", "a\0b", "\0", "ﬁ ½ ＡＢ", "é e\u0301", "\ufffe\u2028"],
    "😀 ❤\ufe0f 👩\u200d👩\u200d👧",
]


@functools.cache
def ice_model(**options: Any) -> bytes:
    """A sentencepiece model with the first ids of the real one."""
    model = io.BytesIO()
    settings = {"vocab_size": 150, "user_defined_symbols": ["<n>"], "unk_id": 0, "bos_id": 1}
    settings |= {"eos_id": 2, "pad_id": 3, "minloglevel": 2, **options}
    sentencepiece().SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 3), model_writer=model, hard_vocab_limit=False, **settings
    )
    return model.getvalue()


def processor(content: bytes) -> Any:
    loaded = sentencepiece().SentencePieceProcessor()
    loaded.LoadFromSerializedProto(content)
    return loaded


def write_ice(path: Path, **options: Any) -> Path:
    path.write_bytes(ice_model(**options))
    return path


_BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]
GPT2_CHARACTERS = [*map(chr, _BYTES), *map(chr, range(256, 256 + 256 - len(_BYTES)))]
GPT2_MERGES = ["t h", "th e", "Ġ the", "i n", "Ġ a", "ð Ł", "ä ¸", "ä¸ Ń", "Ċ Ċ", "1 2", "' s"]
GPT2_ENTRIES = [
    *GPT2_CHARACTERS,
    *(merge.replace(" ", "") for merge in GPT2_MERGES),
    "<|endoftext|>",
]


def write_gpt2(
    folder: Path,
    prefix: str = "",
    entries: Sequence[str] | None = None,
    merges: str | None = None,
) -> Path:
    """vocab.json and merges.txt.   entries, merges: GPT2_ENTRIES and GPT2_MERGES unless given."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = {entry: number for number, entry in enumerate(entries or GPT2_ENTRIES)}
    (folder / f"{prefix}vocab.json").write_text(json.dumps(ids), encoding="utf-8")
    lines = "\n".join(["#version: 0.2", *GPT2_MERGES, ""]) if merges is None else merges
    (folder / f"{prefix}merges.txt").write_text(lines, encoding="utf-8")
    return folder


# ---- BLOOM's tokenizer.json ----------------------------------------------------------------------

BLOOM_SPECIALS = ["<unk>", "<s>", "</s>", "<pad>"]
BLOOM_WORDS = " ?[^(\\s|[.,!?…。，、।۔،])]+"


@functools.cache
def bloom_json() -> str:
    """A tokenizer.json with BLOOM's parts and some pairs of bytes."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(BLOOM_WORDS), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=BLOOM_SPECIALS, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator(LINES, trainer)
    return str(made.to_str())


def write_bloom(folder: Path, **changes: Any) -> Path:
    """tokenizer.json.   changes: of its parts, at the top."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(bloom_json()), **changes}), encoding="utf-8")
    return path
