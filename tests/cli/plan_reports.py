"""The configuration of a small Llama, in a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LLAMA: dict[str, Any] = dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4,
    vocab_size=100,
)  # fmt: skip
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **LLAMA}


def write_llama(folder: Path, **changes: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(CONFIG | changes), encoding="utf-8")
    return folder
