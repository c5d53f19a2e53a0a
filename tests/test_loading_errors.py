"""Folders that bminf.load() must not load: one clear error, and nothing of them is run or kept.

Files that are damaged by chance are in test_loading_damaged.py.
"""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make

import bminf
from bminf import loading
from bminf.errors import (
    ArgumentError,
    BMInfError,
    BudgetError,
    CheckpointError,
    UnknownKeywordError,
)
from bminf.models import source

pytestmark = pytest.mark.filterwarnings("ignore:.* are not quantized")


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model as transformers saves it, in one file and in several, and as save() does."""
    root, model = tmp_path_factory.mktemp("originals"), make("llama")
    model.save_pretrained(root / "plain")
    model.save_pretrained(root / "shards", max_shard_size="100KB")
    bminf.save(bminf.wrapper(model, "int8", device="cpu"), root / "saved", max_shard_size=10**9)
    return {path.name: path for path in root.iterdir()}


def edit(name: str, **fields: Any) -> Callable[[Path], None]:
    """Change fields of a JSON file, as somebody may who says so, or another program."""

    def change(folder: Path) -> None:
        path = folder / name
        written = {**json.loads(path.read_text()), **fields}
        written.pop("checksums", None)
        path.write_text(json.dumps(written))

    return change


def shard(folder: Path) -> Path:
    return sorted(folder.glob("*-00002-of-*"))[0]


def cut(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1000])


def put(name: str, value: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Path], None]:
    """Change one tensor; None takes it out."""

    def change(folder: Path) -> None:
        path = next(folder.glob("*.safetensors"))
        tensors = {n: t for n, t in load_file(path).items() if not n.startswith("padding.")}
        changed = value(tensors.pop(name))
        save_file(tensors if changed is None else {**tensors, name: changed}, path)

    return change


def disagree(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"]["model.norm.weight"] = next(
        file for file in files if file != index["weight_map"]["model.norm.weight"]
    )
    path.write_text(json.dumps(index))


def of_gpt2(folder: Path) -> None:
    make("gpt2").config.save_pretrained(folder)
    edit("config.json", architectures=["GPT2LMHeadModel"])(folder)


NORM = "model.norm.weight"
PROJECTION = "model.layers.3.mlp.up_proj.weight"
CODE = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}
BAD: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "another model's configuration": ("plain", of_gpt2, r"for a GPT2LMHeadModel, .* lacks "),
    "other sizes": (
        "plain", edit("config.json", hidden_size=64),
        "do not fit a LlamaForCausalLM: some of them have other shapes than config.json"),
    "a size that is none": (
        "plain", edit("config.json", hidden_size="x"), "'hidden_size': .*expected int"),
    "a configuration without classes": (
        "plain", edit("config.json", architectures=None), 'names its class under "architectures"'),
    "more layers": ("plain", edit("config.json", num_hidden_layers=9), r"lacks .*layers\.7\."),
    "a tensor less": ("plain", put(NORM, lambda _: None), f"lacks '{NORM}'"),
    "a tensor of another shape": (
        "plain", put(NORM, lambda t: t[:-1].clone()), "do not fit a LlamaForCausalLM"),
    "NaN": (
        "plain", put(PROJECTION, lambda t: t * torch.nan), f"{PROJECTION}.*holds NaN or infinity"),
    "NaN in what is not packed": (
        "plain", put(NORM, lambda t: t * torch.nan), f"{NORM}.* holds NaN, and"),
    "NaN in a scale": (
        "saved", put("model.layers.3.mlp.up_proj.scale", lambda t: t * torch.nan),
        r"up_proj\.scale' in .* holds NaN or infinity, and no model"),
    "infinity in a scale": (
        "saved", put("model.layers.3.mlp.up_proj.scale", lambda t: t / 0), "holds NaN or infinity"),
    "a file cut off": ("plain", cut, "is damaged or truncated"),
    "no weights": (
        "plain", lambda f: (f / "model.safetensors").unlink(), "holds no checkpoint, but"),
    "a shard less": ("shards", lambda f: shard(f).unlink(), r"is missing, which .* names"),
    "a shard that is another": (
        "shards", lambda f: shutil.copy(sorted(f.glob("*-00001-of-*"))[0], shard(f)), "lacks"),
    "an index that disagrees": ("shards", disagree, f"holds '{NORM}', which .* does not place"),
    "no class": ("plain", edit("config.json", architectures=[]), r"architectures is \[\], no "),
    "an unknown class": (
        "plain", edit("config.json", architectures=["Llama9ForCausalLM"]), "no class of transf"),
    "a class that is no model": (
        "plain", edit("config.json", architectures=["AutoTokenizer"]), "no class of transformers"),
    "an unknown model_type": (
        "plain", edit("config.json", model_type="llama9"), "of no model that transformers"),
    "code of its own": (
        "plain", edit("config.json", model_type="own", auto_map=CODE),
        "trust_remote_code=True to run the code"),
    "quantized by others": (
        "plain", edit("config.json", quantization_config={"quant_method": "gptq"}),
        r"quantized already \(gptq\)"),
    "no JSON": ("plain", lambda f: (f / "config.json").write_text("{"), "is not JSON"),
    "a version to come": ("saved", edit("bminf.json", format_version=3), "a newer one wrote it"),
    "no version": ("saved", edit("bminf.json", format_version=None), "no description of a saved"),
    "formats of no kind": ("saved", edit("bminf.json", packed=[1]), 'no object "packed"'),
    "a format of no kind": (
        "saved", edit("bminf.json", packed={"lm_head": {"bits": 3}}), "says no format, shape"),
    "fewer packed linears": ("saved", edit("bminf.json", packed={}), "lacks"),
    "a scale of another shape": (
        "saved", put("model.layers.3.mlp.up_proj.scale", lambda t: t[:1].clone()),
        r"mlp\.up_proj\.scale' in .* is torch\.float32 \(1,\); a Llama"),
    "codes of another kind": (
        "saved", put("model.layers.3.mlp.up_proj.qweight", lambda t: t.view(torch.uint8)),
        r"mlp\.up_proj\.qweight' in .* is torch\.uint8"),
    "a saved tensor less": ("saved", put(NORM, lambda _: None), f"lacks '{NORM}'"),
    "a scale less": (
        "saved", put("model.layers.3.mlp.up_proj.scale", lambda _: None), "is missing; a Llama"),
    "saved and cut off": ("saved", cut, "is damaged or truncated"),
    "saved without weights": (
        "saved", lambda f: (f / "bminf.safetensors").unlink(), "has neither bminf.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_folder_is_one_clear_error(
    name: str, originals: dict[str, Path], tmp_path: Path
) -> None:
    original, change, message = BAD[name]
    folder = shutil.copytree(originals[original], tmp_path / "bad")
    (folder / "code.py").write_text("raise SystemExit('it was run')")
    change(folder)
    before = readers()
    with pytest.raises(BMInfError, match=message):
        bminf.load(folder, device="cpu")
    assert readers() <= before


def readers() -> set[threading.Thread]:
    """The threads of the library; those of transformers end when they like."""
    return {one for one in threading.enumerate() if one.name.startswith("bminf")}


def test_what_is_there_is_said_where_nothing_can_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no .*; give a folder with a checkpoint"):
        bminf.load(tmp_path / "none")
    with pytest.raises(ArgumentError, match="checkpoint is a int; give a folder"):
        bminf.load(3)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="is empty"):
        bminf.load(tmp_path)


def test_code_of_a_folder_is_run_where_it_is_trusted(
    originals: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(originals["plain"], tmp_path / "own")
    (folder / "code.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class C(LlamaConfig):\n    model_type = 'own'\n"
        "class M(LlamaForCausalLM):\n    config_class = C\n"
    )
    edit("config.json", model_type="own", auto_map=CODE, architectures=["M"])(folder)
    model = bminf.load(folder, quantization=None, device="cpu", trust_remote_code=True)
    assert type(model).__name__ == "M"
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(model(ids).logits, make("llama")(ids).logits)


def test_arguments_that_cannot_be_kept(originals: dict[str, Path]) -> None:
    folder = originals["plain"]
    with pytest.raises(BudgetError, match=r"below the least that would do|not fit"):
        bminf.load(folder, "1KB", device="cpu")
    with pytest.raises(UnknownKeywordError, match=r"load\(\) has no keyword 'memory'"):
        bminf.load(folder, memory="1GB")  # type: ignore[call-arg]
    with pytest.raises(ArgumentError, match=r"config is for models of bminf\.models"):
        bminf.load(folder, config={}, device="cpu")
    with pytest.raises(ArgumentError, match=r"deterministic is for models of bminf\.models"):
        bminf.load(folder, deterministic=True, device="cpu")
    with pytest.raises(ArgumentError, match=r"fused_kernels is for models of bminf\.models"):
        bminf.load(folder, fused_kernels=False, device="cpu")
    with pytest.raises(ArgumentError, match="dtype='int8'; accepted"):
        bminf.load(folder, dtype="int8", device="cpu")
    with pytest.raises(ArgumentError, match="quantization='int5'; accepted"):
        bminf.load(folder, quantization="int5", device="cpu")


@pytest.mark.parametrize("name", ["./nothing", "../nothing", "no/-where", ""])
def test_a_path_is_not_asked_of_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(source, "download")
    monkeypatch.delattr(loading, "download")
    for opened in (bminf.load, bminf.models.CPM1):
        with pytest.raises(CheckpointError, match=rf"there is no '{re.escape(name)}'; "):
            opened(name)
