"""What `bminf plan` says, and the configuration of a small Llama."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bminf.cli import main

LLAMA: dict[str, Any] = dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4,
    vocab_size=100,
)  # fmt: skip
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **LLAMA}


def write_llama(folder: Path, **changes: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(CONFIG | changes), encoding="utf-8")
    return folder


def report(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    """The JSON that `bminf plan` prints for `argv`."""
    assert main(["plan", *argv, "--json"]) == 0
    parsed: dict[str, Any] = json.loads(capsys.readouterr().out)
    return parsed


def error(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that `bminf plan` fails with."""
    assert main(["plan", *argv]) in (1, 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("bminf: error: ")
    return line
