"""bminf/cli/expected.py: plans and predictions for a machine whose numbers are given."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers

from bminf.cli import expected
from bminf.cli.expected import CALLS_OF_COPY, CALLS_OF_LAYER, CALLS_OF_TOKEN, SHAPES, Machine, Shape
from bminf.cli.gpus import Speeds
from bminf.cli.machine import Rate
from bminf.offload.plan import Block, plan

GB = 10**9
SHAPE = SHAPES[2]  # 8 billion weights


def machine(is_gpu: bool = False, **changed: Any) -> Machine:
    """One whose link is slower than its disk is never."""
    plain = "float16" if is_gpu else "bfloat16"
    rates = [Rate(form, 10**6, 20 * GB) for form in (plain, "float32", "int8", "int4")]
    usual = Machine(Speeds(10 * GB, 20 * GB), 20 * GB, GB, 0.0, rates, 0, 64 * GB, is_gpu)
    return replace(usual, **changed)


def of(shape: Shape, quantization: str, on: Machine) -> expected.Expected:
    (found,) = [
        one for one in expected.of_sizes(on)
        if (one.model, one.quantization) == (shape.name, quantization)
    ]  # fmt: skip
    return found


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_shapes_are_those_of_the_models(shape: Shape) -> None:
    """The published numbers of weights are what a model of this configuration has."""
    config = transformers.LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=1,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim, vocab_size=shape.vocab, tie_word_embeddings=shape.is_tied,
    )  # fmt: skip
    with torch.device("meta"):
        layer = transformers.LlamaForCausalLM(config).model.layers[0]
    matrices = [p for p in layer.parameters() if p.dim() == 2]
    assert sum(p.numel() for p in matrices) == shape.layer_weights
    tables = (1 if shape.is_tied else 2) * shape.vocab * shape.hidden
    billions = float(shape.name.split()[-1].rstrip("BM")) / (1000 if shape.name[-1] == "M" else 1)
    weights = (shape.layer_weights * shape.num_layers + tables) / 1e9
    assert weights == pytest.approx(billions, rel=0.25)  # "1B" has 1.24


def test_a_model_that_fits_takes_the_time_of_reading_it() -> None:
    on = machine(room_bytes=200 * GB)
    found = of(SHAPE, "none", on)
    read = 2 * (SHAPE.layer_weights * SHAPE.num_layers + SHAPE.vocab * SHAPE.hidden)
    assert found.tokens_per_s == pytest.approx(20 * GB / read)
    assert found.bound == "compute" and found.streamed_bytes == 0
    assert found.total_bytes > read and found.memory_limit == 200 * GB


def test_calls_take_their_time_in_each_layer() -> None:
    on = machine(room_bytes=200 * GB)
    fast, slow = of(SHAPE, "none", on), of(SHAPE, "none", replace(on, call_s=1e-5))
    assert fast.tokens_per_s and slow.tokens_per_s
    more_s = 1 / slow.tokens_per_s - 1 / fast.tokens_per_s
    assert more_s == pytest.approx((SHAPE.num_layers * CALLS_OF_LAYER + CALLS_OF_TOKEN) * 1e-5)


def test_handing_blocks_over_takes_its_time() -> None:
    """The link is fast enough for all copies to hide."""
    on = machine(room_bytes=12 * GB, speeds=Speeds(10**15, 20 * GB))
    fast, slow = of(SHAPE, "none", on), of(SHAPE, "none", replace(on, call_s=1e-5))
    assert fast.tokens_per_s and slow.tokens_per_s and fast.streamed_bytes
    num_streamed = round(fast.streamed_bytes / (2 * SHAPE.layer_weights))
    calls = SHAPE.num_layers * CALLS_OF_LAYER + num_streamed * CALLS_OF_COPY + CALLS_OF_TOKEN
    assert 1 / slow.tokens_per_s - 1 / fast.tokens_per_s == pytest.approx(calls * 1e-5, rel=1e-3)


def test_what_does_not_fit_a_gpu_comes_over_its_link() -> None:
    """Memory and products of a GPU, beside which the link is slow."""
    on = machine(True, room_bytes=6 * GB, speeds=Speeds(10 * GB, 1000 * GB))
    on = replace(on, rates=[replace(rate, bytes_per_s=1000 * GB) for rate in on.rates])
    found = of(SHAPE, "int8", on)
    assert found.bound == "link" and found.streamed_bytes and found.tokens_per_s
    assert found.tokens_per_s == pytest.approx(10 * GB / found.streamed_bytes, rel=0.1)


def test_what_does_not_fit_memory_is_read_from_disk() -> None:
    on = machine(room_bytes=9 * GB, host_bytes=10 * GB)
    found = of(SHAPE, "none", on)
    assert found.bound == "disk" and found.streamed_bytes and found.tokens_per_s
    assert found.tokens_per_s == pytest.approx(GB / found.streamed_bytes, rel=0.1)
    cached = of(SHAPE, "none", replace(on, host_bytes=64 * GB))
    assert cached.bound in ("compute", "link") and cached.tokens_per_s > found.tokens_per_s
    unknown = of(SHAPE, "none", replace(on, disk=None))
    assert unknown.tokens_per_s is None and unknown.streamed_bytes == found.streamed_bytes


def test_what_not_even_streams_is_told_apart() -> None:
    found = of(SHAPE, "none", machine(room_bytes=GB))
    assert found.tokens_per_s is found.resident_bytes is None and found.total_bytes > 14 * GB


def test_the_rate_is_that_of_a_product_of_about_the_size() -> None:
    rates = [Rate("int8", 10**n, float(n)) for n in (4, 6, 8)] + [Rate("int4", 10**6, 9.0)]
    on = machine(rates=rates)
    assert [on.rate("int8", 10.0**n) for n in (0, 4.9, 5.1, 6.9, 7.1, 30)] == [4, 4, 6, 6, 8, 8]
    assert on.rate("int8", 0) == 4 and on.rate("int4", 1e12) == 9


@pytest.mark.parametrize(
    ("quantization", "dtype", "layers", "head"),
    [
        ("none", "float32", "float32", "float32"),
        ("none", "bfloat16", "bfloat16", "bfloat16"),
        ("none", "float16", "bfloat16", "bfloat16"),  # 16 bits, as was measured
        ("int8", "float32", "int8", "float32"),
        ("int4", "float32", "int4", "int8"),  # the head is packed beside it
        ("int4-row", "float16", "int4", "int8"),
        ("as stored", "float16", "int8", "bfloat16"),
    ],
)
def test_forms_are_among_those_measured(
    quantization: str, dtype: str, layers: str, head: str
) -> None:
    form = expected._form(quantization, dtype, machine())
    assert (form.layers, form.head) == (layers, head)


def test_another_tool_is_named_where_its_bound_is_clearly_above() -> None:
    """One layer of 8 GB in 8 bits, which are 4.5 GB there, on memory of 20 GB/s."""
    made = plan([Block("only", 8 * GB)], 8 * GB)
    bound = 20 / 4.5
    assert expected.elsewhere(made, 8, 0.89 * bound, machine()) == (
        "llama.cpp, in 4 bits: up to 4.44 tokens/s by the bandwidth of memory"
    )
    assert expected.elsewhere(made, 8, 0.92 * bound, machine()) is None
    assert expected.elsewhere(made, 8, None, machine()) is None
    assert expected.elsewhere(made, 8, 0.1, machine(host_bytes=4 * GB)) is None  # it has no room


def test_another_tool_computes_on_the_cpu_what_a_gpu_has_no_room_for() -> None:
    made = plan([Block(str(at), GB) for at in range(8)], 4 * GB)
    on = machine(True, room_bytes=2 * GB, speeds=Speeds(10 * GB, 200 * GB))
    found = expected.elsewhere(made, 4, 1.0, on)
    assert found is not None
    assert f"{1 / (2 / 200 + 6 / 20):.3g} tokens/s" in found
