"""Which linears quantization packs, and what is said of those that stay."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import accelerate
import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from streaming import Stack, make_stack, stream
from tiny_models import inputs_of, make, output_of
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

import bminf
from bminf.layers.quantize import computes_as_linear, is_linear, why_not_quantizable
from bminf.quantization.packed import INT4, INT8
from bminf.units import format_bytes
from bminf.wrapping import plan_for


def is_quantizable(module: torch.nn.Module) -> bool:
    return is_linear(module) and why_not_quantizable(module) is None


class Multiplied(torch.nn.Linear):
    """The same product, written out."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Renamed(torch.nn.Linear):
    """Another name, nothing else."""


class Scaled(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, 2 * self.weight, self.bias)


class Clamped(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.clamp(-100, 100), self.weight, self.bias)


class RoundedInputs(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = x.abs().amax() / 127
        return F.linear((x / scale).round() * scale, self.weight, self.bias)


class WithLora(torch.nn.Linear):
    """A second product that begins at zero, so that a look at the output tells nothing."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.lora_b = torch.nn.Parameter(torch.zeros(self.out_features, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + x.sum(-1, keepdim=True) @ self.lora_b.T


class Tuple(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x), None


SAME, OTHER = (Multiplied, Renamed), (Scaled, Clamped, RoundedInputs, WithLora, Tuple)


def with_linears(kind: type, bias: bool = True) -> type:
    class Block(torch.nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.plain = torch.nn.Linear(width, width)
            self.other = kind(width, width, bias=bias)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.other(self.plain(x))
            return x + (y[0] if isinstance(y, tuple) else y)

    return Block


def packed_names(model: torch.nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, bminf.QuantizedLinear)]


def wrap(model: Any, quantization: Any = "int8", **arguments: Any) -> list[str]:
    """Wrap `model`, resident; what was said of what stays."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        bminf.wrapper(model, quantization, "1GB", device="cpu", **arguments)
    return [str(warning.message) for warning in said]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", SAME)
def test_a_subclass_that_computes_the_same_is_packed(kind: type, bias: bool) -> None:
    model = make_stack(block=with_linears(kind, bias))
    x = torch.randn(4, 16)
    expected = model(x)
    assert wrap(model) == []
    assert len(packed_names(model)) == 14
    assert (model(x) - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("wanted", [None, lambda name, module: "other" in name])
@pytest.mark.parametrize("kind", OTHER)
def test_any_other_subclass_stays_and_is_named(kind: type, wanted: Any) -> None:
    model = make_stack(block=with_linears(kind))
    others = [layer.other for layer in model.layers]
    (said,) = wrap(model, quantize=wanted)
    assert kind.__name__ in said and "layers.0.other" in said and "7 linears" in said
    assert [layer.other for layer in model.layers] == others
    assert len(packed_names(model)) == (7 if wanted is None else 0)


def test_the_probe_leaves_the_module_and_the_random_numbers_alone() -> None:
    calls = []
    linear = Multiplied(6, 4)
    linear.register_forward_hook(lambda *_: calls.append(1))
    before, state = copy.deepcopy(linear.state_dict()), torch.get_rng_state()
    assert computes_as_linear(linear)
    assert calls == [] and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in linear.state_dict().items())
    assert computes_as_linear(Multiplied(6, 4, device="meta"))


def test_what_only_its_parent_reads_stays() -> None:
    """torch.nn.MultiheadAttention never calls its output projection."""
    assert not is_quantizable(NonDynamicallyQuantizableLinear(4, 4))
    for linear in (torch.nn.Linear(4, 4), Conv1D(4, 4)):
        assert is_quantizable(linear)
        linear.forward = lambda x: x
        assert not is_quantizable(linear)


def test_hooks_and_attributes_of_a_linear_go_along() -> None:
    model, seen = make_stack(), []
    up = model.layers[0].up
    handle = up.register_forward_hook(lambda *_: seen.append("after"))
    up.register_forward_pre_hook(lambda *_: seen.append("before"))
    up.tag = "mine"
    wrap(model)
    model(torch.randn(2, 16))
    assert seen == ["before", "after"] and model.layers[0].up.tag == "mine"
    handle.remove()
    model(torch.randn(2, 16))
    assert seen == ["before", "after", "before"]


def test_a_packed_linear_is_a_linear_and_is_not_packed_again() -> None:
    packed = bminf.QuantizedLinear(torch.nn.Linear(8, 4))
    assert isinstance(packed, torch.nn.Linear) and not is_quantizable(packed)
    assert (packed.in_features, packed.out_features) == (8, 4)
    with pytest.raises(bminf.errors.ArgumentError, match="not QuantizedLinear"):
        bminf.QuantizedLinear(packed)
    with pytest.raises(bminf.errors.UnsupportedModelError, match="merge adapters, before"):
        packed.weight = torch.nn.Parameter(torch.zeros(4, 8))
    packed.weight = packed.weight  # what adapters do that are taken off
    with pytest.raises(bminf.errors.UnsupportedModelError, match="frozen"):
        packed.reset_parameters()
    assert packed.qweight is packed.packed.qweight


def test_its_output_may_be_written_to() -> None:
    """As that of a linear: models add to it in place, with gradients on."""
    packed = bminf.QuantizedLinear(torch.nn.Linear(8, 4))
    for shape in [(8,), (2, 8), (2, 3, 8)]:
        x = torch.randn(shape, requires_grad=True)
        y = packed(x)
        y += 1
        y.sum().backward()
        assert x.grad is not None and y.shape == (*shape[:-1], 4)


class Narrow(torch.nn.Module):
    """A linear of one column, one of few, one of an odd number, and an ordinary one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        for columns in (1, 8, 17):
            self.add_module(f"of{columns}", torch.nn.Linear(columns, width))
        self.up = torch.nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = torch.cat([x, x], -1)
        return self.up(x) + self.of1(x[..., :1]) + self.of8(x[..., :8]) + self.of17(wide[..., :17])


def test_narrow_linears_stay_in_4_bits_and_are_said_once() -> None:
    model = make_stack(block=Narrow)
    (said,) = wrap(model, "int4")
    nbytes = 7 * 4 * (16 * (1 + 8 + 17) + 3 * 16)
    assert f"{nbytes / 1024:.1f} KiB in 21 linears with an odd number of columns" in said
    assert packed_names(model) == [f"layers.{i}.up" for i in range(7)]
    assert wrap(make_stack(block=Narrow), "int8") == []


def test_where_all_are_narrow_the_format_was_meant_so() -> None:
    model = make_stack()
    form = bminf.Format(4, group_size=64)
    assert wrap(model, form) == [] and len(packed_names(model)) == 14
    assert model.layers[0].up.form == form


def test_a_narrow_linear_that_was_chosen_is_packed_where_it_can_be() -> None:
    model = make_stack(block=Narrow)
    (said,) = wrap(model, "int4", quantize=lambda name, module: name.startswith("layers.0"))
    assert packed_names(model) == ["layers.0.of8", "layers.0.up"]
    assert "2 linears with an odd number" in said


def test_what_is_trained_beside_frozen_linears_stays() -> None:
    model = make_stack().requires_grad_(False)
    model.layers[2].up.requires_grad_(True)
    (said,) = wrap(model)
    assert "1 linear trained beside frozen ones, or part of an adapter (layers.2.up)" in said
    assert len(packed_names(model)) == 13 and model.layers[2].up.weight.requires_grad
    model = make_stack().requires_grad_(False)
    model.layers[2].up.requires_grad_(True)
    assert wrap(model, quantize=lambda name, module: "layers.2" in name) == []
    assert packed_names(model) == ["layers.2.up", "layers.2.down"]  # somebody chose it


class Codebooks(Stack):
    """Several output heads, in a list, as models of audio have them."""

    def __init__(self, as_method: bool) -> None:
        super().__init__()
        name = "projections" if as_method else "code_heads"
        self.add_module(name, torch.nn.ModuleList(torch.nn.Linear(16, 96) for _ in range(4)))
        if as_method:
            self.get_output_embeddings = lambda: list(self.projections)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        heads = self.projections if hasattr(self, "projections") else self.code_heads
        return torch.cat([head(x) for head in heads], -1)


@pytest.mark.parametrize("as_method", [True, False])
def test_several_output_heads_are_treated_like_one(as_method: bool) -> None:
    torch.manual_seed(0)
    model = Codebooks(as_method).eval()
    assert wrap(model) == []
    assert all(".up" in name or ".down" in name for name in packed_names(model))
    assert len(packed_names(model)) == 14
    model = Codebooks(as_method).eval()
    assert wrap(model, "int4") == []
    heads = model.projections if as_method else model.code_heads
    assert [head.form for head in heads] == [INT8] * 4


def test_wrapping_again_says_nothing() -> None:
    model = make_stack(block=with_linears(Scaled))
    assert len(wrap(model)) == 1
    bminf.unwrap(model)
    assert wrap(model) == [] and len(packed_names(model)) == 7


class Around(torch.nn.Linear):
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * super().__call__(x)  # type: ignore[no-any-return]


class Extended(torch.nn.Linear):
    factor = 2

    def doubled(self, x: torch.Tensor) -> torch.Tensor:
        return self(x) * self.factor  # type: ignore[no-any-return]

    @property
    def norm(self) -> torch.Tensor:
        return self.weight.norm()


def test_what_is_around_a_forward_keeps_a_linear_as_it_is() -> None:
    assert not is_quantizable(Around(16, 4)) and is_quantizable(Extended(16, 4))


def test_a_packed_linear_has_the_methods_of_the_class_it_was() -> None:
    packed, x = bminf.QuantizedLinear(Extended(16, 4)), torch.randn(2, 16)
    assert torch.equal(packed.doubled(x), 2 * packed(x))
    assert torch.equal(packed.norm, packed.dequantize().norm())
    with pytest.raises(AttributeError, match="trebled"):
        packed.trebled(x)


def test_hooks_of_accelerate_go_along() -> None:
    class Noted(ModelHook):
        def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            seen.append(type(module).__name__)
            return args, kwargs

    seen: list[str] = []
    for is_removed in (False, True):
        model = make_stack()
        add_hook_to_module(model.layers[1].up, Noted())
        if is_removed:
            remove_hook_from_module(model, recurse=True)
        bminf.wrapper(model, device="cpu")
        assert type(model.layers[1].up) is bminf.QuantizedLinear
        model(torch.randn(2, 16))
    assert seen == ["QuantizedLinear"]


def test_a_packed_model_can_be_offloaded_by_accelerate() -> None:
    x = torch.randn(2, 16)
    model = bminf.unwrap(bminf.wrapper(make_stack(), device="cpu"))
    expected = model(x)
    assert model.get_buffer("layers.0.up.qweight").dtype == torch.int8
    accelerate.cpu_offload(model, execution_device="cpu")
    assert torch.equal(model(x), expected)


def test_other_reasons_to_stay_are_named() -> None:
    model = make_stack()
    model.layers[1].up.double()
    model.layers[2].up.forward = lambda x: x
    with pytest.warns(UserWarning, match=r"of the dtype torch\.float64.*whose forward was repl"):
        bminf.wrapper(model, device="cpu")


def test_the_output_head_stays_as_it_is_even_as_a_block() -> None:
    model = make("llama")
    stream(model, quantization=True, blocks=["model.layers", "lm_head"])
    assert type(model.lm_head) is torch.nn.Linear
    assert isinstance(model.model.layers[3].mlp.up_proj, bminf.QuantizedLinear)


@pytest.mark.parametrize("norm", [torch.nn.utils.weight_norm, torch.nn.utils.spectral_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning")
def test_linears_whose_weight_is_computed_by_a_hook_stay(norm: Any) -> None:
    def normed() -> Stack:
        model = make_stack()
        for layer in model.layers:
            norm(layer.up)
        return model.eval()

    model, x = normed(), torch.randn(3, 16)
    stream(model, quantization=True)
    assert type(model.layers[3].up) is torch.nn.Linear
    assert isinstance(model.layers[3].down, bminf.QuantizedLinear)
    expected = bminf.wrapper(normed(), memory_limit="1GB", device="cpu")(x)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("form", ["int4", bminf.Format(4, 32, scale_bits=8)])
@pytest.mark.parametrize("name", ["llama", "gpt2"])  # which is tied
def test_in_4_bits_the_output_head_is_packed_in_8(name: str, form: Any) -> None:
    model, given = make(name), inputs_of(name)
    embedding = model.get_input_embeddings().weight.detach().clone()
    expected = output_of(model, given)
    wrap(model, form)
    assert model.get_output_embeddings().form == INT8
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    head = model.get_output_embeddings()
    inputs = torch.randn(4, 32)
    weight = embedding if name == "gpt2" else make(name).lm_head.weight
    error = (head(inputs) - inputs @ weight.T).norm() / (inputs @ weight.T).norm()
    assert error < 0.02  # 8 bits, a scale a row
    if name == "gpt2":
        with pytest.raises(bminf.errors.UnsupportedModelError, match="cannot be set"):
            model.tie_weights()
    assert (output_of(model, given) - expected).norm() < 0.3 * expected.norm()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_in_8_bits_the_output_head_stays_unless_it_is_chosen(name: str) -> None:
    model = make(name)
    wrap(model, "int8")
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (name == "gpt2") and "lm_head" not in packed_names(model)
    model, embedding = make(name), make(name).get_input_embeddings().weight
    assert wrap(model, "int8", quantize=lambda n, _: n == "lm_head") == []
    assert packed_names(model) == ["lm_head"]
    assert torch.equal(model.get_input_embeddings().weight, embedding)


def test_a_head_that_is_trained_beside_frozen_weights_stays() -> None:
    model = make("llama").requires_grad_(False)
    model.lm_head.requires_grad_(True)
    (said,) = wrap(model, "int4")
    assert "1 linear trained beside frozen ones" in said and "lm_head" in said
    assert "lm_head" not in packed_names(model)


def test_quantize_may_say_how() -> None:
    model, in_groups = make("llama"), bminf.Format(4, 32, scale_bits=8)

    def wanted(name: str, module: torch.nn.Module) -> Any:
        return {"up_proj": True, "down_proj": "int8", "gate_proj": in_groups}.get(
            name.rpartition(".")[2], False
        )

    wrap(model, "int4", quantize=wanted)
    mlp = model.model.layers[2].mlp
    assert [mlp.up_proj.form, mlp.down_proj.form, mlp.gate_proj.form] == [INT4, INT8, in_groups]
    assert type(model.lm_head) is torch.nn.Linear and len(packed_names(model)) == 3 * 7
    with pytest.raises(bminf.errors.ArgumentError, match="quantize='int5'; accepted"):
        wrap(make("llama"), "int4", quantize=lambda *_: "int5")


def test_a_chosen_linear_whose_weight_another_reads_stays_and_is_said() -> None:
    model = make_stack(width=16)
    model.head = torch.nn.Linear(16, 32)
    model.head.weight = model.layers[2].up.weight
    (said,) = wrap(model, quantize=lambda name, _: name == "head" or "layers.2" in name)
    assert "2 linears whose weight other modules share (layers.2.up, head)" in said
    assert packed_names(model) == ["layers.2.down"]


def test_quantize_chooses_the_linears() -> None:
    offered = {}

    def wanted(name: str, module: torch.nn.Module) -> bool:
        offered[name] = module
        return name == "lm_head" or name.endswith("layers.3.mlp.up_proj")

    model = make("llama")
    arguments = {"quantization": "int4", "quantize": wanted}
    limit = plan_for(model, **arguments).total_bytes
    bminf.wrapper(model, memory_limit=limit, device="cpu", **arguments)
    assert packed_names(model) == ["model.layers.3.mlp.up_proj", "lm_head"]
    assert len(offered) == 7 * 7 + 1 and all(type(m) is torch.nn.Linear for m in offered.values())
    assert not bminf.plan_of(model).streamed


def test_a_chosen_head_is_packed_in_a_streamed_model_too() -> None:
    everything = {"quantization": "int8", "quantize": lambda name, module: True}
    given = inputs_of("llama")
    resident = bminf.wrapper(make("llama"), memory_limit="1GB", device="cpu", **everything)
    model = stream(make("llama"), **everything)
    assert isinstance(model.lm_head, bminf.QuantizedLinear)
    assert torch.equal(output_of(model, given), output_of(resident, given))


class Stacked(torch.nn.Module):
    """Experts of a class that nobody knows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = torch.nn.Linear(width, width)
        self.matrices = torch.nn.Parameter(torch.randn(3, width, width))


def test_stacked_experts_of_an_unknown_class_stay_and_are_said() -> None:
    model = make_stack(block=Stacked)
    nbytes = format_bytes(sum(p.nbytes for p in model.parameters() if p.dim() == 3))
    (said,) = wrap(model, "int4")
    assert f"{nbytes} in the blocks of Stack are not" in said and said.endswith("Stacked")


def test_experts_whose_rows_are_too_narrow_stay_and_are_said() -> None:
    model = make("qwen3_moe")  # 32 and 24 columns
    nbytes = format_bytes(sum(p.nbytes for p in model.parameters() if p.dim() == 3))
    (said,) = wrap(model, bminf.Format(4, group_size=32))
    assert f"{nbytes} in 7 modules of experts with an odd number of columns, or fewer" in said


class Convolved(torch.nn.Module):
    """Three dimensions as well, but no stacked experts."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = torch.nn.Linear(width, width)
        self.across = torch.nn.Conv1d(width, width, 3, padding=1)


class Scale(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.randn(width))


def test_convolutions_stay_without_a_word_and_nothing_to_pack_is_said() -> None:
    model = make_stack(block=Convolved)
    assert wrap(model) == [] and packed_names(model) == [f"layers.{i}.up" for i in range(7)]
    (said,) = wrap(make_stack(block=Scale))
    assert "nothing in the blocks of Stack could be quantized" in said
