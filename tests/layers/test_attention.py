"""Attention, masks, norms and position bias, against plain statements of what they mean.

bminf/layers/position_bias.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from bminf.layers import attention as module
from bminf.layers.attention import (
    BiasKind,
    Causal,
    Gpu,
    Operator,
    attention,
    attention_in_products,
    causal_mask,
    kind_of,
    mask_to_bias,
    merge_heads,
    operator_for,
    padding_mask,
    split_heads,
    tensor_of,
)
from bminf.layers.norm import RMSNorm
from bminf.layers.position_bias import RelativePositionBias, buckets


def plain(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor, scale: float
) -> torch.Tensor:
    scores = scale * query.double() @ key.double().transpose(-1, -2) + bias.double()
    return scores.softmax(-1) @ value.double()


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 1), (1, 9), (5, 9), (9, 9)])
def test_attention_is_softmax_of_scaled_scores_and_bias(
    scale: float, num_queries: int, num_keys: int
) -> None:
    torch.manual_seed(0)
    query = torch.randn(2, 3, num_queries, 16)
    key, value = torch.randn(2, 3, num_keys, 16), torch.randn(2, 3, num_keys, 16)
    bias = torch.randn(1, 3, num_queries, num_keys)
    bias = bias + mask_to_bias(causal_mask(num_queries, num_keys, query.device), bias.dtype)
    given = attention(query, key, value, bias, scale)
    assert torch.allclose(given.double(), plain(query, key, value, bias, scale), atol=1e-5)


HALF, BFLOAT, FULL, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("dtype", "head_dim", "bias", "gpu", "expected"),
    [
        (HALF, 64, "none", Gpu(90), "flash"),
        (HALF, 64, "causal", Gpu(90), "flash"),
        (BFLOAT, 128, "none", Gpu(120), "flash"),
        (HALF, 256, "causal", Gpu(80), "flash"),
        (HALF, 64, "tensor", Gpu(90), "efficient"),  # flash attention takes no bias
        (HALF, 264, "none", Gpu(90), "efficient"),
        (HALF, 64, "none", Gpu(90, has_flash=False), "efficient"),
        (HALF, 64, "causal", Gpu(75), "efficient"),
        (HALF, 80, "tensor", Gpu(61), "efficient"),
        (HALF, 5, "tensor", Gpu(61), "efficient"),
        (FULL, 64, "none", Gpu(90), "efficient"),
        (FULL, 20, "tensor", Gpu(86), "efficient"),
        (FULL, 5, "tensor", Gpu(75), "efficient"),
        (FULL, 18, "tensor", Gpu(86), "math"),
        (HALF, 20, "none", Gpu(90), "math"),
        (HALF, 20, "tensor", Gpu(70), "math"),
        (BFLOAT, 64, "tensor", Gpu(75), "math"),
        (BFLOAT, 64, "causal", Gpu(61), "math"),
        (DOUBLE, 64, "none", Gpu(90), "math"),
        (HALF, 64, "tensor", Gpu(90, has_efficient=False), "math"),
    ],
)
def test_a_gpu_has_an_operator_for_each_kind_of_tensors(
    dtype: torch.dtype, head_dim: int, bias: BiasKind, gpu: Gpu, expected: Operator
) -> None:
    """Of a whole prompt, which has as many queries as keys."""
    assert operator_for(dtype, head_dim, 37, 37, bias, gpu) == expected


@pytest.mark.parametrize("bias", ["none", "causal", "tensor"])
@pytest.mark.parametrize(
    ("num_queries", "num_keys"), [(17, 37), (36, 37), (1, 37), (16, 37), (37, 5)]
)
def test_flash_attention_is_not_for_a_part_of_a_prompt(
    num_queries: int, num_keys: int, bias: BiasKind
) -> None:
    """Its causal mask is aligned to the first key, that of a second chunk to the last. The same
    without a mask, as of decoding where there is no kernel of ours, and of cross-attention."""
    assert operator_for(HALF, 64, num_queries, num_keys, bias, Gpu(90)) == "efficient"
    assert operator_for(HALF, 64, num_keys, num_keys, bias, Gpu(90)) == (
        "efficient" if bias == "tensor" else "flash"
    )


def test_a_causal_mask_is_a_bias_of_the_last_queries() -> None:
    torch.manual_seed(0)
    key = torch.randn(2, 3, 9, 16)
    for num_queries in (1, 4, 9):
        query = torch.randn(2, 3, num_queries, 16)
        mask = mask_to_bias(causal_mask(num_queries, 9, query.device), query.dtype)
        for attend in (attention, attention_in_products):
            given = attend(query, key, key, Causal(), 0.25)
            expected = plain(query, key, key, mask, 0.25)
            assert torch.allclose(given.double(), expected, atol=1e-5)
    assert kind_of(Causal(), 1) == "none" and kind_of(Causal(), 2) == "causal"


def test_a_causal_mask_with_padding_hides_the_first_keys_of_a_row() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 3, 4, 16), torch.randn(2, 3, 9, 16)
    causal = Causal(torch.tensor([0, 3]))
    given = attention(query, key, key, causal, 0.25)
    alone = attention(query[1:], key[1:, :, 3:], key[1:, :, 3:], Causal(), 0.25)
    torch.testing.assert_close(given[1:], alone)
    torch.testing.assert_close(given[:1], attention(query[:1], key[:1], key[:1], Causal(), 0.25))
    assert kind_of(causal, 1) == "tensor"
    assert len(causal.made) == 1 and tensor_of(causal, query, key) is causal.made[4, 9]


def test_a_relative_bias_is_made_once_for_all_layers() -> None:
    module = RelativePositionBias(32, 3, 128, is_bidirectional=False)
    torch.nn.init.normal_(module.weight)
    torch.manual_seed(0)
    key, own = torch.randn(1, 3, 9, 16), module.of_decoder()
    for num_queries in (1, 4):
        query = torch.randn(1, 3, num_queries, 16)
        mask = mask_to_bias(causal_mask(num_queries, 9, query.device), query.dtype)
        expected = plain(query, key, key, module(num_queries, 9) + mask, 1.0)
        with torch.no_grad():
            given = attention(query, key, key, own, 1.0).double()
            assert torch.allclose(given, expected, atol=1e-5)
            assert tensor_of(own, query, key) is own.made[num_queries, 9]


class Recorded(TorchDispatchMode):
    """The operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def refuse(*_: Any, **__: Any) -> torch.Tensor:
    raise AssertionError("torch chooses an operator by itself")


