"""Every float layout of every golden set, against the authors' own code: logits, hidden states,
caches, position bias and greedy ids."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import pytest
import torch
from golden import TOLERANCE, GoldenSet, calls_of, cases, for_each, golden, largest

from bminf.layers.position_bias import buckets

T5_MODELS = ("cpm2", "eva")
MODELS = ("cpm1", *T5_MODELS)
Tensors = dict[str, torch.Tensor]


def float_layouts(given: GoldenSet) -> list[str]:
    """Those that are what the authors' own code computed with; ModelCenter's says another GELU, and
    BMInf's weights are integers (test_golden_quantized.py)."""
    return [layout for layout in given.layouts() if layout not in ("modelcenter", "bminf1")]


def greedy_layouts(given: GoldenSet) -> list[str]:
    return float_layouts(given) if "greedy_ids" in given.tensors else []


# ---- what each model computes, by the names of the reference tensors -----------------------------


def gpt_outputs(model: Any, given: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
    gpt, ids = model.model, given["input_ids"]
    cache = gpt.new_cache(*ids.shape)
    with calls_of(gpt.layers) as calls:
        x = gpt(ids, cache)
    yield "final_hidden", x
    yield "logits", gpt.head(x)
    yield "layer_hidden", torch.stack([output for _, _, output in calls])
    yield "k_cache", cache.keys
    yield "v_cache", cache.values
    cache.reset()
    steps = [gpt.head(gpt(ids[:, at : at + 1], cache)) for at in range(ids.shape[1])]
    yield "logits_incremental", torch.cat(steps, 1)


def t5_outputs(model: Any, given: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
    t5, ids, lengths = model.model, given["enc_input_ids"], given["enc_length"]
    dec_ids = given["dec_input_ids"]
    cache = t5.new_cache(len(ids), ids.shape[1], dec_ids.shape[1])
    with calls_of(t5.encoder.layers) as calls:
        output = t5.encode(ids, cache, lengths)
    encoded = torch.stack([output for _, _, output in calls], 1)
    with calls_of(t5.decoder.layers) as calls:
        x = t5(dec_ids, cache)
    yield "encoder_output", valid(output, lengths)
    yield "encoder_layer_hidden", valid(encoded, lengths)
    yield "decoder_layer_hidden", torch.stack([output for _, _, output in calls])
    yield "decoder_last_hidden", x
    yield "logits", t5.head(x)
    yield "self_k_last", cache.own.keys
    yield "self_v_last", cache.own.values
    yield "cross_k", valid(cache.cross.keys.permute(1, 0, 3, 2, 4), lengths, 2)
    yield "cross_v", valid(cache.cross.values.permute(1, 0, 3, 2, 4), lengths, 2)
    cache.own.reset()
    steps = [t5.head(t5(dec_ids[:, at : at + 1], cache)) for at in range(dec_ids.shape[1])]
    yield "logits_incremental", torch.cat(steps, 1)


def valid(x: torch.Tensor, lengths: torch.Tensor, axis: int | None = None) -> torch.Tensor:
    """(B, ..., S, C), or (B, ..., S, H, C) with axis 2 -> what is no padding, in one row."""
    where = x.dim() - 2 if axis is None else axis
    rows = [row.narrow(where - 1, 0, int(n)) for row, n in zip(x, lengths, strict=True)]
    return torch.cat([row.flatten() for row in rows])


def expected(name: str, given: Tensors) -> torch.Tensor:
    """The reference, cut as `valid` cuts what was computed."""
    reference = given[name]
    if name == "encoder_output":
        return valid(reference, given["enc_length"])
    if name == "encoder_layer_hidden":
        return valid(reference.transpose(0, 1), given["enc_length"])
    if name in ("cross_k", "cross_v"):
        return valid(reference.permute(1, 0, 3, 2, 4), given["enc_length"], 2)
    return reference


def long_outputs(model: Any, given: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
    """Prompts and answers beyond the largest distance that has a bucket of its own."""
    t5 = model.model
    for name, tensor in given.items():
        if not name.endswith("_enc_input_ids"):
            continue
        kind = name.removesuffix("_enc_input_ids")
        dec_ids = given[f"{kind}_dec_input_ids"]
        cache = t5.new_cache(len(tensor), tensor.shape[1], dec_ids.shape[1])
        output = t5.encode(tensor, cache)
        logits = t5.head(t5(dec_ids, cache))
        for key, value in given.items():
            if key.startswith(f"{kind}_encoder_output_last"):
                yield key, output[:, -value.shape[1] :]
            if key.startswith(f"{kind}_logits"):
                yield key, logits[:, -value.shape[1] :]


def bias_outputs(model: Any, given: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
    for name, reference in given.items():
        stack, middle, rest = name.partition("_position_bias_")
        if middle:
            bias = getattr(model.model, stack).position_bias
            size, _, row = rest.partition("_row")
            computed = bias(int(size), int(size))
            yield name, computed[:, :, int(row)] if row else computed
            assert reference.numel()


T5_INPUTS = frozenset(["enc_input_ids", "enc_length", "dec_input_ids"])
T5_OUTPUTS = frozenset(
    "encoder_output encoder_layer_hidden decoder_layer_hidden decoder_last_hidden logits "
    "self_k_last self_v_last cross_k cross_v logits_incremental".split()
)
GPT_INPUTS = frozenset(["input_ids"])
GPT_OUTPUTS = frozenset(
    "final_hidden logits layer_hidden k_cache v_cache logits_incremental".split()
)


def outputs(name: str) -> list[Callable[[Any, Tensors], Iterator[tuple[str, torch.Tensor]]]]:
    return [gpt_outputs] if name == "cpm1" else [t5_outputs, long_outputs, bias_outputs]


def all_outputs(name: str, model: Any) -> dict[str, torch.Tensor]:
    given = golden(name).tensors
    with torch.inference_mode():
        return {key: x.clone() for of in outputs(name) for key, x in of(model, given)}


# ---- the tests -----------------------------------------------------------------------------------


@lru_cache
def outputs_of_layout(name: str, layout: str) -> dict[str, torch.Tensor]:
    with golden(name).load(layout) as model:
        return all_outputs(name, model)


def references(given: GoldenSet) -> list[tuple[str, str]]:
    """(layout, key) of every reference that a set holds for what is computed here."""
    keys = [key for key in given.tensors if is_reference(given, key)]
    return [(layout, key) for layout in float_layouts(given) for key in keys]


def is_reference(given: GoldenSet, key: str) -> bool:
    is_gpt = given.name == "cpm1"
    if not (GPT_INPUTS if is_gpt else T5_INPUTS) <= set(given.tensors):
        return False
    kind = key.partition("_")[0]
    is_long = f"{kind}_enc_input_ids" in given.tensors and not key.endswith("input_ids")
    is_output = key in (GPT_OUTPUTS if is_gpt else T5_OUTPUTS)
    return is_output or is_long or "_position_bias_" in key


@for_each(MODELS, references)
def test_golden_layout_computes_what_the_authors_did(name: str, case: tuple[str, str]) -> None:
    layout, key = case
    computed = outputs_of_layout(name, layout)[key]
    error = largest(computed, expected(key, golden(name).tensors))
    assert error <= TOLERANCE, error


@for_each(MODELS, greedy_layouts)
def test_golden_greedy_ids(name: str, case: str) -> None:
    given = golden(name)
    tensors = given.tensors
    rows = tensors["greedy_ids"]
    with given.load(case) as model:
        for row, reference in enumerate(rows):
            assert greedy(name, model, tensors, row, len(reference)) == reference.tolist()


def greedy(name: str, model: Any, given: Tensors, row: int, num_tokens: int) -> list[int]:
    """The likeliest tokens, never stopped."""
    from bminf.engine.request import Request
    from bminf.engine.sampling import Sampling

    if name == "cpm1":
        ids = given["input_ids"][row, : int(given["greedy_prompt_len"][row])].tolist()
        start_ids = ids
    else:
        ids = given["enc_input_ids"][row, : int(given["enc_length"][row])].tolist()
        start_ids = given["greedy_start_token"].tolist()
    request = Request(ids, num_tokens, Sampling(temperature=0), start_ids=start_ids)
    model.engine.run([model.engine.add(request)])
    return request.tokens


def modelcenter_activations(given: GoldenSet) -> list[str]:
    """The activations that ModelCenter's code was run with."""
    if "modelcenter" not in given.layouts():
        return []
    names = (key.removeprefix("modelcenter_") for key in given.tensors if "modelcenter_" in key)
    return sorted(name.removesuffix("_logits") for name in names if name.endswith("_logits"))


@for_each(("cpm2",), modelcenter_activations)
def test_golden_cpm2_modelcenter_follows_its_activation(name: str, case: str) -> None:
    given = golden(name)
    written = json.loads((given.path / "modelcenter" / "config.json").read_text())
    config = {**written, "ffn_activate_fn": case}
    if written["ffn_activate_fn"] == case:
        config = None  # as it lies there
    with given.load("modelcenter", config=config) as model:
        computed = all_outputs(name, model)
    tensors = given.tensors
    assert largest(computed["logits"], tensors[f"modelcenter_{case}_logits"]) <= TOLERANCE
    encoded = valid(tensors[f"modelcenter_{case}_encoder_output"], tensors["enc_length"])
    assert largest(computed["encoder_output"], encoded) <= TOLERANCE


def other_settings(given: GoldenSet) -> Iterator[tuple[str, str]]:
    """(layout, key) of logits with the exact GELU, or with the other attention scaling."""
    if (key := "hf_eva_logits_erf_gelu") in given.tensors:
        yield "hf_eva", key
    if (key := "logits_attn_scale_flipped") in given.tensors:
        yield from ((layout, key) for layout in float_layouts(given))


@for_each(("eva",), other_settings)
def test_golden_eva_with_another_setting(name: str, case: tuple[str, str]) -> None:
    given, (layout, key) = golden(name), case
    if key.endswith("gelu"):
        config = json.loads((given.path / layout / "config.json").read_text())
        config["hidden_act"] = "gelu"
    else:
        config = {**given.info["config"], "attn_scale": not given.info["config"]["attn_scale"]}
    with given.load(layout, config=config) as model:
        logits = all_outputs(name, model)["logits"]
    assert largest(logits, given.tensors[key]) <= TOLERANCE


def bucket_cases(given: GoldenSet) -> list[str]:
    kinds = ("bidirectional", "unidirectional")
    return [kind for kind in kinds if f"bucket_{kind}" in given.tensors]


@for_each(T5_MODELS, bucket_cases)
def test_golden_buckets(name: str, case: str) -> None:
    given = golden(name).tensors
    num_buckets = given_buckets(given)
    chosen = buckets(given["bucket_rel"], num_buckets, 128, case == "bidirectional")
    assert torch.equal(chosen, given[f"bucket_{case}"])


def given_buckets(given: Tensors) -> int:
    """As many as the farthest distances fill."""
    return max(int(x.max()) + 1 for name, x in given.items() if name.endswith("directional"))


@pytest.mark.parametrize("name", MODELS)
def test_golden_set_gives_tests(name: str) -> None:
    """A golden folder that none of the above looks into would be a test that cannot fail."""
    assert [*cases((name,), references)]
