"""The session on a GPU's machine: its order and limits, and what a kill at any moment leaves."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import jieba
import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # as in test_benchmarks.py
sys.path.append(str(Path(__file__).resolve().parent / "kernels"))
sys.path.append(str(Path(__file__).resolve().parent / "gpu"))

import cases
import test_kernels
from host_launcher import served_by

from benchmarks import kernels, run
from benchmarks.gpu_session import (
    __main__,
    brought,
    few_cases,
    inspection,
    machine_code,
    preparation,
    probe,
    process,
    session,
    stand_in,
    summary,
    three_products,
)
from benchmarks.gpu_session import steps as plan
from benchmarks.gpu_session.archive import ARCHIVE
from benchmarks.gpu_session.outcome import LEGITIMATE_SKIPS, Report, problems_of
from benchmarks.gpu_session.session import LOG, SUMMARY, Session
from benchmarks.gpu_session.steps import Step
from benchmarks.kernels import PATHS, has_path, run_path
from bminf.cuda import compile as cuda_compile
from bminf.cuda.compile import compile_kernel, compiler_version
from bminf.cuda.source import Kernel

STEPS = [*plan.steps(Path("/results")), *plan.spare_steps(Path("/results"))]
TEST_FILES = {argument for step in STEPS if step.is_tests for argument in step.arguments[3:]} & {
    str(file.relative_to(process.ROOT)) for file in (process.ROOT / "tests").rglob("test_*.py")
}


def packed(folder: Path) -> dict[str, bytes]:
    """What the archive holds; it is whole if this can be read."""
    with tarfile.open(folder / ARCHIVE) as archive:
        found = {}
        for entry in archive.getmembers():
            content = archive.extractfile(entry)
            assert content is not None
            found[entry.name] = content.read()
        return found


def new_session(folder: Path, **arguments: Any) -> Session:
    return Session(folder, folder / ARCHIVE, brought.environment(Path("none")), **arguments)


@pytest.fixture(autouse=True)
def _no_least_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "_LEAST_S", 0.0)


# ---- what is run ---------------------------------------------------------------------------------


def test_what_matters_most_comes_first() -> None:
    assert [step.name for step in STEPS if not step.is_spare] == [
        "probe", "kernel tests", "kernels large", "cuda tests", "zoo", "zoo tests", "glm",
        "kernels w8a8", "kernels small", "kernels bfloat16",
    ]  # fmt: skip
    assert [step.name for step in STEPS if step.is_spare] == [
        "offload", "kernels formats", "compiled layers", "speed", "kernels rows",
        "benchmark tests",
    ]  # fmt: skip
    assert [step.is_spare for step in STEPS] == sorted(step.is_spare for step in STEPS)
    names = [name for step in STEPS for name in (*step.files, step.reports)]
    assert len(names) == len(set(names))


def test_the_limits_of_all_steps_are_less_than_eight_minutes() -> None:
    needed_s = sum(step.seconds for step in plan.steps(Path()))
    assert needed_s <= plan.SECONDS < 8 * 60  # nothing is cut for another step's sake
    assert plan.SECONDS + 2 * process._PATIENCE_S < 8 * 60
    assert all(step.seconds >= 12 for step in STEPS)  # else it would never be begun
    assert sum(step.seconds for step in inspection.steps(Path())) <= inspection.SECONDS == 90


@pytest.mark.parametrize("step", [s for s in STEPS if not s.is_tests and s.files], ids=str)
def test_the_arguments_of_each_benchmark_are_known_to_it(step: Step) -> None:
    module, *arguments = step.arguments
    if module == "benchmarks.run":
        parsed = run._parser().parse_args(arguments)
        assert parsed.out.name in step.files
        assert getattr(parsed, "seconds", 0) <= step.seconds - plan.START_S
    assert (Path(process.ROOT) / f"{module.replace('.', '/')}.py").is_file()


def test_resident_models_are_measured_before_streamed_ones() -> None:
    for name in ("zoo", "glm"):
        (step,) = (step for step in STEPS if step.name == name)
        parsed = run._parser().parse_args(step.arguments[1:])
        first, second = (int(limit.removesuffix("GB")) for limit in parsed.memory_limit)
        assert first > second


def test_tests_are_named_by_file_and_each_once() -> None:
    chosen = {step.name: step.arguments for step in STEPS if step.is_tests}
    marked = {
        str(file.relative_to(process.ROOT))
        for file in (process.ROOT / "tests").rglob("test_*.py")
        if re.search(r"^(@|pytestmark = )pytest\.mark\.gpu", file.read_text(), re.MULTILINE)
    }
    assert marked == TEST_FILES
    text = (process.ROOT / plan.KERNEL_TESTS).read_text(encoding="utf-8")
    for name, own in ((plan.COMPILED, "compiled layers"), (plan.SPEED, "speed")):
        assert f"def {name}" in text and chosen[own][4:6] == ("-k", name)
        assert f"not {name}" in chosen["kernel tests"][5]
    assert all(arguments[-2:] == ("-vv", "--durations=15") for arguments in chosen.values())


# ---- a dry run -----------------------------------------------------------------------------------


def test_a_dry_run_leaves_all_files_in_one_archive(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert __main__.main([str(tmp_path), "--dry-run"]) == 0
    content = packed(tmp_path)
    reports = {step.reports for step in STEPS if step.is_tests}
    files = {name for step in STEPS for name in step.files}
    assert set(content) == {LOG, SUMMARY} | reports | files
    assert content == {name: (tmp_path / name).read_bytes() for name in content}
    log, printed = content[LOG].decode(), capsys.readouterr().out
    headers = [line.split(":")[0] for line in log.splitlines() if line.startswith("====")]
    assert headers == [f"==== {step.name}" for step in STEPS]
    assert re.search(r"kernel tests: ok, \d+ s, 3 passed, 0 failed, 0 skipped\n", printed)
    assert printed.endswith(content[SUMMARY].decode())


def hanging(step: Step, folder: Path) -> Step:
    return stand_in.stand_in(step, folder, "--hang-after", "1")


def first_file(step: Step, folder: Path) -> Path:
    return folder / (step.reports if step.is_tests else step.files[0])


def has_content(file: Path) -> bool:
    return file.is_file() and file.stat().st_size > 0


def limit_is_reached_with(file: Path, argument: str) -> Callable[..., int | None]:
    """In place of waiting: a process with `argument` reaches its limit once `file` is written."""

    def wait(running: subprocess.Popen[bytes], *_: Any) -> int | None:
        while running.poll() is None:
            if argument in running.args and has_content(file):  # type: ignore[operator]
                return None
            time.sleep(0.01)
        return running.returncode

    return wait


@pytest.mark.parametrize("number", range(len(STEPS)), ids=[step.name for step in STEPS])
def test_a_step_that_reaches_its_limit_leaves_what_it_had_found(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, others = STEPS[number], STEPS[max(0, number - 1) : number + 2]
    chosen = [(hanging if s is step else stand_in.stand_in)(s, tmp_path) for s in others]
    limit = limit_is_reached_with(first_file(step, tmp_path), "--hang-after")
    monkeypatch.setattr(process, "_wait", limit)
    one = new_session(tmp_path)
    assert one.run(chosen, 1000) == 1
    assert [outcome.is_good for outcome in one.outcomes] == [s is not step for s in others]
    content = packed(tmp_path)
    assert f"{step.name}: STOPPED" in content[SUMMARY].decode()
    for other in others:
        num_groups = 1 if other is step else stand_in.NUM_GROUPS
        for name in other.files:
            found = json.loads(content[name])
            assert len(found["results"]) == num_groups
            assert len(found["parameters"]["left_out"]) == stand_in.NUM_GROUPS - num_groups
        if other.is_tests:
            assert len(content[other.reports].splitlines()) == num_groups


def begin(folder: Path, number: int) -> tuple[subprocess.Popen[str], int]:
    """A session of its own process, in the midst of STEPS[number]; and the step's process."""
    program = (
        "import sys\nfrom pathlib import Path\n"
        "folder, number = Path(sys.argv[1]), int(sys.argv[2])\n"
        "from benchmarks.gpu_session import process, session, steps, stand_in\n"
        "process._LOOK_S = 0.05\n"
        "chosen = [*steps.steps(folder), *steps.spare_steps(folder)]\n"
        "extra = {number: ('--hang-after', '1')}\n"
        "chosen = [stand_in.stand_in(s, folder, *extra.get(i, ())) for i, s in enumerate(chosen)]\n"
        "one = session.Session(folder, folder / 'session.tgz', {})\n"
        "sys.exit(one.run(chosen[number - 1:number + 2], 1000))\n"
    )
    running = subprocess.Popen(
        [sys.executable, "-c", program, str(folder), str(number)],
        env={**os.environ, "PYTHONPATH": str(process.ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    name = STEPS[number].files[0]
    until(lambda: (folder / ARCHIVE).is_file() and name in packed(folder))
    return running, int(re.findall(r"^process (\d+)", (folder / LOG).read_text(), re.MULTILINE)[-1])


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def has_ended(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True
    return status.rpartition(")")[2].split()[0] == "Z"


@pytest.mark.parametrize("number", [2, 9])
def test_a_killed_session_leaves_a_whole_archive_and_no_process(
    number: int, tmp_path: Path
) -> None:
    running, child = begin(tmp_path, number)
    running.kill()
    running.communicate()
    content = packed(tmp_path)
    assert len(json.loads(content[STEPS[number].files[0]])["results"]) == 1
    before = STEPS[number - 1]
    assert f"{before.name}: ok" in content[SUMMARY].decode()
    assert {*before.files, *([before.reports] if before.is_tests else [])} <= set(content)
    until(lambda: has_ended(child))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_session_that_is_told_to_end_says_so(number: signal.Signals, tmp_path: Path) -> None:
    running, child = begin(tmp_path, 2)
    running.send_signal(number)
    printed, _ = running.communicate()
    assert running.returncode == 1
    content = packed(tmp_path)
    assert f"stopped by {number.name}" in printed
    text = content[SUMMARY].decode()
    assert text.strip() in printed and "kernels large: STOPPED" in text
    assert "kernel tests: ok" in text and "cuda tests" not in text
    assert len(json.loads(content[STEPS[2].files[0]])["results"]) == 1
    assert has_ended(child)


def test_a_process_that_heeds_nothing_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "_PATIENCE_S", 0.1)
    ready = tmp_path / "ready"
    program = (
        "import signal, pathlib, time; signal.signal(signal.SIGINT, signal.SIG_IGN);"
        f"pathlib.Path({str(ready)!r}).write_text('1'); time.sleep(600)"
    )
    monkeypatch.setattr(process, "_wait", limit_is_reached_with(ready, "-c"))
    with (tmp_path / "log").open("wb") as log:
        command = [sys.executable, "-c", program]
        assert process.run(command, {}, log.fileno(), 0.0, lambda: None) is None


def test_what_is_left_behind_by_a_step_ends_with_it(tmp_path: Path) -> None:
    program = (
        "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c',"
        "'import time; time.sleep(600)']); print(p.pid, flush=True)"
    )
    with (tmp_path / "log").open("wb") as log:
        assert process.run([sys.executable, "-c", program], {}, log.fileno(), 60, lambda: None) == 0
    pid = int((tmp_path / "log").read_text())
    until(lambda: has_ended(pid))


def test_a_session_goes_on_after_failures_and_within_its_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = Step("bad", ("timeit", "-n1", "no_such_name"), 60)
    steps = [
        Step("good", ("json.tool", "--help"), 60),
        bad,
        replace(bad, name="late", seconds=-1),
        replace(bad, name="spare", seconds=-1, is_spare=True),
    ]
    one = new_session(tmp_path)
    assert one.run(steps, 100) == 1
    assert [outcome.is_good for outcome in one.outcomes] == [True, False, False, True]
    printed = capsys.readouterr().out
    assert "good: ok" in printed and "bad: FAILED, exit status 1" in printed
    assert "its last words: NameError: name 'no_such_name' is not defined" in printed
    assert "late: not begun, no time was left" in printed
    assert "usage:" in (tmp_path / LOG).read_text()


def test_results_of_an_earlier_session_are_not_taken_for_new_ones(tmp_path: Path) -> None:
    (tmp_path / "kernels-cuda-large.json").write_text("{}")
    (tmp_path / "large.jsonl").write_text("{}")
    step = Step("large", ("no_such_module",), 60, files=("kernels-cuda-large.json",))
    assert new_session(tmp_path).run([step], 100) == 1
    assert set(packed(tmp_path)) == {LOG, SUMMARY}


def test_the_archive_may_lie_elsewhere(tmp_path: Path) -> None:
    """A machine may hand back a few files only."""
    options = ("--dry-run", "--only", "zoo", "--archive", str(tmp_path / "out.tgz"))
    assert __main__.main([str(tmp_path / "results"), *options]) == 0
    assert not (tmp_path / "results" / ARCHIVE).exists()
    with tarfile.open(tmp_path / "out.tgz") as archive:
        assert set(archive.getnames()) == {LOG, SUMMARY, plan.ZOO}


def test_a_file_that_cannot_be_shown_does_not_cost_the_summary(tmp_path: Path) -> None:
    (tmp_path / "kernels-cuda-a.json").write_text('{"results": [')
    started = {"results": [], "parameters": {"left_out": ["x", "y"]}}
    (tmp_path / "kernels-cuda-b.json").write_text(json.dumps(started))
    text = summary.summary_of(tmp_path, [])
    assert "kernels-cuda-a.json cannot be shown: JSONDecodeError" in text
    assert "not measured, of lack of time: 2 groups" in text


# ---- steps of tests ------------------------------------------------------------------------------


def toy(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> Step:
    (folder / "test_toy.py").write_text(text)
    monkeypatch.setattr(process, "ROOT", folder)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # quicker
    return Step("toy", ("pytest", ".", "-vv"), 120, is_tests=True)


def test_each_test_of_a_step_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        "import pytest\n"
        "def test_a(): pass\n"
        "def test_b(): assert 1 == 2\n"
        "def test_c(): pytest.skip('needs two GPUs')\n"
        "def test_d(): pytest.skip('torch sees no CUDA device')\n"
        "@pytest.fixture\n"
        "def f():\n    yield\n    assert 3 == 4\n"
        "def test_e(f): pass\n"
    )
    step = toy(tmp_path, text, monkeypatch)
    (tmp_path / "test_other.py").write_text("import no_such_module\ndef test_f(): pass\n")
    one = new_session(tmp_path / "out")
    assert one.run([step], 1000) == 1
    (outcome,) = one.outcomes
    assert outcome.problems == [
        "test_other.py: E   ModuleNotFoundError: No module named 'no_such_module'",
        "test_toy.py::test_b: assert 1 == 2",
        "test_toy.py::test_e: assert 3 == 4",
        "test_toy.py::test_d: skipped, which is not declared: torch sees no CUDA device",
    ], (tmp_path / "out" / LOG).read_text()
    assert "toy: FAILED, exit status 1" in str(outcome)
    assert "1 passed, 3 failed, 2 skipped" in str(outcome)


def test_tests_that_are_all_skipped_have_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pytest itself is content with that, also where each reason is a good one."""
    text = "import pytest\ndef test_a(): pytest.skip('needs two GPUs')\n"
    one = new_session(tmp_path / "out")
    assert one.run([toy(tmp_path, text, monkeypatch)], 1000) == 1
    (outcome,) = one.outcomes
    assert outcome.code == 0 and outcome.problems == ["every test was skipped"]
    assert "toy: FAILED, " in str(outcome) and "1 skipped" in str(outcome)


PASSED = Report("test_a", "passed")
SKIPPED = Report("test_b", "skipped", "the targets are for H100, not for a toy")


@pytest.mark.parametrize(
    ("reports", "problems"),
    [
        ([], ["no test was run: nothing was collected, or pytest did not begin"]),
        ([PASSED], []),
        ([PASSED, SKIPPED], []),
        ([SKIPPED], ["every test was skipped"]),
        ([PASSED, replace(SKIPPED, reason="needs a printer")], []),  # allowed below
        (
            [PASSED, replace(SKIPPED, reason="needs 8 GiB of GPU memory")],
            ["test_b: skipped, which is not declared: needs 8 GiB of GPU memory"],
        ),
        (
            [PASSED, *(Report(f"test_{i}", "skipped", "no GPU") for i in range(400))],
            ["test_0 and 399 more: skipped, which is not declared: no GPU"],
        ),
    ],
)
def test_skips_have_to_be_declared(reports: list[Report], problems: list[str]) -> None:
    assert problems_of(reports, ["needs a printer"]) == problems


def test_the_declared_skips_are_those_of_the_tests() -> None:
    texts = [(process.ROOT / file).read_text() for file in sorted(TEST_FILES)]
    for reason in LEGITIMATE_SKIPS:
        assert any(re.search(rf"pytest\.skip\(f?['\"]{reason}", text) for text in texts), reason


def test_killed_tests_leave_what_they_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (
        "import pathlib, time\ndef test_a(): pass\n"
        "def test_b(): pathlib.Path('ready').write_text('1'); time.sleep(600)\n"
    )
    step = toy(tmp_path, text, monkeypatch)
    monkeypatch.setattr(process, "_wait", limit_is_reached_with(tmp_path / "ready", "pytest"))
    monkeypatch.setattr(process, "_interrupt", lambda _: None)  # straight to SIGKILL
    one = new_session(tmp_path / "out")
    assert one.run([step], 1000) == 1
    assert "toy: STOPPED" in str(one.outcomes[0]) and "1 passed" in str(one.outcomes[0])
    assert "test_toy.py::test_b" in packed(tmp_path / "out")[LOG].decode()  # the one that hung


def test_tests_behind_a_broken_context_get_a_process_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (
        "broken = []\n"
        "def use(breaks=False):\n"
        "    broken.extend([1] * breaks)\n"
        "    assert not broken, 'an illegal memory access was encountered'\n"
        "def test_a(): assert not 'plainly wrong'\n"
        "def test_b(): use(breaks=True)\n"
        "def test_c(): use()\n"
        "def test_d(): use(breaks=True)\n"
    )
    step = toy(tmp_path, text, monkeypatch)
    one = new_session(tmp_path / "out")
    one.run([step], 1000)
    (outcome,) = one.outcomes
    failed = [problem.split(": ")[0] for problem in outcome.problems]
    right = [f"test_toy.py::test_{name}" for name in "abd"]
    assert failed == right, (tmp_path / "out" / LOG).read_text()
    assert outcome.code == 1 and "1 passed, 3 failed" in str(outcome)


# ---- what is brought along -----------------------------------------------------------------------


def jieba_wheel(folder: Path) -> Path:
    """Of the package as it is installed here."""
    wheel, package = folder / "jieba-0.42.1-py3-none-any.whl", Path(jieba.__file__).parent
    with zipfile.ZipFile(wheel, "w") as content:
        for file in package.rglob("*"):
            if file.is_file() and file.suffix != ".pyc":
                content.write(file, Path("jieba") / file.relative_to(package))
    return wheel


PREPARED = machine_code.kernels(90)[:2]

# A machine with neither: no package is found but what the session names, and nothing compiles.
FINDS = """
from bminf.cuda.compile import compile_kernel
from bminf.cuda.source import Kernel
from bminf.errors import KernelError
for kernel in PREPARED: assert compile_kernel(kernel, 90)[:4] == b"\\x7fELF"
try: compile_kernel(OTHER, 90)
except KernelError as error: assert "CuPy cannot be imported" in str(error)
else: raise AssertionError("it was compiled")
import jieba
assert "/packages/jieba" in jieba.__file__.replace("\\\\", "/"), jieba.__file__
assert jieba.lcut("今天天气很好") == ["今天天气", "很", "好"]
"""


def finding(folder: Path) -> Step:
    """A step on such a machine."""
    other = machine_code.kernels(90)[2]
    script = folder / "finds.py"
    script.write_text(
        FINDS.replace("import jieba\n", "import jieba\njieba.setLogLevel(60)\n", 1)
        .replace("PREPARED", repr(PREPARED))
        .replace("OTHER", repr(other))
    )
    home = folder / "home"
    home.mkdir()
    own = (("HOME", str(home)), ("XDG_CACHE_HOME", ""), ("TMPDIR", str(home)))
    return Step("finding", (), 120, tool=(sys.executable, "-S", str(script)), environment=own)


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(machine_code, "kernels", lambda capability: PREPARED)
    wheel = jieba_wheel(tmp_path)
    arguments = [str(tmp_path / "prepared"), "--nvrtc", "installed", "--jieba", str(wheel)]
    assert __main__.main(["prepare", *arguments]) == 0
    return tmp_path / "prepared"


def test_what_was_prepared_is_found_where_nothing_else_is(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the real list of kernels, of which two were prepared
    monkeypatch.delenv("PYTHONPATH", raising=False)
    step = finding(tmp_path)
    with_it, without = (brought.environment(each) for each in (prepared, tmp_path / "none"))
    one = Session(tmp_path / "out", tmp_path / "out" / ARCHIVE, with_it)
    assert one.run([step], 1000) == 0, (tmp_path / "out" / LOG).read_text()
    one = Session(tmp_path / "other", tmp_path / "other" / ARCHIVE, without)
    assert one.run([step], 1000) == 1
    assert "CuPy cannot be imported" in (tmp_path / "other" / LOG).read_text()


def test_prepare_says_what_it_made_and_leaves_other_files_alone(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = {file: file.stat().st_mtime_ns for file in (prepared / brought.CODE).iterdir()}
    (prepared / brought.CODE / "of-an-old-source.cubin").touch()
    wheel = next(tmp_path.glob("*.whl"))
    text = preparation.prepare(prepared, [90], "installed", wheel)
    assert codes == {f: f.stat().st_mtime_ns for f in (prepared / brought.CODE).iterdir()}
    files = [file for file in prepared.rglob("*") if file.is_file()]
    assert len(list((prepared / brought.CODE).glob("*.cubin"))) == len(PREPARED)
    assert (prepared / brought.PACKAGES / "jieba" / "dict.txt").is_file()
    assert not (prepared / brought.PACKAGES / "jieba" / "lac_small").exists()
    assert f"2 kernels by NVRTC {'.'.join(map(str, compiler_version()))}; " in text
    assert sum(file.stat().st_size for file in files) < 16 * 2**20
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "file").touch()
    assert __main__.main(["prepare", str(mine), "--nvrtc", "installed"]) == 1
    assert "has files that prepare did not make" in capsys.readouterr().err
    assert [file.name for file in mine.iterdir()] == ["file"]


def test_kernels_that_were_not_brought_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BMINF_CACHE_DIR", str(tmp_path / "code"))
    version, (first, second) = compiler_version(), PREPARED
    assert machine_code.missing(PREPARED, 90, version) == PREPARED
    compile_kernel(first, 90)
    assert machine_code.missing(PREPARED, 90, version) == [second]
    assert machine_code.missing(PREPARED, 80, version) == PREPARED
    monkeypatch.setattr(cuda_compile, "source_of", lambda kernel: f"changed {kernel}")
    assert machine_code.missing(PREPARED, 90, version) == PREPARED


def test_a_kernel_that_does_not_compile_ends_the_preparation(tmp_path: Path) -> None:
    broken = Kernel("quantize_rows.cu", "quantize_rows", (("float", "no_such_type"),))
    with pytest.raises(preparation.PreparationError, match="no_such_type"):
        preparation.compile_all([(broken, 90)], tmp_path)


class _Recorder:
    """A launcher that notes which kernels it is asked for."""

    capability, num_processors = 90, 132

    def __init__(self) -> None:
        self.kernels: set[Kernel] = set()

    def launch(self, kernel: Kernel, *_: Any) -> None:
        self.kernels.add(kernel)


def asked_for_by_cases() -> Iterator[Callable[[], Any]]:
    groups = [*cases.CASES.values(), cases.LARGEST, *cases.few_of_each().values()]
    yield from (lambda case=case: case.run("cpu") for group in groups for case in group)
    for form in (*cases.WHOLE, *cases.CUT):
        weights = [cases.weight_on("cpu", n, k, form)[0] for n, k in test_kernels.SHAPES]
        for dtype in cases.ROUNDED:
            for path in PATHS:
                for m in test_kernels.ROWS:
                    for weight in weights if has_path(path, 90, m, dtype) else ():
                        x = torch.zeros(m, weight.in_features, dtype=dtype)
                        yield lambda p=path, x=x, w=weight: run_path(p, x, w)


def asked_for_by_benchmarks() -> Iterator[Callable[[], Any]]:
    """All kernel steps, with weights that are small and have several groups."""
    for step in STEPS:
        if step.name.startswith("kernels"):
            arguments = run._parser().parse_args(step.arguments[1:])
            arguments.device = "cpu"
            dtype = getattr(torch, arguments.dtype or "float16")
            setup = replace(
                kernels.setup_of(arguments), dtype=dtype, shapes=((16, 256),), rotate_bytes=0
            )
            setup = replace(setup, rows=tuple(sorted(arguments.rows)))
            for _, calls in kernels.calls_by_group(setup, arguments.ops):
                for call in calls():
                    yield lambda call=call: call.run(0)


def test_all_kernels_that_a_session_asks_for_are_prepared() -> None:
    recorder = _Recorder()
    torch.manual_seed(0)
    with served_by(recorder), torch.no_grad():
        for work in (*asked_for_by_cases(), *asked_for_by_benchmarks()):
            with suppress(AssertionError):  # nothing was computed
                work()
    assert recorder.kernels <= set(machine_code.kernels(90))
    assert {kernel.name for kernel in recorder.kernels} == {
        kernel.name for kernel in machine_code.kernels(90)
    }
    assert len(recorder.kernels) > 100


# ---- the probe and the inspection ----------------------------------------------------------------


def test_the_probe_keeps_what_it_finds_where_parts_of_it_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    parts = {name: probe.PARTS[name] for name in ("gpu", "versions")}
    monkeypatch.setattr(probe, "PARTS", parts | {"attention": lambda: probe._growing("cpu")})
    file = tmp_path / plan.PROBE
    assert probe.main(["--out", str(file)]) == 1
    content = json.loads(file.read_text())
    assert content["failures"] == ["gpu: MissingError: torch sees no CUDA device"]
    assert content["found"]["versions"]["torch"] == torch.__version__
    attention = content["found"]["attention"]
    assert len(attention["first time, ms"]) == len(attention["again, ms"]) == 20
    text = summary.summary_of(tmp_path, [])
    assert "FAILED: gpu: MissingError" in text and f"versions, torch: {torch.__version__}" in text


@pytest.mark.parametrize("code", [0, 2])
def test_the_probe_locks_pages_and_lets_go_of_them(
    code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []

    class Runtime:
        def cudaHostRegister(self, address: int, nbytes: int, _: int) -> int:
            log.append(f"lock {nbytes}")
            return code

        def cudaHostUnregister(self, address: int) -> None:
            log.append("unlock")

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda _: log[-1].startswith("lock"))
    monkeypatch.setattr(probe, "_COPY_BYTES", 2**20)
    monkeypatch.setattr(probe, "_copy_s", lambda host: len(host) / 1e9)
    if code:
        with pytest.raises(OSError, match="CUDA error 2"):
            probe.pinned()
        return
    found = probe.pinned()
    assert list(found) == ["shared", "private, huge pages"]
    for each in found.values():
        assert each["torch calls it pinned"] and each["copying, GB/s"] == 1.0
        assert each["locking, GB/s"] > 0
    assert log == ["lock 1048576", "unlock"] * 2


def test_the_probe_misses_jieba_and_kernels_in_words(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "_capability", lambda: 90)
    monkeypatch.setenv("BMINF_CACHE_DIR", str(prepared / brought.CODE))
    assert probe.brought() == {"kernels": 2, "kernels to compile": 0}
    monkeypatch.setattr(cuda_compile, "source_of", lambda kernel: f"changed {kernel}")
    with pytest.raises(probe.MissingError, match="2 of 2 kernels are not among those brought"):
        probe.brought()
    monkeypatch.setenv("BMINF_CACHE_DIR", str(prepared / "elsewhere" / "code"))
    assert probe.brought() == {"kernels": 2, "kernels to compile": 2}
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(probe.MissingError, match="jieba is not there"):
        probe.brought()


def test_a_tool_that_is_not_there_is_a_failure_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert __main__.main(["inspect", str(tmp_path / "out")]) == 1
    text = packed(tmp_path / "out")[SUMMARY].decode()
    for name, tool in (("memcheck", "compute-sanitizer"), ("ncu", "ncu")):
        assert f"{name}: FAILED, exit status 127" in text
        assert f"{tool} is not on the PATH of this machine" in text


def test_tools_get_python_after_their_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("compute-sanitizer", "ncu"):
        (tmp_path / name).write_text(
            '#!/bin/sh\necho "$0 $*" "[$PYTORCH_NO_CUDA_MEMORY_CACHING]"\n'
        )
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert __main__.main(["inspect", str(tmp_path / "out")]) == 0
    log = (tmp_path / "out" / LOG).read_text()
    ran = f"{sys.executable} -m benchmarks.gpu_session"
    for tool in ("memcheck", "racecheck"):
        assert f"--tool {tool} --error-exitcode 86 {ran}.few_cases [1]" in log
    assert "--clock-control none --set full --profile-from-start off" in log
    assert f"{ran}.three_products []" in log and "--import" in log


def test_the_profiler_sees_each_product_once_and_no_warm_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log: list[str] = []
    for name in ("start", "stop"):
        monkeypatch.setattr(torch.cuda.profiler, name, lambda name=name: log.append(name))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(
        three_products, "linear", lambda x, weight: log.append(f"{len(x)} x {weight.bits}")
    )
    assert three_products.main("cpu", (32, 64)) == 0
    products = ["1 x 8", "1 x 4", "16 x 4"]
    assert log == [*products, "start", *products, "stop"]


def test_wrong_cases_fail_and_do_not_keep_others_from_running(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(_: str) -> None:
        raise AssertionError("wrong")

    found = {61: [cases.Case("a", wrong), cases.Case("b", lambda _: None)]}
    monkeypatch.setattr(cases, "few_of_each", lambda: found)
    assert few_cases.main("cpu") == 1
    assert "2 cases, 1 wrong: a" in capsys.readouterr().out
    found[61] = found[61][1:]
    assert few_cases.main("cpu") == 0
