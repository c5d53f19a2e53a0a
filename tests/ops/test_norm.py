"""Norms by torch's operators; tests/kernels/fused_cases.py has the kernels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from bminf.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_is_that_of_torch_to_the_rounding(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(3, 5, 70).to(dtype), torch.randn(70).to(dtype)
    expected = F.rms_norm(x.double(), (70,), weight.double(), 1e-6)
    y = rms_norm(x, weight, 1e-6)
    bound = 3 * torch.finfo(dtype).eps
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=bound, atol=bound)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm_is_that_of_torch(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    x, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((2, 70), (70,), (70,)))
    assert torch.equal(
        layer_norm(x, weight, bias, 1e-5), F.layer_norm(x, (70,), weight, bias, 1e-5)
    )


@pytest.mark.parametrize("scale", [1.0, 11.832159566199232])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_norm_adds_as_torch_does_and_normalizes_the_sum(dtype: torch.dtype, scale: float) -> None:
    torch.manual_seed(2)
    x, delta = torch.randn(2, 2, 9, 70).to(dtype)
    weight, bias = torch.randn(2, 70).to(dtype)
    total, y = add_rms_norm(x, delta, weight, 1e-6, scale)
    assert torch.equal(total, x * scale + delta)
    assert torch.equal(y, rms_norm(total, weight, 1e-6))
    total, y = add_layer_norm(x, delta, weight, bias, 1e-5, scale)
    assert torch.equal(total, x * scale + delta)
    assert torch.equal(y, layer_norm(total, weight, bias, 1e-5))


def test_fake_tensors_of_a_gpu_need_none() -> None:
    with FakeTensorMode(), torch.device("cuda"):
        x, weight = torch.empty(2, 3, 64), torch.empty(64)
        found = [rms_norm(x, weight, 1e-6), layer_norm(x, weight, weight, 1e-5)]
        found += [*add_rms_norm(x, x, weight, 1e-6), *add_layer_norm(x, x, weight, weight, 1e-5)]
    assert len(found) == 6
    assert all(y.shape == x.shape and y.device.type == "cuda" for y in found)
