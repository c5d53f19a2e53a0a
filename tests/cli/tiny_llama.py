"""A tiny random Llama and its tokenizer of a hundred words, in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

WORDS = ["[UNK]", "once", "upon", "a", "time", *(f"word{i}" for i in range(95))]


TEMPLATE = (
    "{% for message in messages %}{% if message.content == 'refuse' %}"
    "{{ raise_exception('not this') }}{% endif %}"
    "{{ message.role }} {{ message.content }} {% endfor %}"
)


def save_tokenizer(folder: Path, **more: Any) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    vocabulary = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", **more
    )
    wrapped.save_pretrained(folder)


def save_llama(folder: Path, chat_template: str | None = None, **changed: Any) -> Path:
    """changed: fields of the configuration."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        vocab_size=len(WORDS),
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        **changed,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder, chat_template=chat_template)
    return folder
