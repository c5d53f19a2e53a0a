"""Adapters of peft beside packed and streamed weights, put on before wrapping or after."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from quantized_models import relative_error
from streaming import least_limit
from tiny_models import inputs_of, make

import bminf
from bminf.errors import UnsupportedModelError

# What peft 0.21 asks a model of transformers 5.23.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

HOW = [False, "int8", "int4"]
QV = dict(target_modules=["q_proj", "up_proj"])
KINDS: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
    "dora": lambda: peft.LoraConfig(r=4, use_dora=True, init_lora_weights=False, **QV),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        init_ia3_weights=False,
    ),
    "loha": lambda: peft.LoHaConfig(r=4, init_weights=False, **QV),
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}
ON_LAYERS = ["lora", "dora", "ia3", "loha"]
# In both orders each kind, and each way of packing.
CASES = [(kind, how, (i + j) % 2 == 0) for i, kind in enumerate(KINDS) for j, how in enumerate(HOW)]
IDS = torch.randint(3, 96, (2, 6), generator=torch.Generator().manual_seed(1))


def wrap(model: Any, how: Any, streams: bool) -> Any:
    """With every block streamed, or none; what is said of adapters that stay is no news here."""
    limit = least_limit(model, quantization=how) if streams else "1GB"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*part of an adapter")
        bminf.wrapper(model, how, limit, device="cpu")
    assert bool(bminf.plan_of(model).streamed) == streams
    return model


def adapt(model: Any, kind: str) -> Any:
    torch.manual_seed(5)
    return peft.get_peft_model(model, KINDS[kind]()).eval()


def build(kind: str, how: Any, wrapped_first: bool, streams: bool) -> Any:
    if wrapped_first:
        return adapt(wrap(make("llama"), how, streams), kind)
    return wrap(adapt(make("llama"), kind), how, streams)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


@functools.cache
def bare_logits(how: Any) -> torch.Tensor:
    return logits(wrap(make("llama"), how, streams=False))


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("kind", "how", "wrapped_first"), CASES)
def test_streamed_equals_resident_gradients_too(kind: str, how: Any, wrapped_first: bool) -> None:
    resident = build(kind, how, wrapped_first, streams=False)
    model = build(kind, how, wrapped_first, streams=True)
    assert torch.equal(logits(model), logits(resident))
    expected, given = gradients(resident), gradients(model)
    assert expected and list(given) == list(expected)
    assert all(torch.equal(given[name], expected[name]) for name in expected)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert set(trainable) == set(expected)


@pytest.mark.parametrize("how", HOW)
def test_both_orders_give_the_same(how: Any) -> None:
    """Adapters stay as they are; the layers beside them are packed."""
    first, second = (build("lora", how, order, streams=True) for order in (True, False))
    assert torch.equal(logits(first), logits(second))
    packed = sum(isinstance(m, bminf.QuantizedLinear) for m in second.modules())
    assert packed == {False: 0, "int8": 49, "int4": 50}[how]  # and the head


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", ["lora", "ia3", "prompt"])
def test_they_are_saved_and_loaded_again(kind: str, how: Any, tmp_path: Path) -> None:
    model = build(kind, how, wrapped_first=True, streams=True)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 200_000
    base = wrap(make("llama"), how, streams=True)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(base, tmp_path)), logits(model))
    loaded = peft.PeftModel.from_pretrained(make("llama"), tmp_path).eval()  # frozen, too
    assert torch.equal(logits(wrap(loaded, how, streams=True)), logits(model))


@pytest.mark.parametrize(
    ("kind", "how", "wrapped_first"), [case for case in CASES if case[0] in ON_LAYERS]
)
def test_they_are_switched_and_taken_off(kind: str, how: Any, wrapped_first: bool) -> None:
    model = build(kind, how, wrapped_first, streams=True)
    on = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), bare_logits(how))
    torch.manual_seed(6)
    model.add_adapter("second", KINDS[kind]())
    model.set_adapter("second")
    assert not torch.equal(logits(model), on)
    model.set_adapter("default")
    assert torch.equal(logits(model), on)
    model.delete_adapter("second")
    assert torch.equal(logits(model), on)
    bare = model.unload()
    assert torch.equal(logits(bare), bare_logits(how))


@pytest.mark.parametrize("kind", ON_LAYERS)
def test_merging_into_packed_weights_says_what_works(kind: str) -> None:
    model = build(kind, "int8", wrapped_first=True, streams=False)
    with pytest.raises(UnsupportedModelError, match=r"merge adapters, before wrapping"):
        model.merge_and_unload()


def test_an_initialisation_that_changes_the_base_is_refused() -> None:
    model = wrap(make("llama"), "int8", streams=False)
    with pytest.raises(UnsupportedModelError, match="before wrapping"):
        peft.get_peft_model(model, peft.LoraConfig(r=4, init_lora_weights="pissa", **QV))
    first = peft.get_peft_model(
        make("llama"), peft.LoraConfig(r=4, init_lora_weights="pissa", **QV)
    )
    assert relative_error(logits(wrap(first.eval(), "int8", True)), bare_logits(False)) < 0.1


@pytest.mark.parametrize("how", ["int8", "int4"])
def test_a_model_that_asks_an_adapter_for_its_dtype(how: str) -> None:
    """T5 casts to the dtype of the weight of a layer, which here is an adapter around it."""

    def adapted() -> Any:
        config = peft.IA3Config(target_modules=["q", "wo"], feedforward_modules=["wo"])
        return peft.get_peft_model(make("t5"), config).eval()

    given = inputs_of("t5")
    with torch.no_grad():
        expected = adapted()(**given).logits
        error = relative_error(wrap(make("t5"), how, False)(**given).logits, expected)
        assert relative_error(wrap(adapted(), how, False)(**given).logits, expected) < 1.1 * error


@pytest.mark.parametrize("how", HOW)
def test_trainer_writes_checkpoints_that_load(how: Any, tmp_path: Path) -> None:
    model = build("lora", how, wrapped_first=True, streams=True)
    before = logits(model)
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, save_steps=2, per_device_train_batch_size=2, report_to=[],
        use_cpu=True, disable_tqdm=True, learning_rate=0.05, dataloader_pin_memory=False,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    transformers.Trainer(model, arguments, train_dataset=rows).train()
    after = logits(model.eval())
    assert not torch.equal(after, before)
    base = wrap(make("llama"), how, streams=True)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "checkpoint-2")
    assert torch.equal(logits(loaded), after)


def test_adapters_stay_on_the_device_and_are_counted() -> None:
    plain = bminf.plan_of(wrap(make("llama"), "int8", streams=True))
    model = adapt(make("llama"), "lora")
    adapter_bytes = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    plan = bminf.plan_of(wrap(model, "int8", streams=True))
    assert plan.outside_bytes == plain.outside_bytes + adapter_bytes
    assert plan.streamed_bytes == plain.streamed_bytes


def test_a_model_in_training_mode_with_nothing_to_train_is_said() -> None:
    model = make("llama").train().requires_grad_(False)
    with pytest.warns(UserWarning, match="training mode, and nothing in it can be trained"):
        bminf.wrapper(model, False, "1GB", device="cpu")
    model = adapt(make("llama"), "lora").train()
    wrap(model, "int8", streams=True)  # warnings are errors
