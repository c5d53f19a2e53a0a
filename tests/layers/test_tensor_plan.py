"""The plan of a model of transformers: what it cuts, and what is refused. What ranks compute by it
is in tests/models/test_leading.py."""

from __future__ import annotations

import copy
import inspect
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import transformers_models
from tiny_models import make

import bminf
from bminf import wrapping
from bminf.errors import ArgumentError, UnsupportedModelError
from bminf.layers.experts import PackedExperts, matrices_of
from bminf.layers.parallel import Group, RowParallel
from bminf.layers.quantized_linear import QuantizedLinear
from bminf.layers.rendezvous import Place
from bminf.layers.tensor_plan import (
    Gathered,
    Shared,
    SharedExperts,
    check_ranks,
    cut,
    sample_of,
    shared_parts,
)
from bminf.quantization.packed import INT4, INT8, Format


def parts(name: str, form: Format | None, size: int) -> tuple[Any, list[Any]]:
    """A model, and what each of so many ranks has of it."""
    model = transformers_models()[name]()
    ranks = [copy.deepcopy(model) for _ in range(size)]
    for rank, own in enumerate(ranks):
        cut(own, shared_parts(own), form, Group(Place(rank, size)))
    return model, ranks


def weight_of(linear: torch.nn.Module) -> torch.Tensor:
    return linear.dequantize() if isinstance(linear, QuantizedLinear) else linear.weight  # type: ignore[return-value]


@pytest.mark.parametrize("form", [None, INT8, INT4, Format(4)])
@pytest.mark.parametrize("name", ["llama", "qwen3", "tied", "phi3"])
def test_the_ranks_together_have_the_weights_of_one(name: str, form: Format | None) -> None:
    model, ranks = parts(name, form, 4)
    for one in shared_parts(model):
        assert not isinstance(one, SharedExperts)
        own = [rank.get_submodule(one.name) for rank in ranks]
        linears = [part.linear if one.is_by_columns or one.is_gathered else part for part in own]
        assert all(isinstance(part, RowParallel) for part in own) == one.is_by_columns
        whole: Any = one.linear
        if form is not None and not one.is_gathered:
            whole = QuantizedLinear(whole, quantization=form)
        joined = torch.cat([*map(weight_of, linears)], int(one.is_by_columns))
        assert torch.equal(joined, weight_of(whole)), one.name
        biases = [part.bias for part in linears if part.bias is not None]
        if whole.bias is not None:
            assert torch.equal(torch.cat(biases), whole.bias)
    has_own_head = name != "tied"
    assert isinstance(ranks[0].lm_head, Gathered) == has_own_head
    assert ranks[0].get_output_embeddings().weight.dtype == torch.float32
    assert ranks[0].model.embed_tokens.weight.shape == model.model.embed_tokens.weight.shape


def test_ranks_that_have_loaded_other_weights_are_found() -> None:
    make, changed = transformers_models()["llama"], transformers_models()["llama"]()
    assert sample_of(make()) == sample_of(make()) != sample_of(make().half())
    with torch.no_grad():
        changed.model.layers[3].mlp.up_proj.weight[0, 1] += 1
    assert sample_of(changed) != sample_of(make())
    for one in (torch.nn.Linear(2, 2, device="meta"), torch.nn.BatchNorm1d(3)):
        assert sample_of(one) == sample_of(copy.deepcopy(one))


@pytest.mark.parametrize("form", [None, INT8, INT4, Format(4)])
def test_the_ranks_together_have_the_experts_of_one(form: Format | None) -> None:
    """Of each expert both halves of the first matrix, and columns of the second."""
    model, ranks = parts("qwen2_moe", form, 2)
    (one, *_) = [x for x in shared_parts(model) if isinstance(x, SharedExperts)]
    whole = one.module if form is None else PackedExperts(one.module, form)
    own = [stacks_in(rank.get_submodule(one.name)) for rank in ranks]
    for name, stack in stacks_in(whole).items():
        if name == "down_proj":
            joined = torch.cat([part[name] for part in own], 2)
        else:
            halves = [torch.cat([part[name].chunk(2, 1)[i] for part in own], 1) for i in (0, 1)]
            joined = torch.cat(halves, 1)
        assert torch.equal(joined, stack), name


def stacks_in(module: Any) -> dict[str, torch.Tensor]:
    if not isinstance(module, PackedExperts):
        return matrices_of(module)
    return {name: torch.stack([stack[e] for e in range(8)]) for name, stack in module.stacks()}


def test_experts_whose_products_do_not_add_up_are_refused() -> None:
    model = transformers_models()["qwen2_moe"]()
    experts = model.model.layers[0].mlp.experts
    with pytest.raises(ArgumentError, match=r"experts has 128 columns, 64 together; .*: 1, 2$"):
        alone = [one for one in shared_parts(model) if isinstance(one, SharedExperts)]
        check_ranks(model, alone, Format(4, 64), 4)
    for name in ("has_post_expert_norm", "is_transposed"):
        setattr(experts, name, True)
        with pytest.raises(UnsupportedModelError, match=r"'moe_tp_experts' of .*\.0\.mlp\.experts"):
            shared_parts(model)
        setattr(experts, name, False)
    experts.down_proj_bias = torch.nn.Parameter(torch.zeros(8, 64))
    with pytest.raises(UnsupportedModelError, match=r"'moe_tp_experts' of .*\.0\.mlp\.experts"):
        shared_parts(model)


