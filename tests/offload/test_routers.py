"""Routers that are asked early: copies begin before the shared expert, guesses change no bit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers as tf
from test_streamed_experts import stream
from tiny_models import DECODER, LLAMA

import bminf
from bminf.errors import ArgumentError
from bminf.offload.hooks import ATTRIBUTE

LAYERS, EXPERTS = 5, 8
SIZES = {
    **LLAMA, "num_hidden_layers": LAYERS, "num_experts": EXPERTS, "num_experts_per_tok": 2,
    "moe_intermediate_size": 24, "shared_expert_intermediate_size": 32,
}  # fmt: skip


def make(**sizes: Any) -> Any:
    torch.manual_seed(0)
    model = tf.Qwen2MoeForCausalLM(tf.Qwen2MoeConfig(**{**SIZES, **sizes})).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.normal_()
    return model


def decoded(model: Any, number: int = 6, batch: int = 1) -> torch.Tensor:
    """Logits of tokens that come one by one."""
    generator = torch.Generator().manual_seed(1)
    found, past = [], None
    for ids in torch.randint(5, 90, (number, batch, 1), generator=generator):
        output = model(ids, past_key_values=past, use_cache=True)
        past = output.past_key_values
        found.append(output.logits)
    return torch.cat(found)


@contextlib.contextmanager
def events_of(model: Any) -> Iterator[list[str]]:
    """The copies of experts, the calls of shared experts and those of routers' forwards."""
    events: list[str] = []
    backend = model.__dict__[ATTRIBUTE].backend
    copy = backend.copy
    backend.copy = lambda *arguments: (events.append("copy"), copy(*arguments))[1]
    handles = [
        layer.mlp.shared_expert.register_forward_pre_hook(lambda *_: events.append("shared"))
        for layer in model.model.layers
    ]
    yield events
    backend.copy = copy
    for handle in handles:
        handle.remove()


