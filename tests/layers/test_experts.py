"""Stacks of experts against what the classes of transformers compute, and packed."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from host_launcher import HostLauncher, served_by
from quantized_models import relative_error

import bminf
from bminf.errors import ArgumentError
from bminf.layers.experts import (
    PackedExperts,
    PackedStack,
    Tensors,
    VisitResident,
    forward_of,
    matrices_of,
    stacks_of,
)
from bminf.ops.grouped_linear import grouped_linear_of_checked
from bminf.quantization.packed import Format, parse_format

EXPERTS, WIDTH = 8, 32
CONFIG = dict(
    num_experts=EXPERTS, num_local_experts=EXPERTS, n_routed_experts=EXPERTS,
    moe_num_experts=EXPERTS, hidden_size=WIDTH, intermediate_size=24, moe_intermediate_size=24,
    hidden_act="silu", hidden_activation="gelu", mlp_hidden_act="relu2", moe_latent_size=None,
    moe_hidden_size=WIDTH, swiglu_limit=0.5, swiglu_alpha=1.7, post_norm_eps=1e-6,
)  # fmt: skip

# One of each kind of stack; tests/offload/test_by_need_architectures.py has them in whole models.
ROUTED = {
    "mixtral": "MixtralExperts",
    "gpt_oss": "GptOssExperts",  # transposed, interleaved, biases, clamped
    "openai_privacy_filter": "OpenAIPrivacyFilterExperts",  # eager in float32
    "aria": "AriaExperts",  # transposed
    "nemotron_h": "NemotronHExperts",  # no gate
    "muse_spark": "MuseSparkExperts",  # a norm behind each expert
    "beam": "BeamExperts",  # gates in float32
    "deepseek_v4": "DeepseekV4Experts",
    "minimax_m3_vl": "MiniMaxM3VLExperts",
    "gemma4": "Gemma4TextExperts",
}


def make_experts(
    family: str, name: str, dtype: torch.dtype = torch.float32, implementation: str = "grouped_mm"
) -> Any:
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    config = SimpleNamespace(**CONFIG, _experts_implementation=implementation)
    torch.manual_seed(0)
    experts = getattr(module, name)(config).to(dtype)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=0.3)
    return experts.eval()


def routing(
    num_tokens: int, num_top_k: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, and which experts are chosen with what weights: some of them by nobody."""
    x = torch.randn(num_tokens, WIDTH, dtype=dtype)
    scores = torch.randn(num_tokens, EXPERTS)
    scores[:, 3] = -10.0
    weights, ids = scores.softmax(-1).topk(num_top_k)
    return x, ids, weights.to(dtype)


def computed(experts: Any, *arguments: Any) -> torch.Tensor:
    forward = forward_of(experts)
    assert forward is not None
    with torch.no_grad():
        return forward(experts, VisitResident(experts), *arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ROUTED)
def test_it_has_the_bits_of_grouped_mm(family: str, dtype: torch.dtype) -> None:
    experts = make_experts(family, ROUTED[family], dtype)
    for num_tokens, num_top_k in [(1, 2), (3, 1), (50, 2), (7, EXPERTS)]:
        given = routing(num_tokens, num_top_k, dtype)
        with torch.no_grad():
            assert torch.equal(computed(experts, *given), experts(*given))


def test_it_has_the_bits_of_classes_with_one_way_to_multiply() -> None:
    llama = make_experts("llama4", "Llama4TextExperts")
    x = torch.randn(EXPERTS, 5, WIDTH)
    x[[1, 4]] = 0
    x = x.view(-1, WIDTH)
    assert torch.equal(computed(llama, x), llama(x).detach())
    jetmoe = importlib.import_module("transformers.models.jetmoe.modeling_jetmoe")
    experts = jetmoe.JetMoeParallelExperts(EXPERTS, WIDTH, 24)
    torch.nn.init.normal_(experts.weight)
    sizes, rows = [3, 0, 1, 2, 0, 0, 4, 1], torch.randn(11, WIDTH)
    assert torch.equal(computed(experts, rows, sizes), experts(rows, sizes).detach())
    step = make_experts("mixtral", "MixtralExperts")  # stands for eager: sums in another order
    given = routing(9, 2)
    step.config._experts_implementation = "eager"
    torch.testing.assert_close(computed(step, *given), step(*given).detach())


