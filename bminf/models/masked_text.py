"""A text with masks in it, as a GLM reads it: ids, and where its blanks are.

Sources: GLM-130B/generate.py; GLM/generate_samples.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bminf.errors import ArgumentError
from bminf.tokenizers.base import GLMTokenizer

TEXT_MASK, OPEN_MASK = "[MASK]", "[gMASK]"
"""For a word or a few; and for all that follows."""

_MASK = re.compile(r"\[s?MASK\]|\[gMASK\]")


@dataclass(frozen=True)
class Masked:
    """A text with blanks.   ids: as the model reads it.   places: of its masks, among the ids.
    positions: of the masks in the text, in characters.   mask: the kind they all are of."""

    ids: list[int]
    places: list[int]
    positions: list[int]
    mask: str


def has_mask(text: str) -> bool:
    """Whether there is a mask of any kind in the text."""
    return _MASK.search(text) is not None


def masked_text(text: Any, tokenizer: GLMTokenizer, masks_end_texts: bool) -> Masked:
    """The ids of a text and its masks; one is added at the end where there is none.

    masks_end_texts: whether a text that ends in a mask of any kind has no end token behind it, as
    in GLM-130B; in GLM-10B only [gMASK] does without.
    Raises ArgumentError for what is no text or an empty one, for several kinds of masks, and for a
    kind that the vocabulary does not have.
    """
    if not isinstance(text, str):
        raise ArgumentError(f"text is a {type(text).__name__}; give a str")
    found = list(_MASK.finditer(text))
    if not found and not text.strip():
        raise ArgumentError("text is empty; give a text, with or without a mask")
    mask = _kind([match[0] for match in found], tokenizer)
    pieces = _pieces(text, found, tokenizer)
    positions = [match.start() for match in found] or [len(text)]
    is_open = not found or found[-1].end() == len(text)  # by the text: a blank may have no ids
    is_open = is_open and (masks_end_texts or mask == OPEN_MASK)
    ids, places = list(tokenizer.prefix_ids), []
    for piece in pieces[: len(positions)]:
        ids += piece
        places.append(len(ids))
        ids.append(tokenizer.masks[mask])
    rest = [number for piece in pieces[len(positions) :] for number in piece]
    return Masked([*ids, *rest, *([] if is_open else [tokenizer.eos_id])], places, positions, mask)


def _kind(masks: list[str], tokenizer: GLMTokenizer) -> str:
    """The one kind of mask; where there is none, the one that goes on from the end."""
    known = tokenizer.masks
    kinds = list(dict.fromkeys(masks)) or [OPEN_MASK if OPEN_MASK in known else TEXT_MASK]
    if len(kinds) > 1:
        raise ArgumentError(
            f"the text mixes {' and '.join(kinds)}; a text has masks of one kind, since only those "
            "would be filled"
        )
    if kinds[0] not in known:
        raise ArgumentError(f"this model has no {kinds[0]}; it has {', '.join(known)}")
    return kinds[0]


def _pieces(text: str, found: Sequence[re.Match[str]], tokenizer: GLMTokenizer) -> list[list[int]]:
    """The ids before each mask, and behind the last; a mask that is added stands behind all."""
    begins = [0, *(match.end() for match in found)]
    ends = [*(match.start() for match in found), len(text)]
    pieces = [text[begin:end] for begin, end in zip(begins, ends, strict=True)]
    if tokenizer.strips_before_masks:
        num_before = max(1, len(found))
        pieces[:num_before] = [piece.rstrip() for piece in pieces[:num_before]]
    return [tokenizer.encode(piece) if piece else [] for piece in pieces]
