"""Blocks of models that are built in stages, each of which holds a list of layers itself."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import transformers as tf
from streaming import Residual, make_stack, stream

import bminf
from bminf.offload.blocks import find_blocks
from bminf.wrapping import plan_for


class Stage(torch.nn.Module):
    """Layers, a part beside them, a parameter of its own."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.randn(width))
        self.norm = torch.nn.LayerNorm(width, elementwise_affine=False)
        self.layers = torch.nn.ModuleList([Residual(width) for _ in range(depth)])
        self.after = torch.nn.ModuleList([torch.nn.Linear(width, width)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x) * self.scale
        for layer in self.layers:
            x = layer(x)
        return self.after[0](x)


class Staged(torch.nn.Module):
    def __init__(self, depths: Sequence[int], width: int = 16) -> None:
        super().__init__()
        self.stages = torch.nn.ModuleList([Stage(width, depth) for depth in depths])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for stage in self.stages:
            x = stage(x)
        return x


def make_staged(depths: Sequence[int]) -> Staged:
    torch.manual_seed(0)
    return Staged(depths).eval()


def names(model: torch.nn.Module, wanted: list[str] | None = None) -> list[str]:
    return [block.name for block in find_blocks(model, wanted)]


def test_a_large_stage_is_cut_into_its_layers_and_what_is_beside_them() -> None:
    model = make_staged([1, 1, 14])
    cut = [f"stages.2.layers.{at}" for at in range(14)]
    assert names(model) == ["stages.0", "stages.1", *cut, "stages.2.after.0"]
    assert {block.list_name for block in find_blocks(model)} == {"stages"}


def test_a_stage_of_an_eighth_is_left_whole() -> None:
    assert names(make_staged([2] * 8)) == [f"stages.{at}" for at in range(8)]
    assert "stages.0.layers.0" in names(make_staged([2] * 7))


class InDict(torch.nn.Module):
    """Layers in a ModuleDict, which is never called, under the keys that are given."""

    def __init__(self, keys: Sequence[str]) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleDict({key: Residual(16) for key in keys})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return x


@pytest.mark.parametrize("keys", ["012345", "abcdef"])
def test_layers_in_a_dict_are_blocks(keys: str) -> None:
    torch.manual_seed(0)
    model, x = InDict(keys).eval(), torch.randn(2, 16)
    assert names(model) == [f"layers.{key}" for key in keys]
    expected = model(x)
    assert torch.equal(stream(model)(x), expected)
    in_stages = torch.nn.Sequential(InDict(keys[:2]), InDict(keys[:2]), InDict(keys))
    assert names(in_stages)[-6:] == [f"2.layers.{key}" for key in keys]


def test_towers_and_other_parts_in_a_dict_are_no_layers() -> None:
    at_each = range(len(make_stack().layers))
    towers = torch.nn.ModuleDict({key: make_stack() for key in "abc"})
    assert names(towers) == [f"{key}.layers.{at}" for key in "abc" for at in at_each]
    parts = {"wte": torch.nn.Embedding(4, 16), "wpe": torch.nn.Embedding(4, 16), "h": make_stack()}
    assert names(torch.nn.ModuleDict(parts)) == [f"h.layers.{at}" for at in at_each]
    heads = torch.nn.ModuleDict({"a": Residual(16), "b": Residual(16)})
    assert names(torch.nn.ModuleDict({"h": make_stack(), "heads": heads})) == [
        f"h.layers.{at}" for at in at_each
    ]


def test_names_that_are_given_win() -> None:
    assert names(make_staged([2, 9]), ["stages"]) == ["stages.0", "stages.1"]


def test_stages_in_stages_are_cut_as_long_as_they_are_large() -> None:
    model = torch.nn.Sequential(make_staged([1, 18]), make_staged([1]))
    cut = [f"0.stages.1.layers.{at}" for at in range(18)]
    assert names(model) == ["0.stages.0", *cut, "0.stages.1.after.0", "1"]


def test_a_pair_of_linears_is_no_list_of_layers() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.LayerNorm(8)
            self.mlp = torch.nn.Sequential(
                torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8)
            )

    model = torch.nn.ModuleList([Layer() for _ in range(4)])
    assert names(model) == ["0", "1", "2", "3"]


def test_convolutions_in_a_row_are_layers() -> None:
    def stage(depth: int) -> torch.nn.Sequential:
        return torch.nn.Sequential(*(torch.nn.Conv2d(4, 4, 3, padding=1) for _ in range(depth)))

    model = torch.nn.Sequential(stage(2), stage(3), stage(20))
    assert names(model)[-20:] == [f"2.{at}" for at in range(20)]


def test_the_blocks_do_not_depend_on_limit_or_quantization() -> None:
    model = make_staged([1, 12])
    whole = plan_for(model)
    for limit in (whole.total_bytes // 2, whole.total_bytes):
        for quantization in (False, "int4"):
            plan = plan_for(model, quantization, 2 * limit)
            assert [b.name for b in plan.blocks] == [b.name for b in whole.blocks]


@pytest.mark.parametrize("quantization", [False, True])
def test_stages_stream_bit_for_bit(quantization: bool) -> None:
    model, twin, x = make_staged([1, 2, 9]), make_staged([1, 2, 9]), torch.randn(2, 16)
    stream(model, quantization=quantization)
    bminf.wrapper(twin, quantization, memory_limit="1GB", device="cpu")
    assert torch.equal(model(x), twin(x)) and torch.equal(model(x), twin(x))
    whole = plan_for(make_staged([1, 2, 9]), quantization=quantization)
    assert 4 * max(block.nbytes for block in whole.blocks) < whole.total_bytes


def swin() -> torch.nn.Module:
    return tf.SwinModel(
        tf.SwinConfig(
            image_size=64, patch_size=4, embed_dim=16, depths=[2, 2, 12],
            num_heads=[1, 2, 4], window_size=4,
        )
    )  # fmt: skip


def convnext() -> torch.nn.Module:
    return tf.ConvNextModel(
        tf.ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 9, 1], image_size=64)
    )


def segformer() -> torch.nn.Module:
    return tf.SegformerModel(
        tf.SegformerConfig(
            depths=[1, 1, 9, 1], hidden_sizes=[8, 16, 32, 32], num_attention_heads=[1, 2, 4, 4],
            sr_ratios=[4, 2, 1, 1],
        )
    )  # fmt: skip


@pytest.mark.parametrize("make_model", [swin, convnext, segformer])
def test_vision_models_in_stages_stream_within_half_their_bytes(make_model) -> None:
    torch.manual_seed(0)
    model, pixels = make_model().eval(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        want = model(pixels).last_hidden_state
        plan = plan_for(model, quantization=False)
        stream(model)
        assert torch.equal(model(pixels).last_hidden_state, want)
    assert 2 * max(b.nbytes for b in plan.blocks) + plan.outside_bytes < plan.total_bytes / 2


def test_experts_of_a_layer_are_blocks_only_where_layers_are_few() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = torch.nn.ModuleList([Residual(8) for _ in range(4)])

    assert names(torch.nn.ModuleList([Layer() for _ in range(8)])) == [str(n) for n in range(8)]
    assert names(torch.nn.ModuleList([Layer(), Layer()]))[:2] == ["0.experts.0", "0.experts.1"]


def test_a_part_that_layers_share_does_not_make_them_large() -> None:
    shared = make_staged([1, 9])
    for num_blocks in (5, 9):
        model = make_stack(num_blocks=num_blocks)
        for layer in model.layers[1:3]:
            layer.shared = shared
        assert names(model) == [f"layers.{at}" for at in range(num_blocks)]
