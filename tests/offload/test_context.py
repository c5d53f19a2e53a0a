"""What a text takes beside the weights: the estimate, against what a model's cache really holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch
import transformers

import bminf
from bminf.errors import ArgumentError, BudgetError
from bminf.offload.context import cache_bytes, context_of

LENGTH, BATCH = 40, 2
TEXT: dict[str, Any] = dict(
    vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
    num_attention_heads=4, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
GROUPED = {**TEXT, "num_key_value_heads": 2}
EXPERTS: dict[str, Any] = dict(
    num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2,
    moe_intermediate_size=32, n_group=1, topk_group=1, n_shared_experts=1,
)  # fmt: skip
LATENT: dict[str, Any] = dict(
    kv_lora_rank=32, q_lora_rank=24, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=12,
    num_key_value_heads=4, first_k_dense_replace=1,
)  # fmt: skip
MAMBA = dict(mamba_n_heads=8, mamba_d_head=16, mamba_d_state=8)
DELTA = dict(
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16,
    linear_value_head_dim=8, head_dim=16, shared_expert_intermediate_size=32,
)  # fmt: skip
BART = dict(
    vocab_size=96, d_model=64, encoder_layers=3, decoder_layers=4, encoder_attention_heads=2,
    decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96,
)  # fmt: skip
T5 = dict(
    vocab_size=96, d_model=64, d_kv=16, d_ff=96, num_heads=4, num_layers=3, num_decoder_layers=4
)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "all heads": ("gpt2", TEXT),
    "grouped heads": ("llama", GROUPED),
    "heads of their own size": ("qwen3", {**GROUPED, "head_dim": 32}),
    "one head, Falcon": ("falcon", {**TEXT, "multi_query": True}),
    "grouped, expanded": ("falcon", {**TEXT, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "one head, GPT-BigCode": ("gpt_bigcode", {**TEXT, "multi_query": True}),
    "latent": ("deepseek_v3", {**TEXT, **LATENT, **EXPERTS}),
    "window": ("mistral", {**GROUPED, "sliding_window": 20}),
    "window in most layers": ("gemma3_text", {**GROUPED, "sliding_window": 20, "head_dim": 16}),
    "chunks": ("llama4_text", {**GROUPED, **EXPERTS, "attention_chunk_size": 20, "head_dim": 16,
        "intermediate_size_mlp": 96}),
    "Mamba": ("mamba", {**TEXT, "state_size": 8}),
    "Mamba-2": ("mamba2", {**TEXT, "state_size": 8, "num_heads": 8, "head_dim": 16, "n_groups": 1}),
    "some Mamba": ("jamba", {**GROUPED, **EXPERTS, "mamba_d_state": 8, "mamba_dt_rank": 4,
        "attn_layer_period": 2, "attn_layer_offset": 1}),
    "some Mamba-2": ("bamba", {**GROUPED, **MAMBA, "attn_layer_indices": [1]}),
    "both in a layer": ("falcon_h1", {**GROUPED, **MAMBA, "mamba_d_ssm": 128}),
    "delta rule": ("qwen3_next", {**GROUPED, **EXPERTS, **DELTA}),
    "convolutions": ("lfm2", {**GROUPED, "layer_types": ["conv", "full_attention"] * 2}),
    "linear attention": ("minimax", {**GROUPED, **EXPERTS, "block_size": 8, "head_dim": 16}),
    "encoder and decoder": ("t5", T5),
    "encoder of other heads": ("bart", BART),
    "encoder of audio": ("whisper", {**BART, "pad_token_id": 0, "eos_token_id": 2,
        "max_source_positions": 60, "num_mel_bins": 8}),
}  # fmt: skip


def make(kind: str, given: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[kind](**given)
    if kind == "whisper":
        return transformers.WhisperForConditionalGeneration(config).eval()
    name = "Seq2SeqLM" if config.is_encoder_decoder else "CausalLM"
    return getattr(transformers, f"AutoModelFor{name}").from_config(config).eval()


def held(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """The tensors of floating point in a cache, of whatever classes it is built."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value
        return
    if isinstance(value, dict | list | tuple):
        inner = list(value.values() if isinstance(value, dict) else value)
    else:
        is_plain = isinstance(value, type | transformers.PretrainedConfig | torch.nn.Module)
        inner = [] if is_plain else list(getattr(value, "__dict__", {}).values())
    for item in inner:
        yield from held(item, seen)


