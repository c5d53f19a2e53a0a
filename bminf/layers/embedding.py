"""The table of a vocabulary, on the device or on the host."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from bminf.errors import UnsupportedModelError


def embedding(num_rows: int, hidden_size: int) -> torch.nn.Embedding:
    """An embedding that is not initialised, because its rows are read from a file.

    On the meta device torch's own initialisation would import its compiler: a second, and 70 MB.
    """
    return torch.nn.Embedding(num_rows, hidden_size, _weight=torch.empty(num_rows, hidden_size))


def embedded(table: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """(B, T, C): rows of `table` for ids (B, T) int64, or what was looked up before, as it is."""
    if input_ids.is_floating_point():
        return input_ids
    x: torch.Tensor = table(input_ids)
    return x


class HostEmbedding(torch.nn.Module):
    """Rows of a table are gathered on the host; only they are brought to the device.

    The table is no parameter: it is not counted, packed or streamed. It may be mapped from a file,
    so that only the rows that are asked for are ever read.
    """

    def __init__(self, num_rows: int, hidden_size: int, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.num_rows, self.hidden_size = num_rows, hidden_size
        self.dtype = torch.get_default_dtype() if dtype is None else dtype
        self._parts: list[torch.Tensor] = []
        self._table_dtype = self.dtype
        self._starts = torch.zeros(0, dtype=torch.int64, device="cpu")

    def keep(self, parts: Sequence[torch.Tensor], dtype: torch.dtype) -> None:
        """Look rows up in these tables, one below another.

        parts: (n, hidden_size) `dtype` on the CPU; or the bytes of these rows as uint8, which may
        begin at any address.
        """
        with torch.device("cpu"):
            sizes = torch.tensor([0, *(len(part) for part in parts)])
        self._parts, self._starts, self._table_dtype = list(parts), sizes.cumsum(0), dtype

    @property
    def table_dtype(self) -> torch.dtype:
        """That of the tables, which may be another than the one that rows are given in."""
        return self._table_dtype

    def pieces(self, max_rows: int) -> Iterator[tuple[int, torch.Tensor]]:
        """(index of the first, some rows) of the tables, in order, in their own dtype."""
        for part, start in zip(self._parts, self._starts.tolist(), strict=False):
            for row in range(0, len(part), max_rows):
                some = part[row : row + max_rows]
                yield start + row, some.clone().view(self._table_dtype)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(...) int64 on any device -> (..., hidden_size) in `dtype` on that device."""
        if not self._parts:
            raise UnsupportedModelError("the table of the embedding was not given yet; call keep()")
        rows = self._gather(input_ids.ravel().cpu())
        return rows.to(input_ids.device).view(*input_ids.shape, self.hidden_size)

    def _gather(self, ids: torch.Tensor) -> torch.Tensor:
        if len(self._parts) == 1:
            return self._parts[0].index_select(0, ids).view(self._table_dtype).to(self.dtype)
        indices = torch.bucketize(ids, self._starts, right=True) - 1
        rows = torch.empty((len(ids), self.hidden_size), dtype=self.dtype, device=ids.device)
        for index in indices.unique().tolist():
            is_here = indices == index
            found = self._parts[index][ids[is_here] - self._starts[index]]
            rows[is_here] = found.view(self._table_dtype).to(self.dtype)
        return rows

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        """Follow a change of dtype; the table itself stays as it is."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device="meta")).dtype
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