def counted(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows that routers were run on, run by run."""
    runs: list[int] = []
    kind = type(model.model.layers[0].mlp.gate)
    forward = kind.forward

    def run(self: Any, x: torch.Tensor) -> Any:
        runs.append(x.shape[0])
        return forward(self, x)

    monkeypatch.setattr(kind, "forward", run)
    return runs


MODES: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}


@pytest.mark.parametrize("mode", MODES)
def test_misses_are_copied_before_the_shared_expert_is_computed(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, model = make(), make()
    runs = counted(model, monkeypatch)
    stream(model, 4)
    with MODES[mode](), events_of(model) as events:
        decoded(model, 1)
        first, events[:], runs[:] = list(events), [], []
        given = decoded(model, 1)
        second = list(events)
        assert torch.equal(given, decoded(original, 1))
    # In the first pass nobody knows yet what a router takes.
    assert first[:2] == ["shared", "copy"] and first.count("shared") == LAYERS
    assert second[0] == "copy" and second.count("shared") == LAYERS
    behind = [event for event, before in zip(second[1:], second, strict=False) if before == "copy"]
    assert "shared" in behind and second[-1] == "shared"
    assert len(runs) == 2 * LAYERS  # of both models


def test_what_is_said_early_is_counted_as_if_it_were_not() -> None:
    model, other = stream(make(), 6), stream(make(), 6)
    for layer in other.model.layers:
        del layer.mlp.gate.__dict__["forward"]
    with torch.no_grad():
        assert torch.equal(decoded(model), decoded(other))
    stats, without = bminf.stats_of(model), bminf.stats_of(other)
    assert (stats.expert_hits, stats.expert_misses) == (without.expert_hits, without.expert_misses)
    assert stats.bytes_copied == without.bytes_copied
    assert stats.expert_bytes_guessed == stats.expert_bytes_unused == 0


@pytest.mark.parametrize("num_slots", [3, 10, 20])
@pytest.mark.parametrize("quantization", [False, "int8"])
def test_guesses_change_no_bit_and_are_counted_apart(
    quantization: str | bool, num_slots: int
) -> None:
    resident, model = make(), make()
    whole = bminf.plan_for(model, quantization)
    planned = bminf.plan_for(model, quantization, whole.total_bytes * 9 // 10, device="cpu").experts
    limit = whole.total_bytes - whole.table_bytes - planned.nbytes + num_slots * planned.slot_bytes
    if quantization:
        bminf.wrapper(resident, quantization, "1GB", device="cpu")
    bminf.wrapper(model, quantization, limit, device="cpu", prefetch_experts=True)
    with torch.no_grad():
        assert torch.equal(decoded(model), decoded(resident))
        assert torch.equal(decoded(model, batch=3), decoded(resident, batch=3))
    stats, nbytes = bminf.stats_of(model), planned.nbytes // planned.number
    assert stats.expert_bytes_guessed > 0
    assert stats.bytes_copied == stats.expert_bytes_copied
    assert stats.bytes_copied == stats.expert_misses * nbytes + stats.expert_bytes_unused
    assert stats.expert_bytes_unused <= stats.expert_bytes_guessed
    assert bminf.plan_of(model).experts.num_slots == num_slots


def test_layers_that_change_nothing_are_guessed_right() -> None:
    """All routers alike, and what they are given as well."""
    model = make(num_hidden_layers=4)
    layers = model.model.layers
    with torch.no_grad():
        for layer in layers:
            layer.mlp.gate.weight.copy_(layers[0].mlp.gate.weight)
            for linear in (layer.self_attn.o_proj, layer.mlp.shared_expert.down_proj):
                linear.weight.zero_()
            layer.mlp.experts.down_proj.zero_()
        limit = _limit(model, 16)
        bminf.wrapper(model, False, limit, device="cpu", prefetch_experts=True)
        decoded(model, 2)
        before = bminf.stats_of(model)
        model(torch.tensor([[77]]), use_cache=False)
    stats = bminf.stats_of(model)
    assert stats.expert_misses > before.expert_misses
    assert stats.expert_bytes_guessed > before.expert_bytes_guessed
    assert stats.expert_bytes_unused == 0


def _limit(model: Any, num_slots: int) -> int:
    whole = bminf.plan_for(model, False)
    planned = bminf.plan_for(model, False, whole.total_bytes * 9 // 10, device="cpu").experts
    dense = whole.total_bytes - whole.table_bytes - planned.nbytes
    return dense + num_slots * planned.slot_bytes


class Changing(torch.nn.Module):
    """Around experts, and not as its first pass lets expect."""

    def __init__(self, inner: Any, change: str) -> None:
        super().__init__()
        self.gate, self.experts, self._change, self.calls = inner.gate, inner.experts, change, 0

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        x = hidden_states.view(-1, hidden_states.shape[-1])
        is_changed = self.calls % 3 == 0
        if is_changed and self._change == "written":
            x.mul_(-1)
        if is_changed and self._change == "another":
            x = x.flip(-1)
        _, weights, ids = self.gate(x)
        if is_changed and self._change == "chosen":
            ids = EXPERTS - 1 - ids
        if is_changed and self._change == "ids written":
            ids.mul_(-1).add_(EXPERTS - 1)
        if is_changed and self._change == "twice":
            weights.mul_(0.5)
            weights = weights + self.gate(x)[1]
        return self.experts(x, ids, weights).view_as(hidden_states)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("change", ["written", "another", "chosen", "ids written", "twice"])
def test_what_was_said_early_and_was_wrong_costs_time_and_no_value(change: str, mode: str) -> None:
    original, model = make(), make()
    for one in (original, model):
        for layer in one.model.layers:
            layer.mlp = Changing(layer.mlp, change)
    bminf.wrapper(model, False, _limit(model, 7), device="cpu", prefetch_experts=True)
    with MODES[mode]():
        assert torch.equal(decoded(model, 7), decoded(original, 7))
    stats, planned = bminf.stats_of(model), bminf.plan_of(model).experts
    nbytes = planned.nbytes // planned.number
    assert stats.bytes_copied == stats.expert_misses * nbytes + stats.expert_bytes_unused


class InDtype(torch.nn.Module):
    """Routes in a dtype of its own."""

    def __init__(self, inner: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate, self.experts, self.dtype = inner.gate.to(dtype), inner.experts, dtype

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x = hidden_states.view(-1, hidden_states.shape[-1])
        _, weights, ids = self.gate(x.to(self.dtype))
        found = self.experts(x.float(), ids, weights.float())
        return found.to(x.dtype).view_as(hidden_states)


def test_a_router_is_not_asked_about_what_it_would_not_take() -> None:
    original, model = make(), make()
    for one in (original, model):
        for index, layer in enumerate(one.model.layers):
            layer.mlp = InDtype(layer.mlp, torch.float64 if index % 2 else torch.float32)
    bminf.wrapper(model, False, _limit(model, 7), device="cpu", prefetch_experts=True)
    with torch.no_grad():
        assert torch.equal(decoded(model), decoded(original))
    assert bminf.stats_of(model).expert_bytes_guessed == 0


def test_what_the_module_around_would_convert_is_no_error() -> None:
    original, model = make(), make()
    for one in (original, model):
        layer = one.model.layers[1]
        layer.mlp = InDtype(layer.mlp, torch.float32)
    bminf.wrapper(model, False, _limit(model, 7), device="cpu")
    x = torch.randn(1, 3, SIZES["hidden_size"])
    with torch.no_grad():
        for given in (x, x, x.half()):
            found = [one.model.layers[1].mlp(given) for one in (model, original)]
            assert torch.equal(*found)


def test_a_router_in_training_is_not_asked_for_a_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may draw random numbers."""
    model = make()
    runs = counted(model, monkeypatch)
    bminf.wrapper(model, False, _limit(model, 7), device="cpu", prefetch_experts=True)
    with torch.no_grad():
        decoded(model, 1)
        model.model.layers[LAYERS - 1].mlp.gate.train()
        runs.clear()
        decoded(model, 1)
    assert len(runs) == 2 * LAYERS - 2  # each once, and guesses of all but the first and the last


def test_in_training_a_router_is_run_when_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    runs = counted(model, monkeypatch)
    stream(model.requires_grad_(False), 6)
    model.train()
    for _ in range(2):
        decoded(model, 1)
    assert len(runs) == 2 * LAYERS
    assert bminf.stats_of(model).expert_bytes_unused == 0


def test_a_router_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    original, model = make(), stream(make(), 6)
    with torch.no_grad():
        decoded(model, 2)
        with monkeypatch.context() as patched:
            patched.setattr(model.model.layers[2].mlp.shared_expert, "forward", _fail)
            with pytest.raises(KeyboardInterrupt):
                decoded(model, 1)
        assert torch.equal(decoded(model), decoded(original))
    bminf.unwrap(model)
    assert not any("forward" in module.__dict__ for module in model.modules())


def _fail(x: torch.Tensor) -> torch.Tensor:
    raise KeyboardInterrupt


def test_a_switch_is_a_bool() -> None:
    with pytest.raises(ArgumentError, match="prefetch_experts"):
        bminf.wrapper(make(), False, device="cpu", prefetch_experts=1)  # type: ignore[arg-type]


def test_models_without_experts_take_no_notice() -> None:
    config = tf.LlamaConfig(**{**LLAMA, **DECODER})
    model = tf.LlamaForCausalLM(config).eval()
    plan = bminf.plan_for(model, False)
    limit = plan.total_bytes - plan.table_bytes - plan.blocks[0].nbytes
    bminf.wrapper(model, False, limit, device="cpu", prefetch_experts=True)
    assert bminf.plan_of(model).streamed and bminf.stats_of(model).expert_bytes_guessed == 0
