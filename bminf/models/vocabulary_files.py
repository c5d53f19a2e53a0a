"""The files of a tokenizer, as they are called in a folder that loads by itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bminf.arch.architecture import Architecture
from bminf.errors import ArgumentError
from bminf.tokenizers.base import Tokenizer


def check_files(tokenizer: Tokenizer) -> None:
    """Raise ArgumentError for a tokenizer that was not made of files."""
    if not tokenizer.files:
        raise ArgumentError(
            f"tokenizer is a {type(tokenizer).__name__} of no files, and the folder needs "
            "them to load by itself; give the path of a vocabulary"
        )


def vocabulary_files(architecture: Architecture, tokenizer: Tokenizer) -> dict[str, Path]:
    """By what find_tokenizer() looks for, whatever they are called where they come from."""
    files: Sequence[Path] = tokenizer.files
    if len(files) == 2:
        return dict(zip(("vocab.json", "merges.txt"), files, strict=True))
    return {architecture.vocabulary_name(files[0]): files[0]}
