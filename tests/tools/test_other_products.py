"""What other libraries multiply with is the weight that they were given."""

from __future__ import annotations

import pytest
import torch

from benchmarks.products import FORMATS
from bminf.quantization.packed import dequantize
from bminf.quantization.packing import pack
from tools import other_products
from tools.other_products import OTHER_PRODUCTS, OtherProduct

N, K = 64, 96


@pytest.mark.parametrize(
    "other", OTHER_PRODUCTS, ids=lambda other: f"{other.library} {other.title}"
)
def test_each_copy_is_the_product_in_memory_of_its_own(other: OtherProduct) -> None:
    if (obstacle := other.obstacle((N, K))) is not None:
        pytest.skip(obstacle)
    torch.manual_seed(0)
    weight, x = pack(torch.randn(N, K), FORMATS[other.format]), torch.randn(3, K)
    right = x @ dequantize(weight, torch.float32).t()
    copies = other.copies(weight, 2)
    weight.qweight.zero_()
    for copy in copies:
        y = copy.multiply(x.to(other.dtype))
        assert y.shape == right.shape and y.dtype == other.dtype
        # Activations of 8 bits, or of bfloat16, which keeps as many.
        assert (y.float() - right).norm() < 1e-2 * right.norm()
        assert 4 * N * K <= 8 * copy.nbytes <= 9 * N * K


def test_codes_are_those_of_the_columns_in_their_order() -> None:
    weight = pack(torch.randn(5, K), FORMATS["int4-g32"])
    numbers = other_products.codes_of(weight).float() - 8
    scaled = numbers.view(5, -1, 32) * weight.scale.float().unsqueeze(-1)
    assert torch.equal(scaled.view(5, K), dequantize(weight, torch.float32))


def test_what_is_missing_or_ragged_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    of_torch, *_, of_onnx = OTHER_PRODUCTS
    assert of_torch.obstacle((32, 24)) == "32x24 is in no whole blocks of 16"
    assert of_torch.obstacle((32, 48)) is None
    monkeypatch.setattr(other_products, "find_spec", lambda name: None)
    assert of_onnx.obstacle((N, K)) == "onnxruntime and onnx not installed"
