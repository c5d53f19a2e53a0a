"""Rows with one rule between them, as most tests of sampling want them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from bminf.checks import non_finite_logits
from bminf.engine.row_sampler import RowSampler, draw
from bminf.engine.sampling import Sampling


class Sampler:
    """Row i draws with seed + i."""

    def __init__(
        self, sampling: Sampling, prompts: Sequence[Sequence[int]], vocab_size: int
    ) -> None:
        rules = [
            sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + row)
            for row in range(len(prompts))
        ]
        self.rows = [
            RowSampler(rule, prompt, vocab_size, "cpu")
            for rule, prompt in zip(rules, prompts, strict=True)
        ]

    def draw(self, logits: torch.Tensor) -> torch.Tensor:
        """The token of each row, which goes on with it.   Raises as the engine's requests do."""
        tokens = draw(logits, self.rows)
        if wrong := [row for row, token in enumerate(tokens) if token is None]:
            raise non_finite_logits(wrong)
        for row, token in zip(self.rows, tokens, strict=True):
            row.accept(token)
        return torch.tensor(tokens)
