"""Keys and values of the tokens so far."""

from __future__ import annotations

import torch

from bminf.layers.kv_cache import KVCache, cache_bytes


def test_a_cache_gives_back_what_was_appended() -> None:
    torch.manual_seed(0)
    cache = KVCache(2, 3, 4, 10, 8, torch.float32, "cpu")
    first, second = torch.randn(2, 3, 4, 5, 8), torch.randn(2, 3, 4, 1, 8)
    for layer in range(2):
        cache.append(layer, first[layer], first[layer] + 1)
    cache.advance(5)
    keys, values = cache.append(1, second[1], second[1] + 1)
    assert torch.equal(keys, torch.cat([first[1], second[1]], 2))
    assert torch.equal(values, keys + 1)
    assert keys.data_ptr() == cache.keys[1].data_ptr()  # nothing is copied
    assert cache.keys.nbytes + cache.values.nbytes == cache_bytes(2, 3, 4, 10, 8, torch.float32)


def test_a_cache_holds_fewer_rows_than_it_has_room_for() -> None:
    cache = KVCache(1, 3, 2, 4, 8, torch.float32, "cpu")
    keys, _ = cache.append(0, torch.ones(2, 2, 1, 8), torch.ones(2, 2, 1, 8))
    assert keys.shape == (2, 2, 1, 8)
    assert not cache.keys[0, 2].any()


def test_selecting_rows_repeats_and_reorders_them() -> None:
    cache = KVCache(2, 4, 2, 6, 8, torch.float32, "cpu")
    rows = torch.randn(3, 2, 5, 8)
    for layer in range(2):
        cache.append(layer, rows + layer, rows - layer)
    cache.advance(5)
    cache.select(torch.tensor([2, 0, 0, 1]))
    for layer in range(2):
        keys, values = cache.read(layer, 4, 5)
        assert torch.equal(keys, rows[[2, 0, 0, 1]] + layer)
        assert torch.equal(values, rows[[2, 0, 0, 1]] - layer)


def test_a_reset_cache_begins_anew() -> None:
    cache = KVCache(1, 1, 1, 3, 8, torch.float32, "cpu")
    cache.append(0, torch.ones(1, 1, 3, 8), torch.ones(1, 1, 3, 8))
    cache.advance(3)
    cache.reset()
    keys, _ = cache.append(0, torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 1, 8))
    assert keys.shape[2] == 1 and not keys.any()
