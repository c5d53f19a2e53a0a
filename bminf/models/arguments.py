"""What users give to the models of the zoo, checked before any work starts."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from bminf.errors import ArgumentError
from bminf.models.load import DTYPES, Packing
from bminf.models.source import Source
from bminf.quantization.packed import Format
from bminf.tokenizers.base import Tokenizer

Text = str | Sequence[int] | torch.Tensor
"""A text, or its token ids: a sequence of ints or a tensor (T,)."""

_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
_DEFAULT_MAX_LENGTH = 512  # of models whose positions have no end


def dtype_for(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    """`dtype`; None is float32 on the CPU, float16 elsewhere.   Raises ArgumentError."""
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.float16
    dtype = _NAMES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if dtype not in DTYPES:
        raise ArgumentError(f"dtype={dtype!r}; accepted: {', '.join(map(str, DTYPES))}, or None")
    return dtype


def max_length_for(max_length: int | None, source: Source) -> int:
    """`max_length`; None is what the positions allow.   Raises ArgumentError for more."""
    positions: int | None = source.config.max_position_embeddings
    if positions is None:
        return _DEFAULT_MAX_LENGTH if max_length is None else max_length
    if max_length is not None and max_length > positions:
        raise ArgumentError(f"max_length={max_length}, but the model has {positions} positions")
    return positions if max_length is None else max_length


def packing_for(form: Format | None, source: Source) -> Packing:
    """How the linears will be packed: as in the folder, where they are.

    The default format stands for the folder's own packing, because nobody may have asked for it.
    Raises ArgumentError.
    """
    stored = source.weights.packing
    if stored is None:
        return Packing(form)
    if form in (stored.form, source.architecture.default_format):
        return stored
    raise ArgumentError(
        f"quantization is {form}, but {source.weights.path} is packed as {stored.form}; leave "
        "quantization out, or convert the original to what you want"
    )


def ids_of(text: Text, name: str, tokenizer: Tokenizer) -> list[int]:
    """The token ids of a text, or the checked ids themselves.   Raises ArgumentError."""
    if isinstance(text, str):
        ids = tokenizer.encode(text)
    elif isinstance(text, torch.Tensor):
        ids = _ids_of_tensor(text, name)
    elif isinstance(text, Iterable):
        ids = [_as_int(number, name) for number in text]
    else:
        raise ArgumentError(f"{name} is a {type(text).__name__}; give a str, or token ids")
    size = tokenizer.vocab_size
    if not ids or not all(0 <= number < size for number in ids):
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
    return [int(number) for number in ids.tolist()]


def _as_int(number: Any, name: str) -> int:
    if isinstance(number, bool) or not hasattr(number, "__index__"):  # numpy's integers have it
        raise ArgumentError(
            f"{name} holds a {type(number).__name__}; give a str, or token ids as ints"
        )
    return operator.index(number)
