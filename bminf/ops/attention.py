"""Attention of a few queries to the keys and values in a cache: a step of decoding.

Kernels: kernels/attention_decode.cu; kernels/attention_decode_merge.cu, for more than CHUNK keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import torch

from bminf.cuda.launcher import Launcher
from bminf.cuda.source import Kernel, LaunchPlan
from bminf.errors import ArgumentError
from bminf.ops.fused import launcher_in_place
from bminf.ops.rows import ELEMENTS, KERNEL_ALIGNMENT, KERNEL_COLUMNS

MAX_QUERIES = 16
MAX_HEAD_DIM = 256
CHUNK = 256
"""Keys of a block: a power of two, at least as many as a block has threads. Fixed, so that a result
does not depend on how many cells a cache has behind the keys that count."""

_THREADS = 256
_MAX_GRID = 65535  # in y and z


@dataclass(frozen=True)
class Rows:
    """Where the keys of each row of a batch are, for rows of different lengths.

    num_keys: the most that a row has; what is launched is for so many.   lengths: (B,) int32 on the
    device, how many count; None is num_keys.   starts: (B,) int32, the token of the keys that is
    the first of a row, also of keys (1, H_kv, N, D) that all rows share; None is 0.
    That rows lie inside the keys is not checked: it is known to the device alone.
    """

    num_keys: int
    lengths: torch.Tensor | None = None
    starts: torch.Tensor | None = None


@dataclass(frozen=True)
class Slopes:
    """slopes: (H,) float32. A score falls by so much for each key between query and key (ALiBi)."""

    slopes: torch.Tensor


@dataclass(frozen=True)
class Buckets:
    """A bias that depends on the distance from a key to a later query, as T5 has it.

    table: (num_buckets, H).   of_distance: (max_distance + 1,) int32, the bucket of each distance;
    the last one is that of all beyond.
    """

    table: torch.Tensor
    of_distance: torch.Tensor


Added: TypeAlias = torch.Tensor | Slopes | Buckets | None
"""To scores: a tensor that broadcasts to (B, H, T, S), or what the kernel makes it of."""


def decode_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    added: Added = None,
    is_causal: bool = False,
    rows: Rows | None = None,
) -> torch.Tensor:
    """softmax(scale * query key^T + added) value, with sums in float32.

    query: (B, H, T, D) float32, float16 or bfloat16, T up to 16, D a multiple of 8 up to 256.
    key, value: (B, H_kv, S, D) of the same type, views of a cache; H is a multiple of H_kv, and
        heads of queries that follow one another share a head of keys.
    added: see Added; a table and a tensor have the type of query. Slopes and Buckets are for
        is_causal.
    is_causal: the queries are the last of the keys of their row, and see those up to their own.
    rows: where the keys of each row are; None is all S.
    Returns (B, H, T, D), whose memory is (B, T, H, D); a query that sees no key gives 0.
    Raises ArgumentError before any work.
    """
    _check(query, key, value, rows)
    rows = rows or Rows(key.shape[2])
    _check_added(query, added, is_causal, rows.num_keys)
    launch = decode_launch(query, key, value)
    if launch is None:
        return decode_attention_reference(query, key, value, scale, added, is_causal, rows)
    return launch(query, key, value, scale, added, is_causal, rows)


def decode_launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    launcher: Launcher | None = None,
) -> DecodeLaunch | None:
    """Calls a kernel for such tensors; None where torch's operators are to be taken: for many
    queries, other heads, other devices, and where launcher_in_place() says so.

    launcher: what that has said already; None asks it.
    """
    if query.shape[2] > MAX_QUERIES:
        return None
    launcher = launcher or launcher_in_place(query, key, value)
    if launcher is None:
        return None
    plan = _plan_of(query, key, value)
    return None if isinstance(plan, str) else DecodeLaunch(launcher, plan)


# ---- check ---------------------------------------------------------------------------------------


def _check(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: Rows | None) -> None:
    """Raise ArgumentError for tensors that the kernel does not take."""
    plan = _plan_of(query, key, value)
    if isinstance(plan, str):
        raise ArgumentError(plan)
    starts = None if rows is None else rows.starts
    if key.shape[0] != query.shape[0] and (starts is None or key.shape[0] != 1):
        raise ArgumentError(
            f"query has {query.shape[0]} rows, key {key.shape[0]}; there must be as many, or one "
            "with `starts` in it"
        )
    if rows is not None:
        _check_rows(query, key, rows)


def _check_rows(query: torch.Tensor, key: torch.Tensor, rows: Rows) -> None:
    for name, tensor in (("lengths", rows.lengths), ("starts", rows.starts)):
        if tensor is None:
            continue
        expected = (query.shape[0],), torch.int32, query.device
        if (tuple(tensor.shape), tensor.dtype, tensor.device) != expected or tensor.stride() != (
            1,
        ):
            raise ArgumentError(
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}; it "
                f"must be int32, ({query.shape[0]},), contiguous, on {query.device}"
            )
    if not 0 <= rows.num_keys <= key.shape[2]:
        raise ArgumentError(f"num_keys={rows.num_keys}; accepted: 0 to {key.shape[2]}, as key has")


def _plan_of(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> _Plan | str:
    """How such tensors are computed, or why the kernel does not take them."""
    shape = key.shape
    if query.dim() != 4 or len(shape) != 4 or shape != value.shape:
        return (
            f"query, key and value have shapes {tuple(query.shape)}, {tuple(key.shape)} and "
            f"{tuple(value.shape)}; they must be (B, H, T, D), and twice (B, H_kv, S, D)"
        )
    if (key.data_ptr() | value.data_ptr()) % KERNEL_ALIGNMENT:
        return "key and value must begin at a multiple of 16 bytes"
    num_rows, num_heads, _, head_dim = shape
    given = (
        *(query.dtype, query.device, query.shape, query.stride()),
        *(key.dtype, key.device, (num_rows, num_heads, head_dim), key.stride()),
        *(value.dtype, value.device, value.stride()),
    )
    plan = _plans.get(given)
    if plan is None:
        if len(_plans) >= _MAX_PLANS:
            _plans.clear()
        plan = _plans[given] = _plan(given[:4], given[4:8], given[8:])
    return plan


_MAX_PLANS = 256
_plans: dict[tuple[Any, ...], _Plan | str] = {}
"""By all that _plan() looks at."""


def _check_added(query: torch.Tensor, added: Added, is_causal: bool, num_keys: int) -> None:
    """Raise ArgumentError for what cannot be added to scores."""
    if added is None:
        return
    if isinstance(added, torch.Tensor):
        _check_tensor("the bias", added, query.dtype, query.device)
        sizes = tuple(added.shape)
        is_wide = len(sizes) == 4 and (sizes[3] == 1 or sizes[3] >= num_keys)
        if not is_wide or any(
            a not in (1, b) for a, b in zip(sizes[:3], query.shape, strict=False)
        ):
            raise ArgumentError(
                f"a bias of shape {sizes}; accepted: {(*query.shape[:3], num_keys)}, or 1 for any"
            )
        return
    if not is_causal:
        raise ArgumentError(f"{type(added).__name__} are of distances to earlier keys: is_causal")
    num_heads = query.shape[1]
    if isinstance(added, Slopes):
        _check_tensor("slopes", added.slopes, torch.float32, query.device, (num_heads,))
        return
    num_buckets = added.table.shape[0] if added.table.dim() == 2 else 1
    _check_tensor("table", added.table, query.dtype, query.device, (num_buckets, num_heads))
    size = max(1, added.of_distance.numel())
    _check_tensor("of_distance", added.of_distance, torch.int32, query.device, (size,))


def _check_tensor(
    name: str,
    tensor: torch.Tensor,
    dtype: torch.dtype,
    device: torch.device,
    shape: tuple[int, ...] | None = None,
) -> None:
    is_shaped = shape is None or (tuple(tensor.shape) == shape and tensor.is_contiguous())
    if tensor.dtype != dtype or tensor.device != device or not is_shaped:
        expected = "" if shape is None else f" of shape {shape}, contiguous,"
        raise ArgumentError(
            f"{name}: {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}; it must be "
            f"{dtype}{expected} on {device}"
        )


# ---- reference -----------------------------------------------------------------------------------


def decode_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    added: Added = None,
    is_causal: bool = False,
    rows: Rows | None = None,
) -> torch.Tensor:
    """The same in plain torch, row by row."""
    rows = rows or Rows(key.shape[2])
    y = [
        _attended(query[row], *keys, scale, _row_of(added, row), is_causal)
        for row, keys in enumerate(_keys_of_rows(query.shape[0], key, value, rows))
    ]
    if not y:
        return torch.zeros_like(query)
    return torch.stack(y).to(query.dtype).transpose(1, 2).contiguous().transpose(1, 2)


def _keys_of_rows(
    num_rows: int, key: torch.Tensor, value: torch.Tensor, rows: Rows
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(H_kv, S of the row, D) of each row."""
    lengths = [rows.num_keys] * num_rows if rows.lengths is None else rows.lengths.tolist()
    starts = [0] * num_rows if rows.starts is None else rows.starts.tolist()
    places = [
        (min(row, len(key) - 1), slice(start, start + max(0, min(length, rows.num_keys))))
        for row, (start, length) in enumerate(zip(starts, lengths, strict=True))
    ]
    return [(key[row, :, cells], value[row, :, cells]) for row, cells in places]


