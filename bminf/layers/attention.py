"""Attention between heads that are split already, and the masks that go with it.

On a GPU a few queries, as in decoding, take a kernel of ours (ops/attention.py), many take one of
torch's operators, called by name. What torch would choose by itself on compute capability 9.x and
10.x, cuDNN, builds a plan for each new number of keys: tens of milliseconds for every token that is
written for the first time, and device memory that no limit counts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F

from bminf.cuda.launcher import Launcher
from bminf.layers.alibi import Alibi, attend_with_alibi
from bminf.layers.position_bias import RelativeBias
from bminf.ops.attention import Added, Rows, decode_launch

Operator = Literal["flash", "efficient", "math"]
"""Of torch: aten::_scaled_dot_product_flash_attention, ..._efficient_attention, ..._math."""

BiasKind = Literal["none", "causal", "tensor"]

_ALIGNMENT = 8  # elements that the rows of a bias have to begin at a multiple of


@dataclass(frozen=True, eq=False)
class Causal:
    """What attention() takes in place of a bias that masks keys after a query, in one pass.

    num_padding: (B,) int64, of each row keys at its beginning that are none; None is none.
    """

    num_padding: torch.Tensor | None = None
    made: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict, repr=False)
    _rows: dict[int, Rows] = field(default_factory=dict, repr=False)

    added = None  # to scores, by a kernel

    def rows(self, num_keys: int) -> Rows | None:
        """Of a kernel, for rows with padding: made once for all layers."""
        if self.num_padding is None:
            return None
        if num_keys not in self._rows:
            starts = self.num_padding.to(torch.int32)
            self._rows[num_keys] = Rows(num_keys, num_keys - starts, starts)
        return self._rows[num_keys]


_PADDED = (Causal, Alibi)  # which know of keys that are none
ScoreBias: TypeAlias = torch.Tensor | Alibi | RelativeBias | Causal | None
"""Broadcastable to (B, H, T, S), or its parameters, where the queries are the last of the keys and
see none after their own."""


def split_heads(x: torch.Tensor, num_parts: int, head_dim: int) -> tuple[torch.Tensor, ...]:
    """(B, T, num_parts * H * D) -> num_parts tensors (B, H, T, D), views."""
    batch_size, num_tokens, _ = x.shape
    if batch_size == num_tokens == 1:  # as for each token of one text: in fewer operations
        return x.view(num_parts, 1, -1, 1, head_dim).unbind()
    parts = x.view(batch_size, num_tokens, num_parts, -1, head_dim)
    return parts.permute(2, 0, 3, 1, 4).unbind()


def merge_heads(x: torch.Tensor) -> torch.Tensor:
    """(B, H, T, D) -> (B, T, H * D)."""
    if x.shape[2] == 1:
        return x.reshape(x.shape[0], 1, -1)
    return x.transpose(1, 2).flatten(2)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: ScoreBias,
    scale: float,
    launcher: Launcher | None = None,
) -> torch.Tensor:
    """softmax(scale * query key^T + bias) value.

    query: (B, H, T, D).   key, value: (B, H, S, D).   bias: broadcastable to (B, H, T, S), in the
    dtype of query; an Alibi, for scores in float32; a RelativeBias or Causal; or None.
    launcher: what launcher_in_place() has said of all three; None asks it.
    Returns (B, H, T, D).
    """
    launch = decode_launch(query, key, value, launcher)
    if launch is not None:
        rows = bias.rows(key.shape[2]) if isinstance(bias, _PADDED) else None
        return launch(query, key, value, scale, *added_of(bias), rows)
    if isinstance(bias, Alibi):
        return attend_with_alibi(attention, query, key, value, bias, scale)
    if query.device.type != "cuda":
        bias = bias if bias is None else tensor_of(bias, query, key)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
    num_queries, head_dim = query.shape[2:]
    kind, gpu = kind_of(bias, num_queries), _gpu(query.device)
    operator = operator_for(query.dtype, head_dim, num_queries, key.shape[2], kind, gpu)
    if operator == "flash":
        return _flash(query, key, value, kind == "causal", scale)
    return _on_gpu(operator, query, key, value, tensor_of(bias, query, key), scale)


def attention_of_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: ScoreBias,
    scale: float,
    rows: Rows,
) -> torch.Tensor | None:
    """The same for rows of different lengths in one launch; None where there is no kernel for them.

    key, value: (1, H, N, D), where all rows are.   bias: of parameters without padding, or None.
    """
    is_padded = isinstance(bias, _PADDED) and bias.num_padding is not None
    if is_padded or isinstance(bias, torch.Tensor):
        return None
    launch = decode_launch(query, key, value)
    return None if launch is None else launch(query, key, value, scale, *added_of(bias), rows)


def added_of(bias: ScoreBias) -> tuple[Added, bool]:
    """What a kernel adds to scores, and whether it masks later keys."""
    if bias is None:
        return None, False
    if isinstance(bias, torch.Tensor):
        return bias[(None,) * (4 - bias.dim())], False
    return bias.added, True


def attention_in_products(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: ScoreBias,
    scale: float,
) -> torch.Tensor:
    """attention(), whose last bits do not depend on the number of threads: torch's own operator for
    CPUs cuts its work by that."""
    if isinstance(bias, Alibi):
        return attend_with_alibi(attention_in_products, query, key, value, bias, scale)
    y: torch.Tensor = torch.ops.aten._scaled_dot_product_attention_math(
        query, key, value, tensor_of(bias, query, key), scale=scale
    )[0]
    return y


def kind_of(bias: ScoreBias, num_queries: int) -> BiasKind:
    """What operators of torch tell apart."""
    if isinstance(bias, Causal) and bias.num_padding is None:
        return "causal" if num_queries > 1 else "none"
    return "none" if bias is None else "tensor"


def tensor_of(
    bias: torch.Tensor | RelativeBias | Causal | None, query: torch.Tensor, key: torch.Tensor
) -> torch.Tensor | None:
    """The bias as a tensor, made of its parameters once for all layers; None masks nothing."""
    if bias is None or isinstance(bias, torch.Tensor):
        return bias
    shape = query.shape[2], key.shape[2]
    if kind_of(bias, shape[0]) == "none":
        return None
    if shape not in bias.made:
        is_relative = isinstance(bias, RelativeBias)
        make = _relative_tensor if is_relative else _causal_tensor
        bias.made[shape] = make(bias, *shape, query)  # type: ignore[arg-type]
    return bias.made[shape]


def _relative_tensor(
    bias: RelativeBias, num_queries: int, num_keys: int, query: torch.Tensor
) -> torch.Tensor:
    if num_queries == 1:
        return bias.tensor(num_queries, num_keys)
    mask = causal_mask(num_queries, num_keys, query.device)
    return bias.tensor(num_queries, num_keys) + mask_to_bias(mask, query.dtype)


def _causal_tensor(
    bias: Causal, num_queries: int, num_keys: int, query: torch.Tensor
) -> torch.Tensor:
    """(1 or B, 1, T, S)."""
    mask = causal_mask(num_queries, num_keys, query.device)
    if bias.num_padding is not None:
        keys = torch.arange(num_keys, device=query.device)
        mask = mask | (keys < bias.num_padding.unsqueeze(1))[:, None]
    return mask_to_bias(mask.view(-1, 1, num_queries, num_keys), query.dtype)


@dataclass(frozen=True)
class Gpu:
    """What decides between the operators, beside the tensors.

    capability: 61, 80, ...   has_flash, has_efficient: built into torch, and not switched off by
    torch.backends.cuda.enable_flash_sdp() or enable_mem_efficient_sdp().
    """

    capability: int
    has_flash: bool = True
    has_efficient: bool = True


def operator_for(
    dtype: torch.dtype, head_dim: int, num_queries: int, num_keys: int, bias: BiasKind, gpu: Gpu
) -> Operator:
    """The first operator that takes such tensors, where no kernel of ours does.

    Flash attention takes no bias, and its causal mask gives the first query the first key: right
    for a whole prompt, and not for the second part of one, whose queries are the last of the keys.
    Source: the conditions of torch 2.4 to 2.13, aten/src/ATen/native/transformers/cuda/sdp_utils.
    """
    is_half = dtype in (torch.float16, torch.bfloat16)
    is_whole = num_queries == num_keys and bias != "tensor"
    fits_flash = is_half and is_whole and head_dim <= 256 and head_dim % 8 == 0
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


def _flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool, scale: float
) -> torch.Tensor:
    y: torch.Tensor = torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, 0.0, is_causal, scale=scale
    )[0]
    return y


def _on_gpu(
    operator: Operator,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    aten = torch.ops.aten
    if operator == "efficient":
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
