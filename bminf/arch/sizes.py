"""What a pass holds beside the weights, for each architecture to count up for itself.

What a product holds is read off the operations (product_bytes in ops/linear.py); all of it is held
against measurements by tests/models/test_zoo_memory.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bminf.ops.linear import product_bytes
from bminf.quantization.packed import Format

BUCKET_BYTES = 40
"""Of a cell of scores whose positions become a bias: distances, their logarithms and buckets."""
HIDDEN_BYTES = 4
"""Of a cell of scores: what is ahead, what is padding, and both."""


@dataclass(frozen=True)
class Pass:
    """The largest pass that is asked of a model.

    length: tokens of a row, of prompt and answer together where one stack reads both, of each
    elsewhere.   dtype: of activations.   weight_format: of the weights in the blocks.
    is_cpu: products hold other things there on the way.
    """

    batch_size: int
    length: int
    dtype: torch.dtype
    weight_format: Format | None
    is_cpu: bool

    def held(self, *columns: int) -> int:
        """Bytes of activations of so many columns that are held at once."""
        return self.batch_size * self.length * sum(columns) * self.dtype.itemsize

    def product(self, inputs: int, outputs: int) -> int:
        """Bytes of the result of a product, and of what is held on the way beside its input."""
        num_rows = self.batch_size * self.length
        return product_bytes(
            num_rows, inputs, outputs, self.dtype.itemsize, self.weight_format, self.is_cpu
        )

    def scores(self, num_heads: int = 1) -> int:
        """Bytes of a bias of scores, of all heads or of each."""
        return self.batch_size * self.length**2 * num_heads * self.dtype.itemsize


@dataclass(frozen=True)
class Sizes:
    """Bytes of a pass.

    cache: of keys and values.   layer: the widest moment of a layer, but for its bias.
    bias: of scores, which all layers share.   making_bias: while it is made, before them.
    """

    cache: int
    layer: int
    bias: int
    making_bias: int


def layer_bytes(within: Pass, size: int, inner: int, wide: int, gated: int = 0) -> int:
    """The widest moment of a layer of attention and feed-forward.

    size: of its input.   inner: of queries.   wide: of the feed-forward.   gated: of its gate.
    """
    return within.held(size, size) + max(  # the input, and what its norm made of it
        within.product(size, 3 * inner),
        within.held(3 * inner, inner, inner),
        within.held(inner) + within.product(inner, size),
        within.held(gated, wide) + within.product(size, wide),
        within.held(wide) + within.product(wide, size),
    )
