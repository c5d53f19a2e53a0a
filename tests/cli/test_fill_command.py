"""`bminf fill`: the blanks of CPM-2 and of GLM, in their places.

bminf/cli/fill.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from terminal import Command, Output
from tiny_glm import tiny_model
from tiny_llama import save_llama

from bminf.models import CPM2, GLM

CASES = {
    "cpm2": (CPM2, "今天<span>很好，我们<span>吧。", "<span>"),
    "glm10b": (GLM, "now [MASK] is a [MASK]", "[MASK]"),
}
OPTIONS = ("--max-new-tokens", "12", "--seed", "4", "--top-k", "40", "--device", "cpu")


@pytest.fixture
def fill(command: Command) -> Command:
    """fill("cpm2", folder, text, "--json", code=0)"""

    def run(name: str, folder: Path, text: str, *more: str, code: int = 0) -> Output:
        kind = () if name.startswith("glm") else ("--model", name)
        return command("fill", folder, text, *OPTIONS, *kind, *more, code=code)

    return run


@pytest.mark.parametrize("name", CASES)
def test_blanks_are_filled_in_their_places(name: str, tmp_path: Path, fill: Command) -> None:
    kind, text, mark = CASES[name]
    folder = tiny_model(name).write_original(tmp_path)
    with kind(folder, device="cpu") as model:
        blanks: list[dict[str, Any]] = model.fill_blank(text, max_tokens=12, seed=4, top_k=40)
    before, between, behind = text.split(mark)
    expected = before + blanks[0]["text"] + between + blanks[1]["text"] + behind
    assert fill(name, folder, text).out == f"{expected}\n"
    out, err = fill(name, folder, text, "--json", "--verbose")
    report = json.loads(out)
    assert (report["text"], report["blanks"]) == (expected, blanks)
    assert report["stats"]["new_tokens"] > 0 and "tokens read" in err
    assert report["stats"]["prefill"]["bound"] == "computing" and "\nprefill " in err
    assert ("tokens for each, prompt and answer" in err) == (name == "cpm2")


def test_a_text_without_a_mask_is_continued(tmp_path: Path, fill: Command) -> None:
    folder = tiny_model("glm10b").write_original(tmp_path)
    with GLM(folder, device="cpu") as model:
        (blank,) = model.fill_blank("now is a", max_tokens=12, seed=4, top_k=40)
    assert fill("glm10b", folder, "now is a").out == f"now is a{blank['text']}\n"


@pytest.mark.parametrize("name", ["cpm1", "eva", "llama"])
def test_models_that_fill_none_are_told_before_weights_are_read(
    name: str, tmp_path: Path, command: Command
) -> None:
    if name == "llama":
        (save_llama(tmp_path) / "model.safetensors").write_bytes(b"")
        folder, kind = tmp_path, []
    else:
        folder, kind = tiny_model(name).write_original(tmp_path), ["--model", name]
    assert "CPM-2 and GLM do" in command("fill", folder, "a [MASK]", *kind, code=1).error


def test_wrong_blanks_are_wrong_use(tmp_path: Path, fill: Command) -> None:
    folder = tiny_model("cpm2").write_original(tmp_path)
    assert "<span>" in fill("cpm2", folder, "今天很好", code=2).error
