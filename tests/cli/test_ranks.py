"""--tp: what is started, and what each rank prints. tests/models/test_leading.py is about what they
compute."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.run
from ranks import ANY_DEGREE
from tiny_glm import tiny_model
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from bminf.cli import main

COMMAND = ["generate", "glm", "the in", "--device", "cpu", "--temperature", "0", "--tp", "2"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tiny_model("glm10b", **ANY_DEGREE["glm10b"]).write_original(tmp_path / "glm")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The arguments that torchrun is given."""
    found: list[list[str]] = []
    monkeypatch.setattr(torch.distributed.run, "main", found.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return found


def test_the_verb_is_run_by_torchrun_as_it_was_given(started: list[list[str]]) -> None:
    for command in (COMMAND, ["bench", "glm", "--tp", "4"]):
        assert main(command) == 0
        ranks = started[-1]
        assert ranks[ranks.index("--nproc-per-node") + 1] == command[-1]
        assert ranks[-len(command) - 3 :] == [sys.executable, "-m", "bminf", *command]


def test_one_rank_is_this_process(folder: Path, started: list[list[str]], capsys: Any) -> None:
    assert main([*COMMAND[:-1], "1", "--max-new-tokens", "2"]) == 0
    assert not started and capsys.readouterr().out.strip()


@pytest.mark.parametrize(("codes", "expected"), [((2, 1), 2), ((-9, 1), 1)])
def test_the_exit_code_is_that_of_the_first_rank(
    monkeypatch: pytest.MonkeyPatch, codes: tuple[int, int], expected: int
) -> None:
    failures = {
        rank: ProcessFailure(rank, 100 + rank, code, "no file") for rank, code in enumerate(codes)
    }

    def fail(_: list[str]) -> None:
        raise ChildFailedError("bminf", failures)

    monkeypatch.setattr(torch.distributed.run, "main", fail)
    assert main(COMMAND) == expected


@pytest.mark.parametrize(
    ("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 128 + signal.SIGTERM)]
)
def test_a_signal_ends_all_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, number: signal.Signals, expected: int
) -> None:
    def end(_: list[str]) -> None:
        raise SignalException("got a signal", number)

    monkeypatch.setattr(torch.distributed.run, "main", end)
    assert main(COMMAND) == expected
    assert capsys.readouterr() == ("", "bminf: interrupted\n" if number == signal.SIGINT else "")


def test_an_interrupt_is_said_once_for_all_ranks(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    for name, value in {**place, "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("bminf.cli.generate.find", interrupt)
    assert main(COMMAND[:-2]) == 130
    assert capsys.readouterr() == ("", "")


def test_another_number_of_ranks_than_torchrun_has_started_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    place = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}
    for name, value in {**place, "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert main(COMMAND) == 2
    assert "--tp 2, but torchrun has started 4 ranks" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    assert main(COMMAND) == 2
    assert not capsys.readouterr().err, "rank 0 has said it"


def test_a_table_and_a_model_of_transformers_have_no_ranks(capsys: Any) -> None:
    assert main(["bench", "--table", "bloom", "--tp", "2"]) == 2
    assert "--tp is for a MODEL" in capsys.readouterr().err


def test_two_ranks_print_one_text(folder: Path) -> None:
    def said(*more: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "bminf", *COMMAND[:-2], "--max-new-tokens", "5", "--json"]
        done = subprocess.run([*command, *more], capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    one, two = said(), said("--tp", "2")
    assert two["text"] == one["text"] and two["stats"]["new_tokens"] == 5
