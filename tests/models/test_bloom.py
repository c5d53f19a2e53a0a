"""BLOOM against transformers' own model with other sizes than the golden set has, what users call,
and what is wrong with a folder.

bminf/models/bloom.py, bminf/arch/bloom.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_bloom import NUM_UNUSED, TinyBloom, tiny_bloom
from tiny_zoo import with_tensor

import bminf
from bminf.errors import ArgumentError, BudgetError, CheckpointError
from bminf.models import BLOOM, convert, plan_model

Loader = Callable[..., Any]
TEXT = "the inner thing in a then, 今天"


# ---- the network ---------------------------------------------------------------------------------


def of_transformers(made: TinyBloom) -> Any:
    """Its own model of the same weights, in float32."""
    from transformers import BloomConfig, BloomForCausalLM

    fields = {key: value for key, value in made.config.items() if key != "model_type"}
    model = BloomForCausalLM(BloomConfig(vocab_size=made.num_rows, **fields)).eval()
    named = {f"transformer.{name}": tensor.float() for name, tensor in made.tensors.items()}
    missing, unexpected = model.load_state_dict(named, strict=False)
    assert missing in ([], ["lm_head.weight"]) and not unexpected
    return model


@pytest.mark.parametrize(
    "changed",
    [{"n_head": 6}, {"n_head": 3, "apply_residual_connection_post_layernorm": True}, {"n_head": 1}],
    ids=str,
)
def test_it_is_the_bloom_of_transformers(changed: Any, load: Loader, tmp_path: Path) -> None:
    """Numbers of heads that are no power of two, and what is added behind the norm."""
    made = tiny_bloom(**changed)
    model = load("bloom", checkpoint=made.write_huggingface(tmp_path))
    ids = model.tokenizer.encode(TEXT)
    with torch.inference_mode():
        expected = of_transformers(made)(torch.tensor([ids])).logits[0]
    assert float(expected.std()) > 1
    assert torch.allclose(model.logits(TEXT), expected, atol=5e-5)


@pytest.mark.parametrize("degree", [1, 2, 4])
def test_what_ranks_drifted_apart_in_is_averaged(
    degree: int, load: Loader, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = tiny_bloom(n_head=4)
    plain = load("bloom", checkpoint=made.write_original(tmp_path / "a")).logits(TEXT)
    caplog.clear()
    drifted = load("bloom", checkpoint=made.write_original(tmp_path / "b", degree, 2**-6))
    assert torch.allclose(drifted.logits(TEXT), plain, atol=2e-2)
    assert ("differ between ranks" in caplog.text) == (degree > 1)


@pytest.mark.parametrize("form", [None, "int4"])
def test_a_head_of_its_own_counts_where_the_configuration_says_so(
    form: str | None, load: Loader, tmp_path: Path
) -> None:
    """As in some models that were trained on from it; otherwise a head is the embedding."""
    made = tiny_bloom()
    other = made.tensors["word_embeddings.weight"].flip(0).contiguous()
    whole = replace(made, tensors={**made.tensors, "lm_head.weight": other})
    tied = load("bloom", checkpoint=whole.write_huggingface(tmp_path / "tied"))
    assert torch.equal(tied.logits(TEXT), load("bloom").logits(TEXT))
    own = replace(whole, config={**made.config, "tie_word_embeddings": False})
    folder = own.write_huggingface(tmp_path / "own")
    model = load("bloom", checkpoint=folder)
    assert torch.allclose(model.logits(TEXT), tied.logits(TEXT).flip(-1), atol=1e-5)
    packed = {"quantization": form, "head_quantization": form}
    expected = load("bloom", checkpoint=folder, **packed).logits(TEXT)
    convert(folder, tmp_path / "converted", **packed)
    with BLOOM(tmp_path / "converted", device="cpu", quantization=form or None) as again:
        assert torch.equal(again.logits(TEXT), expected)


def test_another_head_of_transformers_is_a_model_of_transformers(tmp_path: Path) -> None:
    from transformers import BloomConfig, BloomForSequenceClassification

    made = tiny_bloom()
    config = BloomConfig(vocab_size=made.num_rows, hidden_size=48, n_layer=2, n_head=6)
    BloomForSequenceClassification(config).save_pretrained(tmp_path)
    model = bminf.load(tmp_path, device="cpu", quantization=None)
    assert type(model).__name__ == "BloomForSequenceClassification"
    folder = made.write_huggingface(tmp_path / "zoo")
    with bminf.load(folder, device="cpu", quantization=None) as zoo:  # which names no class
        assert isinstance(zoo, BLOOM)
    sizes = {"vocab_size": made.num_rows, "architectures": ["BloomForCausalLM"]}
    named = {**made.config, **sizes}
    (folder / "config.json").write_text(json.dumps(named))
    theirs = bminf.load(folder, device="cpu", quantization=None)
    assert type(theirs).__name__ == "BloomForCausalLM"
    with bminf.load(folder, device="cpu", quantization=None, model="bloom") as zoo:
        assert isinstance(zoo, BLOOM)


# ---- what users call -----------------------------------------------------------------------------


def test_generate_goes_on_greedily_by_default(load: Loader) -> None:
    model = load("bloom", max_batch_size=3)
    text, stopped = model.generate(TEXT, max_tokens=12)
    assert text and not stopped
    assert model.generate(model.tokenizer.encode(TEXT), 12) == (text, False)
    assert model.generate_batch([TEXT, "a", "then"], max_tokens=12)[0] == (text, False)
    assert "".join(model.generate_iter(TEXT, max_tokens=12)) == text
    greedy = [int(model.logits(TEXT)[-1].argmax())]
    assert text.startswith(model.tokenizer.decode(greedy))
    drawn = {model.generate(TEXT, 12, temperature=2.0, seed=seed)[0] for seed in range(4)}
    assert len(drawn) > 1
    assert isinstance(model.generate(TEXT, 5, num_beams=3)[0], str)


def test_a_written_end_is_the_end_of_a_text(load: Loader) -> None:
    """As in its own tokenizer, the names of special tokens are these tokens."""
    model = load("bloom")
    assert model.tokenizer.encode("a</s>")[-1] == model.tokenizer.token_id("</s>") == 2


def test_rows_that_no_token_has_are_drawn_and_written_as_nothing(load: Loader) -> None:
    model = load("bloom")
    unused = list(range(model.tokenizer.vocab_size, model.config.vocab_size))
    assert len(unused) == NUM_UNUSED
    head = model.model.lm_head.parts[-1].weight
    with torch.inference_mode():
        head.zero_()[-1] = 1e4 * model.model.norm.bias.sign()  # the last row always wins
    (drawn,) = [int(row.argmax()) for row in model.logits("a")]
    assert drawn == unused[-1]
    assert model.generate("a", max_tokens=3) == ("", False)
    assert list(model.generate_iter("a", max_tokens=3)) == []
    assert model.logits([5, unused[0]]).shape[0] == 2  # and are read


def test_scores_and_perplexity(load: Loader) -> None:
    model = load("bloom", max_length=64)
    logs = model.logits(TEXT).log_softmax(-1)
    ids = model.tokenizer.encode(TEXT)
    each = [float(logs[at - 1, ids[at]]) for at in range(1, len(ids))]
    (score,) = model.score(ids[:1], [ids[1:]])
    assert score == pytest.approx(sum(each), abs=1e-3)
    assert model.perplexity(TEXT) == pytest.approx(
        float(torch.tensor(-sum(each) / len(each)).exp()), rel=1e-4
    )


@pytest.mark.parametrize("form", [None, "int8", "int4"])
def test_head_and_layers_stream_and_give_the_same_bits(load: Loader, form: str | None) -> None:
    arguments: Any = {"quantization": form, "head_quantization": form, "max_length": 64}
    whole = load("bloom", **arguments)
    expected = whole.logits(TEXT)
    model = load("bloom", memory_limit=whole.plan.least_limit, **arguments)
    assert any(name.startswith("lm_head.parts") for name in model.plan.streamed)
    assert torch.equal(model.logits(TEXT), expected)
    assert model.generate(TEXT, 6) == whole.generate(TEXT, 6)


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_a_converted_folder_is_the_same_model(load: Loader, tmp_path: Path, form: str) -> None:
    made = tiny_bloom().write_original(tmp_path / "a", 2)
    convert(made, tmp_path / "b", form, head_quantization=form)
    given = json.loads((tmp_path / "b" / "config.json").read_text())
    assert given["model"] == "bloom" and (tmp_path / "b" / "tokenizer.json").is_file()
    straight = load("bloom", checkpoint=made, quantization=form, head_quantization=form)
    with BLOOM(tmp_path / "b", device="cpu") as model:
        assert torch.equal(model.logits(TEXT), straight.logits(TEXT))
        assert model.generate(TEXT, 6) == straight.generate(TEXT, 6)


def test_published_sizes_are_planned_without_weights() -> None:
    whole = plan_model("bloom-560m", quantization="int8")
    layers = [block for block in whole.blocks if block.name.startswith("layers.")]
    assert len(layers) == 24 * 4
    # Its four matrices, and of each row a bias, a scale and the sum of its codes.
    of_a_layer = 12 * 1024**2 + 9 * 1024 * (2 + 4 + 4)
    assert sum(block.nbytes for block in layers) == 24 * of_a_layer
    big = plan_model("bloom", "24GB", "int4", head_quantization="int8")
    assert big.streamed and big.total_bytes <= 24 * 10**9
    with pytest.raises(BudgetError, match="below the least that would do"):
        plan_model("bloomz", "1GB", "int4")


# ---- what is wrong with a folder -----------------------------------------------------------------


def config_of(**changed: Any) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        fields = json.loads((folder / "config.json").read_text()) | changed
        kept = {key: value for key, value in fields.items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(kept))

    return write


def without(name: str) -> Callable[[Path], object]:
    return lambda folder: next(folder.glob(name)).unlink()


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "heads": (config_of(n_head=5), r"hidden_size=48 is not a multiple of num_attention_heads=5"),
    "no heads": (config_of(n_head=...), r"does not say n_head, and hidden_size=48 is of no pub"),
    "inner": (config_of(n_inner=100), r"n_inner is 100; accepted: 192, or null"),
    "no head": (config_of(tie_word_embeddings=False), r"lacks 'lm_head\.weight', and its config"),
    "layers": (config_of(n_layer=3), r"lacks 'transformer\.h\.2\.input_layernorm\.weight'"),
    "vocabulary": (config_of(vocab_size=999), r"vocab_size is 999, and the embedding has \d+ rows"),
    "a shard": (without("model-00002-*"), r"model-00002-.* is missing, which .* names"),
    "tokenizer": (without("tokenizer.json"), r"no tokenizer for bloom: looked for tokenizer\.json"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_folder_is_named(what: str, refuse: Any, tmp_path: Path) -> None:
    folder = tiny_bloom().write_huggingface(tmp_path / "model", "sharded")
    break_it, words = WRONG[what]
    break_it(folder)
    refuse("bloom", folder, CheckpointError, words)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_nan_in_a_head_that_is_taken_as_it_lies(
    is_streamed: bool, load: Loader, refuse: Any, tmp_path: Path
) -> None:
    """A block of one tensor, in the dtype of the file, which nothing is made of at loading."""
    made = tiny_bloom(tie_word_embeddings=False)
    head = made.tensors["word_embeddings.weight"].clone()
    whole = with_tensor(made, "lm_head.weight", head)
    settings: Any = {"dtype": torch.float16, "quantization": None, "max_length": 64}
    plan = plan_model(
        whole.write_huggingface(tmp_path / "a", "safetensors"), device="cpu", **settings
    )
    limit = plan.least_limit if is_streamed else None
    head[7, 5] = torch.nan
    folder = whole.write_huggingface(tmp_path / "model", "safetensors")
    words = r"'lm_head\.weight' in .*model\.safetensors holds NaN, and no model"
    refuse("bloom", folder, CheckpointError, words, memory_limit=limit, **settings)


@pytest.mark.parametrize("degree", [3, 6])
def test_ranks_have_whole_heads(degree: int, refuse: Any, tmp_path: Path) -> None:
    """Which is all that tells a wrong number of heads: no shape of the model depends on it."""
    folder = tiny_bloom(n_head=6).write_original(tmp_path / "model", degree)
    config_of(n_head=4)(folder)
    refuse("bloom", folder, CheckpointError, r"n_head is 4, 36 rows each, but .*model_00.* has")


def test_a_vocabulary_of_more_tokens_than_rows(refuse: Any, tmp_path: Path) -> None:
    made = tiny_bloom()
    short = with_tensor(made, "word_embeddings.weight", made.tensors["word_embeddings.weight"][:99])
    folder = short.write_huggingface(tmp_path / "model")
    refuse("bloom", folder, CheckpointError, r"the vocabulary has \d+ tokens .* 99 rows")


def test_arguments_are_checked(load: Loader) -> None:
    with pytest.raises(ArgumentError, match="head_quantization='int3'"):
        load("bloom", head_quantization="int3")
    model = load("bloom")
    for wrong in ("", [], [10**6], b"a", None):
        with pytest.raises(ArgumentError, match="text"):
            model.generate(wrong)
