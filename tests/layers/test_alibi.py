"""ALiBi: slopes, distances from each query, padding, tiles, and half precision.

bminf/layers/alibi.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bminf.layers import alibi
from bminf.layers.alibi import Alibi, queries_of_a_tile, slopes
from bminf.layers.attention import attention, attention_in_products

SCALE = 0.25


def heads(num_keys: int, num_heads: int = 6, batch_size: int = 1, **like: Any) -> Any:
    torch.manual_seed(num_keys)
    return [torch.randn(batch_size, num_heads, num_keys, 16, **like) for _ in range(3)]


def made(num_heads: int = 6, padding: list[int] | None = None) -> Alibi:
    return Alibi(torch.tensor(slopes(num_heads)), padding)


def reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, padding: int = 0
) -> torch.Tensor:
    """(H, T, D) float64 of one row, position by position; zeros for padding."""
    num_heads, num_keys, steep = key.shape[0], key.shape[1], slopes(key.shape[0])
    y = torch.zeros(query.shape, dtype=torch.float64)
    for head in range(num_heads):
        for at in range(query.shape[1]):
            position = num_keys - query.shape[1] + at
            seen = slice(padding, position + 1)
            if position < padding:
                continue
            scores = SCALE * key[head, seen].double() @ query[head, at].double()
            scores -= steep[head] * (position - torch.arange(padding, position + 1))
            y[head, at] = scores.softmax(0) @ value[head, seen].double()
    return y


def test_slopes_of_a_power_of_two_and_of_other_numbers() -> None:
    assert slopes(4) == [0.25, 0.0625, 0.015625, 0.00390625]
    assert slopes(6) == [*slopes(4), 0.5, 0.125]
    of_176b = slopes(112)  # BLOOM-176B
    expected = {0: 0.917004, 3: 0.707107, 63: 0.00390625, 64: 0.957603, 111: 0.0163168}
    assert len(of_176b) == 112
    for head, slope in expected.items():
        assert of_176b[head] == pytest.approx(slope, rel=1e-5)
    assert slopes(1) == [2**-8]


@pytest.mark.parametrize("attend", [attention, attention_in_products])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(9, 9), (1, 9), (3, 9)])
def test_it_is_causal_attention_with_distances(
    attend: Any, num_queries: int, num_keys: int
) -> None:
    query, key, value = heads(num_keys)
    query = query[:, :, -num_queries:]
    y = attend(query, key, value, made(), SCALE)
    assert torch.allclose(y[0].double(), reference(query[0], key[0], value[0]), atol=2e-6)


@pytest.mark.parametrize("num_queries", [9, 3, 1])
def test_padding_is_not_seen_and_gives_zeros(num_queries: int) -> None:
    """Each row has the bits that it has alone."""
    query, key, value = heads(9, batch_size=3)
    query = query[:, :, -num_queries:]
    for row, padding in enumerate([0, 4, 8]):
        key[row, :, :padding], value[row, :, :padding] = torch.nan, torch.nan
    y = attention(query, key, value, made(padding=[0, 4, 8]), SCALE)
    for row, padding in enumerate([0, 4, 8]):
        expected = reference(query[row], key[row], value[row], padding)
        assert torch.allclose(y[row].double(), expected, atol=2e-6)
        tokens = max(0, padding - 9 + num_queries)
        assert not y[row, :, :tokens].any()
        own = [x[row : row + 1, :, start:] for x, start in
               ((query, tokens), (key, padding), (value, padding))]  # fmt: skip
        assert torch.equal(y[row, :, tokens:], attention(*own, made(), SCALE)[0])


@pytest.mark.parametrize("padding", [None, [3, 0]])
def test_some_queries_at_a_time_give_what_all_at_once_do(
    padding: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, key, value = heads(23, batch_size=2)
    whole = attention(query, key, value, made(padding=padding), SCALE)
    monkeypatch.setattr(alibi, "TILE_BYTES", 4 * 6 * 23 * 5)
    assert queries_of_a_tile(6, 23) == 5
    tiled = attention(query, key, value, made(padding=padding), SCALE)
    assert torch.allclose(tiled, whole, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_the_result_alone(dtype: torch.dtype) -> None:
    """Positions of 16 bits would have steps of 1 or 8 at the end of such a text."""
    halves = [x.to(dtype) for x in heads(2048, num_heads=2)]
    halves[0] = halves[0][:, :, -4:]
    y = attention(*halves, made(2), SCALE)
    exact = attention(*(x.float() for x in halves), made(2), SCALE)
    assert y.dtype == dtype and torch.equal(y, exact.to(dtype))


def test_large_negative_scores_in_half_precision_stay_finite() -> None:
    query, key, value = heads(5, batch_size=2, dtype=torch.float16)
    query, key = query * 100, -query * 100
    y = attention(query, key, value, made(padding=[0, 4]), SCALE)
    assert y.isfinite().all()


def test_the_bias_of_a_token_is_made_once_for_all_layers() -> None:
    one = made()
    assert one.bias(1, 7) is one.bias(1, 7)
    assert one.bias(1, 8).shape[-1] == 8
