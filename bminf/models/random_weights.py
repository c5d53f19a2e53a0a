"""Weights of a model that nobody has to have: random, of any size, and hardly any memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bminf.checkpoint.stored import Sliced, Stored
from bminf.layers.embedding import HostEmbedding
from bminf.layers.quantized_linear import QuantizedLinear
from bminf.layout import tensors_of
from bminf.models.source import Weights
from bminf.quantization.packed import PACKED_FIELDS, Packing
from bminf.quantization.packing import pack

_DRAWN_ROWS = 16  # of a matrix, which come again and again: only they are held before it is read


@dataclass(frozen=True)
class Random(Sliced):
    """`num_rows` rows, from `start` on, of `drawn` over and over again."""

    where: str
    drawn: torch.Tensor
    num_rows: int
    start: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.num_rows, *self.drawn.shape[1:]

    @property
    def dtype(self) -> torch.dtype:
        return self.drawn.dtype

    def read(self) -> torch.Tensor:
        end = self.start + self.num_rows
        if end <= len(self.drawn):
            return self.drawn[self.start : end]
        return self.drawn.index_select(0, torch.arange(self.start, end) % len(self.drawn))

    def _slice(self, axis: int, start: int, end: int) -> Stored:
        assert axis == 0, "no loader asks for columns"
        return replace(self, start=self.start + start, num_rows=end - start)


def random_weights(network: torch.nn.Module) -> Weights:
    """What a checkpoint of `network`, on the meta device, would hold.

    Weights have the variance 1 / in_features, all else lies between 0.5 and 1.5.
    """
    generator = torch.Generator().manual_seed(0)
    drawn: dict[str, torch.Tensor] = {}
    forms, table = {}, None
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Linear):
            shape = (min(_DRAWN_ROWS, module.out_features), module.in_features)
            weight = torch.randn(shape, generator=generator).div_(module.in_features**0.5)
            if isinstance(module, QuantizedLinear):
                forms[name], packed = module.form, pack(weight, module.form)
                parts = {f"{name}.{field}": getattr(packed, field) for field in PACKED_FIELDS}
                drawn |= {key: part for key, part in parts.items() if part is not None}
            else:
                drawn[f"{name}.weight"] = weight.to(module.weight.dtype)
        elif isinstance(module, HostEmbedding):  # rows that begin a number behind each other
            shape = (module.num_rows, module.hidden_size)
            numbers = torch.randn(sum(shape), generator=generator).half()
            table = Random(name, numbers.as_strided(shape, (1, 1)), module.num_rows)
    stored = {}
    for name, _, like in tensors_of(network):
        if name not in drawn:
            row = torch.rand(like.shape[-1], generator=generator).add_(0.5).to(like.dtype)
            drawn[name] = row.expand(like.shape)
        stored[name] = Random(name, drawn[name], len(like))
    return Weights(stored, Path("random weights"), Packing(None, forms), table=table)
