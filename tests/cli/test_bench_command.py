"""`bminf bench`: what is measured is counted; times are only looked at for their sign.

bminf/cli/bench.py.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from terminal import Command
from tiny_glm import tiny_model
from tiny_llama import WORDS, save_llama, save_tokenizer

import bminf

RATES = ("prefill_tokens_per_s", "decode_tokens_per_s", "time_to_first_token_s")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its every token ends a text, so that a run which heeds them is short."""
    folder = save_llama(tmp_path_factory.mktemp("tiny"))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.eos_token_id = list(range(5, 100))
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def measured(command: Command) -> Callable[..., dict[str, Any]]:
    """measured(folder, "--runs", "1")"""
    return lambda *argv: json.loads(command("bench", *argv, "--device", "cpu", "--json").out)


def test_a_streamed_model(folder: Path, measured: Callable[..., dict[str, Any]]) -> None:
    sizes = ("--prompt-tokens", "9", "--max-new-tokens", "7", "--runs", "3")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    plan = bminf.plan_for(model, memory_limit="1GB", max_length=16, device="cpu")
    found = measured(folder, *sizes, "--memory-limit", str(plan.least_limit))
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


def test_a_resident_model_copies_nothing(
    folder: Path, measured: Callable[..., dict[str, Any]]
) -> None:
    found = measured(folder, "--runs", "1")
    assert (found["prompt_tokens"], found["new_tokens"]) == (128, 32)
    assert found["streamed_bytes"] == found["bytes_copied_per_token"] == 0


@pytest.mark.parametrize("name", ["cpm2", "eva", "glm10b"])
def test_a_built_in_model_ends_no_sooner(
    name: str, tmp_path: Path, measured: Callable[..., dict[str, Any]]
) -> None:
    folder = tiny_model(name).write_original(tmp_path)
    kind = () if name == "glm10b" else ("--model", name)
    sizes = ("--prompt-tokens", "12", "--max-new-tokens", "20", "--runs", "2")
    found = measured(folder, *sizes, *kind)
    assert [run["new_tokens"] for run in found["runs"]] == [20, 20]
    assert 0 < found["prompt_tokens"] <= 12 + 2  # a mask and a start token, or a sentinel
    assert all(found[name] > 0 for name in RATES)


def test_text(folder: Path, command: Command) -> None:
    options = ("--runs", "1", "--prompt-tokens", "4", "--max-new-tokens", "2", "--verbose")
    out, err = command("bench", folder, "--device", "cpu", *options)
    head, *lines = out.splitlines()
    assert head.startswith(str(folder)) and "0 B streamed" in head
    assert [line[:20].strip() for line in lines] == [
        "prefill", "decode", "time to first token", "copied a token", "bound of prefill",
        "bound of decode",
    ]  # fmt: skip
    assert lines[-1].endswith("computing; 0% of the time was waiting for copies")
    assert "fits entirely" in err


def test_experts_that_are_hit(
    tmp_path: Path, command: Command, measured: Callable[..., dict[str, Any]]
) -> None:
    save_tokenizer(tmp_path)
    config = transformers.MixtralConfig(
        vocab_size=len(WORDS), hidden_size=64, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    argv = ("--runs", "2", "--prompt-tokens", "4", "--max-new-tokens", "5")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    whole = bminf.plan_for(model, max_length=16, device="cpu").total_bytes
    plan = bminf.plan_for(model, memory_limit=whole - 1, max_length=16, device="cpu")
    limit = plan.least_limit + 5 * plan.experts.slot_bytes
    found = measured(tmp_path, *argv, "--memory-limit", str(limit))
    for runs, phase in [(1, run["decode"]) for run in found["runs"]] + [(2, found["decode"])]:
        assert phase["expert_hits"] + phase["expert_misses"] == runs * 4 * 4 * 2
        assert phase["expert_misses"] > 0
    sizes = ("--device", "cpu", "--memory-limit", str(limit))
    *_, last = command("bench", tmp_path, *argv, *sizes).out.splitlines()
    assert last.startswith("experts hit   ") and last.endswith("of 64 wanted while decoding")


@pytest.mark.parametrize("option", ["--max-new-tokens", "--prompt-tokens", "--runs"])
def test_wrong_values(option: str, command: Command) -> None:
    assert option in command("bench", "/no/such/model", option, "0", code=2).error
