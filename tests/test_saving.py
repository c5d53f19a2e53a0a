"""bminf.save() and load(): the same model again, packed and streamed as it was."""

from __future__ import annotations

import os
from itertools import cycle
from pathlib import Path
from typing import Any

import peft
import pytest
import tokenizers
import torch
import transformers
from tiny_models import LLAMA, TINY, greedy, inputs_of, make, output_of
from tokenizers import models, pre_tokenizers

import bminf
from bminf.checkpoint.stored import InFile
from bminf.errors import ArgumentError, CheckpointError
from bminf.layers.quantized_linear import QuantizedLinear
from bminf.layout import tensors_of
from bminf.quantization.packed import INT8

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* are not quantized"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:nothing in the blocks of .* could be quantized"),
]


def half_of(model: torch.nn.Module, quantization: str | None) -> int:
    """A limit under which some blocks are streamed."""
    plan = bminf.plan_for(model, quantization)
    return (plan.least_limit + plan.total_bytes) // 2


def values(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, _, tensor in tensors_of(model)}


def formats(model: torch.nn.Module) -> dict[str, bminf.Format]:
    return {n: m.form for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}


# As they are: one of each way in which tensors are shared, merged or told apart.
PLAIN = ["llama", "mixtral", "gpt_oss", "gpt2", "t5", "whisper", "mamba"]


@pytest.mark.parametrize(
    ("name", "quantization"),
    [*((name, None) for name in PLAIN), *zip(TINY, cycle(("int8", "int4")), strict=False)],
)
def test_a_saved_model_loads_as_it_was(name: str, quantization: str | None, tmp_path: Path) -> None:
    """Each packed, in one of two ways by turns; test_wrapping_architectures.py has the other."""
    model, given = make(name), inputs_of(name)
    limit = half_of(model, quantization)
    bminf.wrapper(model, quantization, limit, device="cpu")
    expected = output_of(model, given)
    assert bminf.save(model, tmp_path / "to") == tmp_path / "to"
    loaded = bminf.load(tmp_path / "to", limit, device="cpu")
    assert type(loaded) is type(model) and formats(loaded) == formats(model)
    assert bminf.plan_of(loaded) == bminf.plan_of(model)
    assert bminf.plan_of(loaded).is_streaming
    before, after = values(model), values(loaded)
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert value.dtype == after[key].dtype and torch.equal(value, after[key]), key
    torch.testing.assert_close(output_of(loaded, given), expected)
    if TINY[name].generates and TINY[name].inputs != "audio":
        assert torch.equal(greedy(loaded, given), greedy(model, given))


