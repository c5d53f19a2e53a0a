"""Attention between heads that are cut already, and the masks that go with it."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def split_heads(x: torch.Tensor, num_parts: int, head_dim: int) -> list[torch.Tensor]:
    """(B, T, num_parts * H * D) -> num_parts tensors (B, H, T, D), views."""
    batch_size, num_tokens, _ = x.shape
    parts = x.view(batch_size, num_tokens, num_parts, -1, head_dim)
    return [parts[:, :, part].transpose(1, 2) for part in range(num_parts)]


def merge_heads(x: torch.Tensor) -> torch.Tensor:
    """(B, H, T, D) -> (B, T, H * D)."""
    return x.transpose(1, 2).flatten(2)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """softmax(scale * query key^T + bias) value.

    query: (B, H, T, D).   key, value: (B, H, S, D).   bias: broadcastable to (B, H, T, S), in the
    dtype of query, or None.   Returns (B, H, T, D).
    """
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)


def hide(is_hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A bias for attention() that hides the cells where `is_hidden` is true.

    It is finite, and stays so when a score is added to it in half precision: a query that may see
    nothing gets some average, and never NaN, which would spread through its value to other rows.
    """
    bias = torch.zeros(is_hidden.shape, dtype=dtype, device=is_hidden.device)
    return bias.masked_fill_(is_hidden, torch.finfo(dtype).min / 2)


def is_later(num_queries: int, num_keys: int, device: torch.device) -> torch.Tensor:
    """(T, S) bool: keys that come after the query; the last query sees all of them."""
    queries = torch.arange(num_keys - num_queries, num_keys, device=device)
    return torch.arange(num_keys, device=device) > queries.unsqueeze(1)


def is_padding(lengths: torch.Tensor, num_keys: int) -> torch.Tensor:
    """(B, S) bool: keys at or after the length of their row. lengths: (B,)."""
    return torch.arange(num_keys, device=lengths.device) >= lengths.unsqueeze(1)
