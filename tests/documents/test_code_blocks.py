"""Every block of code in README and docs runs, or says why it does not.

`python` blocks run in one process, and so do `bminf` commands; where a line has a pipe, in a shell.
What they name lies in their folder: small models of the kinds that the pages speak of. `pip
install` is read, not run: its extras, files and packages exist. `text` blocks are nothing to run.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from pages import BLOCKS, ROOT, Block
from terminal import started
from tiny_bloom import tiny_bloom
from tiny_glm import tiny_glm10b
from tiny_llama import WORDS, save_llama
from tiny_zoo import tiny

from bminf.cli import main

TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PORT = "8000"  # in the pages
PATIENCE_S = 120
# Of the two commands that set all up, what follows the installation: one test runs the first, and
# this test is a part of the second.
RUN_ELSEWHERE = ("bminf demo", "pytest")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages call my-model, cpm2, glm-10b, glm-130b and bloom-7b1; each is small."""
    folder = tmp_path_factory.mktemp("pages")
    model = save_llama(folder / "my-model", TEMPLATE, max_position_embeddings=4096)
    ends = {"eos_token_id": list(range(1, len(WORDS), 2))}  # answers are short
    (model / "generation_config.json").write_text(json.dumps(ends))
    snapshot = folder / "hub" / f"models--{HUB_ID.replace('/', '--')}"
    shutil.copytree(model, snapshot / "snapshots" / "0")
    (snapshot / "refs").mkdir()
    (snapshot / "refs" / "main").write_text("0")
    _write_gguf(folder / "my-model.gguf")
    tiny("cpm2").write_original(folder / "cpm2")
    for name in ("glm-10b", "glm-130b"):
        tiny_glm10b(max_sequence_length=512).write_original(folder / name)
    tiny_bloom().write_huggingface(folder / "bloom-7b1")
    _write_tasks(folder)
    _write_changes(folder)
    return folder


def _write_tasks(folder: Path) -> None:
    """What `bminf eval` runs: a task of lm-evaluation-harness, and one of GLM-130B's authors."""
    (folder / "data").mkdir()
    (folder / "data" / "a.jsonl").write_text(
        '{"inputs": [60], "choices": [[61], [62]], "label": 0}'
    )
    (folder / "CoLA.yaml").write_text("name: CoLA\ntype: mul\nfile-pattern: '*.jsonl'\n")
    items = folder / "items.jsonl"
    items.write_text('{"context": "once", "choices": ["upon", "time"], "label": 0}')
    (folder / "my-task.yaml").write_text(
        f"task: my-task\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {items}}}}}\n"
        'test_split: test\noutput_type: multiple_choice\ndoc_to_text: "{{context}}"\n'
        'doc_to_choice: "{{choices}}"\ndoc_to_target: label\n'
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )


def _write_changes(folder: Path) -> None:
    """Something for `git diff` to show."""
    (folder / "poem.txt").write_text("once\n")
    for command in (["init", "-q"], ["add", "poem.txt"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    (folder / "poem.txt").write_text("once upon a time\n")


def _write_gguf(path: Path) -> None:
    from test_generate_command import write_gguf

    write_gguf(path)


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In the folder, from which what a block writes is removed."""
    import huggingface_hub.constants

    monkeypatch.chdir(folder)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder / "hub"))
    before = set(folder.iterdir())
    yield
    for written in set(folder.iterdir()) - before:
        shutil.rmtree(written) if written.is_dir() else written.unlink()


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[str]:
    """The port of one server, which has answered that it is ready."""
    port = _free_port()
    process = started("serve", "./my-model", "--memory-limit", "6GB", "--port", port, cwd=folder)
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", process)
        yield port
    finally:
        process.terminate()
        assert process.wait(PATIENCE_S) == 0


def _free_port() -> str:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            assert process.poll() is None and time.monotonic() < end_s
            time.sleep(0.05)


# ---- run -----------------------------------------------------------------------------------------

PYTHON = [block for block in BLOCKS if block.language == "python" and not block.reason]
BASH = [block for block in BLOCKS if block.language == "bash" and not block.reason]


# transformers says so of what peft asks.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_runs(block: Block, here: None, request: pytest.FixtureRequest) -> None:
    text = block.text
    if PORT in text:
        text = text.replace(PORT, request.getfixturevalue("server"))
    exec(compile(text, str(block), "exec"), {"__name__": "page"})


@pytest.mark.parametrize("block", BASH, ids=str)
def test_commands_run(
    block: Block, here: None, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    for line in block.text.replace("\\\n", " ").splitlines():
        for command in _without_comment(line).split(" && "):
            _run(command, request, monkeypatch)


def _without_comment(line: str) -> str:
    return re.sub(r"(^|\s+)#\s.*$", "", line).strip()


def _run(command: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if command.startswith("pip install"):
        _check_installation(shlex.split(command)[2:])
    elif command.startswith("bminf serve"):
        port = request.getfixturevalue("server")
        assert command == "bminf serve ./my-model --memory-limit 6GB", "start and ask it, too"
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models") as answer:
            assert b"my-model" in answer.read()
    elif command.startswith("bminf ") and "|" not in command and command != RUN_ELSEWHERE[0]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))  # of chat
        assert main(shlex.split(command)[1:]) == 0
    elif command and not command.endswith(RUN_ELSEWHERE):
        _in_a_shell(command, request)


def _in_a_shell(command: str, request: pytest.FixtureRequest) -> None:
    """`bminf` is the one that this test has imported."""
    import bminf

    if PORT in command:
        command = command.replace(PORT, request.getfixturevalue("server"))
    own = 'python() { "$PYTHON" "$@"; }; bminf() { python -m bminf "$@"; }'
    assert bminf.__file__ is not None
    environment = os.environ | {
        "PYTHONPATH": str(Path(bminf.__file__).parents[1]), "PYTHON": sys.executable,
    }  # fmt: skip
    script = f"set -o pipefail; {own}; {command}"
    done = subprocess.run(
        ["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0 and done.stdout, done.stderr


# ---- pip install ---------------------------------------------------------------------------------


def _check_installation(arguments: list[str]) -> None:
    """What it names can be had: this project, with extras that it has; files; pinned packages."""
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    while arguments:
        given = arguments.pop(0)
        if given == "-c":
            assert (ROOT / arguments.pop(0)).is_file()
        elif project := re.fullmatch(r"\.(?:\[([\w,]+)\])?", given):
            for extra in (project[1] or "").split(","):
                assert not extra or f'"{extra}": ' in setup, f"there is no extra {extra}"
        else:
            assert given == "--no-deps" or re.fullmatch(r"[\w-]+==[\d.]+", given), given


def test_an_extra_that_there_is_not_is_noticed() -> None:
    with pytest.raises(AssertionError, match="no extra dmo"):
        _check_installation([".[dmo]"])
