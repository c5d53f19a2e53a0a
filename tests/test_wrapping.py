"""wrapper(), plan_for(), plan_of() and stats_of() as a user meets them, on the CPU.

Files that begin with this one's name wrap models of other libraries; what streaming then does is in
tests/offload/.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from streaming import Residual, Stack, least_limit, make_stack, stream, streamed
from tiny_models import greedy, inputs_of, make

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

# The plan


@pytest.mark.parametrize("width", [16, 15])
@pytest.mark.parametrize("num_fitting", [2, 3, 6])
def test_the_plan_counts_every_byte_and_no_other(width: int, num_fitting: int) -> None:
    """Of the n blocks that fit beside the rest, n - 2 stay; alignment costs no residency."""
    model = make_stack(width=width)
    block_bytes = sum(t.nbytes for t in model.layers[0].state_dict().values())
    head_bytes = sum(t.nbytes for t in model.head.state_dict().values())
    limit = head_bytes + num_fitting * block_bytes + 1000
    assert bminf.wrapper(model, False, limit, device="cpu", reserve=1000) is model
    plan = bminf.plan_of(model)
    assert len(plan.resident) == num_fitting - 2 and len(plan.streamed) == 9 - num_fitting
    assert set(plan.resident) | set(plan.streamed) == {f"layers.{i}" for i in range(7)}
    assert plan.resident_bytes == head_bytes + (num_fitting - 2) * block_bytes
    assert plan.slot_bytes == 2 * block_bytes and plan.reserved_bytes == 1000
    assert plan.total_bytes == limit == plan.budget
    model(torch.randn(3, width))
    stats = bminf.stats_of(model)
    assert stats.bytes_copied == stats.copies * block_bytes


def test_what_fits_entirely_is_not_streamed() -> None:
    model, x = make_stack(), torch.randn(3, 16)
    expected = model(x)
    bminf.wrapper(model, quantization=False, memory_limit="1GB", device="cpu")
    plan = bminf.plan_of(model)
    assert plan.streamed == () and plan.slot_bytes == 0
    assert "forward" not in model.__dict__ and "forward" not in model.layers[0].__dict__
    assert torch.equal(model(x), expected) and bminf.stats_of(model) == bminf.Stats()
    model(x).sum().backward()  # an ordinary model still


def test_a_model_that_is_not_wrapped_has_no_plan() -> None:
    model = make_stack()
    assert bminf.plan_of(model) is None and bminf.stats_of(model) is None
    stream(model)
    bminf.unwrap(model)
    assert bminf.plan_of(model) is None and bminf.stats_of(model) is None


def test_a_plan_can_be_had_without_weights() -> None:
    with torch.device("meta"):
        empty = Stack(7, 16)
    for quantization in (True, False):
        for_empty = plan_for(empty, quantization=quantization, memory_limit="30KB")
        assert for_empty == plan_for(make_stack(), quantization=quantization, memory_limit="30KB")
    with torch.device("meta"):
        tied = type(make("gpt2"))(make("gpt2").config)
    assert plan_for(tied).outside_bytes == plan_for(make("gpt2")).outside_bytes


def test_encoder_and_decoder_share_the_slots_and_the_limit() -> None:
    model, given = make("bart"), inputs_of("bart")
    expected = greedy(model, given)
    stream(model)
    plan = bminf.plan_of(model)
    lists = {b.list_name for b in plan.blocks if b.name in plan.streamed}
    assert lists == {"model.encoder.layers", "model.decoder.layers"}
    assert plan.slot_bytes == 2 * max(b.nbytes for b in plan.blocks if b.name in plan.streamed)
    uses = {b.list_name: plan.uses[b.name] for b in plan.blocks}
    assert uses == {"model.encoder.layers": 1, "model.decoder.layers": 128}
    for _ in range(2):
        assert torch.equal(greedy(model, given), expected)


# Quantization


def test_a_quantized_model_needs_less() -> None:
    limit = least_limit(make("llama")) + 4_000
    residents = []
    for quantization in (False, True, "int4"):
        model = bminf.wrapper(make("llama"), quantization, limit, device="cpu")
        residents.append(len(bminf.plan_of(model).resident))
    assert residents[1] > 2 * residents[0] and residents[2] > residents[1]


def test_a_single_linear_may_be_a_block() -> None:
    model, x = make_stack(), torch.randn(3, 16)
    names = [f"layers.{i}.{part}" for i in range(7) for part in ("up", "down")]
    expected = bminf.wrapper(make_stack(), memory_limit="1GB", device="cpu", blocks=names)(x)
    stream(model, quantization=True, blocks=names)
    assert torch.equal(model(x), expected)
    assert isinstance(model.layers[6].up, bminf.QuantizedLinear)


# What is refused, and that the model is then as it was


def snapshot(model: torch.nn.Module) -> list[Any]:
    """Everything wrapper() could change: classes, tensors with their addresses, attributes."""
    return [
        (name, type(module), sorted(module.__dict__), module.training)
        for name, module in model.named_modules()
    ] + [
        (name, id(tensor), tensor.layout == torch.strided and tensor.data_ptr())
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    ]


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"memory_limit": 3000}, BudgetError, "raise memory_limit"),
        ({"memory_limit": -1}, ArgumentError, "memory_limit=-1"),
        ({"memory_limit": "6 elephants"}, ArgumentError, "unknown unit 'elephants'"),
        ({"reserve": "-3MB"}, ArgumentError, "reserve='-3MB'"),
        ({"memory_limt": "6GB"}, UnknownKeywordError, "did you mean 'memory_limit'"),
        ({"quantization": "int5"}, ArgumentError, "accepted: True or"),
        ({"quantize": "all"}, ArgumentError, "quantize='all'; give a function"),
        ({"quantize": lambda name, module: True}, ArgumentError, "quantize= chooses"),
        ({"device": "gpu"}, ArgumentError, "accepted"),
        ({"device": "cuda:99"}, ArgumentError, "GPUs"),
        ({"blocks": ["layers.70"]}, ArgumentError, "layers.70"),
        ({"uses": {"layer": 3}}, ArgumentError, "layer"),
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


def with_scripted(place: str) -> Stack:
    model = make_stack()
    parent, _, name = place.rpartition(".")
    setattr(model.get_submodule(parent), name, torch.jit.script(model.get_submodule(place)))
    return model


@pytest.mark.parametrize(
    ("make_model", "error", "said"),
    [
        (lambda: make_stack().to("meta"), UnsupportedModelError, "meta device"),
        (lambda: make_stack(block=Sparse), UnsupportedModelError, "'layers.0.graph' is.*sparse"),
        (lambda: make_stack(block=Subclass), UnsupportedModelError, "Packed4bit"),
        (lazy_stack, UnsupportedModelError, "not initialised"),
        (lambda: torch.jit.script(make_stack()), UnsupportedModelError, "TorchScript"),
        (lambda: with_scripted("layers.3"), UnsupportedModelError, "'layers.3' is a TorchScript"),
        (lambda: with_scripted("head"), UnsupportedModelError, "'head' is a TorchScript"),
        (lambda: [torch.nn.Linear(3, 3)], ArgumentError, "list; give a torch.nn.Module"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_models_that_cannot_be_wrapped_are_refused(
    make_model: Any, error: type[BMInfError], said: str
) -> None:
    model = make_model()
    before = snapshot(model) if isinstance(model, Stack) and said != "not initialised" else None
    with pytest.raises(error, match=said):
        bminf.wrapper(model, quantization=False, memory_limit="1GB", device="cpu")
    assert before is None or snapshot(model) == before
    if said != "meta device":  # which has no values, and sizes
        with pytest.raises(error, match=said):
            bminf.plan_for(model, quantization=False, memory_limit="1GB")


def test_wrapping_twice_is_refused() -> None:
    model, x, expected = streamed()
    outer = torch.nn.Sequential(model)
    for again in (model, outer, model.layers, model.layers[5]):
        for call in (partial(bminf.wrapper, device="cpu"), bminf.plan_for):
            with pytest.raises(UnsupportedModelError, match="wrapped already"):
                call(again, memory_limit="1GB")
    assert torch.equal(model(x), expected)


# Parts that torch.jit made: those without tensors are like any other module


class Swish(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(x)


def scripted() -> torch.nn.Module:
    return torch.jit.script(Swish())


def traced() -> torch.nn.Module:
    return torch.jit.trace(Swish(), torch.randn(2, 3))


class Activated(Residual):
    def __init__(self, width: int, make: Callable[[], torch.nn.Module]) -> None:
        super().__init__(width)
        self.act = make()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.act(self.up(x)))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("make", [scripted, traced])
@pytest.mark.parametrize("quantization", [False, True])
def test_a_scripted_part_without_tensors_is_in_nobodys_way(
    make: Callable[[], torch.nn.Module], quantization: bool
) -> None:
    def made() -> torch.nn.Module:
        model = make_stack(block=lambda width: Activated(width, make))
        model.act = make()
        return model

    model, x = made(), torch.randn(3, 16)
    expected = bminf.wrapper(made(), quantization, "1GB", device="cpu")(x)
    stream(model, quantization=quantization)
    for _ in range(2):
        assert torch.equal(model(x), expected)
    bminf.unwrap(model)
    assert torch.equal(model(x), expected)
