"""Every mixture of experts of transformers that builds small from its configuration: a batch of
three, a prompt of 50 tokens, then decoding, with a fifth of the experts resident."""

from __future__ import annotations

import copy
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
import transformers
from test_pool import Lru

import bminf
from bminf.layers.experts import forward_of, is_dispatched
from bminf.wrapping import plan_for
from tools.sweep.shrink import Shrinker

BATCH, LENGTH, NUM_TOKENS = 3, 50, 4

# Those that are left out are not built so small, or do not run on text alone.
FAMILIES = (
    "AfmoeForCausalLM",
    "AriaTextForCausalLM",
    "AXK1ForCausalLM",
    "AXK2ForCausalLM",
    "BeamForCausalLM",
    "Cohere2MoeForCausalLM",
    "DeepseekV3ForCausalLM",
    "DeepseekV32ForCausalLM",
    "DeepseekV4ForCausalLM",
    "Ernie4_5_MoeForCausalLM",
    "ExaoneMoeForCausalLM",
    "FlexOlmoForCausalLM",
    "FlintForCausalLM",
    "Glm4MoeForCausalLM",
    "Glm4MoeLiteForCausalLM",
    "GlmMoeDsaForCausalLM",
    "GptOssForCausalLM",
    "GraniteMoeForCausalLM",
    "GraniteMoeSharedForCausalLM",
    "HYV3ForCausalLM",
    "HYV4ForCausalLM",
    "InklingForCausalLM",
    "JambaForCausalLM",
    "JetMoeForCausalLM",
    "KimiLinearForCausalLM",
    "Kolibri1ForCausalLM",
    "Llama4ForCausalLM",
    "MellumForCausalLM",
    "MiMoV2FlashForCausalLM",
    "MiniMaxForCausalLM",
    "MiniMaxM2ForCausalLM",
    "MiniMaxM3VLForCausalLM",
    "Mistral4ForCausalLM",
    "MixtralForCausalLM",
    "NemotronHForCausalLM",
    "OlmoeForCausalLM",
    "OpenAIPrivacyFilterForTokenClassification",
    "PhimoeForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3_5MoeForCausalLM",
    "Qwen3MoeForCausalLM",
    "Qwen3NextForCausalLM",
    "SolarOpenForCausalLM",
    "ZayaForCausalLM",
)


@cache
def made(family: str) -> Any:
    """As small as it is built, and runs: grouped_mm takes no rows of less than 16 bytes."""
    kind = getattr(transformers, family)
    values = kind.config_class().to_dict()
    for factor, fewer_heads in product((32, 16, 8), (False, True)):
        torch.manual_seed(0)
        try:
            small = Shrinker(factor, fewer_heads).shrink(values)
            model = kind(kind.config_class(**small)).eval()
            outputs_of(model)
        except (ValueError, RuntimeError, TypeError, ZeroDivisionError):
            continue
        return model
    raise AssertionError(f"{family} does not run so small")


def make(family: str) -> Any:
    return copy.deepcopy(made(family))


def outputs_of(model: Any) -> list[torch.Tensor]:
    """Of the prompt, and of each token after it."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 90, (BATCH, LENGTH + NUM_TOKENS), generator=generator)
    found: list[torch.Tensor] = []
    cached: dict[str, Any] = {}
    with torch.no_grad():
        for start, end in [(0, LENGTH), *((n, n + 1) for n in range(LENGTH, LENGTH + NUM_TOKENS))]:
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


def routing_of(model: Any) -> list[list[int]]:
    """What each call of each module of experts wants, numbered over all modules."""
    wanted: list[list[int]] = []
    first = 0
    for module in model.modules():
        if is_dispatched(module):

            def note(module: Any, args: Any, first: int = first) -> None:
                ids = set(args[1].flatten().tolist())
                wanted.append([first + number for number in sorted(ids)])

            module.register_forward_pre_hook(note)
            first += module.num_experts
    outputs_of(model)
    return wanted


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_by_need_equals_the_unwrapped_model(family: str) -> None:
    model = make(family)
    expected = outputs_of(model)
    by_need(model, False)
    for given, other in zip(outputs_of(model), expected, strict=True):
        assert torch.equal(given.nan_to_num(7.0), other.nan_to_num(7.0))
    stats, experts = bminf.stats_of(model), bminf.plan_of(model).experts
    assert stats.expert_misses and stats.bytes_copied == stats.expert_bytes_copied
    assert stats.bytes_copied <= stats.expert_misses * experts.slot_bytes
    layers = routing_of(make(family))
    if layers and experts.num_slots >= max(map(len, layers)):
        lru = Lru(experts.num_slots)
        for number in (number for layer in layers for number in layer):
            lru.use(number)
        assert stats.expert_hits >= lru.hits
        assert stats.expert_hits + stats.expert_misses == sum(map(len, layers))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_by_need_equals_packed_and_resident(family: str) -> None:
    resident = bminf.wrapper(make(family), "int4", "4GB", device="cpu")
    assert not any(
        parameter.dim() == 3
        for module in resident.modules()
        if forward_of(module) is not None
        for parameter in module._parameters.values()
        if parameter is not None
    )
    expected = outputs_of(resident)
    model = by_need(make(family), "int4")
    for given, other in zip(outputs_of(model), expected, strict=True):
        assert torch.equal(given.nan_to_num(7.0), other.nan_to_num(7.0))
