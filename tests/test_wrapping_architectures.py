"""The 21 architectures as they are and with their linears in 8 and 4 bits, on the CPU."""

from __future__ import annotations

from itertools import cycle

import pytest
import torch
from quantized_models import (
    dequantize_linears,
    quantize_and_stream,
    quantize_on_cpu,
    relative_error,
)
from tiny_models import TINY, greedy, half_layer_names, inputs_of, make, output_of

import bminf


@pytest.mark.parametrize("by_half_layers", [False, True])
@pytest.mark.parametrize("name", TINY)
def test_streamed_equals_the_unwrapped_model(name: str, by_half_layers: bool) -> None:
    model, given = make(name), inputs_of(name)
    expected = output_of(model, given)
    ids = greedy(model, given) if TINY[name].generates else None
    quantize_and_stream(model, False, half_layer_names(name, model) if by_half_layers else None)
    plan = bminf.plan_of(model)
    for num_passes in (1, 2):
        assert torch.equal(output_of(model, given), expected)
        stats = bminf.stats_of(model)
        assert stats.passes == num_passes
        assert stats.bytes_copied >= num_passes * plan.streamed_bytes
        assert stats.copies >= num_passes * len(plan.streamed)
    if ids is not None:
        assert torch.equal(greedy(model, given), ids)
        assert bminf.stats_of(model).bytes_copied > 3 * plan.streamed_bytes


# Activations are rounded to 16 bits a token, or to bfloat16 in small products with one row.
ROUNDING = {"int8": 5e-3, "int4": 1e-4}


@pytest.mark.parametrize(
    ("name", "quantization"), [*zip(TINY, cycle(("int4", "int8")), strict=False)]
)
def test_streamed_equals_resident_and_agrees_with_the_dequantized_model(
    name: str, quantization: str
) -> None:
    """In one of two ways by turns; test_saving.py has the other."""
    given = inputs_of(name)
    resident = quantize_on_cpu(make(name), quantization)
    expected = output_of(resident, given)
    ids = greedy(resident, given) if TINY[name].generates else None
    model = quantize_and_stream(make(name), quantization)
    for _ in range(2):
        assert torch.equal(output_of(model, given), expected)
    if ids is not None:
        assert torch.equal(greedy(model, given), ids)
    linears = [m for m in model.modules() if isinstance(m, bminf.QuantizedLinear)]
    assert linears and all(m.weight.dtype == torch.float32 for m in linears)
    if TINY[name].inputs == "ids":
        kind = bminf.QuantizedLinear if quantization == "int4" else torch.nn.Linear
        assert type(model.get_output_embeddings()) in (kind, type(None))
    plain = dequantize_linears(bminf.unwrap(resident))
    assert relative_error(expected, output_of(plain, given)) < ROUNDING[quantization]


SHALLOW = {
    "llama": {"num_hidden_layers": 2},
    "t5": {"num_layers": 1, "num_decoder_layers": 1},
    "gpt2": {"n_layer": 1},
}


@pytest.mark.parametrize("name", SHALLOW)
def test_a_resident_model_compiles_to_one_graph(name: str) -> None:
    """T5 asks for the dtype of a weight, which must not break the graph."""
    given = inputs_of(name)
    model = quantize_on_cpu(make(name, **SHALLOW[name]), "int4")
    expected = output_of(model, given)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(output_of(compiled, given), expected)
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_half_precision_models(quantization: str, dtype: torch.dtype) -> None:
    given = inputs_of("llama")
    resident = quantize_on_cpu(make("llama").to(dtype), quantization)
    model = quantize_and_stream(make("llama").to(dtype), quantization)
    expected = output_of(resident, given)
    assert expected.dtype == dtype and torch.equal(output_of(model, given), expected)
    assert model.model.layers[0].mlp.up_proj.weight.dtype == dtype
    assert (
        relative_error(expected, output_of(dequantize_linears(bminf.unwrap(resident)), given))
        < 0.03
    )
