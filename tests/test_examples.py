"""Each example runs as its first lines say, on a small checkpoint, and stays short."""

from __future__ import annotations

import io
import runpy
import sys
from pathlib import Path

import pytest
from tiny_glm import tiny_glm10b
from tiny_zoo import tiny

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(name: str, *arguments: str | Path, text: str = "") -> str:
    """What it prints, in this process: to import torch takes longer than any of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        patch.setattr(sys, "stdin", io.StringIO(text))
        patch.setattr(sys, "stdout", io.StringIO())
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return sys.stdout.getvalue()


@pytest.fixture(scope="module")
def cpm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("cpm2").write_original(tmp_path_factory.mktemp("cpm2") / "original")


@pytest.fixture(scope="module")
def converted(cpm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "cpm2-int4"
    assert str(folder) in run("convert.py", "cpm2", cpm2, folder, "--quantization", "int4")
    return folder


def test_generate(cpm2: Path) -> None:
    output = run("generate.py", "cpm2", cpm2, "今天天气", "--seed", "1", "--memory-limit", "1GB")
    assert output.startswith("今天天气") and "tokens" in output.splitlines()[-1]


def test_fill_blank_from_a_converted_folder(converted: Path) -> None:
    output = run("fill_blank.py", converted, "今天<span>很好", "--seed", "2")
    assert output.startswith("今天[") and output.endswith("]很好\n")


def test_dialogue(tmp_path: Path) -> None:
    eva = tiny("eva").write_original(tmp_path / "eva" / "original")
    output = run("dialogue.py", eva, "--seed", "3", text="你是谁\n今天天气很好\n\n")
    assert sum(line.startswith("> ") for line in output.splitlines()) == 3


@pytest.fixture(scope="module")
def glm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_glm10b().write_original(tmp_path_factory.mktemp("glm") / "original")


def test_glm_generate(glm: Path) -> None:
    output = run("glm_generate.py", glm, "the layer", "--max-tokens", "8", "--memory-limit", "1GB")
    assert "tokens a second" in output.splitlines()[-1]
    beams = run("glm_generate.py", glm, "the layer", "--max-tokens", "4", "--num-beams", "2")
    scores = [float(line.split()[0]) for line in beams.splitlines() if line.startswith(" ")]
    assert len(scores) == 2 and scores[0] >= scores[1]


def test_glm_fill_blank(glm: Path) -> None:
    output = run("glm_fill_blank.py", glm, "the [MASK] of a [MASK].", "--max-tokens", "3")
    assert output.startswith("the [") and output.rstrip().endswith("].")


def test_glm_24gb() -> None:
    output = run("glm_24gb.py")
    assert "on disk" not in output and "s on the link: 0.5" in output.splitlines()[-1]
    output = run("glm_24gb.py", "--host-memory", "30GB")
    assert "on disk" in output and "s on the disk" in output.splitlines()[-1]
    assert "fits entirely" in run("glm_24gb.py", "--memory-limit", "100GB")


def test_hand_written_model() -> None:
    assert run("hand_written_model.py")


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_examples_are_short_and_tested(example: Path) -> None:
    if example.name != "hand_written_model.py":
        assert len(example.read_text(encoding="utf-8").splitlines()) < 40
    tests = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("*.py"))
    assert example.name in tests
