"""Attention while decoding: its plain torch, what it refuses, how it cuts its work.

bminf/ops/attention.py.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
from attention_cases import attention_cases
from case import Case
from host_launcher import NotingLauncher, served_by

from bminf.cuda.launcher import fused_kernels
from bminf.errors import ArgumentError
from bminf.ops.attention import (
    CHUNK,
    Buckets,
    Rows,
    Slopes,
    decode_attention,
    decode_launch,
)

CASES = list(attention_cases())
ONES, INTS = torch.ones(2), torch.ones(2, dtype=torch.int32)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_plain_torch_is_right_as_the_kernel_is(case: Case) -> None:
    torch.manual_seed(0)
    case.run("cpu")


def heads(
    num_queries: int = 1, num_keys: int = 9, num_heads: int = 2, key_heads: int = 2, **like: Any
) -> list[torch.Tensor]:
    """Of a batch of 2: query, key, value."""
    key, value = torch.randn(2, 2, key_heads, num_keys, 16, **like)
    return [torch.randn(2, num_heads, num_queries, 16, **like), key, value]


@pytest.fixture
def noting() -> Iterator[NotingLauncher]:
    launcher = NotingLauncher()
    with served_by(launcher):
        yield launcher


# ---- what is refused -----------------------------------------------------------------------------


def with_changed(index: int, changed: torch.Tensor) -> list[torch.Tensor]:
    given = heads()
    given[index] = changed
    return given


MISALIGNED = torch.randn(2 * 2 * 9 * 16 + 1)[1:].view(2, 2, 9, 16)
REFUSED: list[tuple[list[torch.Tensor], dict[str, Any], str]] = [
    (with_changed(0, torch.randn(2, 2, 16)), {}, "they must be .B, H, T, D."),
    (with_changed(1, torch.randn(2, 2, 8, 16)), {}, "they must be .B, H, T, D."),
    (heads(num_heads=3), {}, "query has 3 heads of 16, key 2 of 16"),
    (with_changed(0, torch.randn(2, 2, 1, 24)), {}, "2 heads of 24, key 2 of 16"),
    (heads(17, 20), {}, "17 queries, heads of 16; accepted: 1 to 16 queries"),
    ([torch.randn(1, 1, 1, 12)] * 3, {}, "heads of a multiple of 8 up to 256"),
    ([torch.randn(1, 1, 1, 264)] * 3, {}, "heads of a multiple of 8 up to 256"),
    (heads(dtype=torch.float64), {}, "accepted: float32, float16, bfloat16"),
    (with_changed(0, torch.randn(2, 2, 1, 16).half()), {}, "all the same"),
    (with_changed(2, torch.empty(2, 2, 9, 16, device="meta")), {}, "are on cpu, cpu and meta"),
    (with_changed(1, torch.randn(2, 2, 16, 9).mT), {}, "must be alike"),
    (with_changed(1, torch.randn(2, 2, 9, 24)[..., :16]), {}, "must be alike"),
    (with_changed(1, MISALIGNED), {}, "begin at a multiple of 16 bytes"),
    (with_changed(0, torch.randn(3, 2, 1, 16)), {}, "query has 3 rows, key 2"),
    (heads(), {"rows": Rows(10)}, "num_keys=10; accepted: 0 to 9"),
    (heads(), {"rows": Rows(9, ONES)}, "lengths is torch.float32 .* int32, .2,., contiguous"),
    (heads(), {"rows": Rows(9, INTS, INTS[:1])}, "starts is torch.int32 of shape .1,."),
    (heads(), {"added": torch.randn(2, 2, 1, 8)}, "a bias of shape .2, 2, 1, 8.; accepted"),
    (heads(), {"added": torch.randn(2, 3, 1, 9)}, "a bias of shape .2, 3, 1, 9.; accepted"),
    (heads(), {"added": torch.randn(1, 9)}, "a bias of shape .1, 9.; accepted"),
    (heads(), {"added": torch.randn(1, 1, 1, 9).half()}, "the bias: torch.float16"),
    (heads(), {"added": Slopes(ONES)}, "Slopes are of distances to earlier keys: is_causal"),
    (heads(), {"added": Slopes(torch.ones(3)), "is_causal": True}, "slopes: .* of shape .3,."),
    (heads(), {"added": Slopes(ONES.half()), "is_causal": True}, "slopes: torch.float16"),
    (heads(), {"added": Buckets(torch.ones(4, 3), INTS), "is_causal": True}, "table: .*.4, 3."),
    (heads(), {"added": Buckets(torch.ones(4), INTS), "is_causal": True}, "table: .*.4,."),
    (heads(), {"added": Buckets(torch.ones(4, 2), ONES), "is_causal": True}, "of_distance: "),
]


@pytest.mark.parametrize(("given", "more", "said"), REFUSED)
def test_what_the_kernel_cannot_read_is_refused_before_anything_is_launched(
    given: list[torch.Tensor], more: dict[str, Any], said: str, noting: NotingLauncher
) -> None:
    with pytest.raises(ArgumentError, match=said):
        decode_attention(*given, 0.5, **more)
    assert not noting.launches


# ---- who computes --------------------------------------------------------------------------------


def test_a_kernel_is_taken_where_there_is_one_and_nothing_records(noting: NotingLauncher) -> None:
    query, key, value = heads()
    found = decode_launch(query, key, value)
    assert found is not None and found.launcher is noting
    assert decode_launch(*heads(17, 17)) is None
    assert decode_launch(*(x[..., :12] for x in (query, key, value))) is None
    with fused_kernels(False):
        assert decode_launch(query, key, value) is None
    assert decode_launch(query.requires_grad_(), key, value) is None
    with torch.no_grad():
        assert decode_launch(query, key, value) == found
    asked = []
    make_fx(lambda *given: asked.append(decode_launch(*given)) or given[0])(query, key, value)
    assert asked == [None]


def test_gradients_go_through_plain_torch(noting: NotingLauncher) -> None:
    given = [x.requires_grad_() for x in heads(2)]
    decode_attention(*given, 0.5, None, True).square().sum().backward()
    expected = [x.detach().clone().requires_grad_() for x in given]
    mask = torch.ones(2, 9, dtype=torch.bool).tril(7)
    torch.nn.functional.scaled_dot_product_attention(
        *expected, attn_mask=mask, scale=0.5
    ).square().sum().backward()
    for one, other in zip(given, expected, strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    assert not noting.launches


# ---- how the work is cut -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_queries", "num_heads", "key_heads", "rows", "blocks"),
    [
        (1, 2, 2, 1, 1),
        (2, 2, 2, 2, 1),
        (3, 2, 2, 4, 1),  # one of them is no query
        (9, 2, 2, 4, 4),
        (1, 6, 2, 4, 1),
        (1, 7, 1, 4, 2),
        (5, 6, 2, 4, 8),  # 3 heads of 8 tokens, of which 5 are there
        (16, 16, 1, 4, 64),
    ],
)
def test_the_queries_of_a_head_of_keys_are_dealt_out_to_blocks(
    num_queries: int,
    num_heads: int,
    key_heads: int,
    rows: int,
    blocks: int,
    noting: NotingLauncher,
) -> None:
    decode_attention(*heads(num_queries, 20, num_heads, key_heads), 0.5)
    ((kernel, grid),) = noting.launches
    assert dict(kernel.macros)["ROWS"] == rows and grid == (blocks, key_heads, 2)


@pytest.mark.parametrize("num_keys", [1, CHUNK, CHUNK + 1, 5 * CHUNK])
def test_more_than_a_chunk_of_keys_is_split_and_merged(
    num_keys: int, noting: NotingLauncher
) -> None:
    decode_attention(*heads(1, num_keys), 0.5)
    chunks = -(-num_keys // CHUNK)
    assert noting.launches[0][1] == (chunks, 2, 2)
    assert noting.names[1:] == ["attention_decode_merge"] * (chunks > 1)


def test_nothing_to_compute_launches_nothing(noting: NotingLauncher) -> None:
    query, key, value = heads()
    assert decode_attention(query[:0], key[:0], value[:0], 0.5).shape == (0, 2, 1, 16)
    assert not noting.launches
    decode_attention(query, key[:, :, :0], value[:, :, :0], 0.5)
    assert noting.names == ["attention_decode"]  # zeros


def test_no_keys_at_all_give_zeros() -> None:
    query, key, value = heads()
    assert not decode_attention(query, key[:, :, :0], value[:, :, :0], 0.5).any()
    assert decode_attention(query[:0], key[:0], value[:0], 0.5).shape == (0, 2, 1, 16)