def _row_of(added: Added, row: int) -> Added:
    if not isinstance(added, torch.Tensor):
        return added
    return added[min(row, len(added) - 1)]


def _attended(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    added: Added,
    is_causal: bool,
) -> torch.Tensor:
    """(H, T, D) float32 of a row."""
    num_queries, num_keys = query.shape[1], key.shape[1]
    if num_keys == 0:
        return torch.zeros_like(query, dtype=torch.float32)
    key, value = (x.float().repeat_interleave(query.shape[0] // len(x), 0) for x in (key, value))
    scores = scale * (query.float() @ key.mT)
    positions = torch.arange(num_keys, device=key.device)
    queries = positions[-1] - num_queries + 1 + torch.arange(num_queries, device=key.device)
    distances = queries.unsqueeze(1) - positions
    scores = scores + _bias_of(added, distances)
    if is_causal:
        scores = scores.masked_fill(distances < 0, float("-inf"))
    is_seen = scores.amax(-1, keepdim=True) != float("-inf")
    return torch.where(is_seen, scores.softmax(-1), 0.0) @ value


def _bias_of(added: Added, distances: torch.Tensor) -> torch.Tensor | float:
    """What is added to (H, T, S) scores, float32."""
    if added is None:
        return 0.0
    if isinstance(added, torch.Tensor):
        return added[..., : distances.shape[1]].float()
    if isinstance(added, Slopes):
        return -added.slopes.view(-1, 1, 1) * distances
    chosen = added.of_distance[distances.clamp(0, len(added.of_distance) - 1)]
    return added.table[chosen].permute(2, 0, 1).float()


# ---- launch --------------------------------------------------------------------------------------


def attention_kernel(dtype: torch.dtype, head_dim: int, num_rows: int) -> Kernel:
    """Of num_rows queries at a time: 1, 2 or 4."""
    macros = (*_macros(dtype, head_dim), ("ROWS", num_rows))
    return Kernel("attention_decode.cu", "attention_decode", macros)


def merge_kernel(dtype: torch.dtype, head_dim: int) -> Kernel:
    macros = _macros(dtype, head_dim)
    return Kernel("attention_decode_merge.cu", "attention_decode_merge", macros)


def _macros(dtype: torch.dtype, head_dim: int) -> tuple[tuple[str, int], ...]:
    return ("ELEMENT", ELEMENTS[dtype]), ("HEAD_DIM", head_dim), ("CHUNK", CHUNK)


class DecodeLaunch(NamedTuple):
    """Who computes, and how: decode_attention for arguments that are known to be right."""

    launcher: Launcher
    plan: _Plan

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        added: Added,
        is_causal: bool,
        rows: Rows | None = None,
    ) -> torch.Tensor:
        """See decode_attention."""
        launcher, plan = self
        num_keys, lengths, starts = key.shape[2], None, None
        if rows is not None:
            num_keys, lengths, starts = rows.num_keys, rows.lengths, rows.starts
        if query.numel() == 0:
            return query.new_zeros(query.shape)
        query = query.contiguous() if plan.copies_query else query
        if query.data_ptr() % KERNEL_ALIGNMENT:
            query = query.clone(memory_format=torch.preserve_format)
        of_added, max_distance, bias_strides = _arguments_of(added)
        chunks, merge = _launch_plans(plan, num_keys, is_causal, max_distance, bias_strides, scale)
        y, partial = query.new_empty(*plan.shape), None
        if merge is not None:
            shape = plan.partial_shape(num_keys)
            partial = torch.empty(shape, dtype=torch.float32, device=query.device)
        pointers = query, key, value, lengths, starts, *of_added, y, partial
        launcher.run(chunks, pointers)
        if merge is not None:
            launcher.run(merge, (partial, lengths, y))
        return y.transpose(1, 2)


@dataclass(frozen=True, eq=False)
class _Plan:
    """What is the same of each launch for tensors of such shapes, whatever the number of keys.

    shape: of y.   tile_bits: of the number of blocks that share a head of keys and deal out its
    queries; those that have nothing to do end at once.   grid: in y and z.   sizes, steps: for
    the kernel.   copies_query: it lies so that the kernel cannot read it.
    """

    kernel: Kernel
    merge: Kernel
    shape: tuple[int, int, int, int]
    tile_bits: int
    grid: tuple[int, int]
    sizes: tuple[int, ...]
    steps: tuple[int, ...]
    copies_query: bool

    def partial_shape(self, num_keys: int) -> tuple[int, ...]:
        batch_size, num_queries, num_heads, head_dim = self.shape
        return batch_size, num_heads, num_queries, num_chunks_of(num_keys), head_dim + 2


def num_chunks_of(num_keys: int) -> int:
    """One also where there are no keys."""
    return -(-num_keys // CHUNK) or 1


@lru_cache(maxsize=256)  # most are asked for by all layers of a pass, and never again
def _launch_plans(
    plan: _Plan,
    num_keys: int,
    is_causal: bool,
    max_distance: int,
    bias_strides: tuple[int, ...],
    scale: float,
) -> tuple[LaunchPlan, LaunchPlan | None]:
    """Of the kernel, and of the one that merges chunks, if there are several."""
    batch_size, num_queries, num_heads, head_dim = plan.shape
    num_chunks, masks = num_chunks_of(num_keys), int(is_causal)
    grid = num_chunks << plan.tile_bits, *plan.grid
    numbers = num_keys, *plan.sizes, masks, max_distance, *plan.steps, *bias_strides, float(scale)
    chunks = LaunchPlan(plan.kernel, grid, (_THREADS, 1, 1), numbers)
    if num_chunks == 1:
        return chunks, None
    merge_grid, block = (num_queries, num_heads, batch_size), (-(-head_dim // 32) * 32, 1, 1)
    return chunks, LaunchPlan(plan.merge, merge_grid, block, (num_keys, num_chunks, masks))


def _plan(query: tuple[Any, ...], key: tuple[Any, ...], value: tuple[Any, ...]) -> _Plan | str:
    """query, key: dtype, device, shape, without the S of keys, strides.   value: without shape."""
    why_not = _why_not(query, key, value)
    if why_not is not None:
        return why_not
    dtype, _, (batch_size, num_heads, num_queries, head_dim), strides = query
    copies_query = not _is_readable(strides)
    if copies_query:
        strides = (num_heads * num_queries * head_dim, num_queries * head_dim, head_dim, 1)
    group = num_heads // key[2][1]
    token_bits = (num_queries - 1).bit_length()  # the low ones of a query's number
    num_in_group = group << token_bits
    num_rows = 4 if num_in_group > 2 else num_in_group  # of a block
    tile_bits = (-(-num_in_group // num_rows) - 1).bit_length()
    return _Plan(
        attention_kernel(dtype, head_dim, num_rows),
        merge_kernel(dtype, head_dim),
        (batch_size, num_queries, num_heads, head_dim),
        tile_bits,
        (key[2][1], batch_size),
        (num_queries, group, token_bits, tile_bits),
        (*_steps(query[2], strides), *_steps((*key[2][:2], 2), key[3])),
        copies_query,
    )


def _why_not(query: tuple[Any, ...], key: tuple[Any, ...], value: tuple[Any, ...]) -> str | None:
    dtype, device, (batch_size, num_heads, num_queries, head_dim), _ = query
    _, num_key_heads, key_dim = key[2]
    if key_dim != head_dim or num_heads % max(num_key_heads, 1):
        return (
            f"query has {num_heads} heads of {head_dim}, key {num_key_heads} of {key_dim}; they "
            "must be as wide, and the former a multiple of the latter"
        )
    if not 1 <= num_queries <= MAX_QUERIES or head_dim % 8 or not 8 <= head_dim <= MAX_HEAD_DIM:
        return (
            f"{num_queries} queries, heads of {head_dim}; accepted: 1 to {MAX_QUERIES} queries, "
            f"heads of a multiple of 8 up to {MAX_HEAD_DIM}"
        )
    if dtype not in ELEMENTS or not dtype == key[0] == value[0]:
        return (
            f"query, key and value are {dtype}, {key[0]} and {value[0]}; accepted: float32, "
            "float16, bfloat16, all the same"
        )
    if not device == key[1] == value[1]:
        return f"query, key and value are on {device}, {key[1]} and {value[1]}"
    if max(batch_size, num_heads) > _MAX_GRID:
        return f"{batch_size} rows, {num_heads} heads; accepted: up to {_MAX_GRID}"
    if key[3] != value[2] or not _is_readable(key[3]):
        return (
            f"key and value have strides {key[3]} and {value[2]}; they must be alike, and "
            "multiples of 8 but for the last, which is 1"
        )
    return None


def _is_readable(strides: tuple[int, ...]) -> bool:
    """Whether 8 elements at a time can be read of each row."""
    *others, last = strides
    return last == 1 and all(stride % KERNEL_COLUMNS == 0 for stride in others)


def _steps(shape: tuple[int, ...], strides: tuple[int, ...]) -> list[int]:
    """From a row, a head, a token to the next, in units of 8 elements; 0 where there is one."""
    return [
        stride // KERNEL_COLUMNS if size > 1 else 0
        for size, stride in zip(shape[:3], strides[:3], strict=True)
    ]


def _arguments_of(
    added: Added,
) -> tuple[Sequence[torch.Tensor | None], int, tuple[int, ...]]:
    """(bias, slopes, table, buckets); the largest distance that has a bucket of its own; strides of
    the bias in elements, 0 where there is one."""
    if added is None:
        return _NOTHING, 0, _NO_STRIDES
    if isinstance(added, Buckets):
        of_distance = added.of_distance
        return (None, None, added.table, of_distance), of_distance.shape[0] - 1, _NO_STRIDES
    if isinstance(added, Slopes):
        return (None, added.slopes, None, None), 0, _NO_STRIDES
    sizes = zip(added.shape, added.stride(), strict=True)
    strides = tuple(stride if size > 1 else 0 for size, stride in sizes)
    return (added, None, None, None), 0, strides


_NOTHING, _NO_STRIDES = (None,) * 4, (0,) * 4
