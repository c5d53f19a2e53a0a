from __future__ import annotations

import itertools

import pytest
import torch

from bminf.layers.attention import attention, causal_mask, mask_to_bias
from bminf.layers.kv_cache import KVCache
from bminf.layers.packed_cache import PackedCache, Segments, Span

H, D = 2, 8


def causal(num_queries: int, num_keys: int) -> torch.Tensor | None:
    if num_queries == 1:
        return None
    mask = causal_mask(num_queries, num_keys, torch.device("cpu"))
    return mask_to_bias(mask, torch.float32)[None, None]


def parts(lengths: list[int]) -> list[slice]:
    ends = list(itertools.accumulate(lengths))
    return [slice(end - n, end) for end, n in zip(ends, lengths, strict=True)]


@pytest.mark.parametrize("copies", [False, True])
def test_rows_in_one_pass_attend_as_each_in_a_cache_of_its_own(copies: bool) -> None:
    torch.manual_seed(0)
    pool, starts = KVCache(2, 1, H, 40, D, torch.float32, "cpu"), [7, 0, 25]
    own = [KVCache(2, 1, H, 12, D, torch.float32, "cpu") for _ in starts]
    for lengths in ([3, 1, 5], [1, 4, 1], [2, 1, 1]):
        packed = PackedCache(
            pool.tokens,
            [Span(s, c.length, n) for s, c, n in zip(starts, own, lengths, strict=True)],
            copies,
        )
        total = sum(lengths)
        assert packed.positions(total).tolist() == [
            position for c, n in zip(own, lengths, strict=True) for position in c.positions(n)
        ]
        for layer in range(2):
            query, key, value = torch.randn(3, 1, H, total, D)
            given = packed.attend(layer, query, key, value, packed.bias(total, causal), 0.5)
            for cache, part in zip(own, parts(lengths), strict=True):
                q, k, v = (x[:, :, part] for x in (query, key, value))
                bias = cache.bias(q.shape[2], causal)
                expected = cache.attend(layer, q, k, v, bias, 0.5)
                torch.testing.assert_close(given[:, :, part], expected)
        for cache, n in zip(own, lengths, strict=True):
            cache.advance(n)


def test_a_row_alone_gives_the_bits_of_a_cache_of_its_own() -> None:
    torch.manual_seed(1)
    pool, own = (KVCache(1, 1, H, 30, D, torch.float32, "cpu") for _ in range(2))
    for n in (5, 1, 1):
        query, key, value = torch.randn(3, 1, H, n, D)
        packed = PackedCache(pool.tokens, [Span(0, own.length, n)])
        given = packed.attend(0, query, key, value, packed.bias(n, causal), 0.5)
        assert torch.equal(given, own.attend(0, query, key, value, own.bias(n, causal), 0.5))
        own.advance(n)


def test_tokens_of_no_row_get_zeros_and_change_nothing() -> None:
    torch.manual_seed(2)
    pool = KVCache(1, 1, H, 10, D, torch.float32, "cpu")
    packed = PackedCache(pool.tokens, [Span(4, 0, 2)], copies=True)
    query, key, value = torch.randn(3, 1, H, 6, D)
    given = packed.attend(0, query, key, value, packed.bias(6, causal), 1.0)
    assert given[:, :, 2:].eq(0).all() and given[:, :, :2].ne(0).all()
    assert pool.tokens[0][0, :, 6:].eq(0).all() and pool.tokens[0][0, :, :4].eq(0).all()
    assert packed.positions(6).tolist() == [0, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("copies", [False, True])
def test_texts_of_an_encoder_attend_to_themselves(copies: bool) -> None:
    torch.manual_seed(3)
    lengths = [3] if copies else [3, 1, 4]
    query, key, value = torch.randn(3, 1, H, sum(lengths), D)
    biases = [torch.randn(1, H, n, n) for n in lengths]
    given = Segments(lengths, copies).attend(query, key, value, biases, 0.5)
    for part, bias in zip(parts(lengths), biases, strict=True):
        q, k, v = (x[:, :, part] for x in (query, key, value))
        torch.testing.assert_close(given[:, :, part], attention(q, k, v, bias, 0.5))


def test_the_batch_of_a_cache_is_a_view_of_its_pool() -> None:
    cache = KVCache(2, 3, H, 5, D, torch.float32, "cpu")
    cache.append(1, torch.ones(3, H, 2, D), torch.ones(3, H, 2, D))
    used = [row * 5 + token for row in range(3) for token in range(2)]
    assert cache.tokens[0][1].sum((0, 2)).nonzero().flatten().tolist() == used
    cache.move_tokens(5, 3, 6)
    assert cache.keys[1, 0, 0, :, 0].tolist() == [1, 1, 0, 1, 1]
