"""Models where nothing repeats: no block to stream, but they can be moved and packed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from streaming import Residual, Stack

import bminf
from bminf.cli.sources import build_on_meta
from bminf.errors import ArgumentError, BudgetError, NothingToStreamError, UnsupportedModelError
from bminf.layers.quantized_linear import QuantizedLinear
from bminf.offload.plan import least_budget
from bminf.offload.predict import predict
from bminf.wrapping import plan_for

ALBERT = dict(
    vocab_size=96, embedding_size=16, hidden_size=32, intermediate_size=48, num_hidden_layers=6,
    num_attention_heads=4,
)  # fmt: skip


def albert(model_class: Any = tf.AlbertModel) -> Any:
    torch.manual_seed(0)
    return model_class(tf.AlbertConfig(**ALBERT)).eval()


def one_layer_many_times() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(*[Residual(16)] * 6).eval()


def test_what_fits_gives_the_same_output_and_is_taken_back() -> None:
    model, ids = albert(), torch.arange(6)[None]
    want = model(ids).last_hidden_state
    bminf.wrapper(model, False, memory_limit="1GB", device="cpu")
    plan = bminf.plan_of(model)
    assert plan.blocks == () and plan.total_bytes == plan.outside_bytes
    assert least_budget(plan) == plan.outside_bytes - plan.table_bytes  # its rows can be sent
    assert "fits entirely" in str(plan)
    assert torch.equal(model(ids).last_hidden_state, want)
    assert torch.equal(bminf.unwrap(model)(ids).last_hidden_state, want)


@pytest.mark.parametrize("quantization", [True, "int4"])
def test_all_linears_are_packed_the_output_head_beside_4_bits(quantization: bool | str) -> None:
    torch.manual_seed(0)
    config = tf.AlbertConfig(**ALBERT, tie_word_embeddings=False)
    model = tf.AlbertForMaskedLM(config).eval()
    bminf.wrapper(model, quantization, memory_limit="1GB", device="cpu")
    plain = [name for name, m in model.named_modules() if type(m) is torch.nn.Linear]
    assert plain == ([] if quantization == "int4" else ["predictions.decoder"])
    assert isinstance(model.albert.encoder.embedding_hidden_mapping_in, QuantizedLinear)


def test_one_layer_that_runs_many_times_is_packed_once() -> None:
    model, x = one_layer_many_times(), torch.randn(2, 16)
    want = model(x)
    before = plan_for(one_layer_many_times(), False).total_bytes
    bminf.wrapper(model, memory_limit="1GB", device="cpu")
    assert isinstance(model[0].up, QuantizedLinear) and model[0] is model[5]
    assert bminf.plan_of(model).total_bytes < before / 2
    assert (model(x) - want).norm() < 0.1 * want.norm()


@pytest.mark.parametrize("make_model", [albert, one_layer_many_times])
def test_a_limit_too_small_is_refused_with_the_reason(make_model: Any) -> None:
    least = plan_for(make_model(), False).least_limit
    assert plan_for(make_model(), False, least).total_bytes == least
    model = make_model()
    said = r"no list of repeated modules.*raise memory_limit.*blocks=\[\.\.\.\]"
    for error in (NothingToStreamError, BudgetError, UnsupportedModelError):
        with pytest.raises(error, match=said):
            bminf.wrapper(model, False, memory_limit=least - 1, device="cpu")
    with pytest.raises(BudgetError, match=f"{least + 100} bytes"):
        plan_for(model, False, least, reserve=100)
    assert bminf.plan_of(model) is None


def test_blocks_that_are_named_stream() -> None:
    model, x = torch.nn.Sequential(Residual(16), torch.nn.Linear(16, 4)), torch.randn(2, 16)
    want = model(x)
    limit = plan_for(model, False, blocks=["0.up"]).outside_bytes + 2 * model[0].up.weight.nbytes
    bminf.wrapper(model, False, limit, device="cpu", blocks=["0.up", "0.down"])
    assert torch.equal(model(x), want)


@pytest.mark.parametrize(
    "make_model", [lambda: torch.nn.Linear(3, 3), torch.nn.ReLU, lambda: Stack(1), torch.nn.Module]
)
def test_the_smallest_models_are_accepted(make_model: Any) -> None:
    model = make_model()
    assert bminf.wrapper(model, False, memory_limit="1GB", device="cpu") is model
    assert bminf.plan_of(model).blocks == ()


def test_a_linear_alone_cannot_be_exchanged_and_says_so() -> None:
    with pytest.warns(UserWarning, match="Linear could be quantized"):
        model = bminf.wrapper(torch.nn.Linear(3, 3), memory_limit="1GB", device="cpu")
    assert type(model) is torch.nn.Linear


def test_uses_of_a_block_that_is_none_are_refused() -> None:
    with pytest.raises(ArgumentError, match="unknown key"):
        plan_for(albert(), uses={"encoder": 1})


def test_the_time_of_a_token_is_that_of_all_weights_that_are_read_whole() -> None:
    plan = plan_for(albert(), False)
    assert predict(plan, 1e9, 1e9).pass_s == pytest.approx(plan.fixed_bytes / 1e9)
    assert plan.fixed_bytes == plan.total_bytes - plan.table_bytes < plan.total_bytes
    built = build_on_meta({"model_type": "albert", **ALBERT})
    assert plan_for(built, False).blocks == ()
