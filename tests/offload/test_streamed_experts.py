"""Experts by need in a small model on the CPU: what is counted, written, refused, taken back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_models import relative_error
from tiny_models import greedy, inputs_of, make, output_of
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import bminf
from bminf.cli.measure import rss_anon_bytes
from bminf.errors import BudgetError, UnsupportedModelError
from bminf.offload.streamed_experts import StreamedExperts
from bminf.wrapping import plan_for

LAYERS = 7


def stream(model: Any, num_slots: int, quantization: str | bool = False) -> Any:
    """Wrap with all that is dense resident, and room for so many experts."""
    whole = plan_for(model, quantization)
    planned = plan_for(model, quantization, whole.total_bytes * 9 // 10, device="cpu")
    assert planned.experts is not None
    dense = whole.total_bytes - whole.table_bytes - planned.experts.nbytes
    limit = dense + num_slots * planned.experts.slot_bytes
    bminf.wrapper(model, quantization, limit, device="cpu")
    plan = bminf.plan_of(model)
    assert not plan.streamed and plan.experts.num_slots == num_slots
    assert plan.total_bytes <= limit
    return model


@pytest.mark.parametrize("num_slots", [2, 5, 20])
@pytest.mark.parametrize("quantization", [False, "int8"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_any_number_of_slots_gives_the_same_bits(
    name: str, quantization: str | bool, num_slots: int
) -> None:
    given, resident = inputs_of(name), make(name)
    if quantization:
        bminf.wrapper(resident, quantization, "1GB", device="cpu")
    model = stream(make(name), num_slots, quantization)
    for _ in range(2):
        assert torch.equal(output_of(model, given), output_of(resident, given))
    assert torch.equal(greedy(model, given), greedy(resident, given))
    assert torch.equal(model(**given).logits, resident(**given).logits)  # with a graph
    stats = bminf.stats_of(model)
    assert stats.expert_misses and (stats.expert_hits or num_slots < 14)
    assert stats.expert_bytes_copied == stats.bytes_copied


def one_token(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([[5]]), use_cache=False).logits


def test_a_repeated_token_copies_nothing() -> None:
    model = stream(make("mixtral"), 2 * LAYERS)
    first = one_token(model)
    before = bminf.stats_of(model)
    assert before.expert_misses == 2 * LAYERS and not before.expert_hits
    assert torch.equal(one_token(model), first)
    after = bminf.stats_of(model)
    assert after.expert_hits == 2 * LAYERS and after.bytes_copied == before.bytes_copied
    assert after.passes == 2


def test_the_least_limit_is_said_and_does() -> None:
    model = make("mixtral")
    whole = plan_for(model, False)
    plan = plan_for(model, False, whole.total_bytes * 9 // 10, device="cpu")
    with pytest.raises(BudgetError, match="of slots for experts") as caught:
        bminf.wrapper(model, False, plan.least_limit - 1, device="cpu")
    assert f"({plan.least_limit} bytes" in str(caught.value)
    assert 'quantization="int8"' in str(caught.value)
    expected = output_of(model, inputs_of("mixtral"))
    bminf.wrapper(model, False, plan.least_limit, device="cpu")
    assert bminf.plan_of(model).least_limit == plan.least_limit
    assert torch.equal(output_of(model, inputs_of("mixtral")), expected)


def test_the_plan_says_what_is_by_need() -> None:
    plan = bminf.plan_of(stream(make("mixtral"), 5))
    experts = plan.experts
    nbytes = 3 * 32 * 48 * 4
    assert (experts.number, experts.nbytes) == (4 * LAYERS, 4 * LAYERS * nbytes)
    assert experts.bytes_per_token == 2 * LAYERS * nbytes
    assert experts.wanted_bytes() == pytest.approx(experts.bytes_per_token)
    assert experts.missed_bytes() == experts.wanted_bytes()  # more than five
    assert "5 slots of" in str(plan) and "28 by need" in str(plan)
    assert copy.deepcopy(plan) == plan


def test_where_a_token_takes_all_experts_they_are_as_dense_as_the_rest() -> None:
    model = make("mixtral", num_experts_per_tok=4)
    expected = output_of(model, inputs_of("mixtral"))
    bminf.wrapper(model, False, plan_for(model, False).total_bytes * 6 // 10, device="cpu")
    assert bminf.plan_of(model).experts is None and bminf.plan_of(model).streamed
    assert torch.equal(output_of(model, inputs_of("mixtral")), expected)


@pytest.mark.parametrize("num_slots", [2, 9])
def test_eager_adds_up_as_the_class_does(num_slots: int) -> None:
    for name in ("mixtral", "gpt_oss", "deepseek_v3"):
        model, given = make(name), inputs_of(name)
        model.set_experts_implementation("eager")
        expected, ids = output_of(model, given), greedy(model, given)
        stream(model, num_slots)
        assert torch.equal(output_of(model, given), expected)
        assert torch.equal(greedy(model, given), ids)
        inside = model.model.layers[-1].mlp.experts
        assert "down_proj" not in inside.__dict__


def test_other_implementations_are_rounded_otherwise_or_read_whole_stacks() -> None:
    model, given = make("mixtral"), inputs_of("mixtral")
    model.set_experts_implementation("batched_mm")
    expected = output_of(model, given)
    stream(model, 5)
    torch.testing.assert_close(output_of(model, given), expected)

    def of_their_own(self: Any, x: torch.Tensor, ids: Any, weights: Any) -> torch.Tensor:
        return x @ self.down_proj[1] @ self.gate_up_proj.sum(0)[:48]

    ALL_EXPERTS_FUNCTIONS.register("theirs", of_their_own)
    model, original = make("mixtral"), make("mixtral")
    for one in (model, original):
        one.set_experts_implementation("theirs")
    stream(model, 5)
    assert torch.equal(output_of(model, given), output_of(original, given))
    assert not bminf.stats_of(model).bytes_copied


def test_what_reads_or_writes_a_stack_gets_the_real_one() -> None:
    original, model, given = make("mixtral"), stream(make("mixtral"), 4), inputs_of("mixtral")
    weights = original.state_dict()
    read = model.state_dict()
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[key], weights[key]) for key in weights)
    stack = model.model.layers[2].mlp.experts.down_proj
    assert isinstance(stack, torch.nn.Parameter) and stack.shape == (4, 32, 48)
    output_of(model, given)
    with torch.no_grad():
        for one in (model, original):
            one.model.layers[2].mlp.experts.down_proj[1].mul_(-2)
    assert torch.equal(output_of(model, given), output_of(original, given))
    other = make("mixtral")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
    model.load_state_dict(other.state_dict())
    assert torch.equal(output_of(model, given), output_of(other, given))
    bminf.unwrap(model)
    assert type(model.model.layers[2].mlp.experts.down_proj) is torch.nn.Parameter
    assert torch.equal(output_of(model, given), output_of(other, given))
    assert all(torch.equal(t, model.state_dict()[key]) for key, t in other.state_dict().items())


def test_whole_stacks_take_no_memory_where_they_are_read_or_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU state_dict() has them in files, and saving never joins the experts of one."""
    original = make("mixtral", hidden_size=128, intermediate_size=640, num_local_experts=8)
    model = stream(copy.deepcopy(original), 2)
    nbytes = bminf.plan_of(model).experts.nbytes
    assert nbytes > 50e6
    before = rss_anon_bytes()
    weights = model.state_dict()
    assert rss_anon_bytes() - before < nbytes / 10
    expected = original.state_dict()
    assert all(torch.equal(t, weights[key]) for key, t in expected.items())
    for name in ("whole", "held"):
        monkeypatch.setattr(StreamedExperts, name, None)
    saved = bminf.load(bminf.save(model, tmp_path / "saved"), device="cpu").state_dict()
    assert all(torch.equal(t, saved[key]) for key, t in expected.items())


