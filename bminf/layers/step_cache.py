"""One more token of each of some rows, whose places only the device knows: the same work each time.

What a pass of other lengths would change, which cells are written and how many keys are read, is in
tensors that stay where they are, so that a CUDA graph of the pass can be captured and run again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from bminf.layers.attention import ScoreBias, added_of
from bminf.layers.kv_cache import MakeBias
from bminf.ops.attention import Rows, decode_attention
from bminf.ops.fused import launcher_in_place
from bminf.ops.rotary_append import Angles, rotary_append, rotary_append_reference


class Places:
    """Where rows are in a pool of tokens, in memory that stays.

    num_keys: no row has more; so many are read of each, of which those that a row has not change
    nothing.   starts: (B,) int32, first cells.   lengths: (B,) int32, tokens that count.
    """

    def __init__(self, num_rows: int, num_keys: int, device: torch.device) -> None:
        self.num_keys = num_keys
        self._both = torch.zeros(2, num_rows, dtype=torch.int32, device=device)
        self.starts, self.lengths = self._both

    def fill(self, starts: Sequence[int], lengths: Sequence[int]) -> None:
        """Say where the rows are now."""
        self._both.copy_(torch.tensor([starts, lengths], dtype=torch.int32, device="cpu"))


class StepCache:
    """A Cache for a pass of one token of each row, (1, B, C).

    tokens: the pool, two (L, H, N, D), see KVCache.tokens.   places: lengths count the token that
    the pass appends, if it does.
    """

    copies = False

    def __init__(self, tokens: tuple[torch.Tensor, torch.Tensor], places: Places) -> None:
        self._layers = [*zip(*tokens, strict=True)]
        self._rows = Rows(places.num_keys, places.lengths, places.starts)
        self._positions = (places.lengths - 1).long()
        self._cells = places.starts + self._positions

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: ScoreBias,
        scale: float,
        angles: Angles | None = None,
    ) -> torch.Tensor:
        """Keep the tokens, and attend from each to all of its row: (1, H, B, D)."""
        given = query, key, value, angles, self._cells, *self._layers[layer]
        launcher = launcher_in_place(query, key, value)
        if launcher is None:
            query = rotary_append_reference(*given)
        else:
            query = rotary_append(launcher, *given)
        return self.attend_to_kept(layer, query, bias, scale)

    def attend_to_kept(
        self, layer: int, query: torch.Tensor, bias: Any, scale: float
    ) -> torch.Tensor:
        """The same of rows that get nothing new.   bias: of parameters, the same for all rows."""
        keys, values = (tokens.unsqueeze(0) for tokens in self._layers[layer])
        by_row = query.transpose(0, 2)  # (B, H, 1, D)
        y = decode_attention(by_row, keys, values, scale, *added_of(bias), self._rows)
        return y.transpose(0, 2)

    def positions(self, num_tokens: int) -> torch.Tensor:
        """(B,) int64, where the tokens stand in their rows."""
        return self._positions

    def bias(self, num_tokens: int, make: MakeBias) -> ScoreBias:
        return make(1, self._rows.num_keys)

    def advance(self, num_tokens: int) -> None:
        """Nothing: the places are those behind the pass."""
