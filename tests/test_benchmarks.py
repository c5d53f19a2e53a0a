"""The benchmarks run: the harness on a toy, the offload case on a tiny model."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

# Benchmarks are not installed; at the end of the path, so that an installed bminf is found first.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import run
from benchmarks.harness import (
    Settings,
    Variant,
    Work,
    WrongResultError,
    document,
    measure,
    summary,
)
from benchmarks.whole_file import write_json

TINY = ("--model", "random", "--hidden-size", "64", "--layers", "6", "--vocabulary", "64")
QUICK = ("--warmup", "0", "--repeats", "2", "--rounds", "1", "--tokens", "4", "--device", "cpu")


def toy(log: list[str], name: str, value: int) -> Variant:
    @contextmanager
    def open() -> Iterator[Work]:
        log.append(f"open {name}")

        def work() -> int:
            log.append(f"run {name}")
            return value

        yield Work(work, lambda: {"size": value})
        log.append(f"close {name}")

    return Variant(name, open)


def test_order_of_a_measurement() -> None:
    log: list[str] = []
    settings = Settings(warmup=1, repeats=2, rounds=2)
    results = measure([toy(log, "a", 1), toy(log, "b", 1)], settings)
    one_round = [f"{what} {name}" for name in "ab" for what in ("open", *["run"] * 4, "close")]
    assert log == one_round * 2
    assert [[sample.round for sample in result.samples] for result in results] == [[0, 0, 1, 1]] * 2
    assert results[0].details == {"size": 1}


def test_wrong_result_is_not_timed() -> None:
    log: list[str] = []
    with pytest.raises(WrongResultError, match="b gives 2, the reference 1"):
        measure([toy(log, "a", 1), toy(log, "b", 2)], Settings(warmup=0, repeats=1))
    assert log.count("run b") == 1


@pytest.mark.parametrize("settings", [{"warmup": -1}, {"repeats": 0}, {"rounds": 0}])
def test_bad_settings(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="are needed"):
        Settings(**settings)


def test_summary() -> None:
    assert summary([3.0, 1.0, 2.0]) == {"min": 1.0, "median": 2.0, "max": 3.0, "spread": 1.0}


def test_document_is_complete() -> None:
    settings = Settings(warmup=0, repeats=3, rounds=1)
    results = measure([toy([], "a", 1)], settings)
    content = json.loads(json.dumps(document("toy", {"n": 1}, settings, results)))
    assert content["schema_version"] == 1
    assert content["parameters"] == {"n": 1}
    assert content["versions"]["torch"]
    assert content["hardware"]["cores"] >= 1
    result = content["results"][0]
    assert len(result["samples"]) == 3
    assert result["wall_s"]["min"] <= result["wall_s"]["median"] <= result["wall_s"]["max"]
    assert set(result["samples"][0]) == {"round", "wall_s", "cpu_s"}


@pytest.mark.filterwarnings("default")  # of accelerate
def test_offload_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "offload.json"
    assert run.main(["offload", *TINY, *QUICK, "--out", str(file)]) == 0
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


@pytest.mark.filterwarnings("default")  # of accelerate
def test_offload_case_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    import torch

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    threads = torch.get_num_threads()
    run.main(["offload", *TINY, *QUICK])
    assert not list(tmp_path.iterdir())
    assert torch.get_num_threads() == threads


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")  # of accelerate
def test_offload_case_on_a_gpu(tmp_path: Path) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    file = tmp_path / "offload.json"
    assert run.main(["offload", *TINY, *QUICK, "--device", "cuda", "--out", str(file)]) == 0
    results = json.loads(file.read_text())["results"]
    assert [result["name"] for result in results][2] == "cuda: accelerate half on cpu"
    assert all(result["peak_cuda_bytes"] for result in results)


def test_a_file_is_whole_while_another_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "content.json"
    write_json(file, {"n": 1})

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("benchmarks.whole_file.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_json(file, {"n": 2})
    assert json.loads(file.read_text()) == {"n": 1}


def test_unknown_case_is_wrong_usage() -> None:
    with pytest.raises(SystemExit) as exit:
        run.main(["onload"])
    assert exit.value.code == 2


def test_the_tables_of_the_readme_are_those_of_the_json_files() -> None:
    from benchmarks.report import ROOT, with_tables

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert with_tables(readme) == readme
    assert with_tables("<!-- none -->") == "<!-- none -->"
