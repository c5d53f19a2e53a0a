"""Attention between heads that are split already, and the masks that go with it.

On a GPU one of torch's operators is called by name. What torch would choose by itself on compute
capability 9.x and 10.x, cuDNN, builds a plan for each new number of keys: tens of milliseconds for
every token that is written for the first time, and device memory that no limit counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F

from bminf.layers.alibi import Alibi, attend_with_alibi

Operator = Literal["flash", "efficient", "math"]
"""Of torch: aten::_scaled_dot_product_flash_attention, ..._efficient_attention, ..._math."""

_ALIGNMENT = 8  # elements that the rows of a bias have to begin at a multiple of


def split_heads(x: torch.Tensor, num_parts: int, head_dim: int) -> tuple[torch.Tensor, ...]:
    """(B, T, num_parts * H * D) -> num_parts tensors (B, H, T, D), views."""
    batch_size, num_tokens, _ = x.shape
    parts = x.view(batch_size, num_tokens, num_parts, -1, head_dim)
    return parts.permute(2, 0, 3, 1, 4).unbind()


def merge_heads(x: torch.Tensor) -> torch.Tensor:
    """(B, H, T, D) -> (B, T, H * D)."""
    return x.transpose(1, 2).flatten(2)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | Alibi | None,
    scale: float,
) -> torch.Tensor:
    """softmax(scale * query key^T + bias) value.

    query: (B, H, T, D).   key, value: (B, H, S, D).   bias: broadcastable to (B, H, T, S), in the
    dtype of query; an Alibi, for scores in float32; or None.   Returns (B, H, T, D).
    """
    if isinstance(bias, Alibi):
        return attend_with_alibi(attention, query, key, value, bias, scale)
    if query.device.type != "cuda":
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
    gpu = _gpu(query.device)
    operator = operator_for(query.dtype, query.shape[-1], bias is not None, gpu)
    return _on_gpu(operator, query, key, value, bias, scale)


def attention_in_products(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | Alibi | None,
    scale: float,
) -> torch.Tensor:
    """attention(), whose last bits do not depend on the number of threads: torch's own operator for
    CPUs cuts its work by that."""
    if isinstance(bias, Alibi):
        return attend_with_alibi(attention_in_products, query, key, value, bias, scale)
    y: torch.Tensor = torch.ops.aten._scaled_dot_product_attention_math(
        query, key, value, bias, scale=scale
    )[0]
    return y


@dataclass(frozen=True)
class Gpu:
    """What decides between the operators, beside the tensors.

    capability: 61, 80, ...   has_flash, has_efficient: built into torch, and not switched off by
    torch.backends.cuda.enable_flash_sdp() or enable_mem_efficient_sdp().
    """

    capability: int
    has_flash: bool = True
    has_efficient: bool = True


def operator_for(dtype: torch.dtype, head_dim: int, has_bias: bool, gpu: Gpu) -> Operator:
    """The first operator that takes such tensors; any number of queries and keys will do.

    Source: the conditions of torch 2.4 to 2.13, aten/src/ATen/native/transformers/cuda/sdp_utils.
    """
    is_half = dtype in (torch.float16, torch.bfloat16)
    fits_flash = is_half and not has_bias and head_dim <= 256 and head_dim % 8 == 0
    if gpu.has_flash and gpu.capability >= 80 and fits_flash:
        return "flash"
    # Tensor cores, where they are used, read 16 bytes at a time.
    multiple = 1 if gpu.capability < 70 else 8 if is_half else 4 if gpu.capability >= 80 else 1
    is_known = dtype in (torch.float16, torch.float32) or (is_half and gpu.capability >= 80)
    return "efficient" if gpu.has_efficient and is_known and head_dim % multiple == 0 else "math"


def _gpu(device: torch.device) -> Gpu:
    flags = torch.backends.cuda
    has_flash = flags.flash_sdp_enabled() and flags.is_flash_attention_available()
    return Gpu(_capability(device), has_flash, flags.mem_efficient_sdp_enabled())


@cache
def _capability(device: torch.device) -> int:
    if not torch.cuda.is_available():
        return 80  # tensors without bytes, of a GPU that is not there: nothing will be computed
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _on_gpu(
    operator: Operator,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    aten = torch.ops.aten
    if operator == "flash":
        y = aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)[0]
    elif operator == "efficient":
        bias = None if bias is None else _aligned(bias, query, key)
        is_trained = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
        y = aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, is_trained, scale=scale
        )[0]
    else:
        y = aten._scaled_dot_product_attention_math(query, key, value, bias, scale=scale)[0]
    result: torch.Tensor = y
    return result


def _aligned(bias: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """`bias` as (B, H, T, S), each row of it beginning where vectors may be read."""
    num_keys = key.shape[2]
    bias = bias.expand(*bias.shape[:-1], num_keys)
    starts = (bias.storage_offset(), *bias.stride()[:-1])
    if bias.stride(-1) != 1 or any(start % _ALIGNMENT for start in starts):
        missing = -num_keys % _ALIGNMENT
        bias = F.pad(bias, (0, missing)).contiguous().narrow(-1, 0, num_keys)  # in new memory
    return bias.expand(*query.shape[:3], num_keys)


def mask_to_bias(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A bias for attention() that masks out the cells where `mask` is true.

    It is finite, and stays so when a score is added to it in half precision: a query that may see
    nothing gets some average, and never NaN, which would spread through its value to other rows.
    """
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return bias.masked_fill_(mask, torch.finfo(dtype).min / 2)


def causal_mask(num_queries: int, num_keys: int, device: torch.device) -> torch.Tensor:
    """(T, S) bool, true for keys that come after the query; the last query sees all of them."""
    queries = torch.arange(num_keys - num_queries, num_keys, device=device)
    return torch.arange(num_keys, device=device) > queries.unsqueeze(1)


def padding_mask(lengths: torch.Tensor, num_keys: int) -> torch.Tensor:
    """(B, S) bool, true for keys at or after the length of their row. lengths: (B,)."""
    return torch.arange(num_keys, device=lengths.device) >= lengths.unsqueeze(1)
