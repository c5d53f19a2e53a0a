"""ALiBi: scores fall with the distance of a key, as steeply as the slope of a head says.

Positions are nowhere else, so a model that has it reads texts of any length. Distances are counted
from each query, and scores are summed in float32: positions counted from the beginning of a text
are rounded in half precision to steps that are larger than what sets near keys apart.

Source: Press et al. 2021, arXiv:2108.12409.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

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


@dataclass(eq=False)
class Alibi:
    """What attention() adds to the scores of a causal model, in place of a bias.

    slopes: (H,) float32.   num_padding: (B,) int64, keys at the beginning of each row that are none
    and are not attended to; what queries there give is 0. None is none.
    """

    slopes: torch.Tensor
    num_padding: torch.Tensor | None = None
    _last: tuple[int, torch.Tensor] | None = field(default=None, repr=False)

    def bias(self, num_queries: int, num_keys: int) -> torch.Tensor:
        """(1 or B, H, T, S) float32, of the last queries among so many keys."""
        if self._last is not None and num_queries == 1 and self._last[0] == num_keys:
            return self._last[1]  # a token's is the same in all layers
        keys = torch.arange(num_keys, device=self.slopes.device)
        distances = keys - keys[num_keys - num_queries :, None]
        bias = (self.slopes.view(-1, 1, 1) * distances).unsqueeze(0)
        least = torch.finfo(torch.float32).min / 2  # finite, as its sum with a score is, too
        bias.masked_fill_(distances > 0, least)
        if self.num_padding is not None:
            bias = bias.masked_fill(keys < self.num_padding.view(-1, 1, 1, 1), least)
        if num_queries == 1:
            self._last = num_keys, bias
        return bias

    def is_padding(self, num_queries: int, num_keys: int) -> torch.Tensor | None:
        """(B, 1, T, 1) bool, of the last queries; None where there is none."""
        if self.num_padding is None:
            return None
        positions = torch.arange(num_keys - num_queries, num_keys, device=self.slopes.device)
        return positions.view(1, 1, -1, 1) < self.num_padding.view(-1, 1, 1, 1)


def attend_with_alibi(
    attend: Attend,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    alibi: Alibi,
    scale: float,
) -> torch.Tensor:
    """Attention of causal queries, which are the last of the keys; see attention().

    All is computed in float32, and the result is rounded once.
    """
    num_queries, num_keys = query.shape[2], key.shape[2]
    exact = query.float(), key.float(), value.float()
    step = queries_of_a_tile(query.shape[0], query.shape[1], num_keys)
    starts = range(0, num_queries, step)
    tiles = [_tile(attend, exact, alibi, scale, start, step) for start in starts]
    y = tiles[0] if len(tiles) == 1 else torch.cat(tiles, dim=2)
    is_padding = alibi.is_padding(num_queries, num_keys)
    if is_padding is not None:
        y = y.masked_fill(is_padding, 0)
    return y.to(query.dtype)


def queries_of_a_tile(batch_size: int, num_heads: int, num_keys: int) -> int:
    """How many queries are attended from at once."""
    return max(1, TILE_BYTES // (4 * batch_size * num_heads * num_keys))


def _tile(
    attend: Attend,
    exact: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
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
