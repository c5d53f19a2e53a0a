"""Models whose heads are replaced by a script: what is tested is what happens around them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch


def say(model: Any, *answers: Sequence[str]) -> list[list[int]]:
    """Let `model` write these tokens, row by row, then <mask>; returns what it is fed each step.

    Rows that have ended leave the batch, so rows are told apart by what they were fed before.
    """
    token_id, fed = model.tokenizer.token_id, []
    scripts = [[token_id(token) for token in answer] for answer in answers]
    size, mask = model.config.vocab_size, token_id("<mask>")
    steps = itertools.count()

    def head(x: torch.Tensor) -> torch.Tensor:
        step = next(steps)
        ends = model._end_ids()
        alive = [s for s in scripts if len(scripts) == 1 or not {*s[:step]} & {*ends}]
        logits = torch.zeros(len(x), size)
        for row, script in zip(logits, alive, strict=True):
            row[script[step] if step < len(script) else mask] = 50
        return logits

    original = type(model.model).forward

    def forward(input_ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        fed.append(input_ids.tolist())
        return original(model.model, input_ids, *rest)

    model.model.head, model.model.forward = head, forward
    return fed


def script(model: Any, *answers: Sequence[int]) -> None:
    """Let the model write these ids, answer after answer; then what it would have written."""
    waiting = [number for answer in answers for number in answer]
    head = type(model.model).head

    def scripted(x: torch.Tensor) -> torch.Tensor:
        logits = head(model.model, x)
        if waiting:
            logits[:, waiting.pop(0)] += 1000
        return logits

    model.model.head = scripted


class Spied:
    """A tokenizer that notes what it decodes."""

    def __init__(self, tokenizer: Any, seen: list[int]) -> None:
        self._tokenizer, self._seen = tokenizer, seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def decode(self, ids: Sequence[int]) -> str:
        self._seen += ids
        return self._tokenizer.decode(ids)
