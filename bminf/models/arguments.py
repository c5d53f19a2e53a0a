"""Texts as users give them to the models of the zoo, and their token ids."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from bminf.errors import ArgumentError
from bminf.tokenizers.base import Tokenizer

Text = str | Sequence[int] | torch.Tensor
"""A text, or its token ids: a sequence of ints or a tensor (T,)."""


def ids_of(text: Text, name: str, tokenizer: Tokenizer, num_rows: int | None = None) -> list[int]:
    """The token ids of a text, or the checked ids themselves.   Raises ArgumentError.

    num_rows: of the embedding, where more ids than the tokenizer's are taken.
    """
    if isinstance(text, str):
        ids = tokenizer.encode(text)
    elif isinstance(text, torch.Tensor):
        ids = _ids_of_tensor(text, name)
    elif isinstance(text, Iterable) and not isinstance(text, bytes | bytearray):
        ids = [_as_int(token_id, name) for token_id in text]
    else:
        raise ArgumentError(f"{name} is a {type(text).__name__}; give a str, or token ids")
    size = num_rows or tokenizer.vocab_size
    if not ids or not all(0 <= token_id < size for token_id in ids):
        raise ArgumentError(
            f"{name} has {'no tokens' if not ids else 'ids outside the vocabulary'}; give a "
            f"text that is not empty, or ids from 0 to {size - 1}"
        )
    return ids


def ids_of_str(text: Any, name: str, tokenizer: Tokenizer) -> list[int]:
    """The token ids of a text.   Raises ArgumentError for anything but a str with tokens."""
    if not isinstance(text, str):
        raise ArgumentError(f"{name} is a {type(text).__name__}; give a str")
    return ids_of(text, name, tokenizer)


def present_ids(tokenizer: Tokenizer, tokens: Iterable[str]) -> list[int]:
    """The ids of those of `tokens` that the vocabulary has."""
    found = []
    for token in tokens:
        try:
            found.append(tokenizer.token_id(token))
        except ArgumentError:
            continue
    return found


def _ids_of_tensor(ids: torch.Tensor, name: str) -> list[int]:
    if ids.dim() != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ArgumentError(
            f"{name} is {ids.dtype} of shape {tuple(ids.shape)}; token ids are whole numbers (T,)"
        )
    return [int(token_id) for token_id in ids.tolist()]


def _as_int(token_id: Any, name: str) -> int:
    if isinstance(token_id, bool) or not hasattr(token_id, "__index__"):  # numpy's integers have it
        raise ArgumentError(
            f"{name} holds a {type(token_id).__name__}; give a str, or token ids as ints"
        )
    return operator.index(token_id)
