"""What wrapper() refuses, and that the model is then as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from streaming import Residual, Stack, least_limit, make_stack, stream

import bminf
from bminf.errors import (
    ArgumentError,
    BMInfError,
    BudgetError,
    OffloadError,
    UnknownKeywordError,
    UnsupportedModelError,
)
from bminf.wrapping import plan_for


def snapshot(model: torch.nn.Module) -> list[Any]:
    """Everything wrapper() could change: classes, tensors with their addresses, attributes."""
    return [
        (name, type(module), sorted(module.__dict__), module.training)
        for name, module in model.named_modules()
    ] + [
        (name, id(tensor), tensor.layout == torch.strided and tensor.data_ptr())
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    ]


class Sparse(Residual):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.register_buffer("graph", torch.eye(width).to_sparse())


class Subclass(Residual):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        kind = type("Packed4bit", (torch.nn.Parameter,), {})
        self.up.weight = kind(self.up.weight.detach())


def lazy_stack() -> Stack:
    model = make_stack()
    model.layers[3].up = torch.nn.LazyLinear(32)
    return model


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"memory_limit": 3000}, BudgetError, "raise memory_limit"),
        ({"memory_limit": -1}, ArgumentError, "memory_limit=-1"),
        ({"memory_limit": "6 elephants"}, ArgumentError, "unknown unit 'elephants'"),
        ({"memory_limit": [6]}, ArgumentError, "list"),
        ({"reserve": "-3MB"}, ArgumentError, "reserve='-3MB'"),
        ({"memory_limt": "6GB"}, UnknownKeywordError, "did you mean 'memory_limit'"),
        ({"quantization": "int5"}, ArgumentError, "accepted: True or"),
        ({"quantization": 4}, ArgumentError, '"int8", "int4"'),
        ({"quantize": "all"}, ArgumentError, "quantize='all'; give a function"),
        ({"quantize": lambda name, module: True}, ArgumentError, "quantize= chooses"),
        ({"device": "gpu"}, ArgumentError, "accepted"),
        ({"device": "meta"}, ArgumentError, "accepted"),
        ({"device": "cuda:99"}, ArgumentError, "GPUs"),
        ({"blocks": ["layers.70"]}, ArgumentError, "layers.70"),
        ({"blocks": ["layers.1", "layers.1.up"]}, ArgumentError, "inside"),
        ({"uses": {"layer": 3}}, ArgumentError, "layer"),
        ({"uses": {"layers": 0}}, ArgumentError, "layers"),
        ({"uses": [3]}, ArgumentError, "mapping"),
        ({"offload_dir": "/no/such/folder"}, OffloadError, "/no/such/folder"),
        ({"offload_dir": "/proc/self"}, OffloadError, "offload_dir"),
    ],
)
def test_bad_arguments_leave_the_model_unchanged(
    arguments: dict[str, Any], error: type[BMInfError], said: str, tmp_path: Path
) -> None:
    model = make_stack()
    before = snapshot(model)
    settings = {
        "quantization": False,
        "memory_limit": least_limit(model),
        "device": "cpu",
        "offload_dir": tmp_path,
        **arguments,
    }
    with pytest.raises(error, match=said):
        bminf.wrapper(model, **settings)
    assert snapshot(model) == before
    assert list(tmp_path.iterdir()) == []


def test_a_limit_too_small_names_both_numbers() -> None:
    model = make_stack()
    with pytest.raises(BudgetError, match=r"2\.9 KiB.*\d\.\d KiB"):
        bminf.wrapper(model, False, 3000, device="cpu")
    whole = plan_for(model, quantization=False)
    least = whole.outside_bytes + 2 * whole.blocks[0].nbytes
    with pytest.raises(BudgetError):
        plan_for(model, False, least - 1)
    assert plan_for(model, False, least).total_bytes == least


@pytest.mark.parametrize(
    ("make_model", "error", "said"),
    [
        (lambda: make_stack().to("meta"), UnsupportedModelError, "meta device"),
        (lambda: make_stack(block=Sparse), UnsupportedModelError, "'layers.0.graph' is.*sparse"),
        (lambda: make_stack(block=Subclass), UnsupportedModelError, "Packed4bit"),
        (lazy_stack, UnsupportedModelError, "not initialised"),
        (lambda: torch.jit.script(make_stack()), UnsupportedModelError, "TorchScript"),
        (lambda: [torch.nn.Linear(3, 3)], ArgumentError, "list; give a torch.nn.Module"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_models_that_cannot_be_wrapped_are_refused(
    make_model: Any, error: type[BMInfError], said: str
) -> None:
    model = make_model()
    before = snapshot(model) if isinstance(model, Stack) and said != "not initialised" else None
    with pytest.raises(error, match=said):
        bminf.wrapper(model, quantization=False, memory_limit="1GB", device="cpu")
    assert before is None or snapshot(model) == before


def test_wrapping_twice_is_refused() -> None:
    model, x = make_stack(), torch.randn(3, 16)
    expected = model(x)
    stream(model)
    outer = torch.nn.Sequential(model)
    for again in (model, outer, model.layers, model.layers[5]):
        with pytest.raises(UnsupportedModelError, match="wrapped already"):
            bminf.wrapper(again, memory_limit="1GB", device="cpu")
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize(
    "call",
    [bminf.plan_for, bminf.plan_of, bminf.stats_of, bminf.unwrap, bminf.TransformerBlockList],
)
def test_every_function_names_the_keyword_that_was_meant(call: Any) -> None:
    with pytest.raises(UnknownKeywordError, match=r"has no keyword 'modle'.*accepted: "):
        call(modle=make_stack())


def test_what_is_no_model_is_refused() -> None:
    for call in (bminf.plan_for, bminf.plan_of, bminf.stats_of, bminf.unwrap):
        with pytest.raises(ArgumentError, match=r"model is a str; give a torch\.nn\.Module"):
            call("model")
    for layers, words in (("ab", "a str that holds a str"), (5, "a int"), ([5], "holds a int")):
        with pytest.raises(ArgumentError, match=rf"layers is .*{words}; give a list"):
            bminf.TransformerBlockList(layers)  # type: ignore[arg-type]
