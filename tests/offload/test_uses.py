"""How often a block runs, as models tell it: once a token, or once a request."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from streaming import Residual, make_stack
from tiny_models import LLAMA, T5, TINY, make

from bminf.offload.blocks import find_blocks
from bminf.offload.plan import uses_in_words
from bminf.offload.uses import uses_of
from bminf.wrapping import plan_for

TEXT = {**LLAMA, "num_hidden_layers": 3}
VISION = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
    image_size=16, patch_size=4,
)  # fmt: skip
AUDIO = dict(
    num_mel_bins=8, encoder_layers=3, encoder_attention_heads=2, encoder_ffn_dim=24, d_model=16,
    max_source_positions=30,
)  # fmt: skip


def llava() -> Any:
    vision, text = tf.CLIPVisionConfig(**VISION), tf.LlamaConfig(**TEXT)
    config = tf.LlavaConfig(vision_config=vision, text_config=text, image_token_id=3)
    return tf.LlavaForConditionalGeneration(config)


def qwen2_vl() -> Any:
    vision = dict(
        depth=3, embed_dim=16, hidden_size=32, num_heads=2, mlp_ratio=2, patch_size=4,
        spatial_merge_size=2,
    )  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    config = tf.Qwen2VLConfig(text_config={**TEXT, "rope_parameters": rope}, vision_config=vision)
    return tf.Qwen2VLForConditionalGeneration(config)


def qwen2_audio() -> Any:
    audio = tf.Qwen2AudioEncoderConfig(**AUDIO)
    text = tf.Qwen2Config(**TEXT)
    config = tf.Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=3)
    return tf.Qwen2AudioForConditionalGeneration(config)


def blip2() -> Any:
    former = dict(
        vocab_size=96, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, encoder_hidden_size=16,
    )  # fmt: skip
    return tf.Blip2ForConditionalGeneration(
        tf.Blip2Config(
            vision_config=VISION, qformer_config=former, text_config={"model_type": "t5", **T5},
            num_query_tokens=4, image_token_index=3,
        )
    )  # fmt: skip


def git() -> Any:
    text = {k: v for k, v in TEXT.items() if k != "num_key_value_heads"}
    return tf.GitForCausalLM(tf.GitConfig(vision_config=VISION, **text))


def encoder_decoder() -> Any:
    text = {k: v for k, v in TEXT.items() if k != "num_key_value_heads"}
    encoder, decoder = tf.ViTConfig(**VISION), tf.BertConfig(**text)
    return tf.VisionEncoderDecoderModel(
        tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    )


class OwnModel(torch.nn.Module):
    """Of the user's own: a tower by hand, one of transformers, and a language model."""

    def __init__(self) -> None:
        super().__init__()
        self.audio_tower = torch.nn.Sequential(Residual(8), Residual(8))
        self.images = tf.CLIPVisionModel(tf.CLIPVisionConfig(**VISION))
        self.adapters = torch.nn.ModuleList([Residual(8), Residual(8)])
        self.text = tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT))


class TowerByHand(tf.LlamaForCausalLM):
    """A decoder of transformers with a tower in it that knows nothing of transformers."""

    def __init__(self) -> None:
        super().__init__(tf.LlamaConfig(**TEXT))
        self.model.visual = torch.nn.Sequential(Residual(8), Residual(8))


LISTS = {
    TowerByHand: ({"model.visual"}, {"model.layers"}),
    llava: ({"model.vision_tower.encoder.layers"}, {"model.language_model.layers"}),
    qwen2_vl: (
        {"model.visual.blocks", "model.visual.merger.mlp"}, {"model.language_model.layers"}
    ),
    qwen2_audio: ({"model.audio_tower.layers"}, {"model.language_model.layers"}),
    blip2: (
        {"vision_model.encoder.layers", "qformer.encoder.layer", "language_model.encoder.block"},
        {"language_model.decoder.block"},
    ),
    git: ({"git.image_encoder.vision_model.encoder.layers"}, {"git.encoder.layer"}),
    encoder_decoder: ({"encoder.layers"}, {"decoder.bert.encoder.layer"}),
    OwnModel: ({"audio_tower", "images.encoder.layers"}, {"adapters", "text.model.layers"}),
}  # fmt: skip
"""Lists whose blocks run once a request, and once a token."""


