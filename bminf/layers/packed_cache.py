"""A pass over rows of different lengths, whose tokens lie one behind another as one text (1, T, C).

A linear sees T rows, and each row attends to its own keys, which are a range of a pool of tokens:
nothing is padded, and a row alone is computed by the very calls that a KVCache makes for it. On a
GPU rows of as many tokens each, as in decoding, are one launch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from bminf.cuda.launcher import Launcher, fused_launcher
from bminf.layers.attention import (
    ScoreBias,
    attention,
    attention_in_products,
    attention_of_rows,
)
from bminf.layers.kv_cache import MakeBias
from bminf.ops.attention import MAX_QUERIES, Rows
from bminf.ops.fused import launcher_in_place
from bminf.ops.rotary_append import Angles, rotary_append, rotate

Bias = Sequence[ScoreBias]
"""Of each row in a pass: (1, 1 or H, T of the row, S of the row), or what attention() takes in the
place of that."""

Views = tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]
"""Keys and values of a row in each layer, (1, H, n, D) each, views of the pool."""


class Cache(Protocol):
    """What the attention of a decoder asks of a KVCache or a PackedCache."""

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: Any,
        scale: float,
        angles: Angles | None = None,
    ) -> torch.Tensor:
        """Keep keys and values of more tokens, and attend from these to all of their row.

        angles: that rotate queries and keys before, see Rotary.
        """
        ...

    def positions(self, num_tokens: int) -> torch.Tensor:
        """(T,) int64, where the next tokens stand in their rows."""
        ...

    def bias(self, num_tokens: int, make: MakeBias) -> Any:
        """What attend() takes as the bias of the next tokens."""
        ...

    def advance(self, num_tokens: int) -> None:
        """All layers hold `num_tokens` more."""
        ...


class Span(NamedTuple):  # which is made faster than a frozen dataclass, for each row of each pass
    """The tokens of a row in a pass.

    start: where the row begins in the pool.   length: tokens that it held before the pass.
    num_tokens: of the pass.
    """

    start: int
    length: int
    num_tokens: int

    @property
    def num_keys(self) -> int:
        return self.length + self.num_tokens

    @property
    def end(self) -> int:
        """Behind its last cell."""
        return self.start + self.num_keys


class PackedCache:
    """The rows of a pass in a pool: two (L, H, N, D), see KVCache.tokens.

    spans: the rows in the order of their tokens; there may be more tokens behind them, which are of
    no row.   copies: whether queries, keys and values are copied, so that they lie alike whatever
    precedes them, and multiplied alike with any number of threads: for the same bits each time.
    What a row holds is known to whoever made the pass; advance() does nothing.
    """

    def __init__(
        self, tokens: tuple[torch.Tensor, torch.Tensor], spans: Sequence[Span], copies: bool = False
    ) -> None:
        self._keys, self._values = tokens
        self._spans, self.copies = spans, copies
        self._ours = [ours for _, ours in slices(spans)]
        # Of each row: all of its tokens, and of them those of the pass, once they are asked for.
        self._all = [self._views(span.start, span.num_keys) for span in spans]
        self._new: list[Views] | None = None
        # For kernels: where rows are, and the cells of all tokens of the pass, on the device.
        self._layers: list[tuple[torch.Tensor, torch.Tensor]] | None = None
        self._rows: Rows | None = None
        self._cells: torch.Tensor | None = None

    def _views(self, start: int, number: int) -> Views:
        # Of all layers at once: for short rows a view takes as long as a small product.
        num_layers = self._keys.shape[0]
        keys, values = self._keys.narrow(2, start, number), self._values.narrow(2, start, number)
        return keys.chunk(num_layers), values.chunk(num_layers)

    def append(
        self,
        layer: int,
        key: torch.Tensor,
        value: torch.Tensor,
    ) -> None:
        """Keep (1, H, T, D) of all rows."""
        self._keep(layer, key, key, value, None, launcher_in_place(key, value, self._keys))

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
        if launcher is not None:
            cells, tokens = self._cells_of(key.shape[2]), self._tokens_of(layer)
            return rotary_append(launcher, query, key, value, angles, cells, *tokens)
        if angles is not None:
            query, key = rotate(query, *angles), rotate(key, *angles)
        if self._new is None:
            self._new = [
                self._views(span.end - span.num_tokens, span.num_tokens) for span in self._spans
            ]
        spans = self._spans
        if len(spans) == 1 and spans[0].num_tokens == key.shape[2]:  # no view of all there is
            new_keys, new_values = self._new[0]
            new_keys[layer].copy_(key)
            new_values[layer].copy_(value)
            return query
        for (new_keys, new_values), ours in zip(self._new, self._ours, strict=True):
            new_keys[layer].copy_(key[:, :, ours])
            new_values[layer].copy_(value[:, :, ours])
        return query

    def _tokens_of(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(H, N, D): the pool in a layer; views of all layers are made once a pass."""
        if self._layers is None:
            self._layers = [*zip(self._keys.unbind(), self._values.unbind(), strict=True)]
        return self._layers[layer]

    def _cells_of(self, num_tokens: int) -> torch.Tensor:
        """(T,) int64, where the tokens of the pass go; -1 for those of no row."""
        if self._cells is None:
            ends = [(span.end - span.num_tokens, span.end) for span in self._spans]
            cells = [cell for first, end in ends for cell in range(first, end)]
            cells += [-1] * (num_tokens - len(cells))
            self._cells = torch.tensor(cells, device=self._keys.device)
        return self._cells

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: Bias,
        scale: float,
        angles: Angles | None = None,
    ) -> torch.Tensor:
        """(1, H, T, D), of each token to those of its row."""
        launcher = launcher_in_place(query, key, value, self._keys)
        query = self._keep(layer, query, key, value, angles, launcher)
        return self.attend_to_kept(layer, query, bias, scale, launcher)

    def attend_to_kept(
        self,
        layer: int,
        query: torch.Tensor,
        bias: Bias,
        scale: float,
        launcher: Launcher | None = None,
    ) -> torch.Tensor:
        """The same without keys and values of their own: rows hold span.num_keys.

        launcher: see attention().
        """
        if len(self._spans) == 1 and not self.copies:
            keys, values = self._all[0]
            return attention(query, keys[layer], values[layer], bias[0], scale, launcher)
        if not self.copies:
            together = self._attend_together(layer, query, bias, scale)
            if together is not None:
                return together
        rows = [
            self._attend_row(layer, row, query[:, :, ours], bias[index], scale)
            for index, (row, ours) in enumerate(zip(self._all, self._ours, strict=True))
        ]
        return joined(rows, query.shape[2])

    def _attend_together(
        self, layer: int, query: torch.Tensor, bias: Bias, scale: float
    ) -> torch.Tensor | None:
        """All rows in one launch; None where they differ in more than their lengths, or where
        there is no kernel for them."""
        num_rows, num_tokens = len(self._spans), self._spans[0].num_tokens
        if num_tokens > MAX_QUERIES or fused_launcher(query.device) is None:
            return None
        is_full = query.shape[2] == num_rows * num_tokens
        are_alike = all(span.num_tokens == num_tokens for span in self._spans)
        if not (is_full and are_alike and all(own is bias[0] for own in bias)):
            return None
        if self._rows is None:
            self._rows = rows_of(self._spans, query.device)
        by_row = query[0].unflatten(1, (num_rows, num_tokens)).transpose(0, 1)
        keys, values = (tokens.unsqueeze(0) for tokens in self._tokens_of(layer))
        y = attention_of_rows(by_row, keys, values, bias[0], scale, self._rows)
        return None if y is None else y.transpose(1, 2).flatten(0, 1).unsqueeze(0).transpose(1, 2)

    def _attend_row(
        self,
        layer: int,
        row: Views,
        query: torch.Tensor,
        bias: ScoreBias,
        scale: float,
    ) -> torch.Tensor:
        keys, values = row[0][layer], row[1][layer]
        if not self.copies:
            return attention(query, keys, values, bias, scale)
        return attention_in_products(copied(query), copied(keys), copied(values), bias, scale)

    def positions(self, num_tokens: int) -> torch.Tensor:
        first = self._spans[0]
        if first.num_tokens == num_tokens:
            return torch.arange(first.length, first.num_keys, device=self._keys.device)
        parts = [list(range(span.length, span.num_keys)) for span in self._spans]
        positions = [position for part in parts for position in part]
        positions += [0] * (num_tokens - len(positions))
        return torch.tensor(positions, device=self._keys.device)

    def bias(self, num_tokens: int, make: MakeBias) -> Bias:
        return [make(span.num_tokens, span.num_keys) for span in self._spans]

    def advance(self, num_tokens: int) -> None:
        pass