def test_what_is_gathered_is_split_again() -> None:
    """As of queries, keys and values in one linear: then ranks need not divide the heads."""
    model = transformers_models()["phi3"]()
    shared = shared_parts(model)
    linears = [one for one in shared if isinstance(one, Shared)]
    assert {one.name.rpartition(".")[2] for one in linears if one.takes_all} == {
        "o_proj",
        "down_proj",
    }
    assert all(one.is_gathered or one.takes_all for one in linears)
    check_ranks(model, shared, INT8, 8)
    with pytest.raises(ArgumentError, match=r"3 ranks .*: 1, 2, 4, 8, 16, 32$"):
        check_ranks(model, shared, INT8, 3)


def test_what_is_packed_already_is_cut_as_it_is() -> None:
    model = transformers_models()["llama"]()
    bminf.wrapper(model, True, "1GB", "cpu")
    bminf.unwrap(model)
    codes = model.model.layers[0].mlp.down_proj.qweight.clone()
    cut(model, shared_parts(model), INT4, Group(Place(1, 2)))
    part = model.model.layers[0].mlp.down_proj.linear
    assert part.form == INT8 and torch.equal(part.qweight, codes[:, 64:])


def test_generate_is_that_of_the_model_and_keeps_no_memory() -> None:
    """Though each says what has failed in it; of a copy it is the copy's."""
    model = transformers_models()["llama"]()
    signature = inspect.signature(model.generate)
    cut(model, shared_parts(model), None, Group())
    assert inspect.signature(model.generate) == signature
    ids, other = torch.tensor([[5, 6, 7]]), copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.linear.weight.copy_(model.lm_head.linear.weight.flip(0))
    texts = [one.generate(ids, max_new_tokens=3, pad_token_id=0) for one in (model, other)]
    assert texts[0].shape == texts[1].shape == (1, 6) and not torch.equal(*texts)
    held = weakref.ref(model)
    del model
    assert held() is None


@pytest.mark.parametrize("name", ["gpt2", "bloom", "t5"])
def test_a_model_without_a_plan_is_refused_by_name(name: str) -> None:
    model = make(name)
    with pytest.raises(UnsupportedModelError, match=f"{type(model).__name__} has no plan"):
        bminf.wrapper(model, memory_limit="1GB", device="cpu", tp="auto")


def test_styles_that_are_not_known_and_heads_alone_are_refused() -> None:
    model = transformers_models()["llama"]()
    model._tp_plan = {**model._tp_plan, "model.layers.*.mlp": "local_params"}
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM .* 'local_params' of model"):
        shared_parts(model)
    model._tp_plan = {"lm_head": "colwise_gather_output"}
    with pytest.raises(UnsupportedModelError, match="or one for its head alone"):
        shared_parts(model)


@pytest.mark.parametrize(
    ("form", "size", "message"),
    [
        (None, 3, r"num_attention_heads is 8; numbers of ranks that can: 1, 2, 4$"),
        (None, 8, r"num_key_value_heads is 4; .*: 1, 2, 4$"),
        (Format(4, 64), 2, r"o_proj has 64 columns, 64 together; .*: 1$"),
    ],
)
def test_numbers_of_ranks_that_cannot_share_it_are_refused(
    form: Format | None, size: int, message: str
) -> None:
    model = transformers_models()["llama"]()
    shared = shared_parts(model)
    with pytest.raises(ArgumentError, match=message):
        check_ranks(model, shared, form, size)
    check_ranks(model, shared, INT4, 4)


def test_other_arguments_are_refused_before_anything_is_cut() -> None:
    model = transformers_models()["llama"]()
    with pytest.raises(ArgumentError, match="tp='yes'; accepted"):
        bminf.wrapper(model, memory_limit="1GB", device="cpu", tp="yes")
    with pytest.raises(ArgumentError, match="quantize=; accepted"):
        bminf.wrapper(model, memory_limit="1GB", device="cpu", tp="auto", quantize=lambda *_: True)
    assert type(model.model.layers[0].mlp.down_proj) is torch.nn.Linear


@pytest.mark.parametrize(("tp", "num_processes"), [("auto", 4), (None, 1)])
def test_ranks_of_a_machine_share_what_is_free_on_the_host(
    monkeypatch: pytest.MonkeyPatch, tp: str | None, num_processes: int
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(wrapping, "join", lambda _: Group(Place(0, 1, 0, 4)))
    monkeypatch.setattr(wrapping, "host_budget", lambda *sizes: given.append(sizes[-1]))
    bminf.wrapper(transformers_models()["llama"](), memory_limit="1GB", device="cpu", tp=tp)
    assert given == [num_processes]


def test_a_part_is_neither_cut_again_nor_saved(tmp_path: Path) -> None:
    _, (model, _) = parts("llama", None, 2)
    with pytest.raises(UnsupportedModelError, match="cut for ranks already"):
        shared_parts(model)
    with pytest.raises(UnsupportedModelError, match="one rank's part"):
        bminf.save(model, tmp_path / "part")
    assert not (tmp_path / "part").exists()
    with pytest.raises(UnsupportedModelError, match="one rank's part"):
        model.save_pretrained(tmp_path / "pretrained")
    assert not [*(tmp_path / "pretrained").glob("*.safetensors")]
