"""Vocabularies of some hundred tokens, the special ones in their usual places."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path

SPECIAL = ["<unk>", "<s>", "</s>", "▃", "<sep>", "<pad>", "<mask>", "<eod>", "▁", ",", "▂"]
CHARACTERS = list(
    "中国北京大学人工智能天安门的是我你好。、了在abcdefgABC0123456789.!?'\"()<>_#%+-/:;~"
)
WORDS = [
    "中国",
    "北京",
    "北京大学",
    "大学",
    "人工",
    "智能",
    "天安门",
    "ab",
    "abc",
    "bc",
    "12",
    "...",
    "--",
]
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
