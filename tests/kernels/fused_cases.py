"""The cases of kernels that take the place of several of torch's operators: norms, and appends to a
cache. Compared with those operators, which round at the same places."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from case import BOUNDS, DTYPES, Case, case, relative_error

from bminf.cuda.launcher import fused_launcher
from bminf.ops.norm import (
    MAX_COLUMNS,
    add_layer_norm,
    add_rms_norm,
    layer_norm,
    rms_norm,
    rms_norm_reference,
)
from bminf.ops.rotary_append import rotary_append, rotary_append_reference

EPS = 1e-5
DEEP = 11.832159566199232  # DeepNorm's factor, of 70 layers
HALF, BFLOAT16, SINGLE = DTYPES

# ---- norms ---------------------------------------------------------------------------------------


@case
def norm_case(
    device: str,
    name: str,
    dtype: torch.dtype,
    m: int,
    k: int,
    scale: float | None = None,
    mean: float = 0.0,
) -> None:
    """name: "rms" or "layer".   scale: of what a delta is added to; None is no delta."""
    x, delta = ((torch.randn(m, k) + mean).to(dtype) for _ in range(2))
    weights = [torch.randn(k).to(dtype) for _ in range(1 if name == "rms" else 2)]
    given = [one.to(device) for one in (x, delta, *weights)]
    if scale is None:
        plain = rms_norm if name == "rms" else layer_norm
        total, y = x, plain(given[0], *given[2:], EPS)
    else:
        adding = add_rms_norm if name == "rms" else add_layer_norm
        total, y = adding(*given, EPS, scale)
        assert torch.equal(total.cpu(), x * scale + delta)  # each step of it rounded
    # A mean has as many digits as a number: so many of them are lost where it is taken off.
    check_norm(name, total.cpu(), weights, y.cpu(), max(1.0, abs(mean) / 10))


def check_norm(
    name: str, x: torch.Tensor, weights: list[torch.Tensor], y: torch.Tensor, slack: float
) -> None:
    if name == "rms":
        expected = rms_norm_reference(x, *weights, EPS)
    else:
        exact = F.layer_norm(x.double(), x.shape[-1:], *(one.double() for one in weights), EPS)
        expected = exact.to(x.dtype)
    assert y.dtype == x.dtype and relative_error(y, expected) < slack * BOUNDS[x.dtype]
    if x.dtype != SINGLE:  # the same rounding: only where it was near a tie is another number
        num_other = int((y != expected).sum())
        assert num_other <= 1 + y.numel() // 25, num_other


@case
def awkward_norm_case(device: str, name: str) -> None:
    """Strided and misaligned rows give what ordinary ones give; no rows give none."""
    norm, weight = rms_norm if name == "rms" else layer_norm, torch.randn(24, device=device)
    weights = [weight] if name == "rms" else [weight, weight.flip(0)]
    x = torch.randn(3, 24, device=device)
    expected = norm(x, *weights, EPS)
    misaligned = torch.empty(73, device=device)[1:].view(3, 24).copy_(x)
    for other in (x.t().contiguous().t(), misaligned, x.view(3, 1, 24)):
        assert torch.equal(norm(other, *weights, EPS).view(3, 24), expected)
    assert norm(x[:0], *weights, EPS).shape == (0, 24)


@case
def bad_norm_case(device: str, name: str, dtype: torch.dtype) -> None:
    """NaN and infinity stay in their row; a row of zeros gives zeros, or the bias."""
    norm, weight = rms_norm if name == "rms" else layer_norm, torch.ones(24).to(device, dtype)
    weights = [weight] if name == "rms" else [weight, 2 * weight]
    x = torch.zeros(3, 24, device=device, dtype=dtype)
    right = norm(x, *weights, EPS)
    assert torch.equal(right, torch.full_like(x, 0.0 if name == "rms" else 2.0))
    for bad in (float("nan"), float("inf")):
        x[1, 5] = bad
        y = norm(x, *weights, EPS)
        assert torch.equal(y[::2], right[::2]) and not y[1, 5].isfinite()


# ---- appends -------------------------------------------------------------------------------------


def parts_of(
    layout: str, batch_size: int, num_tokens: int, num_heads: int, head_dim: int
) -> list[torch.Tensor]:
    """Queries, keys and values (B, H, T, D), as projections of the zoo lay them out: "fused", one
    part behind another; "by_head", those of a head together; "apart", in memory of their own, in
    another order; "odd", fused, one element beside where vectors may be read."""
    size = 3 * num_heads * head_dim
    x = torch.randn(batch_size * num_tokens * size + 1)
    x = x[1:] if layout == "odd" else x[:-1]
    x = x.view(batch_size, num_tokens, size)
    if layout == "by_head":
        return list(x.view(batch_size, num_tokens, num_heads, -1).transpose(1, 2).chunk(3, -1))
    fused = x.view(batch_size, num_tokens, 3, num_heads, head_dim)
    parts = [fused[:, :, part].transpose(1, 2) for part in range(3)]
    return [part.contiguous() for part in parts] if layout == "apart" else parts


@case
def append_case(
    device: str,
    dtype: torch.dtype,
    angle: torch.dtype | None,
    layout: str,
    shape: tuple[int, int, int, int],
    drops: bool = False,
) -> None:
    """shape: B, T, H, D.   drops: whether some tokens have no cell."""
    batch_size, num_tokens, num_heads, head_dim = shape
    parts = [_in_place(part, dtype, device) for part in parts_of(layout, *shape)]
    angles = None
    if angle is not None:
        turned = torch.rand(batch_size, 1, num_tokens, head_dim // 2) * 6
        angles = turned.cos().to(angle), turned.sin().to(angle)
    num_cells = batch_size * num_tokens + 3
    cells = torch.randperm(num_cells)[: batch_size * num_tokens]
    if drops:
        cells[::2] = -1
    keys, values = (torch.randn(num_heads, num_cells, head_dim).to(dtype) for _ in range(2))
    given = [one.to(device, copy=True) for one in (cells, keys, values)]
    on_device = None if angles is None else (angles[0].to(device), angles[1].to(device))
    launcher = fused_launcher(torch.device(device))
    query = rotary_append(launcher, *parts, on_device, *given)
    on_host = [part.cpu() for part in parts]
    expected = rotary_append_reference(*on_host, angles, cells, keys, values)
    assert torch.equal(query.cpu(), expected)
    assert torch.equal(given[1].cpu(), keys) and torch.equal(given[2].cpu(), values)


def _in_place(part: torch.Tensor, dtype: torch.dtype, device: str) -> torch.Tensor:
    """`part` in another dtype, with the strides and the offset that it has."""
    memory = torch.as_strided(part, (part.untyped_storage().nbytes() // 4,), (1,), 0)
    moved = memory.to(device, dtype)
    return moved.as_strided(part.shape, part.stride(), part.storage_offset())


# ---- what is run ---------------------------------------------------------------------------------


def fused_cases() -> Iterator[Case]:
    for name in ("rms", "layer"):
        for dtype in DTYPES:
            for m, k in ((1, 1), (3, 8), (2, 70), (2, 1000)):
                yield norm_case(name, dtype, m, k)
            yield norm_case(name, dtype, 2, 1000, 1.0)
            yield norm_case(name, dtype, 2, 70, DEEP)
            yield bad_norm_case(name, dtype)
        # As long as rows of the zoo, and where another number of chunks begins.
        for k in (4096, 4104, 8190, 12288, MAX_COLUMNS):
            yield norm_case(name, HALF, 1, k, 1.0)
        yield norm_case(name, SINGLE, 2, 4104, mean=100.0)
        yield awkward_norm_case(name)
    for dtype in DTYPES:
        for angle in (HALF, SINGLE, None):
            yield append_case(dtype, angle, "by_head", (1, 1, 3, 128))
            yield append_case(dtype, angle, "fused", (2, 3, 5, 6))
        yield append_case(dtype, None, "fused", (3, 1, 4, 64))
    yield append_case(HALF, HALF, "odd", (1, 2, 3, 64))
    yield append_case(HALF, HALF, "apart", (2, 2, 3, 32))
    yield append_case(HALF, None, "apart", (2, 2, 3, 5))
    yield append_case(BFLOAT16, SINGLE, "by_head", (1, 5, 70, 80), drops=True)
    yield append_case(BFLOAT16, None, "fused", (1, 5, 70, 8), drops=True)
    yield append_case(SINGLE, SINGLE, "fused", (1, 2, 2, 256))


def few_fused() -> Iterator[Case]:
    """A choice that reaches every line."""
    yield norm_case("rms", HALF, 2, 70, 1.0)
    yield norm_case("rms", BFLOAT16, 2, 4104)
    yield norm_case("layer", SINGLE, 2, 4104, DEEP)
    yield norm_case("layer", HALF, 1, 72)
    yield append_case(HALF, HALF, "by_head", (1, 3, 5, 32), drops=True)
    yield append_case(BFLOAT16, SINGLE, "by_head", (1, 2, 3, 32))
    yield append_case(BFLOAT16, SINGLE, "fused", (2, 1, 3, 6))
    yield append_case(SINGLE, None, "fused", (1, 3, 3, 8), drops=True)
    yield append_case(HALF, None, "odd", (1, 3, 3, 5))
