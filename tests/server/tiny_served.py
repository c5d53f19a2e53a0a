"""A tiny Llama as a server uses it."""

from __future__ import annotations

from typing import Any

from tiny_llama import TEMPLATE

from bminf.server.pretrained import PretrainedTexts


def texts_of(model: Any, **more: Any) -> PretrainedTexts:
    tokenizer = model.tokenizer

    def dialogue(messages: Any) -> list[int]:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    return PretrainedTexts(
        model, tokenizer, lambda text: tokenizer(text)["input_ids"], dialogue, [], TEMPLATE, **more
    )
