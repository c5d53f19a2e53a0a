"""`bminf bench`: what is measured is counted; times are only looked at for their sign.

bminf/cli/bench.py.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import transformers
from tiny_glm import tiny_model
from tiny_llama import save_llama

import bminf
from bminf.cli import main

RATES = ("prefill_tokens_per_s", "decode_tokens_per_s", "time_to_first_token_s")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its every token ends a text, so that a run which heeds them is short."""
    folder = save_llama(tmp_path_factory.mktemp("tiny"))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.eos_token_id = list(range(5, 100))
    model.save_pretrained(folder)
    return folder


def report(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["bench", *argv, "--device", "cpu", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_streamed_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("--prompt-tokens", "9", "--max-new-tokens", "7", "--runs", "3")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    plan = bminf.plan_for(model, memory_limit="1GB", max_length=16, device="cpu")
    found = report(capsys, str(folder), *sizes, "--memory-limit", str(plan.least_limit))
    assert found["prompt_tokens"] == 9
    assert [run["new_tokens"] for run in found["runs"]] == [7, 7, 7]
    assert found["memory_limit"] == plan.least_limit and found["device"] == "cpu"
    assert found["streamed_bytes"] > 0 and found["load_s"] > 0
    for name in RATES:
        values = [run[name] for run in found["runs"]]
        assert min(values) > 0 and found[name] == statistics.median(values)
    # Six tokens; two blocks may have been copied ahead before the first of them, or after the last.
    block_bytes = max(block.nbytes for block in plan.blocks)
    for run in found["runs"]:
        copied = 6 * run["bytes_copied_per_token"]
        assert abs(copied - 6 * found["streamed_bytes"]) <= 2 * block_bytes
        assert run["decode"]["bytes_copied"] == pytest.approx(copied)
    for phase in ("prefill", "decode"):
        values = [run[phase]["waited_s"] for run in found["runs"]]
        assert found[phase]["waited_s"] == pytest.approx(sum(values))
        assert found[phase]["bound"] in ("copying", "computing")


def test_a_resident_model_copies_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, str(folder), "--runs", "1")
    assert (found["prompt_tokens"], found["new_tokens"]) == (128, 32)
    assert found["streamed_bytes"] == found["bytes_copied_per_token"] == 0


@pytest.mark.parametrize("name", ["cpm2", "eva", "glm10b"])
def test_a_built_in_model_ends_no_sooner(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_model(name).write_original(tmp_path)
    kind = () if name == "glm10b" else ("--model", name)
    sizes = ("--prompt-tokens", "12", "--max-new-tokens", "20", "--runs", "2")
    found = report(capsys, str(folder), *sizes, *kind)
    assert [run["new_tokens"] for run in found["runs"]] == [20, 20]
    assert 0 < found["prompt_tokens"] <= 12 + 2  # a mask and a start token, or a sentinel
    assert all(found[name] > 0 for name in RATES)


def test_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--runs", "1", "--prompt-tokens", "4", "--max-new-tokens", "2", "--verbose")
    capsys.readouterr()
    assert main(["bench", str(folder), "--device", "cpu", *options]) == 0
    out, err = capsys.readouterr()
    head, *lines = out.splitlines()
    assert head.startswith(str(folder)) and "0 B streamed" in head
    assert [line[:20].strip() for line in lines] == [
        "prefill", "decode", "time to first token", "copied a token", "bound of prefill",
        "bound of decode",
    ]  # fmt: skip
    assert lines[-1].endswith("computing; 0% of the time was waiting for copies")
    assert "fits entirely" in err


@pytest.mark.parametrize("option", ["--max-new-tokens", "--prompt-tokens", "--runs"])
def test_wrong_values(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["bench", "/no/such/model", option, "0"])
    assert exit.value.code == 2 and option in capsys.readouterr().err
