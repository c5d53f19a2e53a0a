"""An output head that is split into parts, each of which can be streamed like any other matrix."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from bminf.layers.parallel import ALONE


class Head(torch.nn.Module):
    """The output head, split by rows into equal parts, as far as the rows allow.

    config: vocab_size, hidden_size and num_head_parts are read.   num_ranks: that share the rows.
    """

    def __init__(self, config: Any, num_ranks: int = 1) -> None:
        super().__init__()
        num_rows, num_parts = config.vocab_size // num_ranks, config.num_head_parts
        ends = [index * num_rows // num_parts for index in range(num_parts + 1)]
        self.parts = torch.nn.ModuleList(
            torch.nn.Linear(config.hidden_size, end - start, bias=False)
            for start, end in pairwise(ends)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., C) -> logits (..., V / ranks) float32."""
        return torch.cat([part(x) for part in self.parts], dim=-1).float()


def split_head(network: Any, num_parts: int) -> None:
    """Give a network, which lies on the meta device, a head of so many parts: `lm_head`."""
    network.config = replace(network.config, num_head_parts=num_parts)
    with torch.device("meta"):
        network.lm_head = Head(network.config, getattr(network, "group", ALONE).size)
