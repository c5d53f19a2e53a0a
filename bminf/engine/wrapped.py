"""Which rows a model of transformers gets, and for how many tokens there is room."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch

from bminf.checks import check_positive, plain
from bminf.engine.pool_rows import PoolRows
from bminf.errors import ArgumentError, BudgetError, UnsupportedModelError
from bminf.layers.quantized_linear import QuantizedLinear
from bminf.offload.backends import free_budget
from bminf.offload.context import (
    Context,
    cache_bytes,
    context_of,
    first_of,
    generates_text,
    layer_kinds,
    text_config,
)
from bminf.offload.hooks import ATTRIBUTE, Scheduler
from bminf.units import format_bytes

logger = logging.getLogger("bminf")

_SHARE = 5
"""One part in so many of the limit is the cache, unless told."""
_LEAST_TOKENS = 512
_MOST_TEXTS = 64  # of the model's positions: more rows are not decoded at once


def rows_of(
    model: Any, max_length: int | None, max_batch_size: int | None, deterministic: bool
) -> PoolRows:
    """The rows of a model of transformers, wrapped or not.

    max_length, max_batch_size: texts that the cache has room for; None is what wrapper() was told,
    or a fifth of the limit, within it.   deterministic: what the rows are for.
    Raises ArgumentError for a model that does not generate text, UnsupportedModelError where a row
    cannot be independent of others, BudgetError where the limit leaves no room.
    """
    max_length, max_batch_size = plain(max_length), plain(max_batch_size)
    check_positive("max_length", max_length, none="None")
    check_positive("max_batch_size", max_batch_size, none="None")
    if not generates_text(model) and not _is_seq2seq(model):
        raise ArgumentError(
            f"a {type(model).__name__} does not generate text; give a model of the zoo, or one of "
            "transformers that does"
        )
    # These import transformers, which the rest of the engine does without.
    from bminf.engine.alone import AloneRows
    from bminf.engine.causal import CausalRows, why_alone
    from bminf.engine.seq2seq import MODEL_TYPES, Seq2SeqRows

    longest, num_tokens = _room(model, max_length, max_batch_size)
    if getattr(model.config, "model_type", None) in MODEL_TYPES and not deterministic:
        return Seq2SeqRows(model, num_tokens, longest)
    reason = why_alone(model)
    if deterministic and reason is None and _has_experts(model):
        raise UnsupportedModelError(
            f"deterministic=True is not for a {type(model).__name__}: how many tokens an expert "
            "gets, and with that the rounding of its products, depends on all rows of a pass"
        )
    if reason is None:
        return CausalRows(model, num_tokens, longest)
    warnings.warn(
        f"texts of a {type(model).__name__} are decoded one after another, each with passes of its "
        f"own: {reason}",
        stacklevel=3,
    )
    return AloneRows(model, num_tokens, longest)


def _has_experts(model: Any) -> bool:
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return first_of(text_config(model.config), *names) is not None


def _is_seq2seq(model: Any) -> bool:
    config = getattr(model, "config", None)
    return bool(getattr(config, "is_encoder_decoder", False)) and callable(
        getattr(model, "get_encoder", None)
    )


def _room(model: Any, max_length: int | None, max_batch_size: int | None) -> tuple[int, int]:
    """The most tokens of a row, and of all rows together."""
    context = _context_of(model)
    if context is not None:
        max_length = max_length or context.max_length
        max_batch_size = max_batch_size or context.max_batch_size
    positions = _positions_of(model)
    if max_length is None:
        num_tokens = _share_of_limit(model, positions)
        longest = min(num_tokens, positions or num_tokens)
    else:
        longest, num_tokens = max_length, max_length * (max_batch_size or 1)
        if positions is not None and _has_position_table(model, positions):
            longest = min(max_length, positions)
        _warn_of_limit(model, max_length, num_tokens)
    logger.info(
        "the KV cache has room for %d tokens (%s); max_length and max_batch_size set it",
        num_tokens,
        format_bytes(num_tokens * _token_bytes(model)),
    )
    return longest, num_tokens


def _share_of_limit(model: Any, positions: int | None) -> int:
    """Tokens that a fifth of the limit holds, or as many as have room in what its plan leaves; of
    this a pass over 512 takes its share, too.   Raises BudgetError for fewer than 512."""
    token_bytes, scheduler = _token_bytes(model), _scheduler_of(model)
    num_tokens = max(_LEAST_TOKENS, _limit_of(model) // _SHARE // token_bytes)
    if positions is not None:
        num_tokens = min(num_tokens, _MOST_TEXTS * positions)
    if scheduler is None:
        return num_tokens
    workspace_bytes = _workspace_bytes(model, scheduler)
    num_fitting = (scheduler.plan.unused_bytes - workspace_bytes) // token_bytes
    if num_fitting >= _LEAST_TOKENS:
        return min(num_tokens, num_fitting)
    needed = _LEAST_TOKENS * token_bytes + workspace_bytes
    raise BudgetError(
        f"the limit of {format_bytes(scheduler.plan.budget)} leaves "
        f"{format_bytes(scheduler.plan.unused_bytes)} beside the weights, and {_LEAST_TOKENS} "
        f"tokens of a text take {format_bytes(needed)} (KV cache and workspace); load or wrap the "
        f"model with max_length={_LEAST_TOKENS} or more, which sets their room aside"
    )


def _warn_of_limit(model: Any, max_length: int, num_tokens: int) -> None:
    """Where a cache that was asked for has no room within the limit."""
    scheduler, nbytes = _scheduler_of(model), num_tokens * _token_bytes(model)
    if scheduler is not None and nbytes > scheduler.plan.unused_bytes:
        logger.warning(
            "the KV cache of %d tokens takes %s, and the limit of %s leaves %s beside the weights: "
            "the rest is beyond it; load or wrap the model with max_length=%d and "
            "max_batch_size=%d, which sets its room aside",
            num_tokens,
            format_bytes(nbytes),
            format_bytes(scheduler.plan.budget),
            format_bytes(scheduler.plan.unused_bytes),
            max_length,
            num_tokens // max_length,
        )


def _workspace_bytes(model: Any, scheduler: Scheduler) -> int:
    """Of a pass over the prompt of a row of 512 tokens."""
    packed = (module.form for module in model.modules() if isinstance(module, QuantizedLinear))
    is_cpu = scheduler.backend.device.type == "cpu"
    return context_of(model, _LEAST_TOKENS, 1, next(packed, None), is_cpu).workspace_bytes


def _scheduler_of(model: Any) -> Scheduler | None:
    scheduler: Scheduler | None = model.__dict__.get(ATTRIBUTE)
    return scheduler


def _context_of(model: Any) -> Context | None:
    scheduler = _scheduler_of(model)
    return None if scheduler is None else scheduler.plan.context


def _limit_of(model: Any) -> int:
    """Bytes that it was wrapped for, or that are free beside it."""
    scheduler = _scheduler_of(model)
    if scheduler is not None:
        return scheduler.plan.budget
    weight: torch.Tensor = model.get_input_embeddings().weight
    return free_budget(weight.device)


def _token_bytes(model: Any) -> int:
    """Of the cache: a window makes it no smaller, for the pool keeps all tokens of a row; a state
    that does not grow with them counts for a row of 512."""
    itemsize = next(p.dtype.itemsize for p in model.parameters() if p.is_floating_point())
    kinds = layer_kinds(text_config(model.config), 1)
    length = 1 if {"full_attention", "sliding_attention"}.issuperset(kinds) else _LEAST_TOKENS
    return max(1, cache_bytes(model.config, 1, length, itemsize) // length)


def _positions_of(model: Any) -> int | None:
    found = first_of(text_config(model.config), "max_position_embeddings", "n_positions")
    return found if isinstance(found, int) and found > 0 else None


def _has_position_table(model: Any, positions: int) -> bool:
    """Whether positions are rows of a table, which has none beyond: on a GPU, asking for one ends
    all that the process computes there. Tables of OPT and BART begin with two rows more."""
    others = (one for one in model.modules() if one is not model.get_input_embeddings())
    tables = (one for one in others if isinstance(one, torch.nn.Embedding))
    return any(positions <= table.num_embeddings <= positions + 2 for table in tables)
