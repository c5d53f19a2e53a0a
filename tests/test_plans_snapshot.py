"""Plans of all published models, and of a dozen wrapped ones, at 40 limits, as tests/snapshots has
them: what comes over the bus, what the limit has to hold, and that no limit is exceeded."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pytest
import tiny_models
import torch
import transformers as tf
from snapshot_files import check

import bminf
from bminf.arch.registry import ARCHITECTURES
from bminf.errors import BudgetError
from bminf.models import plan_model
from bminf.models.source import published
from bminf.offload.plan import Plan, least_budget, plan

NUM_LIMITS = 40

COMPARED = ("cost", "streamed", "total_bytes")
"""Of each plan. The choice of blocks is not compared, only what it comes to. A planner that makes
another choice of the same cost writes the files anew, or compares ("cost",) alone for a while."""

ZOO = (
    "TsinghuaAI/CPM-Generate", "mymusise/CPM-Generate-distill", "CPM-2 (Chinese), CPM-2.1",
    "CPM-2 (Chinese and English)", "thu-coai/EVA1.0", "thu-coai/EVA2.0-xlarge",
    "thu-coai/EVA2.0-large", "thu-coai/EVA2.0-base", "GLM-130B", "GLM-10B", "GLM-10B-chinese",
    "GLM-2B", "bloom-560m", "bloom-1b1", "bloom-1b7", "bloom-3b", "bloom-7b1", "bloom",
)  # fmt: skip


@dataclass(frozen=True)
class Wrapped:
    """A model of tiny_models with as many layers as real ones have.

    changed: fields of its configuration.   quantization: of wrapper().
    is_halved: whether parts of layers are the blocks.
    """

    model: str
    changed: Mapping[str, Any]
    quantization: str | bool = "int8"
    is_halved: bool = False


_JAMBA = dict(
    num_hidden_layers=16, attn_layer_period=8, attn_layer_offset=4, expert_layer_period=2,
    expert_layer_offset=1, num_experts=4, mamba_d_state=4, mamba_dt_rank=4,
)  # fmt: skip
WRAPPED = {
    "Llama": Wrapped("llama", {"num_hidden_layers": 32}, False),
    "Llama, packed, by halves": Wrapped("llama", {"num_hidden_layers": 24}, is_halved=True),
    "Gemma": Wrapped("gemma3_text", {"num_hidden_layers": 26}),
    "Mixtral": Wrapped("mixtral", {"num_hidden_layers": 32}),
    "DeepSeek": Wrapped("deepseek_v3", {"num_hidden_layers": 24, "first_k_dense_replace": 3}),
    "GLM-4 of experts": Wrapped("glm4_moe", {"num_hidden_layers": 20}, False),
    "Jamba": Wrapped("jamba", _JAMBA),
    "BLOOM": Wrapped("bloom", {"n_layer": 30}, False),
    "Mamba": Wrapped("mamba", {"num_hidden_layers": 30}),
    "T5": Wrapped("t5", {"num_layers": 12, "num_decoder_layers": 15}, False),
    "T5, by parts of layers": Wrapped(
        "t5", {"num_layers": 6, "num_decoder_layers": 7}, "int4", True
    ),
    "BART": Wrapped("bart", {"encoder_layers": 12, "decoder_layers": 14}),
    "Whisper": Wrapped("whisper", {"encoder_layers": 16, "decoder_layers": 18}, False),
    "ViT": Wrapped("vit", {"num_hidden_layers": 24}),
}


@dataclass(frozen=True)
class Planned:
    """whole: without a limit.   at: the plans at as many limits, from the least one to that."""

    whole: Plan
    at: tuple[Plan, ...]


def planned(whole: Plan, num_limits: int = NUM_LIMITS) -> Planned:
    least, most = least_budget(whole), whole.total_bytes
    limits = (least + (most - least) * i // (num_limits - 1) for i in range(num_limits))
    return Planned(whole, tuple(replanned(whole, limit) for limit in limits))


def replanned(whole: Plan, limit: int) -> Plan:
    """Of the same blocks."""
    return plan(
        whole.blocks, limit, whole.uses,
        outside_bytes=whole.outside_bytes - whole.table_bytes, table_bytes=whole.table_bytes,
        tables=["tables"] if whole.table_bytes else [], reserved_bytes=whole.reserved_bytes,
    )  # fmt: skip


@lru_cache
def zoo() -> dict[str, Planned]:
    return {n: planned(plan_of_zoo(n)) for n in ZOO}


def plan_of_zoo(name: str, limit: int | None = None) -> Plan:
    return plan_model(name, limit)


@lru_cache
def wrapped() -> dict[str, Planned]:
    return {name: planned(plan_of_wrapped(name)) for name in WRAPPED}


def plan_of_wrapped(name: str, limit: int | None = None) -> Plan:
    how = WRAPPED[name]
    kind = tiny_models.TINY.get(how.model) or tiny_models.Tiny(
        tf.JambaForCausalLM, tf.JambaConfig, tiny_models.LLAMA
    )
    with torch.device("meta"):
        model = kind.model(kind.config(**{**kind.arguments, **how.changed}))
    blocks = tiny_models.half_layer_names(how.model, model) if how.is_halved else None
    return bminf.plan_for(model, how.quantization, limit, blocks=blocks, device="cpu")


def entries(models: Mapping[str, Planned]) -> dict[str, Any]:
    """What the files hold: of each model its blocks, and of each limit what its plan comes to."""
    found: dict[str, Any] = {}
    for name, its in models.items():
        found[name] = sizes(its.whole)
        found |= {f"{name}, limit {i}": costs(at) for i, at in enumerate(its.at)}
    return found


def sizes(whole: Plan) -> dict[str, Any]:
    """kinds: list, bytes and uses of blocks -> how many; digest: of all, in order."""
    rows = [(block.name, block.nbytes, whole.uses[block.name]) for block in whole.blocks]
    kinds = Counter(f"{b.list_name}: {b.nbytes} x {whole.uses[b.name]}" for b in whole.blocks)
    return {
        "least_limit": whole.least_limit,
        "total_bytes": whole.total_bytes,
        "outside_bytes": whole.outside_bytes,
        "reserved_bytes": whole.reserved_bytes,
        "kinds": dict(kinds),
        "digest": hashlib.sha256(repr(rows).encode()).hexdigest()[:16],
    }


def costs(at: Plan) -> dict[str, Any]:
    """cost: bytes over the bus in a request, which is what the planner keeps small."""
    return {
        "cost": at.streamed_bytes_per_request,
        "streamed": len(at.streamed),
        "total_bytes": at.total_bytes,
    }


def compared(found: Mapping[str, Any]) -> dict[str, Any]:
    """The entries; of plans, the fields that COMPARED names."""
    return {
        name: {field: entry[field] for field in COMPARED} if "cost" in entry else entry
        for name, entry in found.items()
    }


def test_every_published_model_is_planned() -> None:
    """Each configuration by one of its names: some have two."""
    every = [config for one in ARCHITECTURES for config in one.published.values()]
    planned = [published(name).config for name in ZOO]
    assert all(config in planned for config in every)


@pytest.mark.parametrize(
    ("file", "models"), [("plans_zoo.json", zoo), ("plans_wrapped.json", wrapped)]
)
def test_plans_are_those_of_the_snapshot(
    file: str, models: Callable[[], dict[str, Planned]]
) -> None:
    check(file, entries(models()), compared)


@pytest.mark.parametrize("models", [zoo, wrapped])
def test_no_plan_exceeds_its_limit(models: Callable[[], dict[str, Planned]]) -> None:
    for name, its in models().items():
        assert all(at.total_bytes <= at.budget for at in its.at), name
        assert its.at[0].streamed and not its.at[-1].streamed, name
        with pytest.raises(BudgetError, match="below the least"):
            replanned(its.whole, its.whole.least_limit - 1)


@pytest.mark.parametrize("models", [zoo, wrapped])
def test_a_larger_limit_never_costs_more(models: Callable[[], dict[str, Planned]]) -> None:
    for name, its in models().items():
        falling = [at.streamed_bytes_per_request for at in its.at]
        assert falling == sorted(falling, reverse=True), name


@pytest.mark.parametrize(
    ("models", "name", "plan_of"),
    [(zoo, "CPM-2 (Chinese), CPM-2.1", plan_of_zoo), (wrapped, "Gemma", plan_of_wrapped)],
)
def test_the_plan_of_a_limit_is_that_of_the_public_function(
    models: Callable[[], dict[str, Planned]], name: str, plan_of: Callable[[str, int], Plan]
) -> None:
    """The other tests plan the same blocks anew, because making a model takes far longer."""
    middle = models()[name].at[NUM_LIMITS // 2]
    assert plan_of(name, middle.budget).streamed == middle.streamed != ()
