"""What a pass holds beside the weights, for each architecture to count up for itself.

What a product holds is read off the operations (Pass in ops/linear.py); all of it is held
against measurements by tests/models/test_zoo_memory.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from bminf.ops.linear import Pass as Pass  # an architecture counts with it

BUCKET_BYTES = 40
"""Of a cell of scores whose positions become a bias: distances, their logarithms and buckets."""
HIDDEN_BYTES = 4
"""Of a cell of scores: what is ahead, what is padding, and both."""


@dataclass(frozen=True)
class Sizes:
    """Bytes of a pass.

    cache: of keys and values.   layer: the widest moment of a layer, but for its bias.
    bias: of scores, which all layers share.   making_bias: while it is made, before them.
    kept_quarters: of a layer, what stays with the allocators of a CPU after a pass with packed
        weights: measured, not derived.
    """

    cache: int
    layer: int
    bias: int
    making_bias: int
    kept_quarters: int = 5


def layer_bytes(within: Pass, size: int, inner: int, wide: int, gated: int = 0) -> int:
    """The widest moment of a layer of attention and feed-forward.

    size: of its input.   inner: of queries.   wide: of the feed-forward.   gated: of its gate.
    """
    return within.activation_bytes(size, size) + max(  # the input, and what its norm made of it
        within.linear_bytes(size, 3 * inner),
        within.activation_bytes(3 * inner, inner, inner),
        within.activation_bytes(inner) + within.linear_bytes(inner, size),
        within.activation_bytes(gated, wide) + within.linear_bytes(size, wide),
        within.activation_bytes(wide) + within.linear_bytes(wide, size),
    )
