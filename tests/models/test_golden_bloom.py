"""Every layout of a golden set of BLOOM against transformers: hidden states, logits, caches, ids;
in half precision, packed, and streamed.

bminf/arch/bloom.py, bminf/models/bloom.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial
from typing import Any

import torch
from golden import (
    CLASSES,
    GoldenSet,
    calls_of,
    expect_streamed_is_resident,
    for_each,
    golden,
    is_int8,
    largest,
)
from quantized_models import dequantize_linears

from bminf.engine.request import Request
from bminf.engine.sampling import Sampling
from bminf.layers.alibi import Alibi, slopes

NAME = ("bloom",)
CLASSES["bloom"] = "BLOOM"
Tensors = dict[str, torch.Tensor]

_OUTPUTS = (
    *("embed_hidden", "layer_hidden", "final_hidden", "logits", "k_cache", "v_cache"),
    *("logits_incremental", "long_logits_last4", "greedy_step_logits"),
)


def float_layouts(given: GoldenSet) -> list[str]:
    return [layout for layout in given.layouts() if not is_int8(given, layout)]


def references(given: GoldenSet) -> list[tuple[str, str]]:
    keys = [key for key in _OUTPUTS if key in given.tensors]
    return [(layout, key) for layout in float_layouts(given) for key in keys]


def load(given: GoldenSet, layout: str, **arguments: Any) -> Any:
    tensors = given.tensors
    num_rows, width = tensors["input_ids"].shape
    most = [width + tensors["greedy_ids"].shape[1]]
    most += [t.shape[1] for key, t in tensors.items() if key.endswith("input_ids")]
    settings = {"max_length": max(most), "max_batch_size": num_rows}
    return given.load(layout, **{**settings, **arguments})


# ---- what is computed, by the names of the reference tensors -------------------------------------


def padding_of(given: Tensors) -> torch.Tensor:
    return (given["attention_mask"] == 0).sum(1)


def outputs(given: GoldenSet, model: Any) -> Tensors:
    with torch.inference_mode():
        return {key: x.clone() for key, x in computed(given, model)}


def computed(given: GoldenSet, model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    network, tensors = model.model, given.tensors
    ids, padding = tensors["input_ids"], padding_of(tensors)
    cache = network.new_cache(*ids.shape)
    with calls_of([network.embed_norm]) as embedded, calls_of(network.layers) as calls:
        x = network(ids, cache, padding)
    yield "embed_hidden", embedded[0][2]
    yield "layer_hidden", torch.stack([output for _, _, output in calls])
    yield "final_hidden", x
    yield "logits", network.head(x)
    yield "k_cache", cache.keys
    yield "v_cache", cache.values
    cache.reset()
    first = int(given.info["prefill_columns"])
    steps = [ids[:, :first], *ids[:, first:].split(1, 1)]
    yield (
        "logits_incremental",
        torch.cat([network.head(network(step, cache, padding)) for step in steps], 1),
    )
    long_ids = tensors["long_input_ids"]
    x = network(long_ids, network.new_cache(*long_ids.shape))
    yield "long_logits_last4", network.head(x[:, -tensors["long_logits_last4"].shape[1] :])
    greedy_ids = tensors["greedy_ids"]
    cache = network.new_cache(len(ids), ids.shape[1] + greedy_ids.shape[1])
    steps = [ids, *greedy_ids[:, :-1].split(1, 1)]
    logits = [network.head(network(step, cache, padding)[:, -1]) for step in steps]
    yield "greedy_step_logits", torch.stack(logits, 1)


@lru_cache
def outputs_of_layout(layout: str) -> Tensors:
    given = golden("bloom")
    with load(given, layout) as model:
        return outputs(given, model)


def valid(key: str, x: torch.Tensor, given: Tensors) -> torch.Tensor:
    """What is no padding."""
    is_token = given["attention_mask"] == 1
    if key in ("k_cache", "v_cache"):
        return x.transpose(2, 3)[:, is_token]
    if key == "layer_hidden":
        return x[:, is_token]
    return x if key.startswith(("long", "greedy")) else x[is_token]


# ---- the tests -----------------------------------------------------------------------------------


@for_each(NAME, references)
def test_golden_bloom_computes_what_transformers_did(name: str, case: tuple[str, str]) -> None:
    layout, key = case
    given = golden(name)
    x, expected = outputs_of_layout(layout)[key], given.tensors[key]
    error = largest(valid(key, x, given.tensors), valid(key, expected, given.tensors))
    assert error <= given.tolerance, error


def rows_of(given: Tensors) -> list[list[int]]:
    return [
        row[mask == 1].tolist()
        for row, mask in zip(given["input_ids"], given["attention_mask"], strict=True)
    ]


@for_each(NAME, float_layouts)
def test_golden_bloom_greedy_ids(name: str, case: str) -> None:
    """Alone and together; rows of the embedding that no token has are drawn, too."""
    given = golden(name)
    expected = given.tensors["greedy_ids"].tolist()
    with load(given, case) as model:
        together = [request(row, len(expected[0])) for row in rows_of(given.tensors)]
        model.engine.run([model.engine.add(one) for one in together])
        assert [one.tokens for one in together] == expected
        for row, ids in zip(rows_of(given.tensors), expected, strict=True):
            alone = request(row, len(ids))
            model.engine.run([model.engine.add(alone)])
            assert alone.tokens == ids


def request(ids: list[int], num_tokens: int) -> Request:
    return Request(ids, num_tokens, Sampling(temperature=0))


@for_each(NAME, float_layouts)
def test_golden_bloom_texts(name: str, case: str) -> None:
    """generate() and generate_batch() write the text of the ids, up to the end of a text."""
    given = golden(name)
    num_tokens = given.tensors["greedy_ids"].shape[1]
    with load(given, case) as model:
        (end,) = model._end_ids()
        expected = []
        for ids in given.tensors["greedy_ids"].tolist():
            stopped = end in ids
            kept = ids[: ids.index(end)] if stopped else ids
            spoken = [token for token in kept if token < model.tokenizer.vocab_size]
            expected.append((model.tokenizer.decode(spoken), stopped))
        rows = rows_of(given.tensors)
        assert model.generate_batch(rows, max_tokens=num_tokens) == expected
        assert [model.generate(row, max_tokens=num_tokens) for row in rows] == expected
        assert "".join(model.generate_iter(rows[0], max_tokens=num_tokens)) == expected[0][0]


@for_each(NAME, float_layouts)
def test_golden_bloom_in_half_precision_padded_rows_are_those_alone(name: str, case: str) -> None:
    """Finite, and what is padding in other rows changes nothing but the rounding."""
    given = golden(name)
    ids, padding = given.tensors["input_ids"], padding_of(given.tensors)
    with load(given, case, dtype=torch.float16) as model, torch.inference_mode():
        network = model.model
        x = network(ids, network.new_cache(*ids.shape), padding)
        logits = network.head(x)
        assert x.isfinite().all() and logits.isfinite().all()
        for row, count in enumerate(padding.tolist()):
            alone = ids[row : row + 1, count:]
            own = network.head(network(alone, network.new_cache(*alone.shape)))[0]
            bound = 2 * float(given.info["transformers_16bit_vs_this"]["fp16"]["max"])
            assert largest(logits[row, count:], own) <= bound
            assert largest(own, given.tensors["logits"][row, count:]) <= bound


FORMS: dict[str, dict[str, Any]] = {
    "int8": {"quantization": "int8"},
    "int4": {"quantization": "int4"},
    "int8, head int8": {"quantization": "int8", "head_quantization": "int8"},
    "int8, head int4": {"quantization": "int8", "head_quantization": "int4"},
    "int4, head int4": {"quantization": "int4", "head_quantization": "int4"},
}


def packed_cases(given: GoldenSet) -> list[tuple[str, str]]:
    """What is stored as 8 bits stays so, but for the head."""
    return [
        (layout, form)
        for layout in given.layouts()
        for form in FORMS
        if form.startswith("int8") or not is_int8(given, layout)
    ]


@for_each(NAME, packed_cases)
def test_golden_bloom_packed_is_the_float_model_of_its_weights(
    name: str, case: tuple[str, str]
) -> None:
    given, (layout, form) = golden(name), case
    with load(given, layout, **FORMS[form], activations="float") as model:
        packed = outputs(given, model)
        dequantize_linears(model.model)
        floats = outputs(given, model)
    for key, x in packed.items():
        deviation = max(1.0, float(floats[key].std()))
        assert largest(x, floats[key]) <= given.tolerance * deviation, key


def streamed_cases(given: GoldenSet) -> list[tuple[str, str]]:
    return [
        (layout, form)
        for layout in given.layouts()
        for form in ("none", "int8, head int8" if is_int8(given, layout) else "int4, head int4")
    ]


@for_each(NAME, streamed_cases)
def test_golden_bloom_streamed_equals_resident(name: str, case: tuple[str, str]) -> None:
    given, (layout, form) = golden(name), case
    arguments = FORMS.get(form, {})
    expect_streamed_is_resident(given, layout, partial(outputs, given), **arguments)


def int8_layouts(given: GoldenSet) -> list[str]:
    if "ds_int8_logits_last" not in given.tensors:
        return []
    return [layout for layout in given.layouts() if is_int8(given, layout)]


@for_each(NAME, int8_layouts)
def test_golden_bloom_codes_of_deepspeed(name: str, case: str) -> None:
    given = golden(name)
    with load(given, case) as model:
        logits = outputs(given, model)["logits"][:, -1]
    assert largest(logits, given.tensors["ds_int8_logits_last"]) <= given.tolerance


def slope_cases(given: GoldenSet) -> list[str]:
    return [key for key in given.tensors if key.startswith("alibi_slopes")]


@for_each(NAME, slope_cases)
def test_golden_bloom_slopes(name: str, case: str) -> None:
    expected = golden(name).tensors[case]
    assert torch.allclose(torch.tensor(slopes(len(expected))), expected, rtol=1e-6, atol=0)


def probability_cases(given: GoldenSet) -> list[str]:
    return ["attn_probs_layer0"] if "attn_probs_layer0" in given.tensors else []


@for_each(NAME, probability_cases)
def test_golden_bloom_biases_are_those_of_transformers_but_for_a_constant(
    name: str, case: str
) -> None:
    """A number that all keys of a query share changes no probability."""
    given = golden(name).tensors
    alibi, padding = given["alibi"], padding_of(given)
    own = Alibi(torch.tensor(slopes(alibi.shape[1]))).bias(alibi.shape[2], alibi.shape[2])[0]
    for row, count in enumerate(padding.tolist()):
        for query in range(count, alibi.shape[2]):
            seen = slice(count, query + 1)
            difference = own[:, query, seen] - alibi[row, :, seen]
            assert float((difference - difference[:, :1]).abs().max()) <= 1e-5
            assert (given[case][row, :, query, :count] == 0).all()


def test_golden_bloom_of_2048_tokens_keeps_to_float64() -> None:
    """Far keys are told apart as well as near ones: any model of its architecture shows it."""
    from bminf.arch.bloom import Bloom, BloomConfig

    torch.manual_seed(0)
    network = Bloom(BloomConfig(64, 48, 2, 6)).requires_grad_(False)
    network.embed_tokens.keep([torch.randn(64, 48)], torch.float32)
    for parameter in network.parameters():
        parameter.uniform_(-0.3, 0.3) if parameter.dim() == 2 else parameter.add_(0.1)
    ids = torch.randint(64, (1, 2048))
    with torch.inference_mode():
        logits = network.head(network(ids, network.new_cache(1, 2048))[:, -64:])
        expected = reference(network, ids[0])
    assert float(logits.std()) > 1
    assert largest(logits[0], expected[-64:].float()) <= 3e-4


def reference(network: Any, ids: torch.Tensor) -> torch.Tensor:
    """(T, V) float64, of equations: nothing of the network but its weights is used."""
    config = network.config
    num_heads, size = config.num_attention_heads, config.head_dim
    positions = torch.arange(len(ids))
    distances = (positions - positions[:, None]).double()
    steep = torch.tensor(slopes(num_heads), dtype=torch.float64).view(-1, 1, 1)
    hidden = distances > 0

    def norm(module: Any, x: torch.Tensor) -> torch.Tensor:
        centered = x - x.mean(-1, keepdim=True)
        y = centered / (centered.square().mean(-1, keepdim=True) + config.layer_norm_eps).sqrt()
        return y * module.weight.double() + module.bias.double()

    def linear(module: Any, x: torch.Tensor) -> torch.Tensor:
        return x @ module.weight.double().T + module.bias.double()

    x = norm(network.embed_norm, network.embed_tokens(ids).double())
    for layer in network.layers:
        own = linear(layer.attention.qkv, norm(layer.attention.norm, x))
        query, key, value = own.view(len(ids), num_heads, 3, size).permute(2, 1, 0, 3)
        scores = query @ key.transpose(1, 2) / size**0.5 + steep * distances
        y = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value
        x = x + linear(layer.attention.out, y.transpose(0, 1).flatten(1))
        wide = linear(layer.feed_forward.up, norm(layer.norm, x))
        cubic = 0.5 * wide * (1 + (0.7978845608028654 * (wide + 0.044715 * wide**3)).tanh())
        x = x + linear(layer.feed_forward.down, cubic)
    weights = torch.cat([part.weight.double() for part in network.lm_head.parts])
    return norm(network.norm, x) @ weights.T
