"""The harness on toys, the files that it writes, and the offload case on a tiny model.

bminf/cli/tables/document.py.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import run
from benchmarks.harness import (
    Call,
    Settings,
    Variant,
    Work,
    WrongResultError,
    measure,
    measure_calls,
    relative_error,
    write_json,
)
from benchmarks.report import ROOT
from bminf.cli.tables.document import document

CPU = torch.device("cpu")
PARTS = [f"{group}{part}" for group in "abc" for part in (0, 1)]  # of a ToyCase
ONCE = Settings(warmup=0, repeats=1, rounds=1)
TINY = ("--model", "random", "--hidden-size", "64", "--layers", "6", "--vocabulary", "64")
QUICK = ("--warmup", "0", "--repeats", "2", "--rounds", "1", "--tokens", "4", "--device", "cpu")


# ---- variants ------------------------------------------------------------------------------------


def toy(log: list[str], name: str, value: int) -> Variant:
    @contextmanager
    def open() -> Iterator[Work]:
        log.append(f"open {name}")

        def work() -> int:
            log.append(f"run {name}")
            return value

        yield Work(work, lambda samples: {"size": value, "runs": len(samples)})
        log.append(f"close {name}")

    return Variant(name, open)


def test_order_of_a_measurement() -> None:
    log: list[str] = []
    settings = Settings(warmup=1, repeats=2, rounds=2)
    results = measure([toy(log, "a", 1), toy(log, "b", 1)], settings)
    one_round = [f"{what} {name}" for name in "ab" for what in ("open", *["run"] * 4, "close")]
    assert log == one_round * 2
    assert [[sample["round"] for sample in result["samples"]] for result in results] == [
        [0, 0, 1, 1]
    ] * 2
    assert results[0]["details"] == {"size": 1, "runs": 2}


def test_wrong_result_is_not_timed() -> None:
    log: list[str] = []
    with pytest.raises(WrongResultError, match="b gives 2, the reference 1"):
        measure([toy(log, "a", 1), toy(log, "b", 2)], Settings(warmup=0, repeats=1))
    assert log.count("run b") == 1


def test_a_file_says_what_was_run_where_and_by_what() -> None:
    settings = Settings(warmup=0, repeats=3, rounds=1)
    content = json.loads(json.dumps(document("toy", {"n": 1}, vars(settings), ROOT)))
    assert content["schema_version"] == 1 and content["parameters"] == {"n": 1}
    assert content["versions"]["torch"] and content["hardware"]["cores"] >= 1
    assert bool(content["commit"]) == (ROOT / ".git").exists()
    assert content["settings"] == vars(settings)
    (result,) = json.loads(json.dumps(measure([toy([], "a", 1)], settings)))
    assert len(result["samples"]) == 3
    assert result["wall_s"]["min"] <= result["wall_s"]["median"] <= result["wall_s"]["max"]
    assert set(result["samples"][0]) == {"round", "wall_s", "cpu_s"}


def test_a_file_is_whole_while_another_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "content.json"
    write_json(file, {"n": 1})

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("benchmarks.harness.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_json(file, {"n": 2})
    assert json.loads(file.read_text()) == {"n": 1}


class ToyCase:
    """Groups of two parts each; from the part `end` on, someone stops the run."""

    def __init__(self, end: int) -> None:
        self.end = end
        self.done: list[str] = []

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """None of its own."""

    def prepare(self, arguments: argparse.Namespace) -> Any:
        return {}, [(name, partial(self.parts, name)) for name in "abc"]

    def parts(self, name: str, settings: Settings) -> Iterator[list[Any]]:
        for part in (f"{name}0", f"{name}1"):
            if len(self.done) == self.end:
                raise KeyboardInterrupt
            self.done.append(part)
            yield [{"name": part, "details": {}, "failure": "broken" if part == "c1" else None}]


@pytest.mark.parametrize("end", [0, 1, 2, 5])
def test_a_stopped_run_leaves_what_it_measured_and_names_the_rest(
    end: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, case = tmp_path / "toy.json", ToyCase(end)
    monkeypatch.setitem(run.CASES, "toy", (case, ""))
    with pytest.raises(KeyboardInterrupt):
        run.main(["toy", "--out", str(file)])
    content = json.loads(file.read_text())
    assert [result["name"] for result in content["results"]] == case.done == PARTS[:end]
    assert content["parameters"]["left_out"] == ["a", "b", "c"][end // 2 :]


@pytest.mark.parametrize(("seconds", "parts", "code"), [("3600", 6, 1), ("-1", 0, 0)])
def test_groups_that_would_begin_too_late_are_left_out(
    seconds: str, parts: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What could not be measured makes the exit status 1."""
    file = tmp_path / "toy.json"
    monkeypatch.setitem(run.CASES, "toy", (ToyCase(6), ""))
    monkeypatch.setattr(run, "table", lambda content: "")
    assert run.main(["toy", "--seconds", seconds, "--out", str(file)]) == code
    content = json.loads(file.read_text())
    assert [result["name"] for result in content["results"]] == PARTS[:parts]
    assert content["parameters"]["left_out"] == ([] if parts else ["a", "b", "c"])


