"""What a model is asked to continue, as ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Prompt:
    """input_ids: all that the model reads; of an encoder-decoder model, the encoder's input.
    start_ids: the first input of the decoder; of a decoder-only model, input_ids."""

    input_ids: list[int]
    start_ids: list[int]


def padded(
    prompts: Sequence[Sequence[int]], pad_id: int, padding_side: Literal["left", "right"]
) -> list[list[int]]:
    """Prompts, padded to the length of the longest."""
    longest = max(len(prompt) for prompt in prompts)
    rows = []
    for prompt in prompts:
        padding = [pad_id] * (longest - len(prompt))
        rows.append([*padding, *prompt] if padding_side == "left" else [*prompt, *padding])
    return rows
