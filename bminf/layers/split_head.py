"""An output head that is split into parts, each of which can be streamed like any other matrix."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch


class Head(torch.nn.Module):
    """The output head, split by rows into equal parts, as far as the rows allow.

    config: vocab_size, hidden_size and num_head_parts are read.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        vocab_size, num_parts = config.vocab_size, config.num_head_parts
        ends = [index * vocab_size // num_parts for index in range(num_parts + 1)]
        self.parts = torch.nn.ModuleList(
            torch.nn.Linear(config.hidden_size, end - start, bias=False)
            for start, end in pairwise(ends)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., C) -> logits (..., V) float32."""
        return torch.cat([part(x) for part in self.parts], dim=-1).float()


def split_head(network: Any, num_parts: int) -> None:
    """Give a network, which lies on the meta device, a head of so many parts: `lm_head`."""
    network.config = replace(network.config, num_head_parts=num_parts)
    with torch.device("meta"):
        network.lm_head = Head(network.config)
