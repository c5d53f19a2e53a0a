"""A pass of one token of each row, whose places are on the device (bminf/layers/step_cache.py), is
that of a PackedCache, and no key or cell beyond a row's own matters."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from host_launcher import HostLauncher, served_by

from bminf.layers.alibi import Alibi, slopes_on
from bminf.layers.attention import Causal, ScoreBias
from bminf.layers.kv_cache import KVCache
from bminf.layers.packed_cache import PackedCache, Span
from bminf.layers.position_bias import RelativeBias
from bminf.layers.rotary import rotary_table
from bminf.layers.step_cache import Places, StepCache

HEADS, HEAD_DIM, TOKENS = 4, 16, 40
SPANS = (Span(3, 5, 1), Span(11, 0, 1), Span(20, 12, 1))
CPU = torch.device("cpu")
BIASES: dict[str, ScoreBias] = {
    "none": None,
    "causal": Causal(),
    "alibi": Alibi(slopes_on(CPU, HEADS)),
    "relative": RelativeBias(torch.randn(8, HEADS), 16),
}
where = pytest.mark.parametrize("runs_kernels", [False, True], ids=["torch", "kernels"])


def launched(runs_kernels: bool) -> AbstractContextManager[None]:
    return served_by(HostLauncher()) if runs_kernels else nullcontext()


def pool() -> KVCache:
    """With something in every cell."""
    cache = KVCache(2, 1, HEADS, TOKENS, HEAD_DIM, torch.float32, "cpu")
    generator = torch.Generator().manual_seed(1)
    for tokens in cache.tokens:
        tokens.copy_(torch.randn(tokens.shape, generator=generator))
    return cache


def places(spans: Sequence[Span], num_keys: int) -> Places:
    found = Places(len(spans), num_keys, CPU)
    found.fill([span.start for span in spans], [span.num_keys for span in spans])
    return found


def heads(seed: int, num_rows: int = len(SPANS)) -> list[torch.Tensor]:
    """Queries, keys and values, as parts of one projection."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, num_rows, 3, HEADS, HEAD_DIM, generator=generator)
    return [*x.permute(2, 0, 3, 1, 4).unbind()]


@where
@pytest.mark.parametrize("name", BIASES)
def test_it_computes_what_a_packed_cache_does(name: str, runs_kernels: bool) -> None:
    (query, key, value), bias = heads(2), BIASES[name]
    ours, theirs = pool(), pool()
    expected = PackedCache(theirs.tokens, SPANS).attend(1, query, key, value, [bias] * 3, 0.25)
    step = StepCache(ours.tokens, places(SPANS, TOKENS))
    with launched(runs_kernels):
        y = step.attend(1, query, key, value, bias, 0.25)
    assert y.shape == expected.shape and torch.allclose(y, expected, atol=2e-6)
    for a, b in zip(ours.tokens, theirs.tokens, strict=True):
        assert torch.equal(a, b)
    assert step.positions(3).tolist() == [5, 0, 12]


@where
def test_queries_and_keys_are_rotated(runs_kernels: bool) -> None:
    query, key, value = heads(3)
    tables = rotary_table(TOKENS, HEAD_DIM, torch.float32)
    cos, sin = (table[[5, 0, 12]][None, None] for table in tables)
    ours, theirs = pool(), pool()
    packed = PackedCache(theirs.tokens, SPANS)
    expected = packed.attend(0, query, key, value, [None] * 3, 1.0, (cos, sin))
    with launched(runs_kernels):
        step = StepCache(ours.tokens, places(SPANS, TOKENS))
        y = step.attend(0, query, key, value, None, 1.0, (cos, sin))
    assert torch.allclose(y, expected, atol=2e-6)
    assert torch.allclose(ours.tokens[0], theirs.tokens[0], atol=1e-6)


@where
def test_keys_that_a_row_has_not_change_no_bit(runs_kernels: bool) -> None:
    query, key, value = heads(4)
    with launched(runs_kernels):
        results = [
            StepCache(pool().tokens, places(SPANS, num_keys)).attend(
                0, query, key, value, Causal(), 1.0
            )
            for num_keys in (13, 14, 32, TOKENS)
        ]
    assert all(torch.equal(one, results[0]) for one in results)


def test_a_row_twice_writes_what_it_writes_once() -> None:
    """As rows do that stand for those that are missing."""
    cells, again = pool(), pool()
    query, key, value = heads(5)
    twice = [tokens[:, :, [0, 1, 2, 0]] for tokens in (query, key, value)]
    y = StepCache(cells.tokens, places(SPANS, TOKENS)).attend(0, query, key, value, None, 1.0)
    both = StepCache(again.tokens, places([*SPANS, SPANS[0]], TOKENS))
    z = both.attend(0, *twice, None, 1.0)  # type: ignore[arg-type]
    assert torch.equal(z[:, :, :3], y) and torch.equal(z[:, :, 3], y[:, :, 0])
    assert all(torch.equal(a, b) for a, b in zip(cells.tokens, again.tokens, strict=True))


def test_places_that_are_filled_again_move_no_memory() -> None:
    found = places(SPANS, TOKENS)
    addresses = found.starts.data_ptr(), found.lengths.data_ptr()
    found.fill([1, 2, 3], [4, 5, 6])
    assert (found.starts.data_ptr(), found.lengths.data_ptr()) == addresses
    assert found.starts.tolist() == [1, 2, 3] and found.lengths.tolist() == [4, 5, 6]
