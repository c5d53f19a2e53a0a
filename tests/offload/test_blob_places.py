"""A module that stands in several places is one block, used once in each of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from streaming import Residual, Stack, make_stack, stream

import bminf
from bminf.layers.quantized_linear import QuantizedLinear
from bminf.offload.blocks import find_blocks
from bminf.offload.predict import predict
from bminf.wrapping import plan_for


class Chain(torch.nn.Module):
    """Two lists of blocks that run one after another; `first` is another name of one of them."""

    def __init__(self, before: list[torch.nn.Module], after: list[torch.nn.Module]) -> None:
        super().__init__()
        self.first = before[0]
        self.before, self.after = torch.nn.ModuleList(before), torch.nn.ModuleList(after)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in [*self.before, *self.after]:
            x = block(x)
        return x


def residuals(count: int) -> list[torch.nn.Module]:
    torch.manual_seed(0)
    return [Residual(16) for _ in range(count)]


def looped() -> torch.nn.Module:
    blocks = residuals(4)
    return torch.nn.Sequential(*blocks, *blocks).eval()


def in_two_lists() -> torch.nn.Module:
    blocks = residuals(4)
    return Chain(blocks, blocks[::-1]).eval()


def linears() -> torch.nn.Module:
    torch.manual_seed(0)
    blocks = [torch.nn.Linear(16, 16) for _ in range(4)]
    return Chain(blocks, blocks).eval()


def some_twice() -> torch.nn.Module:
    blocks = residuals(6)
    return torch.nn.Sequential(*blocks, *blocks[2:4]).eval()


MODELS = {"looped": looped, "two lists": in_two_lists, "linears": linears, "some": some_twice}


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("quantization", [False, True, "int4"])
def test_it_is_streamed_and_packed_with_the_same_output(case: str, quantization: bool) -> None:
    x = torch.randn(3, 16)
    resident = bminf.wrapper(MODELS[case](), quantization, memory_limit="1GB", device="cpu")
    streaming = stream(MODELS[case](), quantization=quantization)
    for _ in range(3):
        assert torch.equal(streaming(x), resident(x))
    assert bminf.plan_of(streaming).outside_bytes == 0
    packed = [m for m in streaming.modules() if isinstance(m, QuantizedLinear)]
    plain = [m for m in streaming.modules() if type(m) is torch.nn.Linear]
    assert not (plain if quantization else packed)
    bminf.unwrap(streaming)
    assert torch.equal(streaming(x), resident(x))


@pytest.mark.parametrize(
    ("make_model", "uses"),
    [
        (looped, {"0": 256, "1": 256, "2": 256, "3": 256}),
        (in_two_lists, {f"before.{at}": 256 for at in range(4)}),
        (some_twice, {"0": 128, "1": 128, "2": 256, "3": 256, "4": 128, "5": 128}),
        (lambda: make_stack(num_blocks=2), {"layers.0": 128, "layers.1": 128}),
    ],
)
def test_it_is_used_once_in_each_place_of_a_list(
    make_model: Callable[[], torch.nn.Module], uses: dict[str, int]
) -> None:
    plan = plan_for(make_model(), quantization=False)
    assert dict(plan.uses) == uses
    assert len(plan.blocks) == len(uses) and plan.outside_bytes < 500


def test_another_name_of_it_is_the_same_block() -> None:
    assert [b.name for b in find_blocks(looped(), ["1", "5", "2"])] == ["1", "2"]


def test_a_stage_that_stands_twice_counts_for_its_layers() -> None:
    stage = torch.nn.Sequential(*residuals(5))
    plan = plan_for(torch.nn.Sequential(stage, torch.nn.Sequential(*residuals(2)), stage), False)
    assert {plan.uses[f"0.{at}"] for at in range(5)} == {256} and plan.uses["1.0"] == 128


def test_a_part_of_two_blocks_stays_outside_and_is_packed_once() -> None:
    def make_model() -> Stack:
        model = make_stack(num_blocks=4)
        model.layers[2].up = model.layers[0].up
        return model

    x, alone = torch.randn(2, 16), plan_for(make_stack(num_blocks=4), False)
    part_bytes = sum(t.nbytes for t in make_model().layers[0].up.state_dict().values())
    added_bytes = plan_for(make_model(), False).outside_bytes - alone.outside_bytes
    assert part_bytes <= added_bytes < part_bytes + 512
    whole = plan_for(make_model())
    assert whole.outside_bytes < alone.blocks[0].nbytes
    model = bminf.wrapper(make_model(), memory_limit=whole.total_bytes, device="cpu")
    assert isinstance(model.layers[0].up, QuantizedLinear)
    assert model.layers[0].up is model.layers[2].up
    assert torch.equal(stream(make_model(), quantization=True)(x), model(x))


def test_a_part_that_stands_twice_in_its_block_is_no_tensor_set_anew(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def make_model() -> Stack:
        model = make_stack(num_blocks=4)
        for layer in model.layers:
            layer.again = layer.up
        return model

    x = torch.randn(2, 16)
    assert torch.equal(stream(make_model())(x), make_model()(x))
    assert not caplog.records


def test_the_time_of_a_token_counts_it_twice() -> None:
    once, twice = plan_for(torch.nn.Sequential(*residuals(4)), False), plan_for(looped(), False)
    assert predict(twice, 1e9, 1e9).pass_s == pytest.approx(2 * predict(once, 1e9, 1e9).pass_s)
    least = 2 * twice.blocks[0].nbytes
    streaming = predict(plan_for(looped(), False, least), 1e9, 1e12)
    assert streaming.pass_s == pytest.approx(2 * twice.total_bytes / 1e9, rel=0.01)
