"""Attention on a real GPU: right with each operator, at once for lengths never seen, and lean."""

from __future__ import annotations

import time

import pytest
import torch

from bminf.cuda.launcher import fused_kernels
from bminf.layers import attention as module
from bminf.layers.alibi import Alibi, slopes
from bminf.layers.attention import (
    Causal,
    ScoreBias,
    attention,
    causal_mask,
    mask_to_bias,
    operator_for,
)
from bminf.layers.position_bias import RelativePositionBias

pytestmark = pytest.mark.gpu

TOLERANCES = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 2e-3}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("head_dim", [64, 80, 128, 20])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 1), (1, 37), (5, 37), (37, 37)])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("is_fused", [False, True])
def test_each_operator_gives_softmax_of_scaled_scores(
    dtype: torch.dtype,
    head_dim: int,
    num_queries: int,
    num_keys: int,
    has_bias: bool,
    is_fused: bool,
) -> None:
    torch.manual_seed(0)
    query = torch.randn(2, num_queries, 3, head_dim, dtype=dtype, device="cuda").transpose(1, 2)
    cache = torch.randn(2, 2, 3, 50, head_dim, dtype=dtype, device="cuda")[:, :, :, :num_keys]
    bias = torch.zeros(1, 1, num_queries, num_keys, dtype=dtype, device="cuda")
    if has_bias:
        bias = bias + mask_to_bias(causal_mask(num_queries, num_keys, bias.device), dtype)
    scores = 0.2 * query.double() @ cache[0].double().mT + bias.double()
    expected = scores.softmax(-1) @ cache[1].double()
    with fused_kernels(is_fused):
        given = attention(query, *cache, bias if has_bias else None, 0.2).double()
    assert (given - expected).norm() / expected.norm() < TOLERANCES[dtype]


def bias_of(kind: str, dtype: torch.dtype) -> ScoreBias:
    """For 3 heads."""
    if kind == "alibi":
        return Alibi(torch.tensor(slopes(3), device="cuda"))
    if kind == "relative":
        module = RelativePositionBias(32, 3, 128, is_bidirectional=False).to("cuda", dtype)
        torch.nn.init.normal_(module.weight)
        return module.of_decoder()
    return Causal(None if kind == "causal" else torch.tensor([0, 9], device="cuda"))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("kind", ["causal", "padding", "alibi", "relative"])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 37), (5, 37), (16, 1000), (1, 4100)])
def test_the_kernel_computes_what_the_operators_of_torch_do(
    dtype: torch.dtype, kind: str, num_queries: int, num_keys: int
) -> None:
    torch.manual_seed(0)
    query = torch.randn(2, num_queries, 3, 64, dtype=dtype, device="cuda").transpose(1, 2)
    cache = torch.randn(2, 2, 3, 4200, 64, dtype=dtype, device="cuda")[:, :, :, :num_keys]
    with torch.no_grad():
        bias = bias_of(kind, dtype)
        given = attention(query, *cache, bias, 0.2).double()
        with fused_kernels(False):
            expected = attention(query, *cache, bias, 0.2).double()
    assert (given - expected).norm() / expected.norm() < TOLERANCES[dtype]


@pytest.mark.parametrize("num_tokens", [20, 64])
def test_the_second_part_of_a_prompt_sees_the_first(num_tokens: int) -> None:
    """Flash attention's causal mask is aligned to the first key."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 3, 64, 64, dtype=torch.float16, device="cuda")
    whole = attention(query, key, value, Causal(), 0.2)
    part = attention(query[:, :, -num_tokens:], key, value, Causal(), 0.2)
    torch.testing.assert_close(part, whole[:, :, -num_tokens:], atol=2e-3, rtol=2e-3)


def test_lengths_never_seen_cost_no_more_than_others_and_no_memory_elsewhere() -> None:
    query = torch.randn(1, 32, 1, 128, dtype=torch.float16, device="cuda")
    cache = torch.randn(2, 1, 32, 900, 128, dtype=torch.float16, device="cuda")
    bias = torch.zeros(1, 1, 1, 900, dtype=torch.float16, device="cuda")
    for mask in (None, bias):
        first = 501 if mask is None else 601
        attention(query, *cache[:, :, :, :500], None if mask is None else mask[..., :500], 0.1)
        torch.cuda.synchronize()
        outside = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
        began = time.perf_counter()
        for length in range(first, first + 20):
            part = None if mask is None else mask[..., :length]
            attention(query, *cache[:, :, :, :length], part, 0.1)
        torch.cuda.synchronize()
        assert time.perf_counter() - began < 0.02  # a plan of cuDNN's takes longer than all of it
        assert outside - torch.cuda.mem_get_info()[0] - torch.cuda.memory_reserved() < 2**21


def test_this_gpu_has_a_fused_operator_for_half_precision() -> None:
    gpu = module._gpu(torch.device("cuda", torch.cuda.current_device()))
    assert operator_for(torch.float16, 128, 64, 64, "tensor", gpu) == "efficient"
    assert operator_for(torch.float16, 128, 64, 64, "causal", gpu) == (
        "flash" if gpu.capability >= 80 else "efficient"
    )
