"""What is wrong is said of a GLM, too, before anything runs, and nothing of it stays in memory."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_glm import (
    TinyGLM,
    Weights,
    ice_tokenizer,
    tiny_glm,
    tiny_glm10b,
    tiny_glm130b,
)
from tiny_zoo import write_ranks

from bminf.errors import ArgumentError, BudgetError, CheckpointError, UnknownKeywordError
from bminf.models import convert, plan_glm
from bminf.quantization.packed import Format

Loader = Callable[..., Any]
Refuse = Callable[..., None]
NAMES = ("glm130b", "glm10b")
TEXT = "the blocks of a layer"

each_model = pytest.mark.parametrize("name", NAMES)


@pytest.fixture
def silent(load: Loader) -> Callable[..., Any]:
    """silent("glm10b"): a model that must not be run."""

    def loader(name: str, **arguments: Any) -> Any:
        def run(*_: Any) -> Any:
            raise AssertionError("something was computed before the error")

        model = load(name, **{"max_length": 40, "max_batch_size": 2, **arguments})
        model.model.forward = model.model.head = run
        return model

    return loader


# ---- texts ---------------------------------------------------------------------------------------


def uses_of(model: Any) -> list[Callable[..., Any]]:
    """What takes a text with one blank, and options."""
    return [
        model.generate,
        model.generate_iter,
        model.fill_blank,
        lambda text, **more: model.generate_batch([TEXT, text], **more),
        lambda text, **more: model.generate(text, num_beams=2, num_return_sequences=2, **more),
        lambda text, **_: model.score(text, ["a", "the host"]),
        lambda text, **_: model.logits(text),
    ]


@each_model
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("the [MASK] of [gMASK]", r"mixes \[MASK\] and \[gMASK\]; give masks of one kind"),
        ("[sMASK] of [MASK] and [sMASK]", r"mixes \[sMASK\] and \[MASK\]"),
        ("a " * 300, r"text( with all choices)? has \d+ tokens, more than max_length=40; shorten"),
        ("a " * 300 + "[MASK]", r"text( with all choices)? has \d+ tokens, more than max_length"),
        ("\ud800", "surrogate"),
        ("[MASK] \udc00", "surrogate"),
        (None, "text is a NoneType; give a str"),
        (b"bytes", "text (is a bytes|has ids outside|has 5|holds)"),
        (3, "text is a int; give a str"),
        (["the"], "text (is a list; give a str|holds a str)"),
    ],
    ids=lambda x: repr(x)[:16],
)
def test_texts(name: str, text: Any, words: str, silent: Callable[..., Any]) -> None:
    model = silent(name)
    *generating, score, logits = uses_of(model)
    if isinstance(text, bytes):  # five ids, to score()
        score = model.logits
    for use in (*generating, score, logits):
        with pytest.raises(ArgumentError, match=words):
            use(text, **({"max_tokens": 3} if use in generating else {}))


@each_model
def test_a_text_with_nothing_in_it(name: str, silent: Callable[..., Any]) -> None:
    model = silent(name)
    for text in ("", " \n "):
        for use in uses_of(model)[:5]:
            with pytest.raises(ArgumentError, match="text is empty; give a text, with or without"):
                use(text, max_tokens=3)
        with pytest.raises(ArgumentError, match="text is empty"):
            model.logits(text)
    with pytest.raises(ArgumentError, match="text has no tokens"):
        model.perplexity("", 9)


@each_model
def test_several_blanks_are_for_fill_blank(name: str, silent: Callable[..., Any]) -> None:
    model = silent(name)
    text = "the [MASK] of a [MASK]"
    for use in (model.generate, model.generate_iter, lambda t, **m: model.generate_batch([t], **m)):
        with pytest.raises(ArgumentError, match=r"has 2 blanks; generate\(\) takes one, fill_bl"):
            use(text, max_tokens=3)
    with pytest.raises(ArgumentError, match="has 2 blanks"):
        model.logits(text)
    with pytest.raises(ArgumentError, match="has 2 blanks; a choice is for one"):
        model.score(text, ["a"])
    mask = model.tokenizer.masks["[MASK]"]
    with pytest.raises(ArgumentError, match="has 2 blanks; a choice is for one"):
        model.score([60, mask, 61, mask], ["a"])


@each_model
def test_a_mask_that_the_model_does_not_have(name: str, silent: Callable[..., Any]) -> None:
    """As of a GLM that was trained on one kind alone."""
    model = silent(name)
    masks = {"[MASK]": model.tokenizer.masks["[MASK]"]}
    model.tokenizer = Changed(model.tokenizer, masks=masks)
    for mask in ("[gMASK]", "[sMASK]"):
        for use in uses_of(model):
            with pytest.raises(ArgumentError, match=rf"no \{mask[:-1]}\]; it has \[MASK\]"):
                use(f"the {mask}", max_tokens=3)
        with pytest.raises(ArgumentError, match=rf"mask='\{mask[:-1]}\]'; this model has \[MASK\]"):
            model.score(TEXT, ["a"], mask=mask)
    assert model._prompt(TEXT).mask_index == model._prompt(f"{TEXT}[MASK]").mask_index


class Changed:
    """A tokenizer, but for some of what it says."""

    def __init__(self, tokenizer: Any, **changed: Any) -> None:
        self._tokenizer = tokenizer
        vars(self).update(changed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


@each_model
def test_a_text_over_the_positions(name: str, silent: Callable[..., Any]) -> None:
    model = silent(name, max_length=None)
    words = "more than max_length=160; .*take a model with more positions"
    for use in uses_of(model):
        with pytest.raises(ArgumentError, match=words):
            use("a b " * 90, max_tokens=3)
    with pytest.raises(ArgumentError, match="max_tokens=160 are more than max_length=160"):
        model.generate("[MASK]", max_tokens=160)


def test_blanks_that_do_not_all_fit(silent: Callable[..., Any]) -> None:
    for name in NAMES:
        model = silent(name)
        with pytest.raises(ArgumentError, match="2 blanks of max_tokens=19 are more than max_len"):
            model.fill_blank("a [MASK] b [MASK]", max_tokens=19)
        with pytest.raises(ArgumentError, match="max_tokens=40 are more than max_length=40"):
            model.fill_blank("a [MASK] b [MASK]", max_tokens=40)


# ---- options -------------------------------------------------------------------------------------

OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": 0}, "max_tokens=0"),
    ({"max_tokens": "9"}, "max_tokens='9'"),
    ({"max_tokens": 99}, "max_tokens=99 are more than max_length=40"),
    ({"top_n": 0}, "top_n=0"),
    ({"top_n": 9999}, "=9999 is more than the .* tokens"),
    ({"top_n": 2, "top_k": 2}, "two names of one option"),
    ({"top_p": 1.5}, r"top_p=1\.5"),
    ({"temperature": -1}, "temperature=-1"),
    ({"temperature": math.inf}, "temperature=inf"),
    ({"frequency_penalty": "1"}, "frequency_penalty='1'"),
    ({"presence_penalty": math.nan}, "presence_penalty=nan"),
    ({"seed": -1}, "seed=-1"),
    ({"seed": 1.5}, r"seed=1\.5"),
    ({"stop_tokens": 5}, "stop_tokens=5; give a list"),
    ({"stop_tokens": ["not there"]}, r"stop_tokens=\['not there'\]"),
    ({"banned_tokens": ["not there"]}, r"banned_tokens=\['not there'\]"),
    ({"banned_tokens": 3}, "banned_tokens=3; give a list"),
    ({"end_tokens": []}, r"end_tokens=\[\]; give a list of token ids, at least one"),
    ({"end_tokens": 3}, "end_tokens=3; give a list"),
    ({"end_tokens": "a"}, "end_tokens='a'; give a list"),
    ({"end_tokens": [9999]}, "end_tokens holds 9999; accepted: ids"),
    ({"end_tokens": [True]}, "end_tokens holds True"),
    ({"end_tokens": ["a"]}, "end_tokens holds 'a'"),
    ({"out_seq_length": 0}, "out_seq_length=0"),
    ({"out_seq_length": "9"}, "out_seq_length='9'"),
    ({"out_seq_length": 3}, "out_seq_length=3 counts the text, which has .* tokens with its mask"),
    ({"out_seq_length": 99}, "are more than max_length=40"),
    ({"min_length": -1}, "min_length=-1; accepted: an int of at least 0"),
    ({"min_length": True}, "min_length=True"),
    ({"min_length": 2}, "min_length is for num_beams above 1"),
    ({"no_repeat_ngram_size": 2.0}, r"no_repeat_ngram_size=2\.0"),
    ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size is for num_beams above 1"),
    ({"deterministic": 1}, "deterministic=1; accepted: True, False"),
    ({"deterministic": False}, "deterministic is for num_beams above 1"),
    ({"length_penalty": 1.0}, "length_penalty is for num_beams above 1"),
    ({"num_return_sequences": 1}, "num_return_sequences is for num_beams above 1"),
    ({"num_return_sequences": 0}, "num_return_sequences=0"),
    ({"num_beams": 0}, "num_beams=0"),
    ({"num_beams": 2.0}, r"num_beams=2\.0"),
    ({"speed": 3}, "has no keyword 'speed'; did you mean 'seed'.*accepted: .*num_return_sequences"),
]
WITH_BEAMS: list[tuple[dict[str, Any], str]] = [
    ({"num_beams": 3}, "(3|6) rows at once .* max_batch_size is 2"),
    ({"seed": 1}, "num_beams=2 searches .* seed is for sampling"),
    ({"top_p": 0.5}, "num_beams=2 searches .* top_p"),
    ({"frequency_penalty": 1.0}, "num_beams=2 searches .* frequency_penalty"),
    ({"length_penalty": "1"}, "length_penalty='1'"),
    ({"length_penalty": math.inf}, "length_penalty=inf"),
    ({"num_return_sequences": 3}, "num_return_sequences=3 is more than num_beams=2"),
]


@each_model
def test_options(name: str, silent: Callable[..., Any]) -> None:
    model = silent(name)
    drawing = [model.generate, model.generate_iter, model.fill_blank]
    drawing.append(lambda text, **more: model.generate_batch([text], **more))
    for options, words in OPTIONS:
        for use in drawing:
            with pytest.raises(ArgumentError, match=words):
                use(f"{TEXT} [MASK]", **{"max_tokens": 3, **options})
    for options, words in WITH_BEAMS:
        for use in (drawing[0], *drawing[2:]):
            with pytest.raises(ArgumentError, match=words):
                use(TEXT, **{"max_tokens": 3, "num_beams": 2, **options})
    for use in drawing:
        with pytest.raises(UnknownKeywordError, match="'speed'"):
            use(TEXT, max_tokens=3, speed=3)
    with pytest.raises(ArgumentError, match="only at the end"):
        model.generate_iter(TEXT, max_tokens=3, num_beams=2)


@each_model
def test_several_answers_are_for_generate(name: str, silent: Callable[..., Any]) -> None:
    model = silent(name)
    options = {"max_tokens": 3, "num_beams": 2, "num_return_sequences": 2}
    for use in (
        model.fill_blank,
        lambda text, **more: model.generate_batch([text], **more),
    ):
        with pytest.raises(ArgumentError, match=r"num_return_sequences is for generate\(\)"):
            use(TEXT, **options)


def test_options_of_glm130b_alone(silent: Callable[..., Any]) -> None:
    model = silent("glm10b")
    for options in ({"min_length": 2}, {"no_repeat_ngram_size": 2}, {"deterministic": False}):
        for use in uses_of(model)[:4]:
            if use != model.generate_iter:
                with pytest.raises(ArgumentError, match="are for the beam search of GLM-130B"):
                    use(TEXT, max_tokens=3, num_beams=2, **options)


@each_model
def test_batches(name: str, silent: Callable[..., Any]) -> None:
    model = silent(name)
    for texts in (TEXT, [], 3, None):
        with pytest.raises(ArgumentError, match=r"texts=.*; give a list with at least one text"):
            model.generate_batch(texts, max_tokens=3)
    with pytest.raises(ArgumentError, match="3 rows at once"):
        model.generate_batch([TEXT] * 3, max_tokens=3)
    with pytest.raises(ArgumentError, match="out_seq_length is for one text; give max_tokens"):
        model.generate_batch([TEXT] * 2, out_seq_length=30)


# ---- scores --------------------------------------------------------------------------------------


@each_model
def test_choices(name: str, silent: Callable[..., Any]) -> None:
    model = silent(name)
    size = model.tokenizer.vocab_size
    for choices in ("a", [], None, 3, {"a", "b"}, torch.ones(2, 2, dtype=torch.long)):
        with pytest.raises(ArgumentError, match=r"(?s)choices=.*; give a list with at least one"):
            model.score(TEXT, choices)
    for choice, words in [
        ("", "has no tokens"),
        ([], "has no tokens"),
        ([size], f"ids from 0 to {size - 1}"),
        ([-1], "has ids outside the vocabulary"),
        ([1.5], "holds a float"),
        (None, "is a NoneType"),
        (3, "is a int"),
        (torch.tensor([0.5]), r"whole numbers \(T,\)"),
    ]:
        with pytest.raises(ArgumentError, match=rf"choices\[1\] {words}|choices\[1\] .*{words}"):
            model.score(TEXT, ["a", choice])
    for mask in ("[XMASK]", "MASK", None, 3, ["[MASK]"]):
        with pytest.raises(ArgumentError, match=r"mask=.*; this model has \[MASK\], \[sMASK\]"):
            model.score(TEXT, ["a"], mask=mask)
    for text, words in [([size], "ids from 0"), ([], "no tokens"), ([True], "holds a bool")]:
        with pytest.raises(ArgumentError, match=f"text .*{words}"):
            model.score(text, ["a"])
    with pytest.raises(
        ArgumentError, match=r"text with all choices has .* more than max_length=40"
    ):
        model.score(TEXT, ["the host"] * 20)


@each_model
def test_perplexities(name: str, silent: Callable[..., Any]) -> None:
    model = silent(name)
    for text, words in [
        (None, "text is a NoneType"),
        ([1, 2], "text is a list"),
        ("", "no tokens"),
    ]:
        with pytest.raises(ArgumentError, match=words):
            model.perplexity(text, 9)
    for length in (0, -1, 39, 256, 9.0, True, "9", None):
        with pytest.raises(ArgumentError, match=r"generation_length=.*; accepted: 1 to 38, less"):
            model.perplexity(TEXT, length)
    for value in ("yes", 1, None):
        with pytest.raises(ArgumentError, match=r"unidirectional=.*; accepted: True, False"):
            model.perplexity(TEXT, 9, value)


# ---- the constructor -----------------------------------------------------------------------------

ARGUMENTS: list[tuple[dict[str, Any], Any, str]] = [
    ({"quantization": "int3"}, ArgumentError, 'accepted: "int8", "int4", "int4-row", a bminf.Form'),
    ({"quantization": True}, ArgumentError, "quantization=True"),
    ({"quantization": 4}, ArgumentError, "quantization=4"),
    ({"head_quantization": "int3"}, ArgumentError, "head_quantization='int3'; accepted"),
    ({"head_quantization": 8}, ArgumentError, "head_quantization=8"),
    ({"activations": "int8"}, ArgumentError, "activations='int8', but quantization=None"),
    (
        {"activations": "int8", "quantization": "int4"},
        ArgumentError,
        'activations="int8" needs',
    ),
    ({"dtype": torch.int8}, ArgumentError, r"dtype=torch\.int8; accepted: torch\.float32"),
    ({"dtype": "float15"}, ArgumentError, "dtype='float15'"),
    ({"device": "tpu"}, ArgumentError, "device='tpu'"),
    ({"memory_limit": "10KB"}, BudgetError, r"limit of 10 KB .*least .*MiB \(\d+ bytes\)"),
    ({"memory_limit": -1}, ArgumentError, "memory_limit=-1"),
    ({"memory_limit": "lots"}, ArgumentError, "memory_limit='lots'"),
    ({"max_length": 161}, ArgumentError, "max_length=161, but the model has 160 positions"),
    ({"max_length": 0}, ArgumentError, "max_length=0"),
    ({"max_batch_size": 0}, ArgumentError, "max_batch_size=0"),
    ({"max_batch_size": 1.0}, ArgumentError, r"max_batch_size=1\.0"),
    ({"config": 3}, ArgumentError, "config is a int; accepted: .*GLMConfig"),
    ({"config": "nowhere.json"}, CheckpointError, r"nowhere\.json cannot be read"),
    ({"tokenizer": 3}, ArgumentError, "tokenizer=3 .*GLMTokenizer"),
    ({"tokenizer": "nowhere"}, CheckpointError, "tokenizer='nowhere': there is no such"),
    ({"speed": 3}, TypeError, "'speed'"),
]


@each_model
def test_arguments_of_the_constructor(name: str, folders: dict[str, Path], refuse: Refuse) -> None:
    for given, error, words in ARGUMENTS:
        refuse(name, folders[name], error, words, **given)
    precision = {"float16": "rotary_precision is for GLM-130B"} if name == "glm10b" else {}
    precision |= {} if precision else {"half": "rotary_precision='half'; accepted: 'float16'"}
    for given, words in precision.items():
        refuse(name, folders[name], ArgumentError, words, rotary_precision=given)


def test_no_checkpoint(refuse: Refuse, folders: dict[str, Path], tmp_path: Path) -> None:
    titles = "a folder with a GLM-130B or GLM-10B checkpoint"
    for given, error in (
        (None, ArgumentError),
        (3, ArgumentError),
        ("not/there/at", CheckpointError),
    ):
        refuse("glm10b", given, error, f'{titles}, "THUDM/glm-10b"')
    refuse("glm10b", folders["cpm1"], CheckpointError, "holds CPM-1, not GLM-130B or GLM-10B")
    refuse("glm10b", folders["cpm2"], CheckpointError, "holds another model, not GLM-130B or GLM-")
    for name in NAMES:
        title = {"glm130b": "GLM-130B", "glm10b": "GLM-10B"}[name]
        refuse("cpm1", folders[name], CheckpointError, f"holds {title}, not CPM-1")
    (tmp_path / "a").mkdir()
    refuse("glm130b", tmp_path / "a", CheckpointError, "is empty; accepted: .*mp_rank_NN")


def test_icetk_that_is_not_installed(
    refuse: Refuse, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "icetk", None)
    words = r"tokenizer='icetk' asks for the package icetk.*pip install \"bminf\[icetk\]\", or give"
    refuse("glm130b", folders["glm130b"], ArgumentError, words, tokenizer="icetk")
    refuse("glm10b", folders["glm10b"], CheckpointError, "there is no such file", tokenizer="icetk")


def test_the_least_limit_is_named_to_the_byte(
    load: Loader, folders: dict[str, Path], refuse: Refuse
) -> None:
    packed = {"quantization": "int4", "head_quantization": "int8"}
    for name in NAMES:
        with pytest.raises(BudgetError) as error:
            load(name, memory_limit=1, **packed)
        found = re.search(r"that would do, .*? \((\d+) bytes\)", str(error.value))
        del error
        assert found is not None
        least = int(found[1])
        refuse(name, folders[name], BudgetError, found[1], memory_limit=least - 1, **packed)
        with load(name, memory_limit=least, **packed) as model:
            assert model.plan.streamed and model.plan.total_bytes <= least
            assert plan_glm(model.config, least, device="cpu", **packed) == model.plan
            with pytest.raises(BudgetError, match=found[1]):
                plan_glm(model.config, least - 1, device="cpu", **packed)


CONFIGS: list[tuple[str, dict[str, Any], str]] = [
    ("glm130b", {"num_attention_heads": 5}, "hidden_size=64 is not a multiple of 10"),
    ("glm130b", {"num_attention_heads": 64}, "hidden_size=64 is not a multiple of 128"),
    ("glm130b", {"num_attention_heads": "4"}, "num_attention_heads is '4'"),
    ("glm130b", {"num_attention_heads": None}, "does not say num_attention_heads, and hidden_siz"),
    ("glm130b", {"num_layers": 3}, r"lacks 'transformer\.layers\.2\."),
    ("glm130b", {"num_layers": 1}, r"has unexpected tensors: 'transformer\.layers\.1\."),
    ("glm130b", {"inner_hidden_size": 128}, r"dense_h_to_4h.*the configuration asks for \(256"),
    ("glm130b", {"hidden_size": 32}, "the configuration asks for"),
    ("glm130b", {"layernorm_order": "pre"}, "layernorm_order is 'pre', which this library does"),
    ("glm130b", {"rotary_base": 500}, "rotary_base is 500"),
    ("glm130b", {"deepnorm_alpha": 3}, r"deepnorm_alpha is 3; with 2 layers it is 2\.0"),
    ("glm130b", {"layernorm_epsilon": 2}, "layernorm_epsilon is 2"),
    ("glm10b", {"num_attention_heads": 5}, "hidden_size=64 is not a multiple of 5"),
    ("glm10b", {"block_position_encoding": False}, "block_position_encoding is False"),
    ("glm10b", {"attention_scale": 0.5}, r"attention_scale is 0\.5"),
    ("glm10b", {"layernorm": "post"}, "layernorm is 'post'"),
    ("glm10b", {"activation": "relu"}, "activation is 'relu'"),
    ("glm10b", {"num_layers": 0}, "num_layers is 0"),
]


def test_a_configuration_that_is_wrong(folders: dict[str, Path], refuse: Refuse) -> None:
    for name, changed, words in CONFIGS:
        config = {**tiny_glm(name).config, **changed}
        refuse(name, folders[name], CheckpointError, words, config=config)


# ---- files ---------------------------------------------------------------------------------------


def with_tensor(made: TinyGLM, name: str, tensor: torch.Tensor | None) -> TinyGLM:
    kept = {n: t for n, t in made.tensors.items() if n != name}
    return replace(made, tensors=kept if tensor is None else {**made.tensors, name: tensor})


MISSING = [
    ("glm130b", "transformer.layers.1.attention.dense.bias"),
    ("glm130b", "transformer.final_layernorm.weight"),
    ("glm10b", "word_embeddings.weight"),
    ("glm10b", "transformer.position_embeddings.weight"),
    ("glm10b", "transformer.layers.0.mlp.dense_4h_to_h.weight"),
]


def test_a_missing_tensor_is_named_as_in_the_file(refuse: Refuse, tmp_path: Path) -> None:
    for number, (name, tensor) in enumerate(MISSING):
        made = with_tensor(tiny_glm(name), tensor, None)
        folder = made.write_original(tmp_path / str(number), 1 + number % 2)
        refuse(name, folder, CheckpointError, rf"{number} lacks '{re.escape(tensor)}'")
    made = with_tensor(tiny_glm130b(), "transformer.word_embeddings.weight", None)
    folder = made.write_original(tmp_path / "untold")
    refuse(
        "glm130b", folder, CheckpointError, "untold holds another model, not GLM-130B or GLM-10B"
    )


SHAPES: list[tuple[str, str, tuple[int, ...]]] = [
    ("glm130b", "transformer.layers.1.attention.dense.weight", (64, 62)),
    ("glm130b", "transformer.layers.0.input_layernorm.bias", (63,)),
    ("glm10b", "transformer.block_position_embeddings.weight", (9, 64)),
    ("glm10b", "word_embeddings.weight", (280,)),
    ("glm10b", "word_embeddings.weight", (280, 60)),
]


def test_a_tensor_of_another_shape(refuse: Refuse, tmp_path: Path) -> None:
    for number, (name, tensor, shape) in enumerate(SHAPES):
        made = with_tensor(tiny_glm(name), tensor, torch.ones(shape).half())
        words = rf"'{re.escape(tensor)}' in .*\.pt has the shape {re.escape(str(shape))}"
        folder = made.write_original(tmp_path / str(number))
        refuse(name, folder, CheckpointError, words)


@each_model
@pytest.mark.parametrize("degree", [1, 2])
def test_an_unknown_tensor(name: str, degree: int, refuse: Refuse, tmp_path: Path) -> None:
    made = with_tensor(tiny_glm(name), "transformer.layers.0.adapter.weight", torch.ones(4, 4))
    folder = made.write_original(tmp_path / "a", degree)
    refuse(name, folder, CheckpointError, r"'transformer\.layers\.0\.adapter\.weight'")


@each_model
def test_ranks_that_are_missing(name: str, refuse: Refuse, tmp_path: Path) -> None:
    made = tiny_glm(name)
    for gone in range(4):
        folder = made.write_original(tmp_path / str(gone), 4)
        next(folder.rglob(f"mp_rank_{gone:02d}_*.pt")).unlink()
        words = f"lacks the file of rank {gone:02d} .*fetch all ranks"
        words = words if gone < 3 else r"48 columns in all.*files of all ranks .*3 were found"
        refuse(name, folder, CheckpointError, words)
        with pytest.raises(CheckpointError, match=words):
            convert(folder, tmp_path / "to", tokenizer=tokenizer_of(name))
        for degree in (1, 2, 3):
            with pytest.raises(CheckpointError, match=words):
                convert(folder, tmp_path / "to", tp=degree)
        assert not (tmp_path / "to").exists()
    told = made.write_original(tmp_path / "told", 2, mp_world_size=4)
    refuse(name, told, CheckpointError, "one of 4 ranks")


def tokenizer_of(name: str) -> Any:
    return ice_tokenizer() if name == "glm130b" else None


@each_model
def test_ranks_of_different_checkpoints(name: str, refuse: Refuse, tmp_path: Path) -> None:
    """Found only while reading, with two slots and a file at work: what all hold alike differs."""
    made = tiny_glm(name)
    ranks = made.ranks(2)
    ranks[1]["transformer.layers.1.post_attention_layernorm.weight"] += 1
    folder = write_ranks(made.write_beside(tmp_path / "a"), ranks)
    plan = plan_glm_of(made)
    refuse(
        name, folder, CheckpointError, "post_attention_layernorm.* should be the same",
        memory_limit=plan.total_bytes - 1000,
    )  # fmt: skip


def plan_glm_of(made: TinyGLM) -> Any:
    from bminf.arch.glm import GLMConfig

    config, size = made.config, made.config["hidden_size"]
    own = GLMConfig(
        "glm-130b" if made.name == "glm130b" else "glm-10b", made.num_rows, size,
        config["num_layers"], config["num_attention_heads"],
        config.get("inner_hidden_size", 4 * size), config["max_sequence_length"],
    )  # fmt: skip
    return plan_glm(own, 10**9, None, device="cpu")


@each_model
def test_a_truncated_file(name: str, refuse: Refuse, tmp_path: Path) -> None:
    folder = tiny_glm(name).write_original(tmp_path / "a", 2)
    file = sorted(folder.rglob("*.pt"))[1]
    file.write_bytes(file.read_bytes()[:-100])
    refuse(name, folder, CheckpointError, f"{re.escape(str(file))}.* truncated")


@each_model
def test_weights_that_are_not_finite(name: str, refuse: Refuse, tmp_path: Path) -> None:
    made, tensor = tiny_glm(name), "transformer.layers.1.mlp.dense_4h_to_h.weight"
    weight = made.tensors[tensor].clone()
    weight[5, 7] = math.nan
    folder = with_tensor(made, tensor, weight).write_original(tmp_path / "a")
    words = rf"'{re.escape(tensor)}' in .*\.pt cannot be quantized"
    for quantization in ("int4", "int4-row", "int8"):
        refuse(name, folder, CheckpointError, words, quantization=quantization)
        with pytest.raises(CheckpointError, match=words):
            convert(folder, tmp_path / "to", quantization, tokenizer=tokenizer_of(name))
        assert not (tmp_path / "to").exists()


def test_an_odd_number_of_columns(refuse: Refuse, load: Loader, tmp_path: Path) -> None:
    """In 4 bits two columns share a byte."""
    made = tiny_glm130b(inner_hidden_size=51)
    folder = made.write_original(tmp_path / "a")
    words = r"dense_4h_to_h\.weight' in .*\.pt has 51 columns, and in 4 bits two .*use \"int8\""
    for quantization in ("int4-row", "int4"):
        refuse("glm130b", folder, ArgumentError, words, quantization=quantization)
        with pytest.raises(ArgumentError, match=words):
            convert(folder, tmp_path / "to", quantization, tokenizer=ice_tokenizer())
    with pytest.raises(ArgumentError, match=r"dense_4h_to_h.* has 51 columns a rank with degree=1"):
        convert(folder, tmp_path / "to", "int4-row", tp=1)
    assert not (tmp_path / "to").exists()
    for quantization in ("int8", None):
        load("glm130b", checkpoint=folder, quantization=quantization).close()


def test_groups_of_an_odd_width(refuse: Refuse, load: Loader, tmp_path: Path) -> None:
    """Of 8 bits: 51 columns a rank, which two ranks have quantised."""
    folder = tiny_glm130b(inner_hidden_size=102).write_original(tmp_path / "a", 2, 8)
    words = r"dense_4h_to_h\.weight' in .* 2 groups of its 102 columns.*quantization=None"
    refuse("glm130b", folder, CheckpointError, words, quantization="int4")
    with pytest.raises(CheckpointError, match=words):
        convert(folder, tmp_path / "to", tokenizer=ice_tokenizer())
    load("glm130b", checkpoint=folder, quantization=None).close()


def change(folder: Path, edit: Callable[[Weights], None], rank: int = 0) -> Path:
    path = next(folder.rglob(f"mp_rank_{rank:02d}_*.pt"))
    saved = torch.load(path, weights_only=True)
    edit(saved["module"])
    torch.save(saved, path)
    return folder


QKV = "transformer.layers.0.attention.query_key_value.weight"


DAMAGES: list[tuple[Callable[[Weights], Any], str]] = [
    (lambda t: t.pop(f"{QKV}_scale"), r"query_key_value\.weight.* (is torch.int8|has the shape)"),
    (lambda t: t[f"{QKV}_scale"].fill_(math.inf), "holds NaN or infinity; fetch it again"),
    (lambda t: t.update({f"{QKV}_scale": t[f"{QKV}_scale"][:-1]}), r"should be int8 \(N, columns"),
    (lambda t: t.update({QKV: t[QKV][:, :-5].clone()}), "as many columns, of 4 bits half as many"),
    (lambda t: t.update({QKV: t[QKV].half()}), r"should be int8 \(N, columns"),
]


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_folder_that_is_damaged(bits: int, refuse: Refuse, tmp_path: Path) -> None:
    for number, (edit, words) in enumerate(DAMAGES):
        folder = tiny_glm130b().write_original(tmp_path / str(number), bits=bits)
        refuse("glm130b", change(folder, edit), CheckpointError, words, quantization="int4")


def test_a_vocabulary_of_another_length(refuse: Refuse, tmp_path: Path) -> None:
    made = tiny_glm10b()
    folder = made.write_original(tmp_path / "a")
    ids = json.loads((folder / "vocab.json").read_text())
    last = ids.pop("<|endoftext|>")
    more = {f"{letter}{letter}": last + at for at, letter in enumerate("abcdefghijkl")}
    (folder / "vocab.json").write_text(json.dumps({**ids, **more, "<|endoftext|>": last + 12}))
    words = rf"has \d+ tokens \(.*vocab\.json.*\), the embedding of .* {made.num_rows} rows"
    refuse("glm10b", folder, CheckpointError, words)
    for file in ("vocab.json", "merges.txt"):
        (folder / file).unlink()
    refuse("glm10b", folder, CheckpointError, "no tokenizer for glm10b: looked for vocab.json")
    (folder / "a.model").write_bytes(b"no model")
    refuse("glm10b", folder, CheckpointError, r"a\.model")
    folder = tiny_glm130b().write_original(tmp_path / "b")
    words = r"has 20\d{3} tokens \(.*ice_text\.model\)"
    refuse("glm130b", folder, CheckpointError, words, tokenizer=None)


# ---- converting ----------------------------------------------------------------------------------


@each_model
@pytest.mark.parametrize(
    ("changed", "degree", "words"),
    [
        ({}, 3, "does not divide the 104 vocabulary rows and the 64 hidden columns"),
        ({}, 8, "does not divide the 4 attention heads"),
        ({"num_attention_heads": 2}, 4, r"the 2 attention heads .* accepted: 1, 2$"),
        ({"inner_hidden_size": 98}, 4, r"divide the 98 inner columns of the feed-forward"),
        ({}, 0, "tp=0; accepted: an int of at least 1"),
        ({}, True, "tp=True"),
        ({}, "2", "tp='2'"),
        ({}, 2.0, r"tp=2\.0"),
    ],
    ids=str,
)
def test_a_degree_that_does_not_divide(
    name: str, changed: dict[str, Any], degree: Any, words: str, tmp_path: Path
) -> None:
    if name == "glm10b":
        words = words.replace("104 vocabulary rows and the 64", "280 vocabulary rows and the 64")
        if "inner_hidden_size" in changed:  # four times the hidden size, always
            changed, words = {"hidden_size": 66, "num_attention_heads": 2}, "66 hidden columns"
    folder = tiny_glm(name, **changed).write_original(tmp_path / "a", 2)
    with pytest.raises(ArgumentError, match=words):
        convert(folder, tmp_path / "to", tp=degree)
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_ranks_are_not_cut_anew(bits: int, tmp_path: Path) -> None:
    folder = tiny_glm130b().write_original(tmp_path / "a", 2, bits)
    for degree, form in ((1, None), (2, "auto"), (4, "int8"), (1, "int4-row")):
        with pytest.raises(CheckpointError, match=r"a is quantized, each rank .* re-sharded; give"):
            convert(folder, tmp_path / "to", form, tp=degree)
    assert not (tmp_path / "to").exists()


@each_model
def test_arguments_of_convert(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    other = {"glm130b": "glm10b", "glm10b": "glm130b"}[name]
    holds = {"glm130b": "holds GLM-130B, not GLM-10B", "glm10b": "holds GLM-10B, not GLM-130B"}
    wrong: list[tuple[dict[str, Any], Any, str]] = [
        ({"quantization": "int3"}, ArgumentError, "quantization='int3'"),
        ({"quantization": 4}, ArgumentError, "quantization=4"),
        ({"head_quantization": "int3"}, ArgumentError, "head_quantization='int3'"),
        ({"dtype": torch.int8}, ArgumentError, r"dtype=torch\.int8"),
        ({"model": "glm"}, ArgumentError, "model='glm'; accepted: .*glm130b, glm10b"),
        ({"model": other}, CheckpointError, holds[name]),
        ({"model": "cpm1"}, CheckpointError, f"{holds[name][:13]}.*, not CPM-1"),
        ({"config": 3}, ArgumentError, "config is a int; accepted: .*GLMConfig"),
        ({"config": {"num_attention_heads": 5}}, CheckpointError, "hidden_size=64 is not a mult"),
    ]
    plain: list[tuple[dict[str, Any], Any, str]] = [
        ({"tokenizer": 3}, ArgumentError, "tokenizer=3"),
        ({"tokenizer": "nowhere"}, CheckpointError, "there is no such"),
    ]
    cut: list[tuple[dict[str, Any], Any, str]] = [
        ({"dtype": torch.float16}, ArgumentError, "leave dtype out"),
        ({"tokenizer": "nowhere"}, ArgumentError, "leave tokenizer out"),
        ({"head_quantization": "int8"}, ArgumentError, "leave head_quantization out"),
        ({"quantization": Format(4, 32)}, ArgumentError, "own code cannot read; accepted with tp"),
        ({"quantization": Format(8, 32)}, ArgumentError, "own code cannot read"),
    ]
    if name == "glm10b":
        cut.append(({"quantization": "int8"}, ArgumentError, "GLM-10B, whose code has no quant"))
    for own, cases in (({}, wrong + plain), ({"tp": 2}, wrong + cut)):
        for given, error, words in cases:
            with pytest.raises(error, match=words):
                convert(folders[name], tmp_path / "to", **{**own, **given})
    with pytest.raises(CheckpointError, match="only those have model-parallel files"):
        convert(folders["cpm1"], tmp_path / "to", tp=2)
    with pytest.raises(
        ArgumentError, match="head_quantization is for GLM-130B, GLM-10B; leave it out"
    ):
        convert(folders["eva"], tmp_path / "to", model="eva", head_quantization="int8")
    assert list(tmp_path.iterdir()) == []


def test_a_converted_folder_that_is_damaged(refuse: Refuse, tmp_path: Path) -> None:
    made = convert(
        tiny_glm10b().write_original(tmp_path / "a"), tmp_path / "b", head_quantization="int8"
    )
    written = json.loads((made / "config.json").read_text())
    config = written["config"]
    for changed, words in [
        ({"exceptions": None}, "exceptions is None; convert the original anew"),
        ({"exceptions": {}}, "lacks|is torch.int8|unexpected tensors"),
        ({"exceptions": {"lm_head.parts.0": {"bits": 5}}}, "quantization is {'bits': 5}"),
        ({"quantization": None}, "lacks"),
        ({"config": {**config, "num_head_parts": 1}}, "has|lacks"),
        ({"config": {**config, "num_head_parts": 0}}, "num_head_parts"),
        ({"config": {**config, "num_hidden_layers": 3}}, r"lacks 'layers\.2\."),
        ({"config": None}, 'no object "config"'),
        ({"format_version": 9}, "format_version 9"),
        ({"model": "glm130b"}, "no tokenizer for glm130b"),
    ]:
        (made / "config.json").write_text(json.dumps({**written, **changed}))
        refuse("glm10b", made, CheckpointError, words, quantization="int4")


# ---- planning ------------------------------------------------------------------------------------


def test_arguments_of_plan_glm() -> None:
    for given, error, words in [
        ({"model": "GLM-1T"}, ArgumentError, "model='GLM-1T'; accepted: GLM-130B, .*a GLMConfig"),
        ({"model": ["GLM-2B"]}, ArgumentError, "model=.*accepted: GLM-130B"),
        ({"memory_limit": "lots"}, ArgumentError, "memory_limit='lots'"),
        ({"memory_limit": None}, ArgumentError, "memory_limit=None"),
        ({"memory_limit": "1MB"}, BudgetError, "below the least that would do"),
        ({"quantization": "int3"}, ArgumentError, "quantization='int3'"),
        ({"head_quantization": "int3"}, ArgumentError, "head_quantization='int3'"),
        ({"dtype": torch.int8}, ArgumentError, r"dtype=torch\.int8; accepted"),
        ({"max_length": 1025}, ArgumentError, "max_length=1025, but the model has 1024 positions"),
        ({"max_length": 0}, ArgumentError, "max_length=0"),
        ({"max_batch_size": "2"}, ArgumentError, "max_batch_size='2'"),
        ({"device": "tpu"}, ArgumentError, 'device=\'tpu\'; accepted: "cuda", "cpu"'),
        ({"host_memory": "lots"}, ArgumentError, "host_memory='lots'"),
    ]:  # fmt: skip
        with pytest.raises(error, match=words):
            plan_glm(**{"model": "GLM-2B", "memory_limit": "8GB", **given})
