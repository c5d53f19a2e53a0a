"""Tiny random models of the 21 architectures that the wrapper is tested on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf

VOCAB = 96
DECODER = dict(vocab_size=VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=2)
LLAMA = dict(
    **DECODER,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=7,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
EXPERTS = dict(moe_intermediate_size=24, num_experts_per_tok=2)


@dataclass(frozen=True)
class Tiny:
    """How to make one: model class, config class, its arguments, and which inputs it takes."""

    model: Any
    config: Any
    arguments: dict[str, Any]
    inputs: str = "ids"  # "ids", "seq2seq", "audio" or "image"
    generates: bool = True
    half_layers: Callable[[str], bool] = lambda name: name.endswith((".self_attn", ".mlp"))


def _ends(*endings: str) -> Callable[[str], bool]:
    return lambda name: name.endswith(endings)


T5 = dict(
    vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=6, num_decoder_layers=6, num_heads=4,
    decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
)  # fmt: skip
BART = dict(
    **DECODER, d_model=32, encoder_layers=5, decoder_layers=6, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64,
    decoder_start_token_id=2, forced_eos_token_id=None,
)  # fmt: skip
DEEPSEEK = dict(
    **{**LLAMA, "num_key_value_heads": 4}, **EXPERTS, n_routed_experts=4, n_group=2, topk_group=1,
    first_k_dense_replace=2, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=8,
    qk_nope_head_dim=8, v_head_dim=8, n_shared_experts=1,
)  # fmt: skip
GLM4_MOE = dict(
    **LLAMA, **EXPERTS, n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=2,
    head_dim=8,
)  # fmt: skip
GPT_OSS = dict(
    **LLAMA, num_local_experts=4, num_experts_per_tok=2, head_dim=8, sliding_window=8,
)  # fmt: skip

TINY = {
    "llama": Tiny(tf.LlamaForCausalLM, tf.LlamaConfig, LLAMA),
    "qwen2": Tiny(tf.Qwen2ForCausalLM, tf.Qwen2Config, LLAMA),
    "glm4": Tiny(tf.Glm4ForCausalLM, tf.Glm4Config, {**LLAMA, "head_dim": 8}),
    "gemma3_text": Tiny(
        tf.Gemma3ForCausalLM, tf.Gemma3TextConfig, {**LLAMA, "head_dim": 8, "sliding_window": 8}
    ),
    "mixtral": Tiny(
        tf.MixtralForCausalLM,
        tf.MixtralConfig,
        {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "qwen3_moe": Tiny(
        tf.Qwen3MoeForCausalLM,
        tf.Qwen3MoeConfig,
        {**LLAMA, **EXPERTS, "num_experts": 4, "head_dim": 8},
    ),
    "deepseek_v3": Tiny(tf.DeepseekV3ForCausalLM, tf.DeepseekV3Config, DEEPSEEK),
    "glm4_moe": Tiny(tf.Glm4MoeForCausalLM, tf.Glm4MoeConfig, GLM4_MOE),
    "gpt_oss": Tiny(tf.GptOssForCausalLM, tf.GptOssConfig, GPT_OSS),
    "gpt_neox": Tiny(
        tf.GPTNeoXForCausalLM,
        tf.GPTNeoXConfig,
        {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"},
        half_layers=_ends(".attention", ".mlp"),
    ),
    "gptj": Tiny(
        tf.GPTJForCausalLM,
        tf.GPTJConfig,
        dict(**DECODER, n_embd=32, n_layer=7, n_head=4, rotary_dim=4, n_positions=64),
        half_layers=_ends(".attn", ".mlp"),
    ),
    "gpt2": Tiny(
        tf.GPT2LMHeadModel,
        tf.GPT2Config,
        dict(**DECODER, n_embd=32, n_layer=7, n_head=4, n_positions=64),
        half_layers=_ends(".attn", ".mlp"),
    ),
    "bloom": Tiny(
        tf.BloomForCausalLM,
        tf.BloomConfig,
        dict(**DECODER, hidden_size=32, n_layer=7, n_head=4),
        half_layers=_ends(".self_attention", ".mlp"),
    ),
    "opt": Tiny(
        tf.OPTForCausalLM,
        tf.OPTConfig,
        dict(
            **DECODER,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=7,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=32,
        ),
        half_layers=_ends(".self_attn", ".fc1", ".fc2"),
    ),
    "mamba": Tiny(
        tf.MambaForCausalLM,
        tf.MambaConfig,
        dict(**DECODER, hidden_size=32, state_size=4, num_hidden_layers=7, time_step_rank=4),
        half_layers=_ends(".mixer.in_proj", ".mixer.out_proj", ".mixer.x_proj"),
    ),
    "t5": Tiny(
        tf.T5ForConditionalGeneration,
        tf.T5Config,
        T5,
        "seq2seq",
        half_layers=_ends(".layer.0", ".layer.1", ".layer.2"),
    ),
    "mt5": Tiny(
        tf.MT5ForConditionalGeneration,
        tf.MT5Config,
        T5,
        "seq2seq",
        half_layers=_ends(".layer.0", ".layer.1", ".layer.2"),
    ),
    "bart": Tiny(
        tf.BartForConditionalGeneration,
        tf.BartConfig,
        BART,
        "seq2seq",
        half_layers=_ends(".self_attn", ".encoder_attn", ".fc1", ".fc2"),
    ),
    "whisper": Tiny(
        tf.WhisperForConditionalGeneration,
        tf.WhisperConfig,
        {
            **BART,
            "num_mel_bins": 8,
            "max_source_positions": 30,
            "max_target_positions": 64,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
        "audio",
        half_layers=_ends(".self_attn", ".encoder_attn", ".fc1", ".fc2"),
    ),
    "bert": Tiny(
        tf.BertModel,
        tf.BertConfig,
        {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"},
        generates=False,
        half_layers=_ends(".attention", ".intermediate", ".output.dense"),
    ),
    "vit": Tiny(
        tf.ViTModel,
        tf.ViTConfig,
        dict(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=7,
            num_attention_heads=4,
            image_size=16,
            patch_size=4,
        ),
        "image",
        generates=False,
        half_layers=_ends(".attention", ".intermediate", ".mlp", ".output.dense"),
    ),
}


def make(name: str, seed: int = 0, **changed: Any) -> torch.nn.Module:
    """changed: fields of its configuration."""
    tiny = TINY[name]
    torch.manual_seed(seed)
    return tiny.model(tiny.config(**{**tiny.arguments, **changed})).eval()


def inputs_of(name: str, seed: int = 1) -> dict[str, torch.Tensor]:
    """Inputs of a forward pass; without decoder_* they are also those of generate()."""
    generator = torch.Generator().manual_seed(seed)
    kind = TINY[name].inputs
    ids = torch.randint(3, VOCAB, (2, 6), generator=generator)
    if kind == "image":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    if kind == "audio":
        return {
            "input_features": torch.randn(2, 8, 60, generator=generator),
            "decoder_input_ids": ids,
        }
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {**given, "decoder_input_ids": ids[:, :4]} if kind == "seq2seq" else given


def output_of(model: torch.nn.Module, given: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        output = model(**given)
    return output.logits if "logits" in output else output.last_hidden_state


def greedy(model: torch.nn.Module, given: dict[str, torch.Tensor]) -> torch.Tensor:
    prompt = {k: v for k, v in given.items() if not k.startswith("decoder_")}
    return model.generate(**prompt, max_new_tokens=8, do_sample=False)


def half_layer_names(name: str, model: torch.nn.Module) -> list[str]:
    """Names of modules that are parts of a layer, several to a layer, none inside another."""
    wanted = [n for n, _ in model.named_modules() if TINY[name].half_layers(n)]
    return [n for n in wanted if not any(n.startswith(f"{outer}.") for outer in wanted)]