def measured(model: Any) -> int:
    ids = torch.randint(3, 90, (BATCH, LENGTH))
    inputs: dict[str, torch.Tensor] = {"input_ids": ids}
    config = model.config
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    if config.model_type == "whisper":
        frames = torch.randn(BATCH, config.num_mel_bins, 2 * config.max_source_positions)
        inputs = {"input_features": frames, "decoder_input_ids": ids}
    with torch.inference_mode():
        out = model(**inputs, use_cache=True)
    caches = [out.get(name) for name in ("past_key_values", "cache_params")]
    return sum(tensor.nbytes for tensor in held(caches, set()))


@pytest.mark.parametrize(("kind", "given"), CASES.values(), ids=CASES.keys())
def test_the_cache_is_counted(kind: str, given: dict[str, Any]) -> None:
    model = make(kind, given)
    taken = measured(model)
    # A window keeps one token less than it is wide.
    assert taken <= cache_bytes(model.config, BATCH, LENGTH, 4) <= 1.06 * taken


def test_the_text_model_of_a_model_of_images_is_counted() -> None:
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        image_size=16, patch_size=4,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=transformers.LlamaConfig(**GROUPED), image_token_id=3
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    assert cache_bytes(config, BATCH, LENGTH, 4) == measured(model)


def test_the_cache_is_of_the_models_own_type() -> None:
    model = make("llama", GROUPED)
    whole = context_of(model, LENGTH, BATCH)
    half = context_of(model.to(torch.bfloat16), LENGTH, BATCH)
    assert whole.cache_bytes == measured(model.float()) == 2 * half.cache_bytes


