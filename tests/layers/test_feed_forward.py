"""The feed-forward networks, against their formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from quantized_models import dequantize_linears, relative_error

import bminf
from bminf.layers.feed_forward import FeedForward, GatedFeedForward, HalvedFeedForward


def test_plain_and_halved_are_what_their_formulas_say() -> None:
    x, plain, halved = torch.randn(3, 8), FeedForward(8, 12, "gelu"), HalvedFeedForward(8, 12)
    assert torch.equal(plain(x), plain.down(F.gelu(plain.up(x))))
    up = halved.up(x)  # the gate comes second
    assert torch.equal(halved(x), halved.down(up[:, :12] * F.gelu(up[:, 12:])))


@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize("num_rows", [1, 40])
def test_gated_is_the_same_packed_in_one_product_or_two(num_rows: int, activations: str) -> None:
    x, gated = torch.randn(num_rows, 64), GatedFeedForward(64, 48, "silu")
    assert torch.equal(gated(x), gated.down(F.silu(gated.gate(x)) * gated.up(x)))
    for name in ("gate", "up", "down"):
        packed = bminf.QuantizedLinear(getattr(gated, name), activations)
        setattr(gated, name, packed)
    given, by_itself = gated(x), gated.down(F.silu(gated.gate(x)) * gated.up(x))
    assert relative_error(given, by_itself) < 1e-6  # as rounded as each linear alone
    rounding = 1e-3 if activations == "float" else 0.02
    assert relative_error(given, dequantize_linears(gated)(x)) < rounding


def test_gated_with_weights_that_are_not_packed_alike() -> None:
    x, layer = torch.randn(3, 64), GatedFeedForward(64, 48, "silu")
    layer.gate = bminf.QuantizedLinear(layer.gate, "float", "int4")
    layer.up = bminf.QuantizedLinear(layer.up, "float", "int8")
    assert torch.equal(layer(x), layer.down(F.silu(layer.gate(x)) * layer.up(x)))