def test_gradients_change_no_bit_and_are_those_of_the_class() -> None:
    jetmoe = importlib.import_module("transformers.models.jetmoe.modeling_jetmoe")
    experts = jetmoe.JetMoeParallelExperts(EXPERTS, WIDTH, 24)
    torch.nn.init.normal_(experts.weight)
    rows = torch.randn(11, WIDTH), [3, 0, 1, 2, 0, 0, 4, 1]
    tokens = (torch.randn(EXPERTS * 5, WIDTH),)
    for module, given in [
        (experts, rows),
        (make_experts("llama4", "Llama4TextExperts"), tokens),
        *((make_experts(family, name), routing(50, 2)) for family, name in ROUTED.items()),
    ]:
        expected = computed(module, *given)
        leaves = [given[0].clone().requires_grad_() for _ in range(2)]
        found = forward_of(module)(module, OneByOne(module), leaves[0], *given[1:])
        assert torch.equal(found, expected)
        found.square().sum().backward()
        module(leaves[1], *given[1:]).square().sum().backward()
        assert relative_error(leaves[0].grad, leaves[1].grad) < 1e-5


def test_ids_of_no_expert_here_add_nothing() -> None:
    experts = make_experts("gpt_oss", "GptOssExperts")
    experts._is_expert_parallel = True
    x, ids, weights = routing(5, 2)
    ids[0], ids[3, 1], weights[0], weights[3, 1] = EXPERTS, EXPERTS, 0, 0
    with torch.no_grad():
        expected = experts(x, ids.clone(), weights)
    assert torch.equal(computed(experts, x, ids, weights), expected)
    nobody = torch.full_like(ids, EXPERTS)
    assert not computed(experts, x, nobody, weights).any()
    assert computed(experts, x[:0], ids[:0], weights[:0]).shape == (0, WIDTH)
    with pytest.raises(ArgumentError, match="chose the expert -"):
        computed(experts, x, ids - EXPERTS - 1, weights)


def test_nan_of_a_router_stays_where_it_is() -> None:
    experts = make_experts("mixtral", "MixtralExperts")
    x, ids, weights = routing(4, 2)
    weights[2, 0] = torch.nan
    result = computed(experts, x, ids, weights)
    assert result[2].isnan().all() and not result[[0, 1, 3]].isnan().any()


def dequantized(experts: Any, format_: Format) -> Any:
    """`experts` with matrices as they are after packing."""
    packed = PackedExperts(experts, format_)
    with torch.no_grad():
        for name, parameter in matrices_of(experts).items():
            for index in range(len(parameter)):
                parameter[index] = packed._modules[name][index]  # type: ignore[index]
    return experts


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("family", ROUTED)
def test_packed_experts_agree_with_dequantized_ones(family: str, quantization: str) -> None:
    format_ = parse_format(quantization)
    assert format_ is not None
    experts = make_experts(family, ROUTED[family])
    packed, given = PackedExperts(experts, format_), routing(20, 2)
    assert not matrices_of(packed) and packed.num_experts == EXPERTS
    assert all(len(stack) == EXPERTS for stack in stacks_of(packed).values())
    with torch.no_grad():
        expected = dequantized(experts, format_)(*given)
        # Activations are rounded in small products: see ROUNDING of the architectures.
        assert relative_error(packed(*given), expected) < 5e-3


