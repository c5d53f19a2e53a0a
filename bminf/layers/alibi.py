"""ALiBi: scores fall with the distance of a key, as steeply as the slope of a head says.

Positions are nowhere else, so a model that has it reads texts of any length. Distances are counted
from each query, and scores are summed in float32: positions counted from the beginning of a text
are rounded in half precision to steps that are larger than what sets near keys apart.

Source: Press et al. 2021, arXiv:2108.12409.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch

from bminf.ops.attention import Rows, Slopes

TILE_BYTES = 2**25
"""Of the biases of some queries, which are made and added before those of others, if they can."""

Attend = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, float], torch.Tensor
]
"""attention(), or another that takes the same."""


def slopes(num_heads: int) -> list[float]:
    """The slope of each head.

    Of a number that is no power of two, the first heads have those of the power below it, and the
    others every second one of the power above.
    """
    power = 1 << (num_heads.bit_length() - 1)
    first = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    return first + [2 ** (-4 * (2 * i + 1) / power) for i in range(num_heads - power)]


@cache
def slopes_on(device: torch.device, num_heads: int) -> torch.Tensor:
    """(H,) float32, copied to a device once."""
    with torch.inference_mode(False):
        return torch.tensor(slopes(num_heads), device=device)


@dataclass(eq=False)
class Alibi:
    """What attention() adds to the scores of a causal model, in place of a bias, in one pass.

    slopes: (H,) float32.   num_padding: of each row, keys at its beginning that are none, and are
    not attended to; what queries there give is 0. None is none.
    """

    slopes: torch.Tensor
    num_padding: Sequence[int] | None = None
    _of_tokens: dict[int, torch.Tensor] = field(default_factory=dict, repr=False)
    _rows: dict[int, Rows] = field(default_factory=dict, repr=False)

    @property
    def added(self) -> Slopes:
        """The slopes for a kernel, which makes no bias of them."""
        return Slopes(self.slopes)

    def rows(self, num_keys: int) -> Rows | None:
        """Of a kernel, for rows with padding: made once for all layers."""
        if self.num_padding is None:
            return None
        if num_keys not in self._rows:
            starts = torch.tensor(self.num_padding, dtype=torch.int32, device=self.slopes.device)
            self._rows[num_keys] = Rows(num_keys, num_keys - starts, starts)
        return self._rows[num_keys]

    def bias(self, num_queries: int, num_keys: int) -> torch.Tensor:
        """(1, H, T, S) float32, of the last queries among so many keys."""
        if num_queries == 1 and num_keys in self._of_tokens:
            return self._of_tokens[num_keys]  # a token's is the same in all layers
        keys = torch.arange(num_keys, device=self.slopes.device)
        distances = keys - keys[num_keys - num_queries :, None]
        bias = (self.slopes.view(-1, 1, 1) * distances).unsqueeze(0)
        # Finite, as its sum with a score is, too.
        bias.masked_fill_(distances > 0, torch.finfo(torch.float32).min / 2)
        if num_queries == 1:
            self._of_tokens[num_keys] = bias
        return bias


def attend_with_alibi(
    attend: Attend,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    alibi: Alibi,
    scale: float,
) -> torch.Tensor:
    """Attention of causal queries, which are the last of the keys; see attention().

    All is computed in float32, and the result is rounded once. Rows with padding are computed one
    by one, as each of them is alone.
    """
    exact = query.float(), key.float(), value.float()
    if alibi.num_padding is None:
        return _attended(attend, exact, alibi, scale).to(query.dtype)
    y, num_before = torch.zeros_like(exact[0]), key.shape[2] - query.shape[2]
    for row, padding in enumerate(alibi.num_padding):
        first = max(0, padding - num_before)  # of the queries, the first that is a token
        if first < query.shape[2]:
            starts = zip(exact, (first, padding, padding), strict=True)
            own = [x[row : row + 1, :, start:] for x, start in starts]
            y[row, :, first:] = _attended(attend, own, alibi, scale)[0]
    return y.to(query.dtype)


def queries_of_a_tile(num_heads: int, num_keys: int) -> int:
    """How many queries are attended from at once."""
    return max(1, TILE_BYTES // (4 * num_heads * num_keys))


def _attended(
    attend: Attend, exact: Sequence[torch.Tensor], alibi: Alibi, scale: float
) -> torch.Tensor:
    """(B, H, T, D) float32, of rows without padding, some queries at a time."""
    query, key, _ = exact
    step = queries_of_a_tile(query.shape[1], key.shape[2])
    starts = range(0, query.shape[2], step)
    tiles = [_tile(attend, exact, alibi, scale, start, step) for start in starts]
    return tiles[0] if len(tiles) == 1 else torch.cat(tiles, dim=2)


def _tile(
    attend: Attend,
    exact: Sequence[torch.Tensor],
    alibi: Alibi,
    scale: float,
    start: int,
    step: int,
) -> torch.Tensor:
    """Of some queries, to the keys up to the last of them."""
    query, key, value = exact
    some = query[:, :, start : start + step]
    num_keys = key.shape[2] - query.shape[2] + start + some.shape[2]
    bias = alibi.bias(some.shape[2], num_keys)
    return attend(some, key[:, :, :num_keys], value[:, :, :num_keys], bias, scale)