def rows_of(spans: Sequence[Span], device: torch.device) -> Rows:
    """Where they are, for a kernel."""
    places = [[span.start for span in spans], [span.num_keys for span in spans]]
    starts, lengths = torch.tensor(places, dtype=torch.int32, device=device)
    return Rows(max(span.num_keys for span in spans), lengths, starts)


def slices(spans: Sequence[Span]) -> Iterator[tuple[Span, slice]]:
    """Each row, and where its tokens are among those of the pass."""
    end = 0
    for span in spans:
        start, end = end, end + span.num_tokens
        yield span, slice(start, end)


def joined(rows: list[torch.Tensor], num_tokens: int) -> torch.Tensor:
    """(1, H, T of a row, D) each, one behind another, and zeros for tokens of no row."""
    missing = num_tokens - sum(row.shape[2] for row in rows)
    if missing:
        rows.append(rows[0].new_zeros(1, rows[0].shape[1], missing, rows[0].shape[3]))
    return torch.cat(rows, dim=2)


def copied(x: torch.Tensor) -> torch.Tensor:
    """In memory of its own, in order."""
    return x.clone(memory_format=torch.contiguous_format)


class Segments:
    """Texts one behind another, (1, T, C), each of which attends to itself: of an encoder.

    lengths: of the texts.   copies: see PackedCache; there is one text then.
    """

    def __init__(self, lengths: Sequence[int], copies: bool = False) -> None:
        self.lengths, self._attention = lengths, attention_in_products if copies else attention
        self._places = [ours for _, ours in slices([Span(0, 0, length) for length in lengths])]

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: Bias,
        scale: float,
    ) -> torch.Tensor:
        """(1, H, T, D), of each token to those of its text."""
        if self.lengths == [query.shape[2]]:
            return self._attention(query, key, value, bias[0], scale)
        texts = [
            self._attention(query[:, :, ours], key[:, :, ours], value[:, :, ours], own, scale)
            for ours, own in zip(self._places, bias, strict=True)
        ]
        return joined(texts, query.shape[2])
