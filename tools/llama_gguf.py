"""A Llama of transformers as a GGUF file for llama.cpp, with every matrix in one kind of blocks.

Nothing here speaks: the vocabulary has as many tokens as the model, and none of them is a word.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import torch

_NAMES = {  # of a layer in transformers -> in GGUF
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_OUTSIDE = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_NUM_BYTES = 256


def write_gguf(model: Any, file: Path, kind: str) -> None:
    """The matrices of `model` in `kind`, such as "Q4_0", norms in float32.

    Raises KeyError for a model with other parameters than a Llama's.
    """
    writer = gguf.GGUFWriter(file, "llama")
    number = gguf.GGMLQuantizationType[kind]
    _add_sizes(writer, model.config)
    _add_vocabulary(writer, model.config.vocab_size)
    for name, tensor in _tensors(model):
        numbers = tensor.float().numpy()
        if tensor.dim() == 1:
            writer.add_tensor(name, numbers)
        else:
            writer.add_tensor(name, gguf.quantize(numbers, number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_sizes(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(_head_dim(config))
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)


def _head_dim(config: Any) -> int:
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def _add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    """Three tokens that control, all bytes, and names; a small model has the first of these."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(_NUM_BYTES))]
    kinds = [
        gguf.TokenType.UNKNOWN,
        *2 * [gguf.TokenType.CONTROL],
        *_NUM_BYTES * [gguf.TokenType.BYTE],
    ]
    rest = range(len(tokens), size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*tokens, *(f"token{i}" for i in rest)][:size])
    writer.add_token_scores([-float(i) for i in range(size)])
    writer.add_token_types([*kinds, *(gguf.TokenType.NORMAL for _ in rest)][:size])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Names as GGUF has them; a head that is the embedding is not there twice."""
    heads = {"attn_q": model.config.num_attention_heads, "attn_k": model.config.num_key_value_heads}
    for name, tensor in model.named_parameters():
        module = name.removesuffix(".weight")
        if module in _OUTSIDE:
            yield f"{_OUTSIDE[module]}.weight", tensor.detach()
            continue
        number, _, rest = module.removeprefix("model.layers.").partition(".")
        short = _NAMES[rest]
        if short in heads:
            tensor = _in_pairs(tensor, heads[short])
        yield f"blk.{number}.{short}.weight", tensor.detach().contiguous()


def _in_pairs(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of Q or K as llama.cpp has them: RoPE turns neighbours there, here halves of a head."""
    halves = weight.view(num_heads, 2, -1, weight.shape[1])
    return halves.transpose(1, 2).reshape(weight.shape)
