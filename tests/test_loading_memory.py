"""Loading takes the model as it will be, and two blocks, whatever it was saved as."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as tf
from programs import told_by
from tiny_models import make

MB = 10**6
SIZES = dict(
    vocab_size=8000, hidden_size=768, num_hidden_layers=8, num_attention_heads=12,
    num_key_value_heads=12,
)  # fmt: skip


@pytest.mark.slow
def test_peak_memory_of_loading(tmp_path: Path) -> None:
    """Memory of the process itself: files in the page cache are not counted. Of the models, one has
    experts, which transformers merges. Whole, they would take 140 and 230 MB, twice in float32."""
    make("llama").save_pretrained(tmp_path / "tiny")
    dense = tf.LlamaConfig(**SIZES, intermediate_size=2048)
    experts = tf.MixtralConfig(**SIZES, intermediate_size=1024, num_local_experts=4)
    for name, kind, config in (
        ("dense", tf.LlamaForCausalLM, dense), ("experts", tf.MixtralForCausalLM, experts),
    ):  # fmt: skip
        kind(config).to(torch.bfloat16).save_pretrained(tmp_path / name)
    program = Path(__file__).with_name("loading_memory.py")
    report = told_by(program, tmp_path, "dense", "experts")
    assert len(report) == 4
    for case in report:
        assert case["grown"] <= case["model"] + 2 * case["block"] + 16 * MB, report
