"""Every mixture of experts of transformers that builds small from its configuration: a batch of
three, a prompt of 50 tokens, then decoding, and one text alone, with a fifth of the experts
resident."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from test_pool import Lru

import bminf
from bminf.layers.experts import forward_of, is_dispatched
from bminf.offload.hooks import ATTRIBUTE
from bminf.wrapping import plan_for
from tools.sweep.shrink import Shrinker

BATCH, LENGTH, NUM_TOKENS = 3, 50, 2
NUM_EXPERTS = 16  # of a layer, so that a fifth of all is more than a token takes

# Those that are left out are not built so small, or do not run on text alone.
FAMILIES = (
    "AfmoeForCausalLM",
    "AriaTextForCausalLM",
    "AXK1ForCausalLM",
    "AXK2ForCausalLM",
    "BailingHybridForCausalLM",
    "BeamForCausalLM",
    "Cohere2MoeForCausalLM",
    "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM",
    "DeepseekV32ForCausalLM",
    "DeepseekV4ForCausalLM",
    "Dots1ForCausalLM",
    "Ernie4_5_MoeForCausalLM",
    "ExaoneMoeForCausalLM",
    "FlexOlmoForCausalLM",
    "FlintForCausalLM",
    "Gemma4ForCausalLM",
    "Glm4MoeForCausalLM",
    "Glm4MoeLiteForCausalLM",
    "Glm5NextForConditionalGeneration",
    "GlmMoeDsaForCausalLM",
    "GptOssForCausalLM",
    "GraniteMoeForCausalLM",
    "GraniteMoeSharedForCausalLM",
    "GraniteMoeSWAForCausalLM",
    "HunYuanMoEV1ForCausalLM",
    "HYV3ForCausalLM",
    "HYV4ForCausalLM",
    "Inkling2ForCausalLM",
    "InklingForCausalLM",
    "JambaForCausalLM",
    "JetMoeForCausalLM",
    "KimiLinearForCausalLM",
    "Kolibri1ForCausalLM",
    "LagunaForCausalLM",
    "Lfm2MoeForCausalLM",
    "Llama4ForCausalLM",
    "MellumForCausalLM",
    "MiMoV2FlashForCausalLM",
    "MiniMaxForCausalLM",
    "MiniMaxM2ForCausalLM",
    "MiniMaxM3VLForCausalLM",
    "Mistral4ForCausalLM",
    "MixtralForCausalLM",
    "MuseSparkForConditionalGeneration",
    "NemotronHForCausalLM",
    "OlmoeForCausalLM",
    "OpenAIPrivacyFilterForTokenClassification",
    "PhimoeForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3_5MoeForCausalLM",
    "Qwen3MoeForCausalLM",
    "Qwen3NextForCausalLM",
    "Qwen3OmniMoeThinkerForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
    "SolarOpenForCausalLM",
    "UnlimitedOcrForConditionalGeneration",
    "ZayaForCausalLM",
)

# Their routers are called with more than the module around them was given.
ASKED_LATE = (
    "AfmoeForCausalLM",
    "DeepseekV4ForCausalLM",
    "Gemma4ForCausalLM",
    "HYV3ForCausalLM",
    "JetMoeForCausalLM",
    "Lfm2MoeForCausalLM",
    "MiniMaxM2ForCausalLM",
    "ZayaForCausalLM",
)

# Of four layers, one has to be of each kind.
NUM_LAYERS = {
    "BailingHybridForCausalLM": 6,
    "JambaForCausalLM": 6,
    "KimiLinearForCausalLM": 6,
}

# What does not run as it is made smaller.
SIZES: dict[str, dict[str, Any]] = {
    "BailingHybridForCausalLM": {"num_expert_group": 1, "topk_group": 1},
    "DeepseekV2ForCausalLM": {"num_experts_per_tok": 2, "moe_intermediate_size": 64},
    "Dots1ForCausalLM": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "Gemma4ForCausalLM": {
        "enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 16,
    },
    "HunYuanMoEV1ForCausalLM": {"head_dim": 16, "num_experts": 8, "moe_topk": 2},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"] * 2},
}  # fmt: skip


class Made(NamedTuple):
    """A model that is not wrapped, what it gives, and the experts that it wants meanwhile."""

    model: Any
    outputs: list[torch.Tensor]
    wanted: list[list[int]]


@cache
def made(family: str) -> Made:
    """As small as it is built, and runs: grouped_mm takes no rows of less than 16 bytes."""
    kind = getattr(transformers, family)
    values = kind.config_class().to_dict()
    for factor, fewer_heads in product((32, 16, 8), (False, True)):
        torch.manual_seed(0)
        try:
            small = Shrinker(factor, fewer_heads, NUM_LAYERS.get(family, 4)).shrink(values)
            small = _with_more_experts(small | SIZES.get(family, {}))
            model = kind(kind.config_class(**small)).eval()
            with routing_of(model) as wanted:
                outputs = run_all(model)
        except (ValueError, RuntimeError, TypeError, ZeroDivisionError, StrictDataclassError):
            continue
        return Made(model, outputs, wanted)
    raise AssertionError(f"{family} does not run so small")


def _with_more_experts(values: dict[str, Any]) -> dict[str, Any]:
    """The configuration, and those in it, with NUM_EXPERTS in place of seven or eight."""
    return {
        name: _with_more_experts(value)
        if isinstance(value, dict)
        else NUM_EXPERTS
        if value in (7, 8) and _OF_EXPERTS.fullmatch(name)
        else value
        for name, value in values.items()
    }


_OF_EXPERTS = re.compile("(moe_)?num(_local|_routed)?_experts|n_routed_experts")


def make(family: str) -> Any:
    return copy.deepcopy(made(family).model)


def outputs_of(model: Any, batch: int = BATCH, prompt: int = LENGTH) -> list[torch.Tensor]:
    """Of the prompt, and of each token after it."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 90, (batch, prompt + NUM_TOKENS), generator=generator)
    found: list[torch.Tensor] = []
    cached: dict[str, Any] = {}
    with torch.no_grad():
        for start, end in [(0, prompt), *((n, n + 1) for n in range(prompt, prompt + NUM_TOKENS))]:
            result = model(ids[:, start:end], **cached)
            found.append(result[0].clone())
            past = getattr(result, "past_key_values", None)
            cached = {} if past is None else {"past_key_values": past, "use_cache": True}
    return found


