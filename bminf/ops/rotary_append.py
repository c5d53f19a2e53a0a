"""New keys and values to their cells of a cache, and rotary positions on the way: one launch.

Kernel: kernels/rotary_append.cu, which rounds where torch's operators do, to the same bits.
Source: Su et al. 2021, arXiv:2104.09864. In the order of halves: column j is rotated together with
column j + head_dim / 2.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from bminf.cuda.launcher import Launcher
from bminf.cuda.source import Kernel, LaunchPlan
from bminf.errors import ArgumentError
from bminf.ops.rows import ELEMENTS, KERNEL_ALIGNMENT, is_aligned

_WIDTHS = (8, 1)  # columns that a thread takes
_THREADS = 64  # of a block: a single token has to keep many multiprocessors busy
_MAX_THREADS = 1024

Angles = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines, (B, 1, T, D / 2) float32 or float16."""


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x: (B, H, T, D).   cos, sin: (B, 1, T, D / 2).   Returns (B, H, T, D) in the dtype of x."""
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return rotated.to(x.dtype)


def rotary_append(
    launcher: Launcher,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    angles: Angles | None,
    cells: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> torch.Tensor:
    """Write keys and values to `cells` of a layer of a cache, and return the queries.

    query, key, value: (B, H, T, D), parts of one projection.   angles: rotate queries and keys by
    these; None does not.   cells: (B * T,) int64, where each token goes; below 0 for nowhere.
    keys, values: (H, N, D), contiguous.   Returns (B, H, T, D).   Raises ArgumentError.
    """
    given = (query, key, value, angles, cells, keys, values)
    known = _known(*given)
    plan = _plans.get(known)
    if plan is None:
        _check(*given)
        if not _is_in_line(query, key, value):
            query, key, value = map(_in_line, (query, key, value))
            return rotary_append(launcher, query, key, value, angles, cells, keys, values)
        if len(_plans) >= _MAX_PLANS:
            _plans.clear()
        plan = _plans[known] = _plan(*given)
    tensors: list[torch.Tensor | None] = [None, key, value, None, None, cells, None, keys, values]
    rotated = query
    if angles is not None:
        by_token = torch.empty_like(key.transpose(1, 2), memory_format=torch.contiguous_format)
        cos, sin = (x.contiguous() for x in angles)
        tensors = [query, key, value, cos, sin, cells, by_token, keys, values]
        rotated = by_token.transpose(1, 2)
    launcher.run(plan, tensors)
    return rotated


def rotary_append_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    angles: Angles | None,
    cells: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> torch.Tensor:
    """The same by operators of torch."""
    if angles is not None:
        query, key = rotate(query, *angles), rotate(key, *angles)
    is_kept = cells >= 0
    for cache_, new in ((keys, key), (values, value)):
        by_token = new.transpose(1, 2).flatten(0, 1)  # (B * T, H, D)
        cache_[:, cells[is_kept]] = by_token[is_kept].transpose(0, 1)
    return query


@cache
def rotary_append_kernel(dtype: torch.dtype, angle: torch.dtype | None, width: int) -> Kernel:
    """angle: dtype of cosines and sines; None is no rotation.   width: 8 or 1."""
    macros = (
        ("ELEMENT", ELEMENTS[dtype]),
        ("ANGLE", 0 if angle is None else ELEMENTS[angle]),
        ("WIDTH", width),
    )
    return Kernel("rotary_append.cu", "rotary_append", macros)


def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    angles: Angles | None,
    cells: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> None:
    if any(x.dtype != key.dtype for x in (query, value, keys, values)):
        raise ArgumentError(
            f"query, key and value are {query.dtype}, {key.dtype}, {value.dtype}, keys and values "
            f"of the cache {keys.dtype}, {values.dtype}; all have to be of one dtype"
        )
    batch_size, num_heads, num_tokens, head_dim = key.shape
    fits = query.shape == key.shape == value.shape and keys.shape == values.shape
    fits = fits and (num_heads, head_dim) == (keys.shape[0], keys.shape[2])
    if not fits or cells.shape != (batch_size * num_tokens,) or cells.dtype != torch.int64:
        raise ArgumentError(
            f"query, key and value are {[tuple(x.shape) for x in (query, key, value)]}, cells "
            f"{cells.dtype} {tuple(cells.shape)}, keys and values of the cache "
            f"{[tuple(x.shape) for x in (keys, values)]}; three (B, H, T, D), int64 (B * T,) and "
            "two (H, N, D) go together"
        )
    if not all(x.is_contiguous() and x.device == key.device for x in (cells, keys, values)):
        raise ArgumentError(
            f"cells, and keys and values of the cache, have to be contiguous, on {key.device}"
        )
    if angles is None:
        return
    expected, dtypes = (batch_size, 1, num_tokens, head_dim // 2), {x.dtype for x in angles}
    if head_dim % 2 or len(dtypes) > 1 or not dtypes <= {torch.float16, torch.float32}:
        raise ArgumentError(
            f"heads of {head_dim} columns, cosines and sines in {dtypes}; an even number of "
            "columns, and float16 or float32 for both, are accepted"
        )
    if any(x.shape != expected for x in angles):
        raise ArgumentError(f"angles are {[tuple(x.shape) for x in angles]}, not {expected} each")


def _is_in_line(*parts: torch.Tensor) -> bool:
    """Whether the tokens of all lie in one line, with the same strides."""
    first = parts[0]
    in_line = first.shape[0] == 1 or first.stride(0) == first.shape[2] * first.stride(2)
    return in_line and first.stride(3) == 1 and all(x.stride() == first.stride() for x in parts)


def _in_line(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


_MAX_PLANS = 1024  # of 2 KiB: a prompt of each length has one
_plans: dict[tuple[Any, ...], LaunchPlan] = {}
"""By what _known() tells: what has a plan was checked."""


def _known(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    angles: Angles | None,
    cells: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> tuple[Any, ...]:
    """All that a check looks at and a plan depends on."""
    addresses = query.data_ptr() | key.data_ptr() | value.data_ptr()
    addresses |= keys.data_ptr() | values.data_ptr()
    of_angles = None
    if angles is not None:
        cos, sin = angles
        of_angles = cos.dtype, cos.shape, sin.dtype, sin.shape
        addresses |= cos.data_ptr() | sin.data_ptr()
    return (
        *(query.dtype, key.dtype, value.dtype, keys.dtype, values.dtype),
        *(query.shape, query.stride(), key.shape, key.stride(), value.shape),
        *(value.stride(), of_angles, cells.dtype, cells.shape, cells.stride(), keys.shape),
        *(keys.stride(), values.shape, values.stride(), key.device, keys.device, values.device),
        *(cells.device, addresses % KERNEL_ALIGNMENT == 0),
    )


def _plan(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    angles: Angles | None,
    cells: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> LaunchPlan:
    batch_size, num_heads, num_tokens, head_dim = key.shape
    columns = head_dim if angles is None else head_dim // 2
    tensors = (query, key, value, keys, values, *(angles or ()))
    # The most columns that can be read and written at once.
    widest, narrow = _WIDTHS
    is_even = not any(n % widest for n in (columns, key.stride(1), key.stride(2)))
    width = widest if is_even and all(map(is_aligned, tensors)) else narrow
    block = _block(num_heads, columns // width)
    kernel = rotary_append_kernel(key.dtype, None if angles is None else angles[0].dtype, width)
    grid = (batch_size * num_tokens, -(-num_heads // block[1]), 1)
    numbers = (num_heads, head_dim, key.stride(2), key.stride(1), keys.shape[1])
    return LaunchPlan(kernel, grid, block, numbers)


def _block(num_heads: int, columns: int) -> tuple[int, int, int]:
    """Threads for the columns of a head, and for heads."""
    if columns > _MAX_THREADS:
        raise ArgumentError(f"{columns} columns of a head at once; at most {_MAX_THREADS}")
    return columns, min(num_heads, max(1, _THREADS // columns)), 1
