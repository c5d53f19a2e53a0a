"""A Llama that was written as GGUF is the same model when it is read again."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bminf.cli import models
from tools.llama_gguf import write_gguf


def tiny(is_tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=270, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, rope_theta=1234.0, rms_norm_eps=1e-3,
        tie_word_embeddings=is_tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("is_tied", [False, True])
def test_transformers_reads_what_was_written(is_tied: bool, tmp_path: Path) -> None:
    model, ids = tiny(is_tied), torch.randint(270, (2, 9))
    write_gguf(model, tmp_path / "model.gguf", "F32")
    again = models.load_model(tmp_path / "model.gguf", torch.float32)
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_all_matrices_and_no_norm_are_in_blocks(tmp_path: Path) -> None:
    write_gguf(tiny(False), tmp_path / "model.gguf", "Q4_0")
    tensors = gguf.GGUFReader(tmp_path / "model.gguf").tensors
    assert len(tensors) == 3 + 2 * 9
    for tensor in tensors:
        is_norm = "norm" in tensor.name
        assert tensor.tensor_type.name == ("F32" if is_norm else "Q4_0")
