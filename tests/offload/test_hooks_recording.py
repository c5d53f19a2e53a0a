"""Whatever records operations: of a streamed model it would record the slots, so it is refused."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from streaming import Stack, make_stack, stream
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import bminf
from bminf.errors import UnsupportedModelError

X = torch.randn(3, 16)


def traced(model: torch.nn.Module) -> Any:
    return torch.jit.trace(model, (X,), check_trace=False)


def legacy_onnx(model: torch.nn.Module) -> Any:
    is_cached = torch.is_autocast_cache_enabled()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(model, (X,), io.BytesIO(), dynamo=False)
    finally:  # an export that fails leaves it off
        torch.set_autocast_cache_enabled(is_cached)


RECORDERS: dict[str, Callable[[torch.nn.Module], Any]] = {
    "jit.trace": traced,
    "onnx": legacy_onnx,
    "make_fx": lambda model: make_fx(lambda x: model(x))(X),
    "make_fx of fakes": lambda model: make_fx(lambda x: model(x), tracing_mode="fake")(X),
    "fx": torch.fx.symbolic_trace,
    "jit.script": torch.jit.script,
    "export": lambda model: torch.export.export(model, (X,)),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("quantization", [False, "int8"])
@pytest.mark.parametrize("how", RECORDERS)
def test_a_streamed_model_is_not_recorded(how: str, quantization: Any) -> None:
    model = stream(make_stack().requires_grad_(False), quantization=quantization)
    expected = model(X)
    words = "exported" if how == "export" else "cannot record"
    with pytest.raises(UnsupportedModelError, match=rf"{words}.*bminf\.unwrap"):
        RECORDERS[how](model)
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize("part", ["layers.2", "layers"])
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_nor_is_a_model_around_a_part_of_it(part: str) -> None:
    model = stream(make_stack().requires_grad_(False))
    inner = model.get_submodule(part)
    around = torch.nn.Sequential(*(inner if part == "layers" else [inner]))
    with pytest.raises(UnsupportedModelError, match="cannot record"):
        traced(around)


@pytest.mark.parametrize("is_new", [True, False])
def test_compiling_to_one_graph_says_why_not(is_new: bool) -> None:
    model = stream(make_stack().requires_grad_(False))
    if not is_new:
        model(X)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"bminf: .*streamed blocks"):
        compiled(X)
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("how", ["jit.trace", "make_fx", "export"])
def test_a_packed_model_that_fits_is_recorded_as_it_is(how: str) -> None:
    """At another number of rows, too, where the product goes another way."""
    model = bminf.wrapper(make_stack(), memory_limit="1GB", device="cpu").requires_grad_(False)
    recorded = RECORDERS[how](model)
    recorded = recorded.module() if how == "export" else recorded
    x = X if how == "export" else torch.randn(40, 16)
    assert torch.equal(recorded(x), model(x))


@pytest.mark.parametrize("record", [torch.jit.script, torch.fx.symbolic_trace])
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_what_cannot_look_into_a_packed_linear_says_so(record: Any) -> None:
    model = bminf.wrapper(make_stack(), memory_limit="1GB", device="cpu")
    with pytest.raises(UnsupportedModelError, match=r"packed linear; use"):
        record(model)


def test_afterwards_it_is_recorded_again() -> None:
    model: Stack = bminf.unwrap(stream(make_stack().requires_grad_(False)))
    assert torch.equal(make_fx(lambda x: model(x))(X)(X), model(X))


def test_fake_tensors_and_transforms_that_keep_weights_are_refused() -> None:
    model, x = stream(make_stack()), torch.randn(2, 16)
    expected = model(x)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        with pytest.raises(UnsupportedModelError, match="FakeTensorMode"):
            model(mode.from_tensor(x))
    for gradients in (torch.func.jacrev(model), torch.func.grad(lambda x: model(x).sum())):
        with pytest.raises(UnsupportedModelError, match=r"torch\.func .*jacfwd"):
            gradients(x[0])
    assert torch.equal(model(x), expected)
