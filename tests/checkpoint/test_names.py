"""Names that training code wrapped, in every layout; and files that an editor marked."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from tiny_glm import tiny_glm10b
from tiny_zoo import save, tiny, write_huggingface

from bminf.arch.registry import checkpoint_in
from bminf.checkpoint.names import listed, unwrapped

Renaming = Callable[[str], str]
WRAPPED: dict[str, Renaming] = {
    "DataParallel": lambda name: f"module.{name}",
    "compiled": lambda name: f"_orig_mod.{name}",
    "both": lambda name: f"module._orig_mod.{name}",
    "the other way": lambda name: f"_orig_mod.module.{name}",
    "twice": lambda name: f"module.module._orig_mod.{name}",
    "FSDP": lambda name: f"_fsdp_wrapped_module.{name}",
    "layers compiled": lambda name: name.replace(".0.", ".0._orig_mod."),
    "layers checkpointed": lambda name: name.replace(".1.", ".1._checkpoint_wrapped_module."),
}


@pytest.mark.parametrize("how", WRAPPED)
def test_wrapped_names_are_those_of_the_model(how: str) -> None:
    names = ["wte.weight", "h.0.attn.bias", "h.1.attn.bias", "module_list.weight"]
    tensors = {WRAPPED[how](name): number for number, name in enumerate(names)}
    assert list(unwrapped(tensors).items()) == [(n, i) for i, n in enumerate(names)]


@pytest.mark.parametrize(
    "names", [[], ["module.a", "b"], ["a", "_orig_mod.a"], ["modules.a", "module"], ["a.module.b"]]
)
def test_other_names_stay(names: list[str]) -> None:
    assert list(unwrapped(dict.fromkeys(names))) == names


def test_of_many_names_five_are_shown() -> None:
    assert listed("abcde") == "'a', 'b', 'c', 'd', 'e'"
    assert listed("abcdefgh") == "'a', 'b', 'c', 'd', 'e' and 3 more"


def wrap(tensors: Mapping[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    return {WRAPPED[how](name): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("how", WRAPPED)
@pytest.mark.parametrize("form", ["zip", "safetensors", "sharded"])
def test_hugging_faces_files(how: str, form: str, tmp_path: Path) -> None:
    plain = checkpoint_in(tiny("cpm1").write_huggingface(tmp_path / "plain", form)).tensors
    tensors = {name: stored.read().clone() for name, stored in plain.items()}
    (tmp_path / "wrapped").mkdir()
    found = checkpoint_in(write_huggingface(tmp_path / "wrapped", wrap(tensors, how), form))
    assert found.tensors.keys() == plain.keys()
    assert all(torch.equal(found.tensors[name].read(), t) for name, t in tensors.items())


@pytest.mark.parametrize("how", WRAPPED)
@pytest.mark.parametrize("degree", [1, 2])
@pytest.mark.parametrize("name", ["cpm1", "cpm2", "glm10b"])
def test_the_authors_files(how: str, degree: int, name: str, tmp_path: Path) -> None:
    """How ranks are cut is told by the names, too."""
    made = tiny_glm10b() if name == "glm10b" else tiny(name)
    folder = made.write_original(tmp_path, degree)
    whole = checkpoint_in(folder).tensors
    plain = {name: stored.read().clone() for name, stored in whole.items()}
    for path in folder.rglob("*.pt"):
        saved = torch.load(path)
        save({**saved, "module": wrap(saved["module"], how)}, path)
    found = checkpoint_in(folder).tensors
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name].read(), tensor) for name, tensor in plain.items())


def test_modelcenters_file(tmp_path: Path) -> None:
    save(wrap({"input_embedding.weight": torch.ones(2)}, "both"), tmp_path / "pytorch_model.pt")
    assert list(checkpoint_in(tmp_path).tensors) == ["input_embedding.weight"]


def test_an_index_and_a_tracker_with_a_byte_order_mark(tmp_path: Path) -> None:
    folder = write_huggingface(tmp_path, {"a": torch.ones(1), "b": torch.ones(2)}, "sharded")
    index = folder / "model.safetensors.index.json"
    for encoding in ("utf-8-sig", "utf-16"):
        index.write_bytes(json.dumps(json.loads(index.read_bytes())).encode(encoding))
        assert set(checkpoint_in(folder).tensors) == {"a", "b"}
    original = tiny("cpm1").write_original(tmp_path / "original")
    tracker = original / "latest_checkpointed_iteration.txt"
    tracker.write_bytes(codecs.BOM_UTF8 + tracker.read_bytes())
    assert checkpoint_in(original).kind == "original"