# Of reading, of reading in chunks, and of writing; as the models make them.
BIASES: list[tuple[int, ...] | None] = [
    None, (1, 1, 5, 21), (1, 3, 5, 21), (2, 1, 5, 21), (2, 1, 1, 21), (2, 3, 5, 1), (5, 21),
]  # fmt: skip
CAUSAL = (0,)  # none of these


@pytest.mark.parametrize("num_queries", [1, 5, 21])
@pytest.mark.parametrize("bias_shape", [*BIASES, CAUSAL])
@pytest.mark.parametrize("dtype", [HALF, BFLOAT, FULL])
@pytest.mark.parametrize(
    "gpu", [Gpu(61), Gpu(90), Gpu(100, has_flash=False), Gpu(90, False, False)]
)
def test_on_a_gpu_torch_is_not_asked_to_choose(
    monkeypatch: pytest.MonkeyPatch,
    num_queries: int,
    bias_shape: tuple[int, ...] | None,
    dtype: torch.dtype,
    gpu: Gpu,
) -> None:
    """On tensors that have a device and no bytes; the keys are views of a cache."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", refuse)
    monkeypatch.setattr(module, "_gpu", lambda device: gpu)
    with FakeTensorMode(), Recorded() as recorded:
        query = torch.empty(2, num_queries, 3, 64, dtype=dtype, device="cuda").transpose(1, 2)
        cache = torch.empty(2, 3, 40, 64, dtype=dtype, device="cuda").narrow(2, 0, 21)
        bias: torch.Tensor | Causal | None = Causal() if bias_shape == CAUSAL else None
        if bias_shape not in (None, CAUSAL):
            shape = [num_queries if size == 5 else size for size in bias_shape]
            bias = torch.empty(shape, dtype=dtype, device="cuda")
        y = attention(query, cache, cache, bias, 0.125)
    assert y.shape == (2, 3, num_queries, 64) and y.device.type == "cuda" and y.dtype == dtype
    operator = operator_for(dtype, 64, num_queries, 21, kind_of(bias, num_queries), gpu)
    assert any(operator in name or operator == "math" for name in recorded.names)
    assert not any("cudnn" in name for name in recorded.names)


def test_a_gpu_that_is_not_there_is_answered_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "scaled_dot_product_attention", refuse)
    with FakeTensorMode(), Recorded() as recorded:
        query = torch.empty(1, 2, 3, 64, dtype=HALF, device="cuda")
        assert attention(query, query, query, None, 1.0).shape == query.shape
    assert not any("cudnn" in name for name in recorded.names)


def test_what_is_switched_off_in_torch_is_not_used() -> None:
    flags = torch.backends.cuda
    before = flags.mem_efficient_sdp_enabled()
    device = torch.device("cuda", 0)
    try:
        flags.enable_mem_efficient_sdp(True)
        assert module._gpu(device).has_efficient
        flags.enable_mem_efficient_sdp(False)
        assert not module._gpu(device).has_efficient
    finally:
        flags.enable_mem_efficient_sdp(before)


@pytest.mark.parametrize("num_keys", [21, 24])
@pytest.mark.parametrize("num_queries", [1, 5, 21])
@pytest.mark.parametrize("bias_shape", BIASES[1:])
def test_the_operators_get_the_same_bias_in_rows_that_are_aligned(
    num_keys: int, num_queries: int, bias_shape: tuple[int, ...]
) -> None:
    """Whatever they were: cut from a wider one, at any column, transposed, broadcast."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 3, num_queries, 16), torch.randn(2, 3, num_keys, 16)
    *shape, num_columns = [{5: num_queries, 21: num_keys}.get(size, size) for size in bias_shape]
    whole = torch.randn(*shape, 40)
    cut = slice(1, 1 + num_columns)
    narrow = whole[..., cut].clone()
    for bias in (narrow, whole[..., cut], narrow.mT.contiguous().mT):
        given = module._aligned(bias, query, key)
        assert torch.equal(given, bias.expand(2, 3, num_queries, num_keys))
        assert given.stride(-1) == 1 and given.storage_offset() % 8 == 0
        assert all(stride % 8 == 0 for stride in given.stride()[:-1])
        y = module._on_gpu("math", query, key, key, bias, 0.25)
        assert torch.allclose(y.double(), plain(query, key, key, bias, 0.25), atol=1e-5)


