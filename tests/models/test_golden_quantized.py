"""Every layout of every golden set with packed weights: what 8 bits mean, and what they cost; and
streamed, packed or not."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import cycle
from typing import Any

import torch
from golden import (
    TOLERANCE,
    GoldenSet,
    expect_streamed_is_resident,
    for_each,
    golden,
    largest,
)
from quantized_models import dequantize_linears
from test_golden_forward import MODELS, all_outputs

# Logits that BMInf 1.x' own 8 bits moved by so much, see bminf1_golden.json; ours may move them by
# these factors of that, most and on average.
MOST, MEAN = 1.5, 1.2


def layouts_with_bound(given: GoldenSet) -> list[str]:
    """Those whose float logits are those of the authors."""
    if "int8_logits_abs_diff_vs_fp32" not in given.bminf1:
        return []
    return [layout for layout in given.layouts() if layout != "modelcenter"]


def settings(given: GoldenSet, layout: str) -> dict[str, Any]:
    """EVA as BMInf ran it, without scaling, where the weights are those of BMInf."""
    if given.name == "eva" and layout == "bminf1":
        return {"config": {**given.info["config"], "attn_scale": False}}
    return {}


def reference_logits(given: GoldenSet, layout: str) -> torch.Tensor:
    is_flipped = layout == "bminf1" and given.info["config"].get("attn_scale") is True
    return given.tensors["logits_attn_scale_flipped" if is_flipped else "logits"]


@for_each(MODELS, GoldenSet.layouts)
def test_golden_int8_is_the_float_model_of_its_dequantized_weights(name: str, case: str) -> None:
    given = golden(name)
    with given.load(
        case, **settings(given, case), quantization="int8", activations="float"
    ) as model:
        packed = all_outputs(name, model)
        dequantize_linears(model.model)
        floats = all_outputs(name, model)
    for key, x in packed.items():
        assert largest(x, floats[key]) <= TOLERANCE, key


@for_each(MODELS, layouts_with_bound)
def test_golden_int8_activations_cost_what_bminf_paid(name: str, case: str) -> None:
    given = golden(name)
    bound = given.bminf1["int8_logits_abs_diff_vs_fp32"]
    with given.load(
        case, **settings(given, case), quantization="int8", activations="int8"
    ) as model:
        logits = all_outputs(name, model)["logits"]
    difference = (logits - reference_logits(given, case)).abs()
    assert float(difference.max()) <= MOST * bound["max"]
    assert float(difference.mean()) <= MEAN * bound["mean"]


def ways_by_turns(given: GoldenSet) -> Iterator[tuple[str, str]]:
    return zip(given.layouts(), cycle(("None", "int8", "int4")), strict=False)


@for_each(MODELS, ways_by_turns)
def test_golden_streamed_equals_resident(name: str, case: tuple[str, str]) -> None:
    """Each model in each way, each layout in one."""
    (layout, way), given = case, golden(name)
    arguments = {**settings(given, layout), "quantization": None if way == "None" else way}
    expect_streamed_is_resident(given, layout, partial(all_outputs, name), **arguments)


def bminf_layouts(given: GoldenSet) -> list[str]:
    return ["bminf1"] if "bminf1" in given.layouts() else []


@for_each(MODELS, bminf_layouts)
def test_golden_bminf1_codes_are_taken_as_they_are(name: str, case: str) -> None:
    from bminf.checkpoint.bminf1_file import read_bminf1

    given = golden(name)
    with given.load(case, **settings(given, case), quantization="int8") as model:
        linears = {n: m for n, m in model.model.named_modules() if hasattr(m, "qweight")}
        first = "layers.0" if name == "cpm1" else "encoder.layers.0"
        codes = linears[f"{first}.feed_forward.down"].packed
    tensors = read_bminf1(given.path / case / "checkpoint.pt")
    theirs = "layers.0" if name == "cpm1" else "enc_layers.0"
    width = codes.in_features
    stored = tensors[f"{theirs}.ff.linear_out.weight"].read()
    assert torch.equal(codes.qweight[:, :width], stored)
    assert torch.equal(codes.scale, tensors[f"{theirs}.ff.linear_out.scale"].read().float())
