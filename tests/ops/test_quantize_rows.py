"""Activations to codes, by themselves and straight from an RMSNorm."""

from __future__ import annotations

import pytest
import torch

from bminf.errors import ArgumentError
from bminf.ops.quantize_rows import quantize_rows, rms_norm_quantize


def test_rms_norm_and_quantize_in_one() -> None:
    x, weight = torch.randn(2, 3, 70), torch.randn(70)
    normal = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight
    codes, scale = rms_norm_quantize(x, weight, 1e-6)
    assert codes.shape == (6, 80) and not codes[:, 70:].any()
    back = codes[:, :70].float() * scale.unsqueeze(1)
    assert ((back.view_as(normal) - normal).abs() <= 0.51 * scale.view(2, 3, 1)).all()
    with pytest.raises(ArgumentError, match="x has shape"):
        rms_norm_quantize(x, weight[:-1], 1e-6)
    with pytest.raises(ArgumentError, match=r"x is torch\.int64"):
        quantize_rows(x.long())
    plain_codes, plain_scale = quantize_rows(normal)
    assert torch.equal(plain_codes, codes) and torch.allclose(plain_scale, scale)
