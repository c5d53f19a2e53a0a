"""CPU time of tokens: variants in processes that take turns, and what each of them does.

The processes are stand-ins here; what runs in them is called directly.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

import bminf
from benchmarks import run
from tools import decoding, decoding_work
from tools.decoding import FORMATS, NAMES, Work, chosen, command_of, gguf_in, save

CONFIG = LlamaConfig(
    vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1,
)  # fmt: skip
# Counts what it is asked, and gives that many seconds.
STAND_IN = """
import json, sys
for count, _ in enumerate(sys.stdin):
    about = {"weight_bytes": 2**20}
    sample = {"prefill_s": count, "token_s": count / 10}
    print(json.dumps(sample if count else about), flush=True)
"""


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the variants whose processes were started."""
    started: list[str] = []

    def command(name: str, *_: Any) -> list[str]:
        started.append(name)
        return [sys.executable, "-c", STAND_IN if name != "int8" else "exit()"]

    monkeypatch.setattr(decoding, "command_of", command)
    monkeypatch.setattr(decoding, "save_elsewhere", lambda *_: None)
    return started


def test_the_case(stand_ins: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "decoding.json"
    options = ("--variants", "float32", "int4 g32*", "--warmup", "1", "--rounds", "3")
    assert run.main(["decoding", *options, "--out", str(file)]) == 0
    content = json.loads(file.read_text())
    names = ["float32", *(f"int4 g32{own}" for own in ("", ", 8-bit scales"))]
    names += [f"{name}, head too" for name in names[1:]]
    assert [r["name"] for r in content["results"]] == stand_ins == names
    for result in content["results"]:
        assert [sample["prefill_s"] for sample in result["samples"]] == [2, 3, 4]
        assert result["token_s"]["median"] == 0.3
    shown = capsys.readouterr().out
    assert "| int4 g32, head too | 1.0 MiB | 300 | 1.00 | 3000 | 1.00 |" in shown


def test_a_process_that_ends_is_named(stand_ins: list[str]) -> None:
    with pytest.raises(RuntimeError, match="the process of int8 has ended"):
        run.main(["decoding", "--variants", "int8"])


def test_which_variants(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert chosen(["*"], None) == [name for name in NAMES if "llama.cpp" not in name]
    assert "left out: llama.cpp Q4_0: --llama-cpp names no folder\n" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="none of float32; int8; int4"):
        chosen(["int5"], None)
    with pytest.raises(SystemExit, match="node-llama-cpp, is missing"):
        chosen(["*"], tmp_path)


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("packs_head", [False, True])
def test_a_model_is_packed_and_writes_all_its_tokens(
    packs_head: bool, is_tied: bool, tmp_path: Path
) -> None:
    config = LlamaConfig.from_dict(CONFIG.to_dict() | {"tie_word_embeddings": is_tied})
    save(tmp_path, config, ["Q4_0"])
    assert gguf_in(tmp_path, "Q4_0").stat().st_size > 1000
    plain = decoding_work.opened(str(tmp_path), None, False)
    packing = json.loads(json.dumps(FORMATS["int4 g32"].to_json()))
    model = decoding_work.opened(str(tmp_path), packing, packs_head)
    assert isinstance(model.lm_head, bminf.QuantizedLinear) == packs_head
    assert isinstance(model.model.layers[0].mlp.up_proj, bminf.QuantizedLinear)
    sizes = [decoding_work.weight_bytes(own) for own in (plain, model)]
    assert 0 <= sizes[0] - sum(p.nbytes for p in plain.parameters()) < 1000  # RoPE's frequencies
    assert sizes[1] < sizes[0] / 1.5
    assert torch.equal(model.model.embed_tokens.weight, plain.model.embed_tokens.weight)
    found = decoding_work.sample(model, torch.ones(1, 3, dtype=torch.int64), 4)
    assert min(found.values()) > 0 and {*found} == {"prefill_s", "token_s"}


def test_commands_say_what_runs(tmp_path: Path) -> None:
    work = Work(prompt_tokens=5, tokens=7, threads=1)
    _, _, module, folder, packing, what, *numbers = command_of(
        "int4 g32, head too", tmp_path, work, None
    )
    assert (module, folder, what, numbers) == (
        "tools.decoding_work", str(tmp_path), "head", ["5", "7", "1"],
    )  # fmt: skip
    assert bminf.Format(**json.loads(packing)) == FORMATS["int4 g32"]
    assert command_of("float32", tmp_path, work, None)[4:6] == ["none", "blocks"]


# A library that says how it was called, and knows no last token.
LIBRARY = """
export async function getLlama(options) {
    const sequence = {
        clearHistory: async () => {},
        async *evaluate(prompt) {
            if (prompt.length !== 5) throw new Error("another prompt");
            for (let i = 0; ; i++) yield i;
        }
    };
    const context = {getSequence: () => sequence};
    return {loadModel: async () => ({createContext: async () => context})};
}
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="there is no node")
def test_the_worker_of_llama_cpp_answers_line_by_line(tmp_path: Path) -> None:
    home = tmp_path / "node_modules" / "node-llama-cpp"
    (home / "dist").mkdir(parents=True)
    (home / "dist" / "index.js").write_text(LIBRARY)
    (home / "package.json").write_text('{"version": "1.2.3", "type": "module"}')
    file = gguf_in(tmp_path, "Q8_0")
    file.write_bytes(b"123")
    command = command_of("llama.cpp Q8_0", tmp_path, Work(5, 4, 1), tmp_path)
    ended = subprocess.run(command, input="\n" * 3, capture_output=True, text=True, check=True)
    about, *samples = map(json.loads, ended.stdout.splitlines())
    assert about == {"weight_bytes": 3, "node-llama-cpp": "1.2.3"}
    assert len(samples) == 2
    assert all(0 <= one["token_s"] <= one["prefill_s"] + 1 for one in samples)
