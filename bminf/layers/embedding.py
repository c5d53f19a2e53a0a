"""The table of a vocabulary."""

from __future__ import annotations

import torch


def embedding(num_rows: int, hidden_size: int) -> torch.nn.Embedding:
    """An embedding that is not initialised, because its rows are read from a file.

    On the meta device torch's own initialisation would import its compiler: a second, and 70 MB.
    """
    return torch.nn.Embedding(num_rows, hidden_size, _weight=torch.empty(num_rows, hidden_size))
