"""bminf.load() and save() of models of the zoo: the class, and what its own constructor gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import for_each, golden
from tiny_glm import ice_tokenizer, tiny_model, tokenizer_of

import bminf
from bminf.errors import ArgumentError, CheckpointError, UnsupportedModelError
from bminf.models import convert

Loader = Callable[..., Any]
KINDS = {
    "cpm1": bminf.models.CPM1,
    "cpm2": bminf.models.CPM2,
    "eva": bminf.models.EVA,
    "glm130b": bminf.models.GLM,
    "glm10b": bminf.models.GLM,
    "bloom": bminf.models.BLOOM,
}
NEEDED = {"cpm2": {"model": "cpm2"}, "eva": {"model": "eva"}}
MORE = {"glm130b": {"tokenizer": ice_tokenizer()}}


pytestmark = pytest.mark.filterwarnings("ignore:found no sentencepiece model")


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small checkpoint of each model, in the authors' layout."""
    root = tmp_path_factory.mktemp("zoo")
    return {name: tiny_model(name).write_original(root / name) for name in KINDS}


@pytest.fixture
def load(folders: dict[str, Path]) -> Iterator[Loader]:
    """load("cpm2", quantization=...): a model by its own constructor, closed after the test."""
    loaded = []

    def loader(name: str, **settings: Any) -> Any:
        settings = {"quantization": None, "tokenizer": tokenizer_of(name), **settings}
        loaded.append(KINDS[name](folders[name], device="cpu", **settings))
        return loaded[-1]

    yield loader
    for model in loaded:
        model.close()


def logits(model: Any, name: str) -> torch.Tensor:
    if name.startswith("glm"):
        return model.logits("the [MASK]")
    ids = list(range(11, 31))
    return model.logits(ids) if name in ("cpm1", "bloom") else model.logits(ids, ids[:9])


@pytest.mark.parametrize("name", KINDS)
def test_a_folder_of_the_zoo_gives_its_class(
    name: str, load: Loader, folders: dict[str, Path], tmp_path: Path
) -> None:
    expected = logits(load(name), name)
    converted = convert(folders[name], tmp_path / "to", None, model=name, **MORE.get(name, {}))
    for folder, needed in ((folders[name], NEEDED.get(name, {})), (converted, {})):
        more = {} if folder == converted else MORE.get(name, {})
        with bminf.load(folder, None, None, device="cpu", **needed, **more) as model:
            assert type(model) is KINDS[name]
            assert torch.equal(logits(model, name), expected)


def test_it_may_be_deterministic(folders: dict[str, Path]) -> None:
    with bminf.load(folders["cpm1"], device="cpu", deterministic=True) as model:
        assert model.engine._is_fixed


def test_the_format_is_that_of_the_folder_unless_it_is_said(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = convert(folders["cpm1"], tmp_path / "to", "int4")
    with (
        bminf.load(folder, device="cpu") as model,
        bminf.load(folders["cpm1"], device="cpu") as fresh,
    ):
        assert [one.model.layers[0].attention.qkv.form.bits for one in (model, fresh)] == [4, 8]
    with pytest.raises(ArgumentError, match="is packed as"):
        bminf.load(folder, quantization=bminf.Format(4), device="cpu")


@pytest.mark.parametrize("file", ["config.json", "vocab.txt", "model.safetensors"])
def test_a_byte_that_changed_is_noticed(
    file: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Also where another model would come of it."""
    path = convert(folders["cpm1"], tmp_path / "to", "int8") / file
    content = path.read_bytes()
    at = len(content) // 2
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    with pytest.raises(CheckpointError, match=r"not as (it was|they were) written|is not JSON"):
        bminf.load(tmp_path / "to", device="cpu")


def test_a_model_may_be_converted_to_several_files(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    one, several = (
        convert(folders["cpm1"], tmp_path / str(size), "int8", max_shard_size=size)
        for size in ("5GB", 20_000)
    )
    files = sorted(path.name for path in several.glob("*.safetensors*"))
    assert files[0] == f"model-00001-of-{len(files) - 1:05}.safetensors"
    assert files[-1] == "model.safetensors.index.json"
    with bminf.load(one, device="cpu") as whole, bminf.load(several, device="cpu") as again:
        assert torch.equal(logits(again, "cpm1"), logits(whole, "cpm1"))
    with bminf.load(several / files[-1], device="cpu") as again:  # the path of a file
        assert type(again) is KINDS["cpm1"]
    (several / files[1]).unlink()
    with pytest.raises(CheckpointError, match=f"{files[1]} is missing, which {files[-1]} names"):
        bminf.load(several, device="cpu")


def test_what_only_models_of_transformers_take_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ArgumentError, match=r"blocks is for models of transformers, .*of CPM1"):
        bminf.load(folders["cpm1"], device="cpu", blocks=["layers.0"])


def test_which_of_two_models_it_is_has_to_be_said(folders: dict[str, Path]) -> None:
    with pytest.raises(ArgumentError, match='say model="cpm2" or model="eva"'):
        bminf.load(folders["cpm2"], device="cpu")
    with pytest.raises(CheckpointError, match=r"holds .*, not CPM-2"):
        bminf.load(folders["cpm1"], device="cpu", model="cpm2")


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
@pytest.mark.parametrize("name", KINDS)
def test_a_model_of_the_zoo_is_saved_as_it_is(
    name: str, quantization: str | None, load: Loader, folders: dict[str, Path], tmp_path: Path
) -> None:
    head = {"head_quantization": quantization} if name == "glm130b" else {}
    model = load(name, quantization=quantization, **head)
    expected, plan = logits(model, name), model.plan
    bminf.save(model, tmp_path / "whole")
    with bminf.load(tmp_path / "whole", device="cpu") as again:
        assert type(again) is KINDS[name] and torch.equal(logits(again, name), expected)
    bminf.save(model, tmp_path / "shards", max_shard_size=20_000)
    assert len(list((tmp_path / "shards").glob("model-*-of-*.safetensors"))) > 1
    with bminf.load(tmp_path / "shards", device="cpu") as again:
        assert torch.equal(logits(again, name), expected)
    limit = (plan.least_limit + plan.total_bytes) // 2
    with bminf.load(tmp_path / "whole", limit, device="cpu") as streamed:
        assert streamed.plan.streamed
        bminf.save(streamed, tmp_path / "again")
    with bminf.load(tmp_path / "again", device="cpu") as again:
        assert torch.equal(logits(again, name), expected)
    with pytest.raises(UnsupportedModelError, match="closed"):
        bminf.save(streamed, tmp_path / "closed")


def checkpoints(given: Any) -> list[str]:
    return [layout for layout in given.layouts() if layout != "tokenizer"]


@for_each(("cpm1", "cpm2", "eva", "glm10b", "glm130b"), checkpoints)
def test_golden_layouts_load_as_their_class_does(name: str, case: str) -> None:
    given, is_glm = golden(name), name.startswith("glm")
    own = {"tokenizer": given.tokenizer()} if is_glm else {"config": given.config(case)}
    settings = dict(quantization=None, device="cpu", dtype=torch.float32, max_batch_size=2, **own)
    found = []
    for model in (
        bminf.load(
            given.path / case, max_length=given.most_tokens(), **settings, **NEEDED.get(name, {})
        ),
        given.load(case, max_batch_size=2),
    ):
        with model:
            found.append(model.logits("11 12 [MASK]") if is_glm else logits(model, name))
        assert type(model) is KINDS[name]
    assert torch.equal(*found)
