"""bminf.load() of folders that transformers has saved: as from_pretrained() and wrapper()."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from golden import TOLERANCE, for_each, golden, largest
from tiny_models import TINY, greedy, inputs_of, make, output_of

import bminf
from bminf.layout import tensors_of
from bminf.pretrained import open_pretrained

FEW = ["llama", "mixtral", "gpt2", "t5", "gemma3_text", "whisper"]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* are not quantized")
        warnings.filterwarnings("ignore", message="nothing in the blocks of .* could be quantized")
        yield


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny model, written once."""
    root, folders = tmp_path_factory.mktemp("pretrained"), dict[str, Path]()

    def folder(name: str) -> Path:
        if name not in folders:
            folders[name] = root / name
            make(name).save_pretrained(folders[name])
        return folders[name]

    return folder


def reference(name: str, folder: Path, **settings: Any) -> Any:
    return TINY[name].model.from_pretrained(folder, **settings)


def aliases(model: torch.nn.Module) -> set[frozenset[str]]:
    """Names of tensors that are one object."""
    names: dict[int, set[str]] = {}
    for name, _, tensor in tensors_of(model):
        names.setdefault(id(tensor), set()).add(name)
    return set(map(frozenset, names.values()))


def attributes(model: torch.nn.Module) -> dict[str, set[str]]:
    return {name: set(vars(module)) for name, module in model.named_modules()}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("name", TINY)
def test_what_is_to_be_read_is_what_transformers_reads(
    name: str, dtype: torch.dtype | None, saved: Callable[[str], Path]
) -> None:
    expected = reference(name, saved(name), dtype=dtype or "auto")
    opened = open_pretrained(saved(name), dtype)
    values = {name: tensor for name, _, tensor in tensors_of(expected)}
    assert opened.tensors.keys() == values.keys()
    for key, value in values.items():
        read = opened.tensors[key].read()
        assert read.dtype == value.dtype and torch.equal(read, value), key
    metas = {name: tensor for name, _, tensor in tensors_of(opened.model)}
    assert all(tensor.is_meta for tensor in metas.values())
    kinds = [{n: (type(t), t.requires_grad) for n, t in x.items()} for x in (metas, values)]
    assert kinds[0] == kinds[1]
    assert aliases(opened.model) == aliases(expected)
    assert attributes(opened.model) == attributes(expected)
    assert opened.model.config.to_dict() == expected.config.to_dict()
    if expected.can_generate():
        configs = [one.generation_config.to_dict() for one in (opened.model, expected)]
        assert configs[0] == configs[1]


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
@pytest.mark.parametrize("name", FEW)
def test_it_answers_as_the_wrapped_model_does(
    name: str, quantization: str | None, saved: Callable[[str], Path]
) -> None:
    limit = half_of(name, quantization, saved(name))
    settings = dict(quantization=quantization, memory_limit=limit, device="cpu")
    expected = bminf.wrapper(reference(name, saved(name)), **settings)
    model = bminf.load(saved(name), **settings)
    assert bminf.plan_of(model) == bminf.plan_of(expected)
    assert bminf.plan_of(model).streamed
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
    saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(hub_id: str, allow_patterns: list[str]) -> str:
        asked.append((hub_id, allow_patterns))
        return str(saved("llama"))

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
    assert largest(found[real.bool()], given.tensors["logits"][real.bool()]) <= TOLERANCE
