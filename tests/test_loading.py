"""bminf.load() of folders that transformers has saved: as from_pretrained() and wrapper()."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from golden import for_each, golden, largest
from tiny_models import TINY, greedy, inputs_of, output_of

import bminf

FEW = ["llama", "mixtral", "gpt2", "t5", "gemma3_text", "whisper"]


pytestmark = [
    pytest.mark.filterwarnings("ignore:.* are not quantized"),
    pytest.mark.filterwarnings("ignore:nothing in the blocks of .* could be quantized"),
]


def reference(name: str, folder: Path, **settings: Any) -> Any:
    return TINY[name].model.from_pretrained(folder, **settings)


def attributes(model: torch.nn.Module) -> dict[str, set[str]]:
    return {name: set(vars(module)) for name, module in model.named_modules()}


@pytest.mark.parametrize(
    ("name", "quantization"),
    [*((name, None) for name in FEW), *zip(FEW, cycle(("int8", "int4")), strict=False)],
)
def test_it_answers_as_the_wrapped_model_does(
    name: str, quantization: str | None, saved_tiny: Callable[[str], Path]
) -> None:
    limit = half_of(name, quantization, saved_tiny(name))
    settings = dict(quantization=quantization, memory_limit=limit, device="cpu")
    expected = bminf.wrapper(reference(name, saved_tiny(name)), **settings)
    model = bminf.load(saved_tiny(name), **settings)
    assert bminf.plan_of(model) == bminf.plan_of(expected)
    assert bminf.plan_of(model).is_streaming
    given = inputs_of(name)
    torch.testing.assert_close(output_of(model, given), output_of(expected, given))
    if TINY[name].generates and TINY[name].inputs != "audio":
        assert torch.equal(greedy(model, given), greedy(expected, given))
    del model.tokenizer
    assert attributes(bminf.unwrap(model)) == attributes(bminf.unwrap(expected))


def half_of(name: str, quantization: str | None, folder: Path) -> int:
    """A limit under which some blocks are streamed."""
    plan = bminf.plan_for(reference(name, folder), quantization)
    return (plan.least_limit + plan.total_bytes) // 2


def test_a_hub_id_is_downloaded(
    saved_tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(hub_id: str, allow_patterns: list[str]) -> str:
        asked.append((hub_id, allow_patterns))
        return str(saved_tiny("llama"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model = bminf.load("somebody/llama", quantization=None, device="cpu")
    assert type(model) is TINY["llama"].model
    ((hub_id, patterns),) = asked
    assert hub_id == "somebody/llama" and "*.safetensors" in patterns
    assert not {"*.bin", "*.py"} & set(patterns)


@for_each(("bloom",), lambda given: [n for n in given.layouts() if n.startswith("hf_")])
def test_golden_folders_of_transformers(name: str, case: str) -> None:
    given = golden(name)
    model = bminf.load(given.path / case, quantization=None, dtype="float32", device="cpu")
    real = given.tensors["attention_mask"]
    with torch.no_grad():
        found = model(given.tensors["input_ids"], attention_mask=real).logits
    assert largest(found[real.bool()], given.tensors["logits"][real.bool()]) <= given.tolerance


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_stands_for_its_folder(saved_tiny: Callable[[str], Path], name: str) -> None:
    loaded = bminf.load(saved_tiny("llama") / name, quantization=None, device="cpu")
    expected = bminf.load(saved_tiny("llama"), quantization=None, device="cpu")
    given = inputs_of("llama")
    assert torch.equal(output_of(loaded, given), output_of(expected, given))
