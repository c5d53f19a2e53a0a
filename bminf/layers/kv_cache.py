"""Keys and values of the tokens so far, in memory that is allocated once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bminf.layers.attention import ScoreBias, attention

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
        self.length = 0

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
        num_rows, _, num_tokens, _ = key.shape
        end = self.length + num_tokens
        self.keys[layer, :num_rows, :, self.length : end] = key
        self.values[layer, :num_rows, :, self.length : end] = value
        return self.read(layer, num_rows, end)

    def read(self, layer: int, num_rows: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first `end` tokens of the first rows of a layer: two (num_rows, H, end, D) views."""
        keys, values = self.keys[layer, :num_rows, :, :end], self.values[layer, :num_rows, :, :end]
        return keys, values

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: ScoreBias,
        scale: float,
    ) -> torch.Tensor:
        """Append, and attend from the appended tokens to all; see attention()."""
        key, value = self.append(layer, key, value)
        return attention(query, key, value, bias, scale)

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


def decoder_cache(config: Any, batch_size: int, max_length: int, like: torch.Tensor) -> KVCache:
    """An empty cache of a decoder-only model, in the dtype and on the device of `like`.

    config: num_hidden_layers, num_attention_heads and head_dim are read.
    """
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    return KVCache(layers, batch_size, heads, max_length, config.head_dim, like.dtype, like.device)


def decoder_cache_bytes(config: Any, batch_size: int, max_length: int, dtype: torch.dtype) -> int:
    """Bytes of decoder_cache."""
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    return cache_bytes(layers, batch_size, heads, max_length, config.head_dim, dtype)