def by_need(model: Any, quantization: str | bool) -> Any:
    whole = plan_for(model, quantization)
    planned = plan_for(model, quantization, whole.total_bytes - 1, device="cpu").experts
    assert planned is not None
    num_slots = max(2, planned.number // 5)
    dense = whole.total_bytes - whole.table_bytes - planned.nbytes
    limit = dense + num_slots * planned.slot_bytes
    bminf.wrapper(model, quantization, limit, device="cpu")
    plan = bminf.plan_of(model)
    assert plan.experts.num_slots in (num_slots, num_slots + 1) and not plan.streamed
    return model


@contextmanager
def routing_of(model: Any) -> Iterator[list[list[int]]]:
    """What each call of each module of experts wants meanwhile, numbered over all modules."""
    wanted: list[list[int]] = []
    handles, first = [], 0
    for module in model.modules():
        if is_dispatched(module):

            def note(module: Any, args: Any, first: int = first) -> None:
                ids = set(args[1].flatten().tolist())
                wanted.append([first + number for number in sorted(ids)])

            handles.append(module.register_forward_pre_hook(note))
            first += module.num_experts
    yield wanted
    for handle in handles:
        handle.remove()


def run_all(model: Any) -> list[torch.Tensor]:
    """What a test compares: three texts with a prompt, and one token by token."""
    return outputs_of(model) + outputs_of(model, 1, 1) + outputs_of(model, 1, 1)


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for given, other in zip(found, expected, strict=True):
        assert torch.equal(given.nan_to_num(7.0), other.nan_to_num(7.0))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_by_need_equals_the_unwrapped_model(family: str) -> None:
    model = by_need(make(family), False)
    _, expected, layers = made(family)
    assert_equal(run_all(model), expected)
    stats, experts = bminf.stats_of(model), bminf.plan_of(model).experts
    assert stats.expert_misses and stats.bytes_copied == stats.expert_bytes_copied
    assert stats.bytes_copied <= stats.expert_misses * largest_expert(model)
    lru = Lru(experts.num_slots)
    for number in (number for layer in layers for number in layer):
        lru.use(number)
    assert stats.expert_hits >= lru.hits
    if layers:
        assert stats.expert_hits + stats.expert_misses == sum(map(len, layers))
    assert stats.expert_hits or experts.num_slots < 8  # of one layer, with the least room


def largest_expert(model: Any) -> int:
    """Bytes of it."""
    modules = model.__dict__[ATTRIBUTE].experts
    return max(layout.nbytes for one in modules for layout in one.stack.experts)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_repeated_token_copies_nothing(family: str) -> None:
    model, ids = by_need(make(family), False), torch.tensor([[7]])
    with torch.no_grad():
        first, before = model(ids, use_cache=False)[0].clone(), bminf.stats_of(model)
        again = model(ids, use_cache=False)[0]
    after = bminf.stats_of(model)
    assert torch.equal(again.nan_to_num(7.0), first.nan_to_num(7.0))
    assert after.bytes_copied == before.bytes_copied
    assert after.expert_hits == before.expert_misses
    routers = model.__dict__[ATTRIBUTE].routers
    assert routers and all(one.is_early for one in routers) == (family not in ASKED_LATE)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_other_implementations(family: str) -> None:
    """What a configuration may ask for: "eager" adds up in the order of the experts, and batched_mm
    rounds otherwise."""
    one, streamed = make(family), make(family)
    if not any(map(is_dispatched, one.modules())):
        pytest.skip("it lets nobody choose")
    by_need(streamed, False)
    for model in (one, streamed):
        model.set_experts_implementation("eager")
    expected = outputs_of(one, prompt=9)
    assert_equal(outputs_of(streamed, prompt=9), expected)
    streamed.set_experts_implementation("batched_mm")
    for given, right in zip(outputs_of(streamed, prompt=9), expected, strict=True):
        torch.testing.assert_close(given, right, equal_nan=True)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "family", list(FAMILIES)[::2]
)  # how each is packed: layers/test_experts.py
def test_packed_by_need_equals_packed_and_resident(family: str) -> None:
    resident = bminf.wrapper(make(family), "int4", "4GB", device="cpu")
    assert not any(
        parameter.dim() == 3
        for module in resident.modules()
        if forward_of(module) is not None
        for parameter in module._parameters.values()
        if parameter is not None
    )
    expected = run_all(resident)
    assert_equal(run_all(by_need(make(family), "int4")), expected)