# ---- calls ---------------------------------------------------------------------------------------


def call(name: str, run: Callable[[int], Any], error: float = 0.0, num_sets: int = 1) -> Call:
    details = {"num_sets": num_sets, "bound": 0.1, "num_bytes": 100, "num_ops": 10}
    return Call(name, run, lambda value: error, details)


def test_calls_take_turns_and_their_sets_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.harness._LEAST_SAMPLE_S", 0.0)  # so a sample is one call
    log: list[str] = []
    calls = [call(name, lambda i, n=name: log.append(f"{n}{i}"), num_sets=3) for name in "ab"]
    results = measure_calls(calls, Settings(warmup=1, repeats=2, rounds=2), CPU)
    check_and_estimate = ["a0", "a0", "a1", "b0", "b0", "b1"]
    rounds = ["a2", "a0", "a1", "b2", "b0", "b1"] * 2
    assert log == check_and_estimate + rounds
    for name in ("samples_s", "samples_cpu_s"):
        assert [[len(times) for times in result[name]] for result in results] == [[2, 2]] * 2


def test_a_call_is_checked_and_timed_within_what_is_around_it() -> None:
    entered: list[int] = []

    @contextmanager
    def around() -> Iterator[None]:
        entered.append(1)
        yield
        entered.pop()

    seen: list[list[int]] = []
    (result,) = measure_calls(
        [replace(call("in", lambda _: seen.append([*entered])), around=around)], ONCE, CPU
    )
    assert result["failure"] is None and not entered
    assert seen and all(one == [1] for one in seen)


def test_one_thread_does_not_pay_for_others_that_are_busy() -> None:
    """As those of OpenMP are after a call; more threads are counted together."""
    done = threading.Event()

    def wait_busily() -> None:
        while not done.is_set():
            sum(range(1000))

    other = threading.Thread(target=wait_busily)
    calls = [call("asleep", lambda _: time.sleep(0.05)) for _ in range(2)]
    calls[0].details["threads"] = 1
    other.start()
    try:
        one, both = measure_calls(calls, ONCE, CPU)
    finally:
        done.set()
        other.join()
    assert one["cpu_s"]["median"] < 0.01 < one["time_s"]["median"]
    assert both["cpu_s"]["median"] > one["cpu_s"]["median"]


def test_what_is_wrong_or_fails_is_not_timed_and_says_why() -> None:
    def fail(_: int) -> None:
        raise ValueError("no such kernel")

    log: list[int] = []
    calls = [call("wrong", log.append, error=0.2), call("broken", fail), call("right", id)]
    wrong, broken, right = measure_calls(calls, ONCE, CPU)
    assert log == [0]
    assert wrong["failure"] == "ArithmeticError: relative error 0.2, at most 0.1"
    assert broken["failure"] == "ValueError: no such kernel"
    assert wrong["time_s"] is broken["time_s"] is None and not wrong["samples_s"]
    assert right["failure"] is None and right["gbps"] > 0 and right["tops"] > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_what_is_not_written_is_wrong(dtype: torch.dtype) -> None:
    unwritten = replace(
        call("unwritten", lambda _: torch.empty(1000, dtype=dtype)),
        error=lambda value: relative_error(value, torch.zeros(1000)),
    )
    (result,) = measure_calls([unwritten], ONCE, CPU)
    assert result["error"] == float("inf")
    assert not torch.are_deterministic_algorithms_enabled()


# ---- the offload case ----------------------------------------------------------------------------


@pytest.mark.filterwarnings("default")  # of accelerate
def test_offload_case_writes_its_fields_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, temporary, threads = tmp_path / "offload.json", tmp_path / "tmp", torch.get_num_threads()
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setenv(
        "TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor")
    )  # torch's, if it is new
    assert run.main(["offload", *TINY, *QUICK, "--out", str(file)]) == 0
    assert not list(temporary.iterdir()) and torch.get_num_threads() == threads
    content = json.loads(file.read_text())
    results = {result["name"]: result for result in content["results"]}
    assert list(results) == [
        "cpu: plain",
        "cpu: bminf half resident",
        "cpu: accelerate half on disk",
        "cpu: bminf all streamed",
        "cpu: accelerate all on disk",
    ]
    assert all(len(result["samples"]) == 2 for result in results.values())
    assert results["cpu: bminf half resident"]["details"]["streamed"] == 3
    assert results["cpu: bminf all streamed"]["details"]["streamed"] == 6
    assert results["cpu: bminf all streamed"]["details"]["bytes_copied"] > 0
    assert content["parameters"]["layers"] == 6
    table = capsys.readouterr().out
    assert all(name in table for name in results)


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")  # of accelerate
def test_offload_case_on_a_gpu(tmp_path: Path) -> None:
    file = tmp_path / "offload.json"
    assert run.main(["offload", *TINY, *QUICK, "--device", "cuda", "--out", str(file)]) == 0
    results = json.loads(file.read_text())["results"]
    assert [result["name"] for result in results][2] == "cuda: accelerate half on cpu"
    assert all(result["peak_cuda_bytes"] for result in results)
