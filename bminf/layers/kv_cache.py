"""Keys and values of the tokens so far, in memory that is allocated once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bminf.cuda.launcher import Launcher
from bminf.layers.attention import ScoreBias, attention
from bminf.ops.fused import launcher_in_place
from bminf.ops.rotary_append import Angles, rotary_append, rotate

MakeBias = Callable[[int, int], ScoreBias]
"""From the numbers of queries and keys to a bias of attention(); queries are the last keys."""


class KVCache:
    """Room for the keys and values of `batch_size` rows of `max_length` tokens, in all layers.

    It begins with zeros, so that no cell holds NaN. `length` tokens are in use, the same number in
    each of the rows in use; a pass appends to every layer and then says advance().
    The rows lie one behind another, so that `tokens`, the same memory, is a pool for rows of any
    lengths (see packed_cache.py): two (L, H, batch_size * max_length, D).
    """

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        num_heads: int,
        max_length: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        shape = (num_layers, num_heads, batch_size * max_length, head_dim)
        keys = torch.zeros(shape, dtype=dtype, device=device)
        values = torch.zeros(shape, dtype=dtype, device=device)
        self.tokens = keys, values
        by_row = (num_layers, num_heads, batch_size, max_length, head_dim)
        self.keys, self.values = (
            keys.view(by_row).transpose(1, 2),
            values.view(by_row).transpose(1, 2),
        )
        self._layers = [*zip(keys, values, strict=True)]  # of `tokens`
        self.length = 0
        self._cells: tuple[tuple[int, int, int], torch.Tensor] | None = None  # of the last append
        self._read: tuple[tuple[int, int], list[tuple[torch.Tensor, torch.Tensor]]] | None = None

    @property
    def batch_size(self) -> int:
        return self.keys.shape[1]

    @property
    def max_length(self) -> int:
        return self.keys.shape[3]

    def append(
        self, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write (B, H, T, D) behind what layer `layer` holds, and return all of it as views.

        B may be less than batch_size. Returns two (B, H, length + T, D).
        """
        self._keep(layer, key, key, value, None, self._launcher(key, key, value))
        return self.read(layer, key.shape[0], self.length + key.shape[2])

    def _keep(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        angles: Angles | None,
        launcher: Launcher | None,
    ) -> torch.Tensor:
        """The queries, rotated like the keys that are written."""
        num_rows, _, num_tokens, _ = key.shape
        end = self.length + num_tokens
        # Where there is no room, torch's operators say what is wrong.
        if launcher is not None and num_rows <= self.batch_size and end <= self.max_length:
            cells = self._cells_of(num_rows, num_tokens)
            return rotary_append(launcher, query, key, value, angles, cells, *self._layers[layer])
        if angles is not None:
            query, key = rotate(query, *angles), rotate(key, *angles)
        self.keys[layer, :num_rows, :, self.length : end] = key
        self.values[layer, :num_rows, :, self.length : end] = value
        return query

    def _launcher(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> Launcher | None:
        """Of the kernels that append such tensors, and attend from them to this cache."""
        return launcher_in_place(query, key, value, self.keys)

    def _cells_of(self, num_rows: int, num_tokens: int) -> torch.Tensor:
        """(B * T,) int64, where the next tokens go; made once for all layers."""
        asked = self.length, num_rows, num_tokens
        if self._cells is None or self._cells[0] != asked:
            cells = self.positions(num_tokens)
            if num_rows > 1:
                starts = torch.arange(num_rows, device=cells.device) * self.max_length
                cells = (starts.unsqueeze(1) + cells).flatten()
            self._cells = asked, cells
        return self._cells[1]

    def read(self, layer: int, num_rows: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first `end` tokens of the first rows of a layer: two (num_rows, H, end, D) views."""
        asked = num_rows, end
        if self._read is None or self._read[0] != asked:  # of all layers at once, once a pass
            keys, values = (tokens[:, :num_rows, :, :end] for tokens in (self.keys, self.values))
            self._read = asked, [*zip(keys.unbind(), values.unbind(), strict=True)]
        return self._read[1][layer]

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
        """Append, and attend from the appended tokens to all; see attention().

        angles: that rotate queries and keys before, see Rotary.
        """
        launcher = self._launcher(query, key, value)
        query = self._keep(layer, query, key, value, angles, launcher)
        key, value = self.read(layer, key.shape[0], self.length + key.shape[2])
        return attention(query, key, value, bias, scale, launcher)

    def positions(self, num_tokens: int) -> torch.Tensor:
        """(T,) int64, where the next tokens stand."""
        return torch.arange(self.length, self.length + num_tokens, device=self.keys.device)

    def bias(self, num_tokens: int, make: MakeBias) -> ScoreBias:
        """That of the next tokens."""
        return make(num_tokens, self.length + num_tokens)

    def advance(self, num_tokens: int) -> None:
        """All layers hold `num_tokens` more."""
        self.length += num_tokens

    def move_tokens(self, start: int, target: int, count: int) -> None:
        """Copy `count` cells of `tokens`, which may overlap; layer by layer, see select()."""
        for tensor in self.tokens:
            for layer in tensor:
                layer[:, target : target + count] = layer[:, start : start + count].clone()

    def reset(self) -> None:
        """Forget all tokens; the memory stays."""
        self.length = 0

    def select(self, rows: torch.Tensor) -> None:
        """Row i becomes what row rows[i] was, in every layer. rows: (at most batch_size,) int64.

        Layer by layer, so that a copy of one layer is all that it needs beside the cache.
        """
        for tensor in (self.keys, self.values):
            for layer in tensor[:, :, :, : self.length]:
                layer[: len(rows)] = layer.index_select(0, rows)


def cache_bytes(
    num_layers: int,
    batch_size: int,
    num_heads: int,
    max_length: int,
    head_dim: int,
    dtype: torch.dtype,
) -> int:
    """Bytes that a KVCache of this size takes."""
    return 2 * num_layers * batch_size * num_heads * max_length * head_dim * dtype.itemsize


def decoder_cache(
    config: Any, batch_size: int, max_length: int, like: torch.Tensor, num_ranks: int = 1
) -> KVCache:
    """An empty cache of a decoder-only model, in the dtype and on the device of `like`.

    config: num_hidden_layers, num_attention_heads and head_dim are read.   num_ranks: that share
    the heads.
    """
    layers, heads = config.num_hidden_layers, config.num_attention_heads // num_ranks
    return KVCache(layers, batch_size, heads, max_length, config.head_dim, like.dtype, like.device)


def decoder_cache_bytes(
    config: Any, batch_size: int, max_length: int, dtype: torch.dtype, num_ranks: int = 1
) -> int:
    """Bytes of decoder_cache."""
    layers, heads = config.num_hidden_layers, config.num_attention_heads // num_ranks
    return cache_bytes(layers, batch_size, heads, max_length, config.head_dim, dtype)