def test_packed_experts_follow_moves_and_are_loaded_as_they_were_saved() -> None:
    experts = make_experts("gpt_oss", "GptOssExperts")
    packed = PackedExperts(experts, bminf.Format(4, group_size=16))
    assert packed.to(torch.bfloat16) is packed
    stack = packed._modules["down_proj"]
    assert isinstance(stack, PackedStack) and stack.shape == (EXPERTS, 24, WIDTH)
    assert stack.dtype == stack[0].dtype == torch.bfloat16
    assert stack._buffers["scale"].dtype == torch.float16  # type: ignore[union-attr]
    weights = packed.state_dict()
    assert sorted(weights) == [
        "down_proj.qweight", "down_proj.scale", "down_proj_bias",
        "gate_up_proj.qweight", "gate_up_proj.scale", "gate_up_proj_bias",
    ]  # fmt: skip
    other = make_experts("gpt_oss", "GptOssExperts", torch.bfloat16)
    torch.nn.init.normal_(other.down_proj)
    loaded = PackedExperts(other, bminf.Format(4, group_size=16))
    loaded.load_state_dict(weights)
    given = routing(6, 2, torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(loaded(*given), packed(*given))
    narrow = {**weights, "down_proj.qweight": weights["down_proj.qweight"].int()}
    with pytest.raises(ArgumentError, match=r"qweight is torch\.int32"):
        loaded.load_state_dict(narrow, assign=True)


def test_gradients_reach_the_input_of_packed_experts() -> None:
    experts = make_experts("mixtral", "MixtralExperts").requires_grad_(False)
    format_ = bminf.Format(8)
    packed, (x, ids, weights) = PackedExperts(experts, format_), routing(5, 2)
    grads = []
    for module in (packed, dequantized(experts, format_)):
        leaf = x.clone().requires_grad_()
        module(leaf, ids, weights).square().sum().backward()
        grads.append(leaf.grad)
    assert relative_error(*grads) < 1e-2  # type: ignore[arg-type]


def test_what_is_no_stack_is_refused() -> None:
    assert forward_of(torch.nn.Linear(2, 2)) is None
    with pytest.raises(ArgumentError, match="a Linear holds no stacks of experts"):
        PackedExperts(torch.nn.Linear(2, 2), bminf.Format(8))
    with pytest.raises(ArgumentError, match="31 columns cannot be packed to 4 bits"):
        PackedStack(torch.randn(2, 3, 31), False, bminf.Format(4))


class OneByOne(VisitResident):
    """The experts of a pool that has room for one, the last first."""

    def __call__(self, experts: Sequence[int]) -> Iterator[Mapping[int, Tensors]]:
        for expert in reversed(experts):
            yield from super().__call__([expert])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("family", ROUTED)
def test_few_tokens_are_one_call_a_matrix_with_the_bits_of_many(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = PackedExperts(make_experts(family, ROUTED[family], dtype), bminf.Format(4, 16))
    for num_tokens, num_top_k in ((1, 3), (16, 2), (21, 3), (33, 2)):
        given, calls = routing(num_tokens, num_top_k, dtype), []
        given[1][0, 0] = EXPERTS  # of no expert here
        with torch.no_grad(), monkeypatch.context() as patched:
            patched.setattr(
                "bminf.layers.experts.grouped_linear_of_checked",
                lambda *a, calls=calls: calls.append(a) or grouped_linear_of_checked(*a),
            )
            together = packed(*given)
            assert len(calls) == (2 if num_tokens * num_top_k <= 64 else 0)
            assert torch.equal(packed.computes(packed, OneByOne(packed), *given), together)
            patched.setattr("bminf.layers.experts._is_grouped", lambda *_: False)
            assert torch.equal(packed(*given), together)


# ---- on a GPU, by kernels that are compiled for the CPU ------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("family", ROUTED)
def test_few_tokens_are_one_launch_a_matrix_with_the_bits_of_many(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = PackedExperts(make_experts(family, ROUTED[family], dtype), bminf.Format(4, 16))
    launcher, given = HostLauncher(), routing(2, 3, dtype)
    given[1][0, 0] = EXPERTS  # of no expert here
    with served_by(launcher), torch.no_grad():
        together = packed(*given)
        assert launcher.names == ["linear_grouped"] * 2
        assert torch.equal(packed.computes(packed, OneByOne(packed), *given), together)
        launcher.names.clear()
        monkeypatch.setattr("bminf.layers.experts._is_grouped", lambda *_: False)
        assert torch.equal(packed(*given), together)
    assert {*launcher.names} == {"linear_few_rows"}


def test_many_tokens_and_gradients_are_multiplied_one_expert_after_another() -> None:
    packed = PackedExperts(make_experts("mixtral", "MixtralExperts"), bminf.Format(8))
    launcher, (x, ids, weights) = HostLauncher(), routing(3, 1)
    with served_by(launcher):
        packed(x.requires_grad_(), ids, weights).sum().backward()
        with torch.no_grad():
            packed(x, torch.zeros_like(ids), weights)  # three rows of one expert
            assert "linear_grouped" not in launcher.names
            packed(x[:2], torch.zeros_like(ids[:2]), weights[:2])
    assert launcher.names[-2:] == ["linear_grouped"] * 2
