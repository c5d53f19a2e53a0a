"""A real model on the CPU: the same text, in the memory that the plan promises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from programs import told_by

import bminf

PROMPT = "Once upon a time,"


pytestmark = pytest.mark.slow  # the first test to ask for a report makes all of them


@pytest.fixture(scope="module")
def plain_ids(smollm2_folder: Path) -> list[list[int]]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    inputs = AutoTokenizer.from_pretrained(smollm2_folder)(PROMPT, return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    torch.set_num_threads(num_threads)
    return ids.tolist()


@pytest.fixture(scope="module")
def reports(smollm2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    program, offload_dir = (
        Path(__file__).with_name("smollm2_memory.py"),
        tmp_path_factory.mktemp("a"),
    )
    report: dict[str, Any] = told_by(program, smollm2_folder, offload_dir)
    assert list(offload_dir.iterdir()) == []
    return report


@pytest.mark.parametrize(("mode", "num_resident"), [("half", 15), ("all", 0)])
def test_it_keeps_to_the_plan(
    mode: str, num_resident: int, reports: dict[str, Any], plain_ids: list[list[int]]
) -> None:
    """RssAnon within 5% of the plan (the program also sets RLIMIT_DATA to it + 100 MiB)."""
    report = reports[mode]
    assert report["ids"] == plain_ids
    assert (report["num_resident"], report["num_streamed"]) == (num_resident, 30 - num_resident)
    if mode == "half":
        assert report["generating_bytes"] == pytest.approx(report["total_bytes"], rel=0.05)
    assert report["wrapping_bytes"] <= report["total_bytes"] + 2 * report["block_bytes"]


_WORK_BYTES = 40 * 2**20  # what a pass takes beside the plan; the embedding has 108 MiB


@pytest.mark.parametrize("mode", ["int4", "untied"])
def test_the_embedding_takes_no_memory_that_the_limit_counts(
    mode: str, reports: dict[str, Any], plain_ids: list[list[int]]
) -> None:
    report, tied = reports[mode], reports["all"]
    embedding_bytes, num_rows = 49152 * 576 * 4, 49152
    assert report["table_bytes"] == embedding_bytes and tied["table_bytes"] == 0
    assert report["generating_bytes"] <= report["total_bytes"] + _WORK_BYTES
    if mode == "untied":  # the head takes the place of what both were
        assert report["outside_bytes"] == tied["outside_bytes"] and report["ids"] == plain_ids
    else:
        head_bytes = num_rows * (576 + 8)  # codes, a scale and a sum of codes a row
        saved = tied["outside_bytes"] - report["outside_bytes"]
        assert saved == embedding_bytes - head_bytes


def test_quantized_it_still_speaks(smollm2_folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    model = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32)
    bminf.wrapper(model, memory_limit="200MB", device="cpu")
    assert bminf.plan_of(model).streamed
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    text = tokenizer.decode(model.generate(**inputs, max_new_tokens=4, do_sample=False)[0])
    assert "Paris" in text
