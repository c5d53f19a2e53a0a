from __future__ import annotations

import gc
import os
import tempfile
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tiny_glm import tiny_model, tokenizer_of

import bminf
from bminf.models import LanguageModel

Loader = Callable[..., Any]
KINDS = {
    "cpm1": bminf.models.CPM1,
    "cpm2": bminf.models.CPM2,
    "eva": bminf.models.EVA,
    "glm130b": bminf.models.GLM,
    "glm10b": bminf.models.GLM,
    "bloom": bminf.models.BLOOM,
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small checkpoint of each model, in the authors' layout."""
    root = tmp_path_factory.mktemp("zoo")
    return {name: tiny_model(name).write_original(root / name / "original") for name in KINDS}


@pytest.fixture
def load(folders: dict[str, Path]) -> Iterator[Loader]:
    """load("cpm2", memory_limit=...): a model on the CPU, closed at the end of the test."""
    loaded = []

    def loader(name: str, **arguments: Any) -> Any:
        settings = {
            **{"checkpoint": folders[name], "device": "cpu", "quantization": None},
            **{"tokenizer": tokenizer_of(name), **arguments},
        }
        with warnings.catch_warnings():
            # These CPM-1 folders have no sentencepiece model, and the library says so.
            warnings.filterwarnings("ignore", message="found no sentencepiece model")
            loaded.append(KINDS[name](**settings))
        return loaded[-1]

    yield loader
    for model in loaded:
        model.close()


@pytest.fixture
def silent(load: Loader) -> Loader:
    """silent("cpm1"): a model that must not be run, of 40 tokens and 2 rows."""

    def run(*_: Any) -> Any:
        raise AssertionError("something was computed before the error")

    def loader(name: str, **arguments: Any) -> Any:
        model = load(name, **{"max_length": 40, "max_batch_size": 2, **arguments})
        model.model.forward = model.model.head = model.model.encode = run
        model.model.encode_packed = run
        return model

    return loader


def held() -> Counter[Any]:
    """Threads, but for the one that tqdm begins with its first bar, and names of open files."""
    found: Counter[Any] = Counter(t for t in threading.enumerate() if t.name != "tqdm_monitor")
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # one that is closed just now
            found[os.readlink(f"/proc/self/fd/{number}")] += 1
    return found


def mapped(folder: Path) -> list[str]:
    """Lines of the process's memory map that are files of the folder."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line for line in lines if str(folder) in line]


@pytest.fixture
def refuse(
    load: Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., None]]:
    """refuse("cpm1", folder, CheckpointError, "words"): loading fails, and leaves nothing."""
    made: weakref.WeakSet[LanguageModel] = weakref.WeakSet()
    original = LanguageModel.__init__

    def begin(self: LanguageModel, *arguments: Any, **more: Any) -> None:
        made.add(self)
        original(self, *arguments, **more)
        made.discard(self)

    monkeypatch.setattr(LanguageModel, "__init__", begin)
    home = tmp_path / "offload"
    home.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(home))

    def check(name: str, folder: Any, error: type[Exception], match: str, **arguments: Any) -> None:
        gc.collect()  # what a load before this one left to the collector of cycles
        before = held()  # also threads of other tests that are about to end
        with pytest.raises(error, match=match):
            load(name, checkpoint=folder, **arguments)
        assert not held() - before
        assert [path for path in home.rglob("*") if path.is_file()] == []

    yield check
    gc.collect()
    assert not made, "a model that was refused is still in memory"
    assert mapped(tmp_path) == []