def peak_of_a_pass(model: Any) -> int:
    """Bytes of the tensors that live at once while a text is read, beside weights and cache."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.weak import WeakIdKeyDictionary

    class Live(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.storages, self.peak = WeakIdKeyDictionary(), 0

        def __torch_dispatch__(
            self, op: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = op(*args, **(kwargs or {}))
            for item in result if isinstance(result, tuple | list) else [result]:
                if isinstance(item, torch.Tensor) and not isinstance(item, torch.nn.Parameter):
                    storage = item.untyped_storage()
                    if storage.data_ptr() not in weights:
                        self.storages[storage] = storage.nbytes()
            self.peak = max(self.peak, sum(self.storages.values()))
            return result

    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    live = Live()
    with torch.inference_mode(), live:
        out = model(input_ids=torch.randint(3, 90, (BATCH, 200)), logits_to_keep=1)
    del out
    return live.peak


def test_a_pass_stays_within_the_workspace() -> None:
    model = make("llama", {**GROUPED, "max_position_embeddings": 256})
    assert peak_of_a_pass(model) <= context_of(model, 200, BATCH).nbytes


def test_max_length_is_set_aside() -> None:
    model = make("llama", GROUPED)
    bare = bminf.plan_for(model, False)
    plan = bminf.plan_for(model, False, reserve="1KB", max_length=64, max_batch_size=3)
    is_cpu = not torch.cuda.is_available()  # as wrapper() has it
    assert plan.context == context_of(model, 64, 3, is_cpu=is_cpu)
    assert plan.reserved_bytes == plan.context.nbytes + 1000
    assert plan.least_limit == bare.least_limit + plan.reserved_bytes
    assert "estimated for 3 texts of 64 tokens: KV cache" in str(plan)
    assert bminf.plan_for(model, False, plan.least_limit, "1KB", max_length=64, max_batch_size=3)
    with pytest.raises(BudgetError, match="max_length"):
        bminf.plan_for(model, False, bare.least_limit, max_length=64)


def test_wrapping_sets_it_aside_and_says_so() -> None:
    model = bminf.wrapper(make("llama", GROUPED), False, device="cpu", max_length=64)
    plan = bminf.plan_of(model)
    assert plan is not None and plan.context is not None
    assert plan.reserved_bytes == plan.context.nbytes
    assert plan.context.cache_bytes == cache_bytes(model.config, 1, 64, 4)


@pytest.mark.parametrize("form", [False, "int8"])
def test_the_least_limit_of_a_plan_is_enough_to_wrap_with(form: str | bool) -> None:
    given: dict[str, Any] = {"max_length": 64, "max_batch_size": 2}
    model = make("llama", GROUPED)
    least = bminf.plan_for(model, form, device="cpu", **given).least_limit
    bminf.wrapper(model, form, least, device="cpu", **given)
    assert bminf.plan_for(make("llama", GROUPED), form, device="cuda", **given).least_limit < least
    with pytest.raises(ArgumentError, match="device='tpu'"):
        bminf.plan_for(model, device="tpu")


def test_a_number_may_be_one_of_numpys() -> None:
    model = make("llama", GROUPED)
    given = bminf.plan_for(model, False, max_length=numpy.int64(64), max_batch_size=numpy.int32(2))
    assert given.context == bminf.plan_for(model, False, max_length=64, max_batch_size=2).context


def test_without_max_length_the_plan_says_what_a_usual_text_takes() -> None:
    model = make("llama", GROUPED)
    plan = bminf.plan_for(model, False)
    is_cpu = not torch.cuda.is_available()
    assert plan.unreserved == context_of(model, 2048, is_cpu=is_cpu) and plan.reserved_bytes == 0
    lines = [line for line in str(plan).splitlines() if "2,048" in line]
    assert len(lines) == 1 and "max_length=2048 reserves it" in lines[0]
    for given in ({"reserve": "1KB"}, {"max_length": 64}):
        assert "2,048" not in str(bminf.plan_for(model, False, **given))
    stack = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(4)))
    assert "2,048" not in str(bminf.plan_for(torch.nn.Sequential(stack), False))


@pytest.mark.parametrize(
    "given",
    [{"max_length": 0}, {"max_length": 1.5}, {"max_length": True}, {"max_length": "2048"},
     {"max_length": 8, "max_batch_size": 0}, {"max_batch_size": 2}],
)  # fmt: skip
def test_numbers_that_are_none_are_refused(given: dict[str, Any]) -> None:
    model = make("llama", GROUPED)
    lacks = "max_batch_size=2 .*give max_length, too"
    words = "whole number above 0" if "max_length" in given else lacks
    with pytest.raises(ArgumentError, match=words):
        bminf.plan_for(model, **given)


@pytest.mark.parametrize("kind", ["bert", "vit", "layers"])
def test_models_that_write_no_text_are_told_to_use_reserve(kind: str) -> None:
    small = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    model: torch.nn.Module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    if kind == "bert":
        model = transformers.BertModel(transformers.BertConfig(**small))
    if kind == "vit":
        model = transformers.ViTModel(transformers.ViTConfig(**small, image_size=32))
    with pytest.raises(
        ArgumentError, match=r"max_length=64 needs a model that generates.*reserve="
    ):
        bminf.wrapper(model, False, device="cpu", max_length=64)


def test_a_config_that_cannot_be_counted_from_is_told_to_use_reserve() -> None:
    model = make("llama", GROUPED)
    vars(model.config)["num_key_value_heads"] = "two"
    assert bminf.plan_for(model, False).unreserved is None
    with pytest.raises(ArgumentError, match=r"cannot be counted.*reserve="):
        bminf.plan_for(model, False, max_length=64)
