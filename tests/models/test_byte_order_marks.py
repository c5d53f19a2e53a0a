"""Text files as some editors save them, with a byte-order mark, are read as without."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bminf.models import convert

Loader = Callable[..., Any]
TEXTS = {".json", ".txt"}


def mark(folder: Path, encoding: str, endings: set[str]) -> list[str]:
    """Write each text file of the folder again; the names of those."""
    found = [path for path in sorted(folder.rglob("*")) if path.suffix in endings]
    for path in found:
        path.write_bytes(path.read_bytes().decode().encode(encoding))
    return [path.name for path in found]


@pytest.mark.parametrize("name", ["cpm1", "cpm2", "eva", "glm10b"])
@pytest.mark.parametrize(
    ("encoding", "endings"), [("utf-8-sig", {".json", ".txt"}), ("utf-16", {".json"})]
)
def test_the_files_of_a_model(
    name: str,
    encoding: str,
    endings: set[str],
    folders: dict[str, Path],
    load: Loader,
    tmp_path: Path,
) -> None:
    marked = tmp_path / "marked"
    shutil.copytree(folders[name], marked)
    assert {"config.json", "model_config.json"} & set(mark(marked, encoding, endings))
    plain, other = load(name), load(name, checkpoint=marked)
    assert other.config == plain.config
    assert other.generate("a", 3, temperature=0) == plain.generate("a", 3, temperature=0)
    assert other.tokenizer.encode("a b") == plain.tokenizer.encode("a b")


def test_a_folder_that_convert_wrote(
    folders: dict[str, Path], load: Loader, tmp_path: Path
) -> None:
    folder = convert(folders["cpm2"], tmp_path / "own", None, "cpm2")
    before = load("cpm2", checkpoint=folder).logits([5, 6], [7, 8])
    assert set(mark(folder, "utf-8-sig", TEXTS)) == {"config.json", "vocab.txt"}
    assert torch.equal(load("cpm2", checkpoint=folder).logits([5, 6], [7, 8]), before)
    own = load("cpm2", checkpoint=folder, config=folder / "config.json")
    assert own.config == load("cpm2").config
