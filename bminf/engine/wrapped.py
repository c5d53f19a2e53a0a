"""Which rows a model of transformers gets, and for how many tokens there is room."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch

from bminf.checks import check_positive
from bminf.engine.pool_rows import PoolRows
from bminf.errors import ArgumentError, UnsupportedModelError
from bminf.offload.backends import free_budget
from bminf.offload.context import Context, cache_bytes, first_of, generates_text, text_config
from bminf.offload.hooks import ATTRIBUTE
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
    or a fifth of the limit.   deterministic: what the rows are for.
    Raises ArgumentError for a model that does not generate text, UnsupportedModelError where a row
    cannot be independent of others.
    """
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
    if max_length is not None:
        longest = max_length
        if positions is not None and _has_position_table(model, positions):
            longest = min(max_length, positions)
        return longest, max_length * (max_batch_size or 1)
    num_tokens = max(_LEAST_TOKENS, _limit_of(model) // _SHARE // _token_bytes(model))
    if positions is not None:
        num_tokens = min(num_tokens, _MOST_TEXTS * positions)
    logger.info(
        "the KV cache has room for %d tokens (%s); max_length and max_batch_size set it",
        num_tokens,
        format_bytes(num_tokens * _token_bytes(model)),
    )
    return min(num_tokens, positions or num_tokens), num_tokens


def _context_of(model: Any) -> Context | None:
    scheduler = model.__dict__.get(ATTRIBUTE)
    return None if scheduler is None else scheduler.plan.context


def _limit_of(model: Any) -> int:
    """Bytes that it was wrapped for, or that are free beside it."""
    scheduler = model.__dict__.get(ATTRIBUTE)
    if scheduler is not None:
        return int(scheduler.plan.budget)
    weight: torch.Tensor = model.get_input_embeddings().weight
    return free_budget(weight.device)


def _token_bytes(model: Any) -> int:
    itemsize = next(p.dtype.itemsize for p in model.parameters() if p.is_floating_point())
    return max(1, cache_bytes(model.config, 1, 1, itemsize))


def _positions_of(model: Any) -> int | None:
    found = first_of(text_config(model.config), "max_position_embeddings", "n_positions")
    return found if isinstance(found, int) and found > 0 else None


def _has_position_table(model: Any, positions: int) -> bool:
    """Whether positions are rows of a table, which has none beyond: on a GPU, asking for one ends
    all that the process computes there. Tables of OPT and BART begin with two rows more."""
    others = (one for one in model.modules() if one is not model.get_input_embeddings())
    tables = (one for one in others if isinstance(one, torch.nn.Embedding))
    return any(positions <= table.num_embeddings <= positions + 2 for table in tables)
