"""Experts in a list or a dict of modules, streamed by need in models that are written by hand."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from quantized_models import relative_error
from test_pool import Lru

import bminf
from bminf.errors import UnsupportedModelError
from bminf.offload.blob import lay_out
from bminf.offload.blocks import find_blocks
from bminf.wrapping import plan_for

LAYERS, EXPERTS, CHOSEN, WIDTH = 9, 8, 2, 32


class Expert(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(WIDTH, 3 * WIDTH)
        self.down = torch.nn.Linear(3 * WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.nn.functional.silu(self.up(x)))


class Gate(torch.nn.Module):
    """Chooses by itself, as in later models."""

    def __init__(self, *sizes: int, bias: bool) -> None:
        super().__init__()
        self.weight = torch.nn.Linear(*sizes, bias=bias).weight

    def forward(self, x: torch.Tensor) -> Any:
        weights, ids = (x @ self.weight.t()).softmax(-1).topk(CHOSEN, dim=-1)
        return ids, weights, None


class Layer(torch.nn.Module):
    """kind: "list" or "dict" of experts; "chosen" is a list behind a router that gives ids."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.gate = (Gate if kind == "chosen" else torch.nn.Linear)(WIDTH, EXPERTS, bias=False)
        experts = [Expert() for _ in range(EXPERTS)]
        self.experts: Any = torch.nn.ModuleList(experts)
        if kind == "dict":
            self.experts = torch.nn.ModuleDict({f"expert_{n}": e for n, e in enumerate(experts)})
        self.wanted: list[list[int]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.view(-1, WIDTH)
        routed = self.gate(y)
        if isinstance(routed, tuple):
            ids, weights, _ = routed
        else:
            weights, ids = routed.softmax(-1).topk(CHOSEN, dim=-1)
        total = torch.zeros_like(y)
        self.wanted.append(sorted(set(ids.flatten().tolist())))
        for number in self.wanted[-1]:
            rows, places = torch.where(ids == number)
            expert = self.experts[
                f"expert_{number}" if isinstance(self.experts, torch.nn.ModuleDict) else number
            ]
            total.index_add_(0, rows, expert(y[rows]) * weights[rows, places, None])
        return x + total.view_as(x)


class Model(torch.nn.Module):
    def __init__(self, kind: str = "list") -> None:
        super().__init__()
        self.config = SimpleNamespace(num_experts_per_tok=CHOSEN)
        self.layers = torch.nn.ModuleList([Layer(kind) for _ in range(LAYERS)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def make(kind: str = "list") -> Any:
    torch.manual_seed(0)
    return Model(kind).eval()


def by_need(model: Any, num_slots: int, quantization: str | bool = False) -> Any:
    whole = plan_for(model, quantization)
    planned = plan_for(model, quantization, whole.total_bytes * 9 // 10, device="cpu").experts
    assert planned is not None
    dense = whole.total_bytes - planned.nbytes
    bminf.wrapper(model, quantization, dense + num_slots * planned.slot_bytes, device="cpu")
    plan = bminf.plan_of(model)
    assert plan.experts.num_slots == num_slots and not plan.streamed
    assert plan.experts.number == LAYERS * EXPERTS
    return model


def prompt_and_tokens(model: Any) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    lengths = [50, *[1] * 6]
    with torch.no_grad():
        return [model(torch.randn(3, n, WIDTH, generator=generator)) for n in lengths]


@pytest.mark.parametrize(
    ("kind", "quantization", "num_slots"),
    [
        *(("list", False, 2), ("list", False, 40), ("list", "int4", 15), ("dict", False, 15)),
        *(("dict", "int4", 2), ("chosen", False, 15), ("chosen", "int4", 40)),
    ],
)
def test_streamed_equals_resident(kind: str, quantization: str | bool, num_slots: int) -> None:
    original, model = make(kind), make(kind)
    if quantization:
        bminf.wrapper(original, quantization, "1GB", device="cpu")
    by_need(model, num_slots, quantization)
    for given, expected in zip(prompt_and_tokens(model), prompt_and_tokens(original), strict=True):
        assert torch.equal(given, expected)
    stats, experts = bminf.stats_of(model), bminf.plan_of(model).experts
    nbytes = experts.nbytes // experts.number
    layers = [layer.wanted for layer in model.layers]
    wanted = [
        [EXPERTS * at + number for number in calls[turn]]
        for turn in range(len(layers[0]))
        for at, calls in enumerate(layers)
    ]
    assert stats.expert_hits + stats.expert_misses == sum(map(len, wanted))
    # What a router gives the largest scores is what is chosen: nothing is copied for nothing.
    assert stats.bytes_copied == stats.expert_misses * nbytes + stats.expert_bytes_unused
    assert stats.expert_bytes_unused == 0
    cache = Lru(num_slots)
    for number in (number for layer in wanted for number in layer):
        cache.use(number)
    assert stats.expert_hits >= cache.hits


def test_copies_begin_when_the_router_has_chosen_and_repeated_tokens_copy_nothing() -> None:
    model, x = by_need(make(), CHOSEN * LAYERS), torch.randn(1, 1, WIDTH)
    held: list[int] = []
    for layer in model.layers:
        for expert in layer.experts:
            expert.up.register_forward_pre_hook(
                lambda *_: held.append(bminf.stats_of(model).copies)
            )
    with torch.no_grad():
        first = model(x)
        # Both experts of a layer are on their way before the first one is computed.
        assert held == [CHOSEN * (at // CHOSEN + 1) for at in range(CHOSEN * LAYERS)]
        before = bminf.stats_of(model)
        assert torch.equal(model(x), first)
    after = bminf.stats_of(model)
    assert after.bytes_copied == before.bytes_copied and after.passes == 2
    assert after.expert_hits == CHOSEN * LAYERS == before.expert_misses


def test_a_router_that_nobody_knows_leaves_them_to_be_fetched_one_by_one() -> None:
    original, model = make(), make()
    for one in (original, model):
        for layer in one.layers:
            layer.gate = torch.nn.Sequential(layer.gate, torch.nn.Tanh())
            del one.config
            one.config = SimpleNamespace()
    by_need(model, 5)
    for given, expected in zip(prompt_and_tokens(model), prompt_and_tokens(original), strict=True):
        assert torch.equal(given, expected)
    stats, experts = bminf.stats_of(model), bminf.plan_of(model).experts
    assert stats.bytes_copied == stats.expert_misses * experts.nbytes // experts.number


def test_what_reads_or_writes_an_expert_gets_the_real_one() -> None:
    original, model = make(), by_need(make(), 12)
    weights = original.state_dict()
    assert all(torch.equal(t, weights[key]) for key, t in model.state_dict().items())
    x = torch.randn(3, 2, WIDTH)
    with torch.no_grad():
        model(x)
        for one in (original, model):
            for expert in one.layers[4].experts:
                expert.down.weight.mul_(-2)
        assert torch.equal(model(x), original(x))
        other = make()
        for parameter in other.parameters():
            parameter.mul_(0.9)
        model.load_state_dict(other.state_dict())
        assert torch.equal(model(x), other(x))
        bminf.unwrap(model)
        assert torch.equal(model(x), other(x))
    assert type(model.layers[4].experts[0].up.weight) is torch.nn.Parameter
    assert "forward" not in model.layers[4].experts[0].__dict__


class Counting(Expert):
    """Counts its own calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1  # type: ignore[has-type]
        return super().forward(x) * self.calls


def test_what_an_expert_writes_is_kept() -> None:
    original = make()
    for layer in original.layers:
        layer.experts = torch.nn.ModuleList([Counting() for _ in range(EXPERTS)])
    model = by_need(copy.deepcopy(original), 3)
    for given, expected in zip(prompt_and_tokens(model), prompt_and_tokens(original), strict=True):
        assert torch.equal(given, expected)
    counts = [layer.experts[1].calls for layer in original.layers]
    assert torch.equal(torch.stack(counts), torch.stack([m.experts[1].calls for m in model.layers]))


def test_gradients_reach_what_is_before_frozen_experts_and_no_experts() -> None:
    x, grads = torch.randn(2, 3, WIDTH), []
    for model in (make().requires_grad_(False), by_need(make().requires_grad_(False), 3)):
        given = x.clone().requires_grad_()
        model(given).square().sum().backward()
        grads.append(given.grad)
    assert relative_error(grads[1], grads[0]) < 1e-6
    with pytest.raises(UnsupportedModelError, match="a gradient reached a streamed weight"):
        by_need(make(), 3)(x).sum().backward()


def test_an_expert_that_fails_leaves_nothing_behind() -> None:
    original, model = make(), by_need(make(), 3)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    handles = [expert.down.register_forward_hook(fail) for expert in model.layers[5].experts]
    with pytest.raises(KeyboardInterrupt):
        prompt_and_tokens(model)
    for handle in handles:
        handle.remove()
    for given, expected in zip(prompt_and_tokens(model), prompt_and_tokens(original), strict=True):
        assert torch.equal(given, expected)


@pytest.mark.parametrize("kind", ["shared by experts", "by layers", "by a layer", "not alike"])
def test_what_cannot_be_told_apart_streams_with_its_block(kind: str) -> None:
    def build() -> Any:
        model = make()
        for layer in model.layers:
            if kind == "shared by experts":
                layer.experts[1].up.weight = layer.experts[0].up.weight
            elif kind == "by layers":
                layer.experts = model.layers[0].experts
            elif kind == "by a layer":
                layer.again = layer.experts[2].up
            else:
                layer.experts[2] = torch.nn.Sequential(layer.experts[2])
        return model

    original, model = build(), build()
    found = lay_out(model, find_blocks(model), {}, keep_addresses=False, by_need=True).stacks
    assert not found
    if kind != "by layers":  # they lie outside all blocks
        limit = plan_for(model, False).total_bytes * 6 // 10
        bminf.wrapper(model, False, limit, device="cpu")
        assert bminf.plan_of(model).streamed and bminf.plan_of(model).experts is None
    for given, expected in zip(prompt_and_tokens(model), prompt_and_tokens(original), strict=True):
        assert torch.equal(given, expected)


class Nested(torch.nn.Module):
    """An expert that holds experts, in a list or as stacks."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        config = tf.Qwen3MoeConfig(
            hidden_size=WIDTH, moe_intermediate_size=WIDTH, num_experts=4, num_experts_per_tok=2
        )
        stacked = tf.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeSparseMoeBlock(config)
        for parameter in stacked.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        self.inner = Layer("list") if kind == "list" else stacked
        self.out = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(x + self.inner(self.out(x)[None])[0])


@pytest.mark.parametrize(("kind", "num_slots"), [("list", 2), ("stack", 9)])
def test_an_expert_comes_with_the_experts_in_it(kind: str, num_slots: int) -> None:
    original = make()
    for layer in original.layers:
        layer.experts = torch.nn.ModuleList([Nested(kind) for _ in range(EXPERTS)])
    original.eval()
    model = by_need(copy.deepcopy(original), num_slots)
    for given, expected in zip(prompt_and_tokens(model), prompt_and_tokens(original), strict=True):
        assert torch.equal(given, expected)


@pytest.mark.parametrize("name", ["SwitchTransformers", "NllbMoe"])
def test_experts_in_dicts_of_transformers(name: str, tmp_path: Path) -> None:
    kind = getattr(tf, f"{name}ForConditionalGeneration")
    sizes = dict(
        vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=5, num_decoder_layers=5,
        num_heads=4, num_experts=4, num_sparse_encoder_layers=5, num_sparse_decoder_layers=5,
        encoder_layers=5, decoder_layers=5, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, encoder_sparse_step=1, decoder_sparse_step=1,
        decoder_start_token_id=0, pad_token_id=1, eos_token_id=2, bos_token_id=0,
        max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = kind(kind.config_class(**sizes)).eval()
    ids = torch.randint(3, 99, (2, 7), generator=torch.Generator().manual_seed(1))

    def output(one: Any) -> torch.Tensor:
        with torch.no_grad():
            return one(input_ids=ids, decoder_input_ids=ids[:, :4]).logits

    expected = output(model)
    bminf.save(model, tmp_path / "saved")
    limit = plan_for(model, False).total_bytes * 6 // 10
    bminf.wrapper(model, False, limit, device="cpu")
    loaded = bminf.load(tmp_path / "saved", limit, device="cpu")
    for one in (model, loaded):
        assert bminf.plan_of(one).experts.number == 10 * 4
        assert torch.equal(output(one), expected)
        assert bminf.stats_of(one).expert_misses
    again = bminf.save(loaded, tmp_path / "again")
    assert torch.equal(output(bminf.load(again, device="cpu")), expected)
