"""What attention while decoding must get right (bminf/ops/attention.py): see cases.py.

Keys and values are views of a cache, strided and with NaN wherever no row has a key. What is
expected is computed in float64, query by query, from nothing but the definition.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from case import BOUNDS, DTYPES, Case, case, relative_error

from bminf.layers.position_bias import RelativeBias, buckets
from bminf.ops.attention import CHUNK, Added, Buckets, Rows, Slopes, decode_attention

HEAD_DIMS = (8, 16, 64, 80, 96, 128, 256)
LENGTHS = (1, 2, 31, 32, 33, 127, 128, 129, 1000, 4100)
SCALE = 0.3
NUM_BUCKETS, MAX_DISTANCE = 16, 40
KINDS = ("all", "causal", "bias", "slopes", "buckets")


@dataclass(frozen=True)
class Inputs:
    """Of some rows: lengths[i] keys each, of which `num_queries` queries are the last.

    kind: "all" keys are seen by each query, or what is added where it sees those up to its own.
    """

    dtype: torch.dtype
    head_dim: int
    lengths: Sequence[int]
    num_queries: int
    heads: tuple[int, int]
    kind: str

    @property
    def is_causal(self) -> bool:
        return self.kind not in ("all", "bias")

    def query(self) -> torch.Tensor:
        """(B, H, T, D), cut from a product for queries, keys and values."""
        shape = (len(self.lengths), self.num_queries, 3, self.heads[0], self.head_dim)
        return torch.randn(shape).to(self.dtype)[:, :, 1].transpose(1, 2)

    def keys(self, num_cells: int) -> torch.Tensor:
        """Keys and values (2, B, H_kv, S, D), NaN behind those that count, as KVCache lays them."""
        shape = (2, self.heads[1], len(self.lengths), num_cells, self.head_dim)
        both = torch.randn(shape).to(self.dtype).transpose(1, 2)
        for row, length in enumerate(self.lengths):
            both[:, row, :, length:] = torch.nan
        return both

    def added(self) -> Added:
        num_heads, longest = self.heads[0], max(self.lengths)
        if self.kind == "bias":
            shape = (len(self.lengths), num_heads, self.num_queries, longest)
            return torch.randn(shape).to(self.dtype)
        if self.kind == "slopes":
            return Slopes(torch.rand(num_heads))
        if self.kind == "buckets":
            weight = torch.randn(NUM_BUCKETS, num_heads).to(self.dtype)
            return RelativeBias(weight, MAX_DISTANCE).added
        return None


def expected(
    inputs: Inputs, query: torch.Tensor, rows: Sequence[torch.Tensor], added: Added
) -> torch.Tensor:
    """(B, H, T, D) float64.   rows: keys and values of each, (2, H_kv, S, D)."""
    y = torch.zeros(query.shape, dtype=torch.float64)
    group = inputs.heads[0] // inputs.heads[1]
    for b, both in enumerate(rows):
        key, value = both.double().repeat_interleave(group, 1)
        for t in range(inputs.num_queries):
            position = key.shape[1] - inputs.num_queries + t
            num_seen = position + 1 if inputs.is_causal else key.shape[1]
            if num_seen > 0:
                scores = (key[:, :num_seen] @ query[b, :, t].double()[..., None])[..., 0] * SCALE
                scores += added_to(added, b, t, position, num_seen)
                y[b, :, t] = (scores.softmax(-1)[:, None] @ value[:, :num_seen])[:, 0]
    return y


def added_to(added: Added, row: int, token: int, position: int, num_seen: int) -> torch.Tensor:
    """(H, S) float64, or what broadcasts to it."""
    back = position - torch.arange(num_seen)
    if isinstance(added, Slopes):
        return -added.slopes.double()[:, None] * back
    if isinstance(added, Buckets):
        return added.table.double()[buckets(-back, NUM_BUCKETS, MAX_DISTANCE, False)].T
    if added is None:
        return torch.zeros(1, dtype=torch.float64)
    return added[row, :, token, :num_seen].double()


def moved(added: Added, device: str) -> Added:
    if isinstance(added, Slopes):
        return Slopes(added.slopes.to(device))
    if isinstance(added, Buckets):
        return Buckets(added.table.to(device), added.of_distance.to(device))
    return None if added is None else added.to(device)


def check(given: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> None:
    assert given.dtype == dtype and given.transpose(1, 2).is_contiguous()
    bound = 2 * BOUNDS[dtype] if dtype == torch.float32 else BOUNDS[dtype]
    assert relative_error(given, right) < bound


@case
def attention_case(
    device: str,
    dtype: torch.dtype,
    head_dim: int,
    num_keys: int,
    kind: str = "causal",
    num_queries: int = 1,
    heads: tuple[int, int] = (2, 2),
) -> None:
    """Two rows of one length, as in a KVCache."""
    inputs = Inputs(dtype, head_dim, [num_keys, num_keys], num_queries, heads, kind)
    query, both, added = (
        inputs.query(),
        inputs.keys(num_keys + 3)[:, :, :, :num_keys],
        inputs.added(),
    )
    key, value = both.to(device) if device != "cpu" else both
    arguments = SCALE, moved(added, device), inputs.is_causal
    y = decode_attention(query.to(device), key, value, *arguments)
    check(y, expected(inputs, query, list(both.transpose(0, 1)), added), dtype)


@case
def rows_case(
    device: str,
    dtype: torch.dtype,
    head_dim: int,
    lengths: tuple[int, ...],
    kind: str = "causal",
    num_queries: int = 1,
    heads: tuple[int, int] = (2, 2),
) -> None:
    """Rows of different lengths in one pool of tokens, in any order and with gaps between."""
    inputs = Inputs(dtype, head_dim, lengths, num_queries, heads, kind)
    query, added = inputs.query(), inputs.added()
    pool = torch.full((2, heads[1], sum(lengths) + 5 * len(lengths), head_dim), torch.nan).to(dtype)
    ends = torch.tensor([0, *(length + 5 for length in reversed(lengths))]).cumsum(0).tolist()
    starts = [begin + 2 for begin, _ in pairwise(ends)][::-1]
    rows = []
    for start, length in zip(starts, lengths, strict=True):
        rows.append(pool[:, :, start : start + length].normal_())
    key, value = (tensor[None].to(device) for tensor in pool)
    places = (torch.tensor(x, dtype=torch.int32, device=device) for x in (lengths, starts))
    given = decode_attention(
        query.to(device), key, value, SCALE, moved(added, device), inputs.is_causal,
        Rows(max(lengths), *places),
    )  # fmt: skip
    check(given, expected(inputs, query, rows, added), dtype)


@case
def padded_attention_case(device: str, kind: str, lengths: tuple[int, ...], queries: int) -> None:
    """As many cells behind the keys as may be: the same bits."""
    inputs = Inputs(torch.float16, 64, lengths, queries, (2, 2), kind)
    query, both = inputs.query().to(device), inputs.keys(max(lengths) + 3 * CHUNK).to(device)
    added = moved(inputs.added(), device)
    num_keys = torch.tensor(lengths, dtype=torch.int32, device=device)
    found = []
    for padding in (0, 1, CHUNK, 3 * CHUNK):
        rows = Rows(max(lengths) + padding, num_keys)
        wide = added
        if isinstance(added, torch.Tensor):
            wide = torch.nn.functional.pad(added, (0, padding), value=math.nan)
        found.append(decode_attention(query, *both, SCALE, wide, inputs.is_causal, rows))
    assert found[0].isfinite().all() and all(torch.equal(y, found[0]) for y in found)


@case
def no_key_case(device: str, dtype: torch.dtype, num_cells: int) -> None:
    """A query that sees no key gives zeros: a row of length 0, and queries before the first key."""
    inputs = Inputs(dtype, 16, [0, 2, 5], 4, (2, 1), "slopes")
    query, both, added = inputs.query(), inputs.keys(num_cells), inputs.added()
    num_keys = torch.tensor(inputs.lengths, dtype=torch.int32, device=device)
    key, value = both.to(device)
    y = decode_attention(
        query.to(device), key, value, SCALE, moved(added, device), True, Rows(num_cells, num_keys)
    )
    rows = [both[:, row, :, :length] for row, length in enumerate(inputs.lengths)]
    assert not y[0].any() and not y[1, :, :2].any() and y[1, :, 2:].all()
    check(y, expected(inputs, query, rows, added), dtype)


@case
def masked_case(device: str, dtype: torch.dtype) -> None:
    """The same where minus infinity is added to all scores, and where a finite mask is."""
    inputs = Inputs(dtype, 16, [300, 300], 1, (2, 2), "bias")
    query, (key, value) = inputs.query().to(device), inputs.keys(300).to(device)
    bias = torch.zeros(2, 1, 1, 300, dtype=dtype, device=device)
    bias[0], bias[1, ..., 7:] = -math.inf, torch.finfo(dtype).min / 2
    y = decode_attention(query, key, value, SCALE, bias)
    assert not y[0].any()
    check(y[1:], decode_attention(query, key[:, :, :7], value[:, :, :7], SCALE)[1:], dtype)


@case
def bad_values_case(device: str, dtype: torch.dtype) -> None:
    """NaN and infinity stay in their head, and in a value in their column."""
    inputs = Inputs(dtype, 80, [300], 2, (4, 2), "causal")
    query, (key, value) = inputs.query().to(device), inputs.keys(300).to(device)
    right = decode_attention(query, key, value, SCALE, None, True)
    for bad in (math.nan, math.inf):
        for tensor in (query, key, value):
            kept, others = tensor[0, 1, 1, 5].clone(), torch.ones(right.shape, dtype=torch.bool)
            tensor[0, 1, 1, 5] = bad
            y = decode_attention(query, key, value, SCALE, None, True)
            tensor[0, 1, 1, 5] = kept
            where = {id(query): (0, 1, 1), id(key): (0, slice(2, 4))}
            others[where.get(id(tensor), (0, slice(2, 4), slice(None), 5))] = False
            assert torch.equal(y[others.to(device)], right[others.to(device)])
            assert not y[~others.to(device)].isfinite().all()


@case
def awkward_query_case(device: str) -> None:
    """Queries that begin at an odd place, and biases of any strides."""
    inputs = Inputs(torch.float16, 24, [33, 33], 3, (3, 3), "bias")
    query, (key, value) = inputs.query().to(device), inputs.keys(33).to(device)
    bias = inputs.added()
    assert isinstance(bias, torch.Tensor)
    bias = bias.to(device)
    right = decode_attention(query, key, value, SCALE, bias)
    shifted = torch.empty(query.numel() + 1, device=device, dtype=query.dtype)[1:]
    shifted = shifted.view(query.shape).copy_(query)
    turned = bias.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    assert torch.equal(decode_attention(shifted, key, value, SCALE, turned), right)
    wide = query.repeat_interleave(2, -1)[..., ::2]
    assert torch.equal(decode_attention(wide, key, value, SCALE, bias), right)
    for dim in range(4):
        one = bias.narrow(dim, 0, 1)
        broadcast = one.expand(bias.shape).contiguous()
        given = decode_attention(query, key, value, SCALE, one)
        assert torch.equal(given, decode_attention(query, key, value, SCALE, broadcast))


# ---- the lists -----------------------------------------------------------------------------------


def attention_cases() -> Iterator[Case]:
    """kernels/attention_decode.cu and attention_decode_merge.cu."""
    for head_dim in HEAD_DIMS:
        for num_keys in LENGTHS:
            yield attention_case(torch.float16, head_dim, num_keys, heads=(1, 1))
    for dtype in DTYPES:
        for kind in KINDS:
            yield attention_case(dtype, 64, 300, kind)
            yield attention_case(dtype, 80, 270, kind, num_queries=5)
    for head_dim in HEAD_DIMS:
        yield attention_case(torch.float16, head_dim, 40, num_queries=3, heads=(1, 1))
    for num_queries in (2, 4, 9, 16):
        yield attention_case(torch.float16, 64, 33, num_queries=num_queries)
    yield attention_case(torch.float32, 256, 4100, heads=(1, 1))
    yield attention_case(torch.bfloat16, 256, 520, "buckets", 16)
    for group in (1, 2, 3, 5, 6, 7, 8, 12, 15, 16):
        yield attention_case(torch.float16, 16, 33, "slopes", heads=(2 * group, 2))
    for group, num_queries in ((2, 2), (3, 4), (16, 5)):
        for kind in KINDS:
            yield attention_case(torch.bfloat16, 64, 65, kind, num_queries, (group, 1))
    for kind in KINDS:
        yield rows_case(torch.float16, 64, (1, 300, 33, 257), kind)
        yield padded_attention_case(kind, (5, 256, 300), 1)
    yield rows_case(torch.float32, 80, (5, 600, 9), "buckets", 3, (4, 2))
    yield padded_attention_case("causal", (3, 40), 3)
    for dtype in DTYPES:
        yield no_key_case(dtype, 7)
        yield no_key_case(dtype, 2 * CHUNK)
        yield masked_case(dtype)
        yield bad_values_case(dtype)
    yield awkward_query_case()


def few_attention_cases() -> list[Case]:
    """Every line, for sanitizers."""
    half, bfloat16, single = DTYPES
    return [
        attention_case(half, 64, 33, "slopes"),
        attention_case(bfloat16, 80, 300, "buckets", 3),
        attention_case(single, 16, 270, "bias", 1, (3, 1)),
        rows_case(half, 64, (1, 70, 33), "causal"),
        no_key_case(half, 2 * CHUNK),
    ]
