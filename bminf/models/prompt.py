"""What a model is asked to go on from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Prompt:
    """input_ids: what the model reads; for a T5, what its encoder does.   start_ids: what is fed
    to the decoder first; for a GPT, input_ids."""

    input_ids: list[int]
    start_ids: list[int]
