"""One tokenizer of each kind, with a tiny vocabulary."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tiny_vocabularies import (
    BILINGUAL,
    CHINESE,
    DIALOGUE,
    PIECES,
    write_bloom,
    write_gpt2,
    write_ice,
    write_lines,
    write_piece_model,
)

from bminf.tokenizers import (
    BloomTokenizer,
    CPM1Tokenizer,
    CPM1WordTokenizer,
    CPM2BilingualTokenizer,
    CPM2Tokenizer,
    EVATokenizer,
    TextStream,
)
from bminf.tokenizers.cog_pretrain import CogPretrainTokenizer
from bminf.tokenizers.gpt2 import GPT2Tokenizer
from bminf.tokenizers.icetk import IceTokenizer

OFFSET = 7
"""Image tokens of the GLM-130B."""

ODD = ["##", "##▂", "##中", "▂▂", "▂b", "##▃", "中b", "####"]
"""Tokens that no published vocabulary has, and that make a word Chinese, or U+2582 alone, late."""

KINDS: dict[str, Any] = {
    "cpm1": (CPM1Tokenizer, PIECES),
    "cpm1_word": (CPM1WordTokenizer, PIECES),
    "cpm2": (CPM2Tokenizer, CHINESE),
    "cpm2_bilingual": (CPM2BilingualTokenizer, BILINGUAL),
    "eva": (EVATokenizer, DIALOGUE),
}
ODD_KINDS: dict[str, Any] = {
    "bilingual_empty": (CPM2BilingualTokenizer, [*BILINGUAL, "", "##", "##▂", "▂b"]),
    "bilingual_odd": (CPM2BilingualTokenizer, [*BILINGUAL, "", *ODD]),
}
GLM_KINDS = ["ice", "ice_lines", "cog", "cog_fixed", "gpt2"]


def tokens_of(kind: str) -> list[str]:
    """Of a vocabulary that is no GLM's."""
    return list({**KINDS, **ODD_KINDS}[kind][1])


def write(kind: str, folder: Path, tokens: Sequence[str] | None = None) -> Path:
    """The vocabulary of such a kind.   tokens: tokens_of(kind) unless given."""
    given = tokens_of(kind) if tokens is None else tokens
    if kind == "cpm1":
        return write_piece_model(folder / "spiece.model", given)
    return write_lines(folder / "vocab.txt", given)


@functools.cache
def make(kind: str) -> Any:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if kind == "bloom":
            return BloomTokenizer(write_bloom(folder))
        if kind not in GLM_KINDS:
            return {**KINDS, **ODD_KINDS}[kind][0](write(kind, folder))
        if kind == "gpt2":
            return GPT2Tokenizer(write_gpt2(folder))
        path = write_ice(folder / "any.model")
        if kind.startswith("cog"):
            return CogPretrainTokenizer(path, fixed_commands=kind == "cog_fixed")
        return IceTokenizer(path, OFFSET, ignore_linebreak=kind == "ice")


def stream(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each id gives, and then the end."""
    stream = TextStream(tokenizer)
    return [*map(stream.feed, ids), stream.finish()]