def test_packed_stacks_are_saved_and_taken_back() -> None:
    given = inputs_of("qwen3_moe")
    resident = bminf.wrapper(make("qwen3_moe"), "int4", "1GB", device="cpu")
    model = stream(make("qwen3_moe"), 6, "int4")
    expected = output_of(resident, given)
    weights = resident.state_dict()
    assert all(torch.equal(t, weights[key]) for key, t in model.state_dict().items())
    with pytest.raises(UnsupportedModelError, match="would put random"):
        model.save_pretrained("nowhere")
    model.load_state_dict(weights)
    assert torch.equal(output_of(model, given), expected)
    bminf.unwrap(model)
    assert torch.equal(output_of(model, given), expected)
    bminf.wrapper(model, memory_limit=bminf.plan_of(resident).total_bytes // 2, device="cpu")
    assert bminf.plan_of(model).experts is not None
    assert torch.equal(output_of(model, given), expected)


def test_gradients_reach_what_is_before_frozen_experts_and_no_experts() -> None:
    ids = torch.arange(6).unsqueeze(0)
    grads = []
    for wrapped in (False, True):
        model = make("mixtral").requires_grad_(False)
        model.model.embed_tokens.requires_grad_(True)
        if wrapped:
            stream(model, 3)
        model(ids, use_cache=False).logits.square().sum().backward()
        grads.append(model.model.embed_tokens.weight.grad)
    assert relative_error(grads[1], grads[0]) < 1e-5
    model = stream(make("mixtral"), 3)
    with pytest.raises(UnsupportedModelError, match="a gradient reached a streamed weight"):
        model(ids, use_cache=False).logits.square().sum().backward()


def test_a_layer_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = make("mixtral"), inputs_of("mixtral")
    expected = output_of(model, given)
    stream(model, 3)
    activation = model.model.layers[4].mlp.experts.act_fn

    def fail(x: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(activation, "forward", fail)
        with pytest.raises(KeyboardInterrupt):
            output_of(model, given)
    assert torch.equal(output_of(model, given), expected)


def test_moving_and_copying_are_refused() -> None:
    model = stream(make("mixtral"), 3)
    with pytest.raises(UnsupportedModelError, match="cannot be moved or converted"):
        model.model.layers[0].mlp.experts.to(torch.bfloat16)
    with pytest.raises(UnsupportedModelError, match="cannot be copied"):
        copy.deepcopy(model.model.layers[0].mlp.experts)
    assert model.to("cpu") is model


def test_experts_of_unequal_sizes_share_a_pool() -> None:
    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.models = torch.nn.ModuleList(
                [make("mixtral"), make("mixtral", intermediate_size=80)]
            )

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return torch.cat([model(ids, use_cache=False).logits for model in self.models])

    model, ids = Two().eval(), torch.arange(5).unsqueeze(0)
    with torch.no_grad():
        expected = model(ids)
        whole = plan_for(model, False).total_bytes
        bminf.wrapper(model, False, whole * 6 // 10, device="cpu")
        assert bminf.plan_of(model).experts.number == 2 * 4 * LAYERS
        assert torch.equal(model(ids), expected)


def test_experts_that_no_configuration_counts_stream_by_need_as_well() -> None:
    model, given = make("mixtral"), inputs_of("mixtral")
    expected = output_of(model, given)
    for layer in model.model.layers:
        layer.mlp.experts.config = copy.copy(layer.mlp.experts.config)
        del layer.mlp.experts.config.num_experts_per_tok
    config = model.config
    model.config = copy.copy(config)
    del model.config.num_experts_per_tok
    stream(model, 4)
    model.config = config
    assert torch.equal(output_of(model, given), expected)
