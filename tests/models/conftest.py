from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_zoo import write_cpm1, write_cpm2, write_eva

import bminf

Loader = Callable[..., Any]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small checkpoint of each model, in the authors' layout."""
    root = tmp_path_factory.mktemp("zoo")
    return {
        "cpm1": write_cpm1(root / "cpm1" / "original"),
        "cpm2": write_cpm2(root / "cpm2" / "original"),
        "eva": write_eva(root / "eva" / "original"),
    }


@pytest.fixture
def load(folders: dict[str, Path]) -> Iterator[Loader]:
    """load("cpm2", memory_limit=...): a model on the CPU, closed at the end of the test."""
    loaded = []

    def loader(name: str, **arguments: Any) -> Any:
        kind = {"cpm1": bminf.models.CPM1, "cpm2": bminf.models.CPM2, "eva": bminf.models.EVA}[name]
        settings = {"checkpoint": folders[name], "device": "cpu", "quantization": None, **arguments}
        with warnings.catch_warnings():
            # These CPM-1 folders have no sentencepiece model, and the library says so.
            warnings.filterwarnings("ignore", message="found no sentencepiece model")
            loaded.append(kind(**settings))
        return loaded[-1]

    yield loader
    for model in loaded:
        model.close()
