"""bminf/arch/gpt.py, against the GPT-2 of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_zoo import vocabulary, write_vocabulary

from bminf.models import CPM1

IDS = list(range(11, 31))


@pytest.mark.filterwarnings("ignore:found no sentencepiece model")
def test_cpm1_is_gpt2_of_transformers(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    tokens = vocabulary(0)
    torch.manual_seed(1)
    reference = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokens), n_positions=40, n_embd=24, n_layer=2, n_head=2, n_inner=56,
            initializer_range=0.3,
        )
    ).eval()  # fmt: skip
    reference.save_pretrained(tmp_path)
    write_vocabulary(tmp_path, tokens)
    with torch.inference_mode():
        theirs = reference(torch.tensor([IDS])).logits[0]
    for config in (None, reference.config):
        with CPM1(tmp_path, device="cpu", quantization=None, config=config) as model:
            assert torch.allclose(model.logits(IDS), theirs, atol=2e-5)
