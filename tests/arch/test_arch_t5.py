"""bminf/arch/t5.py, against the T5 of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_zoo import TinyModel, tiny, write_vocabulary

from bminf.arch.t5 import T5Cache
from bminf.models import CPM2, EVA

KINDS = {"cpm2": CPM2, "eva": EVA}
PROMPT, TARGET = list(range(11, 41)), list(range(12, 26))  # long enough for shared buckets


@pytest.mark.parametrize(("name", "is_scaled"), [("cpm2", False), ("eva", True), ("eva", False)])
def test_it_is_the_t5_of_transformers(name: str, is_scaled: bool, tmp_path: Path) -> None:
    """Written by transformers where nothing has to be folded in, and by the tests where it has."""
    made = tiny(name, attn_scale=is_scaled, d_kv=16)
    reference = reference_t5(made)
    if is_scaled:
        folder = made.write_original(tmp_path, 2)
    else:
        reference.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "attn_scale": False}))
        folder = write_vocabulary(tmp_path, made.tokens).parent
    with torch.inference_mode():
        theirs = reference(
            input_ids=torch.tensor([PROMPT]), decoder_input_ids=torch.tensor([TARGET])
        ).logits[0]
    with KINDS[name](folder, device="cpu", quantization=None) as model:
        assert torch.allclose(model.logits(PROMPT, TARGET), theirs, atol=1e-4)


def reference_t5(made: TinyModel) -> Any:
    from transformers import T5Config as TheirConfig
    from transformers import T5ForConditionalGeneration

    config = made.config
    reference = T5ForConditionalGeneration(
        TheirConfig(
            vocab_size=len(made.tokens), feed_forward_proj="gated-gelu", tie_word_embeddings=False,
            **{name: config[name] for name in ("d_model", "d_kv", "d_ff", "num_layers",
            "num_decoder_layers", "num_heads")},
        )
    ).eval()  # fmt: skip
    # transformers 5 ties the head to the embedding whatever the configuration says.
    reference.lm_head.weight = torch.nn.Parameter(torch.empty_like(reference.lm_head.weight))
    tensors = {name: tensor.float() for name, tensor in made.huggingface_tensors().items()}
    if config.get("attn_scale"):  # which theirs cannot do: folded into the queries
        for name in tensors:
            if name.endswith("Attention.q.weight"):
                tensors[name] = tensors[name] * config["d_kv"] ** -0.5
    reference.load_state_dict(tensors)
    return reference


class Selected:
    """In place of keys and values: what rows became which."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = []

    def select(self, rows: torch.Tensor) -> None:
        self.rows.append(rows.tolist())


def test_keys_of_prompts_move_only_where_a_row_turns_to_another_prompt() -> None:
    own, cross = Selected(), Selected()
    cache = T5Cache(own, cross)  # type: ignore[arg-type]
    cache.start(2, torch.tensor([1.0, 2.0]))
    for rows in ([0, 0, 1, 1], [1, 0, 3, 2], [0, 2, 2, 3], [1, 0, 2, 3]):
        cache.select(torch.tensor(rows))
    assert own.rows == [[0, 0, 1, 1], [1, 0, 3, 2], [0, 2, 2, 3], [1, 0, 2, 3]]
    assert cross.rows == [[0, 0, 1, 1], [0, 2, 2, 3], [1, 0, 2, 3]]
    assert cache.cross_bias is not None and cache.cross_bias.tolist() == [2, 1, 2, 2]