def test_rows_that_are_aligned_are_not_copied() -> None:
    query, key, bias = torch.randn(2, 3, 4, 16), torch.randn(2, 3, 24, 16), torch.randn(1, 1, 4, 24)
    assert module._aligned(bias, query, key).data_ptr() == bias.data_ptr()


def test_later_keys_are_counted_from_the_last_query() -> None:
    assert causal_mask(2, 4, torch.device("cpu")).tolist() == [
        [False, False, False, True],
        [False, False, False, False],
    ]


def test_padding_is_what_lies_at_or_behind_the_length() -> None:
    assert padding_mask(torch.tensor([2, 3]), 3).tolist() == [[False, False, True], [False] * 3]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_query_that_sees_nothing_is_no_nan(dtype: torch.dtype) -> None:
    """Also where scores of ordinary size push the bias beyond the range of the type."""
    query, key = (
        torch.full((1, 1, 2, 16), -9.0, dtype=dtype),
        torch.full((1, 1, 3, 16), 9.0, dtype=dtype),
    )
    bias = mask_to_bias(torch.ones(1, 1, 2, 3, dtype=torch.bool), dtype)
    assert (query @ key.transpose(-1, -2) + bias).isfinite().all()
    assert attention(query, key, key, bias, 1.0).isfinite().all()


def test_heads_are_split_part_by_part() -> None:
    x = torch.arange(2 * 3 * 12.0).view(2, 3, 12)
    first, second = split_heads(x, 2, 3)
    assert first.shape == (2, 2, 3, 3)
    assert torch.equal(merge_heads(first), x[:, :, :6])
    assert torch.equal(merge_heads(second), x[:, :, 6:])


@pytest.mark.parametrize("is_bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (16, 40), (8, 100)])
def test_buckets_are_those_of_transformers(
    num_buckets: int, max_distance: int, is_bidirectional: bool
) -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    distances = torch.arange(-300, 301)
    expected = T5Attention._relative_position_bucket(
        distances, is_bidirectional, num_buckets, max_distance
    )
    given = buckets(distances, num_buckets, max_distance, is_bidirectional)
    assert torch.equal(given, expected)


def test_the_bias_of_the_last_queries_is_the_end_of_the_whole() -> None:
    bias = RelativePositionBias(32, 4, 128, is_bidirectional=False)
    torch.nn.init.normal_(bias.weight)
    whole = bias(20, 20)
    assert torch.equal(bias(3, 20), whole[:, :, -3:])
    assert torch.equal(whole[0, :, 19, 19], bias.weight[0])


def test_rms_norm_rounds_before_it_scales() -> None:
    norm = RMSNorm(64, 1e-6)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 64)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.allclose(norm(x).double(), exact * norm.weight.double(), atol=1e-6)
    half = norm.half()(x.half())
    normed = x.half().float() / (x.half().float().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.equal(half, normed.half() * norm.weight)
