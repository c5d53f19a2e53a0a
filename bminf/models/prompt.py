"""What a model is asked to continue, as ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Prompt:
    """input_ids: what the model reads; for a T5, what its encoder does.   start_ids: what is fed
    to the decoder first; for a GPT, input_ids."""

    input_ids: list[int]
    start_ids: list[int]


def padded(prompts: Sequence[Sequence[int]], pad_id: int, is_at_end: bool) -> list[list[int]]:
    """Prompts of any lengths as rows of one."""
    longest = max(len(prompt) for prompt in prompts)
    rows = []
    for prompt in prompts:
        padding = [pad_id] * (longest - len(prompt))
        rows.append([*prompt, *padding] if is_at_end else [*padding, *prompt])
    return rows
