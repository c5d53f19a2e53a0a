"""Launches of a decode step, at the real depth: kernels of bminf, and operations of torch.

Widths are small: what is launched does not depend on them. Nothing is computed, since the launcher
runs no kernel, and numbers do not matter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from counted_launches import NO_LAUNCH, CountingMode
from host_launcher import NotingLauncher, served_by

from bminf.arch.bloom import Bloom, BloomConfig
from bminf.arch.glm import GLM, GLMConfig
from bminf.arch.gpt import GPT, GPTConfig
from bminf.arch.t5 import T5, PackedT5Cache, T5Config
from bminf.cuda.launcher import fused_kernels
from bminf.layers.norm import RMSNorm
from bminf.layers.packed_cache import PackedCache, Span
from bminf.layers.quantized_linear import QuantizedLinear
from bminf.quantization.packed import INT4, INT8, Format
from tools.predict_kernels import MODELS

CPM2_LAYERS, GLM_LAYERS = 24, 70
MOST_OF_CPM2, MOST_OF_A_LAYER_OF_GLM = 420, 16
SPLIT_ATTENTION = 1  # launches that an attention has beside the counted one, with more keys
PAST = 5  # tokens in the cache


def packed(network: Any, form: Format) -> Any:
    """On the CPU in half precision, its linears packed; what they hold is of no importance."""
    network = network.half().eval().requires_grad_(False)
    for name, linear in [*network.named_modules()]:
        if isinstance(linear, torch.nn.Linear):
            parent, _, own = name.rpartition(".")
            setattr(network.get_submodule(parent), own, QuantizedLinear(linear, "float", form))
    return network.to_empty(device="cpu")


def cpm2_step(num_layers: int = CPM2_LAYERS) -> Callable[[], Any]:
    """Of its decoder and head, as the engine calls them."""
    with torch.device("meta"):
        network = packed(T5(T5Config(64, 32, 80, 4, 8, 1, num_layers)), INT8)
    cache = network.new_cache(1, 8, 8)
    span = [Span(0, PAST, 1)]
    ids = torch.zeros(1, 1, dtype=torch.int64)

    def step() -> Any:
        own, cross = (PackedCache(one.tokens, span) for one in (cache.own, cache.cross))
        return network.head(network(ids, PackedT5Cache(own, cross, 1)))

    return step


def filled(table: Any, num_rows: int, width: int) -> None:
    table.keep([torch.zeros(num_rows, width).half()], torch.float16)


def glm130b_step(num_layers: int = GLM_LAYERS) -> Callable[[], Any]:
    config = GLMConfig("glm-130b", 64, 32, num_layers, 4, 80, 64)
    with torch.device("meta"):
        network = packed(GLM(config), INT4)
    filled(network.embed_tokens, 64, 32)
    cache = network.new_cache(1, 8)
    ids, span = torch.zeros(1, 1, dtype=torch.int64), [Span(0, PAST, 1)]
    return lambda: network.head(network(ids, ids, PackedCache(cache.tokens, span), [None]))


def cpm1_step() -> Callable[[], Any]:
    with torch.device("meta"):
        network = packed(GPT(GPTConfig(64, 32, 32, 4, 80, 64)), INT8)
    cache = network.new_cache(1, 8)
    ids, span = torch.zeros(1, 1, dtype=torch.int64), [Span(0, PAST, 1)]
    return lambda: network.head(network(ids, PackedCache(cache.tokens, span)))


def bloom_step() -> Callable[[], Any]:
    with torch.device("meta"):
        network = packed(Bloom(BloomConfig(64, 32, 70, 4)), INT8)
    filled(network.embed_tokens, 64, 32)
    cache = network.new_cache(1, 8)
    ids, span = torch.zeros(1, 1, dtype=torch.int64), [Span(0, PAST, 1)]
    return lambda: network.head(network(ids, PackedCache(cache.tokens, span)))


def launches(step: Callable[[], Any], is_fused: bool = True) -> tuple[Counter[str], Counter[str]]:
    """Of one step: those of ours, and operations of torch that launch."""
    launcher, mode = NotingLauncher(90), CountingMode()
    with torch.no_grad(), served_by(launcher), fused_kernels(is_fused):
        step()  # what is made once, such as tables of angles
        launcher.launches.clear()
        with mode:
            step()
    return Counter(launcher.names), mode.counts


def total(found: tuple[Counter[str], Counter[str]]) -> int:
    own, of_torch = found
    return own.total() + of_torch.total()


def told(name: str, found: tuple[Counter[str], Counter[str]]) -> str:
    own, of_torch = found
    return (
        f"{name}: {own.total()} launches {dict(own)}, {of_torch.total()} of torch {dict(of_torch)}"
    )


def test_a_step_of_cpm2_takes_at_most_420_launches() -> None:
    found = launches(cpm2_step())
    print(told("CPM-2", found))
    assert total(found) == MODELS[0].launches  # what docs/kernels.md reckons with
    assert total(found) + 2 * CPM2_LAYERS * SPLIT_ATTENTION <= MOST_OF_CPM2, told("CPM-2", found)
    assert found[0]["rms_norm"] == 3 * CPM2_LAYERS + 1
    assert found[0]["rotary_append"] == CPM2_LAYERS
    assert found[0]["attention_decode"] == 2 * CPM2_LAYERS


def test_a_layer_of_glm130b_takes_at_most_16_launches() -> None:
    found, without = launches(glm130b_step()), launches(glm130b_step(1))
    print(told("GLM-130B", found))
    assert total(found) == MODELS[1].launches
    of_a_layer = (total(found) - total(without)) / (GLM_LAYERS - 1)
    assert of_a_layer + SPLIT_ATTENTION <= MOST_OF_A_LAYER_OF_GLM, told("GLM-130B", found)
    assert found[0]["layer_norm"] == 2 * GLM_LAYERS + 1
    assert found[0]["rotary_append"] == found[0]["attention_decode"] == GLM_LAYERS


@pytest.mark.parametrize("step", [cpm1_step, bloom_step])
def test_norms_and_appends_of_the_other_models_are_launches_of_ours(
    step: Callable[[], Callable[[], Any]],
) -> None:
    own, of_torch = launches(step())
    print(told(step.__name__, (own, of_torch)))
    assert own["rotary_append"] in (32, 70)
    assert own["layer_norm"] == 2 * own["rotary_append"] + (1 if step is cpm1_step else 2)
    assert not {"native_layer_norm", "copy_", "mean"} & {*of_torch}


def test_nine_launches_of_a_norm_become_one() -> None:
    """And with the sum before it ten."""
    norm, x = RMSNorm(32, 1e-6).half(), torch.zeros(1, 1, 32).half()
    of_norm = {"_to_copy": 3, "pow": 1, "mean": 1, "add": 1, "rsqrt": 1, "mul": 2}
    assert sum(of_norm.values()) == 9
    for call, of_torch in (
        (lambda: norm(x), of_norm),
        (lambda: norm.add(x, x), {**of_norm, "add": 2}),
    ):
        assert launches(call) == ({"rms_norm": 1}, {})
        assert launches(call, is_fused=False) == ({}, of_torch)


def test_what_launches_nothing_is_a_list_with_reasons() -> None:
    """Each is an operation of torch, once; and what is not in it counts."""
    names = [name for names in NO_LAUNCH.values() for name in names]
    assert len(names) == len({*names})
    assert all(hasattr(torch.ops.aten, name) for name in names)
    x, mode = torch.randn(2, 3), CountingMode()
    with torch.no_grad(), mode:
        x.t().reshape(3, 2)[1:].unsqueeze(0)
        torch.empty(3).new_empty(2)
        assert not mode.counts
        x.t().contiguous()
        x.contiguous()
        x.to(torch.float32)
        x.half()
        (x + x).mul_(2).copy_(x)
    assert mode.counts == {"clone": 1, "_to_copy": 1, "add": 1, "mul_": 1, "copy_": 1}