def lists_by_uses(model: torch.nn.Module) -> dict[float, set[str]]:
    blocks = find_blocks(model)
    uses = uses_of(model, blocks)
    found: dict[float, set[str]] = {}
    for block in blocks:
        found.setdefault(uses.get(block.name, 128), set()).add(block.list_name)
    return found


@pytest.mark.parametrize("make_model", LISTS, ids=lambda made: made.__name__)
def test_towers_run_once_a_request(make_model: Any) -> None:
    once, often = LISTS[make_model]
    with torch.device("meta"):
        assert lists_by_uses(make_model()) == {1: once, 128: often}


@pytest.mark.parametrize("name", [name for name in TINY if TINY[name].generates])
def test_what_generates_runs_once_a_token_but_for_its_encoder(name: str) -> None:
    for uses, lists in lists_by_uses(make(name)).items():
        assert uses == (1 if any("encoder" in part for part in lists) else 128)


def test_a_model_that_does_not_generate_runs_once_a_request() -> None:
    with torch.device("meta"):
        assert set(lists_by_uses(make("vit"))) == {1}
        assert set(lists_by_uses(llava().model.language_model)) == {128}
        assert lists_by_uses(llava().model)[1] == {"vision_tower.encoder.layers"}


def test_of_a_model_by_hand_nothing_is_known() -> None:
    assert uses_of(make_stack(), find_blocks(make_stack())) == {}


def test_layers_of_a_tower_stream_before_those_of_the_language_model() -> None:
    with torch.device("meta"):
        model = llava()
    whole = plan_for(model, quantization=False)
    tower = [block.name for block in whole.blocks if "vision" in block.name]
    limit = whole.total_bytes - min(block.nbytes for block in whole.blocks)
    assert set(plan_for(model, False, limit).streamed) <= set(tower)


def test_uses_that_are_given_win() -> None:
    with torch.device("meta"):
        model = llava()
    layers = "model.vision_tower.encoder.layers"
    plan = plan_for(model, uses={layers: 5, f"{layers}.1": 7})
    assert [plan.uses[f"{layers}.{at}"] for at in range(3)] == [5, 7, 5]


@pytest.mark.parametrize(
    ("uses", "words"),
    [
        (1, "once a request"),
        (2, "twice a request"),
        (3, "3 times a request"),
        (0.5, "0.5 times a request"),
        (127, "127 times a request"),
        (128, "once a token"),
        (128.0, "once a token"),
        (256, "twice a token"),
        (640, "5 times a token"),
    ],
)
def test_uses_in_words(uses: float, words: str) -> None:
    assert uses_in_words(uses) == words


def test_the_plan_shows_uses_in_words() -> None:
    with torch.device("meta"):
        model = llava()
    whole = plan_for(model, quantization=False)
    rows = str(plan_for(model, False, whole.total_bytes - 1)).splitlines()
    tower = next(row for row in rows if row.startswith("model.vision_tower.encoder.layers:"))
    text = next(row for row in rows if row.startswith("model.language_model.layers:"))
    assert tower.endswith("(once a request)") and text.endswith("(once a token)")
    assert "once a request" in str(whole) and "once a token" in str(whole)


@pytest.mark.parametrize(
    ("is_encoder_decoder", "encoder", "uses"),
    [(True, "layers", 1), (False, "layers", 128), (True, "", 128)],
)
def test_only_the_encoder_of_two_parts_is_used_once(
    is_encoder_decoder: bool, encoder: str, uses: int
) -> None:
    model = make_stack()
    model.config = SimpleNamespace(is_encoder_decoder=is_encoder_decoder)
    model.get_encoder = lambda: model.get_submodule(encoder)
    assert plan_for(model, False).uses["layers.5"] == uses