HYBRID: dict[str, dict[str, Any]] = {
    "Jamba": dict(
        num_experts=4, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
        expert_layer_offset=1, mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False,
    ),
    "Qwen3Next": dict(
        num_experts=4, head_dim=8, linear_key_head_dim=8, linear_value_head_dim=8,
        linear_num_key_heads=2, linear_num_value_heads=4, moe_intermediate_size=24,
        shared_expert_intermediate_size=24, layer_types=["linear_attention", "full_attention"] * 3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("quantization", [None, "int4"])
@pytest.mark.parametrize("name", HYBRID)
def test_layers_of_several_kinds(name: str, quantization: str | None, tmp_path: Path) -> None:
    """Attention, recurrent layers and experts, which transformers merges as it loads."""
    config, kind = (getattr(transformers, name + end) for end in ("Config", "ForCausalLM"))
    sizes = {**LLAMA, "num_hidden_layers": 6, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    kind(config(**sizes, **HYBRID[name])).save_pretrained(tmp_path / "plain")
    expected = kind.from_pretrained(tmp_path / "plain")
    limit, given = half_of(expected, quantization), inputs_of("llama")
    bminf.wrapper(expected, quantization, limit, device="cpu")
    loaded = bminf.load(tmp_path / "plain", limit, quantization, device="cpu")
    bminf.save(loaded, tmp_path / "saved")
    again = bminf.load(tmp_path / "saved", limit, device="cpu")
    for model in (loaded, again):
        assert bminf.plan_of(model) == bminf.plan_of(expected)
        assert {k: t.tolist() for k, t in values(model).items()} == {
            k: t.tolist() for k, t in values(expected).items()
        }
        assert torch.equal(greedy(model, given), greedy(expected, given))


def test_what_is_not_wrapped_is_saved_too(tmp_path: Path) -> None:
    model = make("llama")
    model.model.layers.to(torch.bfloat16)  # and nothing else, as no configuration says
    bminf.save(model, tmp_path / "to")
    loaded = bminf.load(tmp_path / "to", device="cpu")
    assert {key: (t.dtype, t.tolist()) for key, t in values(loaded).items()} == {
        key: (t.dtype, t.tolist()) for key, t in values(model).items()
    }


def test_it_may_be_packed_and_cast_as_it_is_loaded(tmp_path: Path) -> None:
    model = make("gpt2")
    bminf.save(model, tmp_path / "to")
    loaded = bminf.load(tmp_path / "to", quantization="int4", dtype="bfloat16", device="cpu")
    expected = bminf.wrapper(make("gpt2").to(torch.bfloat16), "int4", device="cpu")
    assert formats(loaded) == formats(expected) and formats(loaded)
    assert {k: t.tolist() for k, t in values(loaded).items()} == {
        k: t.tolist() for k, t in values(expected).items()
    }


def test_each_block_is_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = bminf.wrapper(make("llama"), "int8", device="cpu")
    bminf.save(model, tmp_path / "to")
    read_into, runs = InFile.read_into, []

    def counting(stored: InFile, buffer: torch.Tensor) -> None:
        runs.append((stored.name, stored.dtype))
        read_into(stored, buffer)

    monkeypatch.setattr(InFile, "read_into", counting)
    bminf.load(tmp_path / "to", device="cpu")
    blocks = [name for name, dtype in runs if dtype == torch.uint8]
    assert blocks == ["", *(f"model.layers.{n}" for n in range(7))]  # the first: the embedding
    others = {name for name, dtype in runs if dtype != torch.uint8}
    assert others == {"model.norm.weight", "lm_head.weight"}


def test_a_large_model_is_saved_in_several_files(tmp_path: Path) -> None:
    model = bminf.wrapper(make("gpt2"), "int8", device="cpu")
    bminf.save(model, tmp_path / "one")
    bminf.save(model, tmp_path / "several", max_shard_size=40_000)
    files = sorted(path.name for path in (tmp_path / "several").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"bminf-00001-of-{len(files):05}.safetensors"
    sizes = [(tmp_path / "several" / name).stat().st_size for name in files]
    assert max(sizes) < 60_000  # a header each
    one, several = (bminf.load(tmp_path / name, device="cpu") for name in ("one", "several"))
    assert {k: t.tolist() for k, t in values(one).items()} == {
        k: t.tolist() for k, t in values(several).items()
    }


def test_from_pretrained_does_not_make_up_weights(tmp_path: Path) -> None:
    bminf.save(bminf.wrapper(make("llama"), "int8", device="cpu"), tmp_path / "to")
    with pytest.raises(OSError, match="no file named"):
        TINY["llama"].model.from_pretrained(tmp_path / "to")


def test_the_tokenizer_and_the_settings_go_along(tmp_path: Path) -> None:
    model = make("llama")
    model.generation_config.max_new_tokens = 5
    model.generation_config.eos_token_id = [2, 7]
    bminf.save(model, tmp_path / "to", tokenizer_of_words())
    loaded = bminf.load(tmp_path / "to", device="cpu")
    assert loaded.tokenizer("b a").input_ids == [1, 0]
    assert loaded.generation_config.to_dict() == model.generation_config.to_dict()
    bminf.save(loaded, tmp_path / "again")  # with the tokenizer that it was loaded with
    assert bminf.load(tmp_path / "again", device="cpu").tokenizer("b").input_ids == [1]
    bminf.save(model, tmp_path / "without")
    assert bminf.load(tmp_path / "without", device="cpu").tokenizer is None


def tokenizer_of_words() -> Any:
    words = models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?")
    made = tokenizers.Tokenizer(words)
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?")


class Own(torch.nn.Module):
    """Of no library."""


def with_adapters() -> Any:
    config = peft.LoraConfig(target_modules=["q_proj"], r=2)
    return peft.get_peft_model(make("llama"), config)


def with_another_module() -> Any:
    model = make("llama")
    model.model.extra = torch.nn.Linear(3, 3)
    return model


def resized() -> Any:
    model = make("llama")
    model.model.norm.weight = torch.nn.Parameter(torch.ones(33))
    return model


@pytest.mark.parametrize(
    ("make_model", "message"),
    [
        (Own, r"a Own of .* cannot be saved; accepted: a model whose class is in transformers"),
        (with_adapters, r"a PeftModel of peft.* cannot be saved; accepted"),
        (with_another_module, r"this LlamaForCausalLM would not load again: .*model\.extra"),
        (resized, r"this LlamaForCausalLM would not load again: .*"),
        (lambda: 3, r"model is a int; give a model of transformers"),
    ],
)
def test_what_would_not_load_again_is_not_saved(
    make_model: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ArgumentError, match=message):
        bminf.save(make_model(), tmp_path / "to")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(ArgumentError, match="exists already; name a folder that does not"):
        bminf.save(make("llama"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_an_error_midway_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    model = bminf.wrapper(make("llama"), "int8", device="cpu")
    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        with pytest.raises(CheckpointError, match="No space left"):
            bminf.save(model, tmp_path / "to")
    assert not list(tmp_path.iterdir())
    assert bminf.save(model, tmp_path / "to").is_dir()


def test_what_is_packed_as_int4_was_stays_so(tmp_path: Path) -> None:
    model = bminf.wrapper(make("llama"), bminf.Format(4, 16), device="cpu")
    bminf.save(model, tmp_path / "to")
    assert '"scale_bits"' not in (tmp_path / "to" / "bminf.json").read_text()
    for asked in ({}, {"quantization": "int4"}):
        loaded = bminf.load(tmp_path / "to", device="cpu", **asked)
        assert formats(loaded) == formats(model)
    with pytest.raises(ArgumentError, match=r"is packed as .*; leave quantization out"):
        bminf.load(tmp_path / "to", quantization=bminf.Format(4, 32, scale_bits=8), device="cpu")


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bart"])  # all but the first are tied
def test_a_head_in_8_bits_beside_linears_in_4(name: str, tmp_path: Path) -> None:
    model, given = bminf.wrapper(make(name), "int4", device="cpu"), inputs_of(name)
    limit, expected = bminf.plan_of(model).least_limit, output_of(model, given)
    bminf.save(model, tmp_path / "to")
    for asked in ({}, {"quantization": "int4"}):
        loaded = bminf.load(tmp_path / "to", limit, device="cpu", **asked)
        assert formats(loaded) == formats(model) and INT8 in formats(loaded).values()
        assert bminf.plan_of(loaded).tables and bminf.plan_of(loaded).total_bytes <= limit
        assert torch.equal(output_of(loaded, given), expected)
    bminf.save(loaded, tmp_path / "again")  # while its rows lie in the first folder
    again = bminf.load(tmp_path / "again", device="cpu")
    assert torch.equal(output_of(again, given), expected)
    with pytest.raises(ArgumentError, match=r"is packed as .*; leave quantization out"):
        bminf.load(tmp_path / "to", quantization="int8", device="cpu")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_folder_from_before_heads_were_packed_stays_so(name: str, tmp_path: Path) -> None:
    def chosen(full_name: str, _: torch.nn.Module) -> bool:
        return full_name != "lm_head"

    model = bminf.wrapper(make(name), "int4", device="cpu", quantize=chosen)
    bminf.save(model, tmp_path / "to")
    loaded = bminf.load(tmp_path / "to", quantization="int4", device="cpu")
    assert formats(loaded) == formats(model) and "lm_head" not in formats(loaded)
    tied = loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert tied == (name == "gpt2")
    given = inputs_of(name)
    assert torch.equal(output_of(loaded, given), output_of(model, given))


def test_what_is_packed_is_not_packed_otherwise(tmp_path: Path) -> None:
    bminf.save(bminf.wrapper(make("llama"), "int8", device="cpu"), tmp_path / "to")
    with pytest.raises(ArgumentError, match=r"is packed as .*; leave quantization out"):
        bminf.load(tmp_path / "to", quantization="int4", device="cpu")
    with pytest.raises(ArgumentError, match="quantize= chooses what is packed"):
        bminf.load(tmp_path / "to", quantize=lambda *_: True, device="cpu")
    assert formats(bminf.load(tmp_path / "to", quantization="int8", device="cpu"))


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_the_state_of_a_wrapped_model_goes_into_another(quantization: str | None) -> None:
    made, other, given = make("llama"), make("llama", seed=5), inputs_of("llama")
    limit = half_of(made, quantization)
    bminf.wrapper(made, quantization, limit, device="cpu")
    whole = bminf.wrapper(make("llama", seed=6), quantization, device="cpu")
    bminf.wrapper(other, quantization, limit, device="cpu")
    assert bminf.plan_of(other).streamed and not bminf.plan_of(whole).streamed
    other.load_state_dict(made.state_dict())
    whole.load_state_dict(other.state_dict())
    for model in (other, whole):
        torch.testing.assert_close(output_of(model, given), output_of(made, given))
    weights = make("llama").state_dict()
    if quantization is not None:
        with pytest.raises(
            RuntimeError, match=r"Missing key.*qweight(.|\n)*Unexpected key.*weight"
        ):
            other.load_state_dict(weights)
