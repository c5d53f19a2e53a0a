"""The session on a GPU's machine: its order and limits, and what a kill at any moment leaves."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jieba
import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent / "gpu"))

import cases
import gpu_reports

from benchmarks import gpu_probe, run
from benchmarks import gpu_session as session
from benchmarks.gpu_session import ARCHIVE, CODE, LOG, PACKAGES, ROOT, SUMMARY, Session, Step
from bminf.cuda import compile as cuda_compile
from bminf.cuda.compile import compiler_version
from bminf.cuda.source import Kernel

STEPS = session.steps()
BENCHMARKS = [step for step in STEPS if "benchmarks.run" in step.command]
STAND_IN = "sh -c 'echo {{}} >\"$1\"' sh {out}"


def packed(archive: Path) -> dict[str, bytes]:
    """What it holds; it is whole if this can be read."""
    with tarfile.open(archive) as content:
        files = {entry.name: content.extractfile(entry) for entry in content}
        return {name: file.read() for name, file in files.items() if file is not None}


def python(program: str) -> str:
    """The command of a step that writes what it finds to sys.argv[1]."""
    quoted = shlex.quote(program).replace("{", "{{").replace("}", "}}")
    return f"{{python}} -S -c {quoted} {{out}}"


HANGS = python(
    "import os, pathlib, sys, time; print('process', os.getpid(), flush=True);"
    "pathlib.Path(sys.argv[1]).write_text('half'); time.sleep(600)"
)


@pytest.fixture
def new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Session:
    """A session in tmp_path/out, which begins steps however little time is left."""
    monkeypatch.setattr(session, "_LEAST_S", 0.0)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # quicker
    folder = tmp_path / "out"
    environment = session.environment_with(tmp_path / "none") | {gpu_reports.ALLOWED: ""}
    return Session(folder, folder / ARCHIVE, environment)


def log_of(one: Session) -> str:
    return (one.folder / LOG).read_text()


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def processes_of(log: str) -> list[str]:
    """Those that have told their number and still run."""
    told = re.findall(r"^process (\d+)", log, re.MULTILINE)
    assert told
    return [pid for pid in told if runs(pid)]


def runs(pid: str) -> bool:
    try:
        return Path("/proc", pid, "cmdline").read_bytes() != b""  # as of one that is not waited for
    except OSError:
        return False


# ---- what is run ---------------------------------------------------------------------------------


def test_the_steps_are_within_the_limits_and_spare_ones_come_last() -> None:
    are_spare = [step.is_spare for step in STEPS]
    assert are_spare == sorted(are_spare)
    assert len({step.name for step in STEPS}) == len({step.file for step in STEPS}) == len(STEPS)
    needed_s = sum(step.seconds for step in STEPS if not step.is_spare)
    assert needed_s <= session.SECONDS  # nothing is cut for another step's sake
    assert session.SECONDS + 2 * session._PATIENCE_S < 8 * 60
    assert all(step.seconds > session._LEAST_S for step in STEPS[:-1])
    assert sum(step.seconds for step in session.inspection()) == 90


@pytest.mark.parametrize("step", BENCHMARKS, ids=[s.name for s in BENCHMARKS])
def test_the_arguments_of_each_benchmark_are_known_to_it(step: Step) -> None:
    parsed = run._parser().parse_args(step.words(Path("/results"))[3:])
    assert parsed.out == Path("/results") / step.file and parsed.device == "cuda"
    # What a process takes with torch, before it measures, and its last group.
    assert getattr(parsed, "seconds", 0) <= step.seconds - 15
    if step.name in ("zoo", "glm"):  # resident before streamed
        first, second = (int(limit.removesuffix("GB")) for limit in parsed.memory_limit)
        assert first > second


def test_each_file_with_tests_for_a_gpu_is_run() -> None:
    named = [word for s in STEPS for word in s.words(Path()) if word.startswith("tests/")]
    marked = {
        str(file.relative_to(ROOT))
        for file in (ROOT / "tests").rglob("test_*.py")
        if re.search(r"^(@|pytestmark = )pytest\.mark\.gpu", file.read_text(), re.MULTILINE)
    }
    assert marked <= {*named} and all((ROOT / file).is_file() for file in named)
    assert [file for file in {*named} if named.count(file) > 1] == ["tests/gpu/test_kernels.py"]
    commands = "".join(step.command for step in STEPS)
    for choice in ("compiled_layer", "the_targets"):  # of its tests, a step for each
        assert f"{choice}_" in (ROOT / "tests/gpu/test_kernels.py").read_text()
        assert f"not {choice}" in STEPS[1].command and f"-k {choice}" in commands


# ---- a whole session -----------------------------------------------------------------------------


@pytest.fixture
def _with_stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of each command."""
    stand_ins = [replace(step, command=STAND_IN) for step in STEPS]
    monkeypatch.setattr(session, "steps", lambda: stand_ins)


@pytest.mark.usefixtures("_with_stand_ins")
def test_a_session_says_how_each_step_ended_and_leaves_all_files_in_one_archive(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "earlier.json").write_text("{}")
    assert session.main([str(tmp_path)]) == 0
    printed, content = capsys.readouterr().out, packed(tmp_path / ARCHIVE)
    assert set(content) == {LOG, SUMMARY, "earlier.json", *(step.file for step in STEPS)}
    assert content == {name: (tmp_path / name).read_bytes() for name in content}
    headers = re.findall("^>>>> (.+?):", content[LOG].decode(), re.MULTILINE)
    assert headers == [step.name for step in STEPS]
    assert re.findall(r"^(.+): ok, \d+ s$", printed, re.MULTILINE) == [*headers, *headers]
    assert printed.endswith(content[SUMMARY].decode())


@pytest.mark.usefixtures("_with_stand_ins")
def test_some_steps_and_an_archive_elsewhere(tmp_path: Path) -> None:
    """A machine may hand back a few files only."""
    options = ["--only", "zoo", "glm", "--archive", str(tmp_path / "out.tgz")]
    assert session.main([str(tmp_path / "results"), *options]) == 0
    assert not (tmp_path / "results" / ARCHIVE).exists()
    assert set(packed(tmp_path / "out.tgz")) == {LOG, SUMMARY, "zoo-cuda.json", "glm-cuda.json"}


def test_a_dry_run_prints_the_commands_and_runs_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert session.main([str(tmp_path / "out"), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for step, line in zip(STEPS, lines, strict=True):
        assert (
            line == f"{step.name}, {step.seconds:g} s: {shlex.join(step.words(tmp_path / 'out'))}"
        )
    assert not (tmp_path / "out").exists()


# ---- steps that fail, hang, or are killed --------------------------------------------------------


def test_a_session_goes_on_after_failures_and_within_its_time(
    new: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = Step("bad", 60, python("import sys; print('no', 'luck'); sys.exit(3)"), "bad.json")
    chosen = [
        bad,
        Step("good", 60, STAND_IN, "good.json"),
        replace(bad, name="late", seconds=-1),
        replace(bad, name="spare", seconds=-1, is_spare=True),
    ]
    new.folder.mkdir()
    (new.folder / "bad.json").write_text("of an earlier session")
    assert new.run(chosen, 100) == 1
    printed = capsys.readouterr().out
    assert "bad: FAILED, exit status 3, " in printed and "\nno luck\n" in printed
    assert "good: ok, " in printed and "late: not started, no time was left" in printed
    assert set(packed(new.archive)) == {LOG, SUMMARY, "good.json"}
    assert [new.run([step], 100) for step in chosen] == [1, 0, 1, 0]


def test_the_archive_stays_whole_where_a_new_one_cannot_be_written(
    new: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert new.run([Step("good", 60, STAND_IN, "good.json")], 100) == 0
    before = packed(new.archive)
    monkeypatch.setattr(tarfile.TarFile, "addfile", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        new._pack()
    assert packed(new.archive) == before and new.archive.stat().st_size


def limit_once(file: Path, word: str) -> Callable[..., int | None]:
    """In place of Session._wait: once there is `file`, a command with `word` reaches its limit."""

    def wait(_: Session, process: subprocess.Popen[bytes], end: float) -> int | None:
        while process.poll() is None:
            if word in str(process.args) and file.is_file() and file.read_bytes():
                return None
            time.sleep(0.01)
        return process.returncode

    return wait


def test_a_step_that_reaches_its_limit_leaves_what_it_had_found(
    new: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "_PATIENCE_S", 60.0)
    monkeypatch.setattr(Session, "_wait", limit_once(new.folder / "hang.json", "sleep"))
    before, behind = (Step(name, 60, STAND_IN, name) for name in ("before", "behind"))
    assert new.run([before, Step("hang", 60, HANGS, "hang.json"), behind], 1000) == 1
    content = packed(new.archive)
    assert content["hang.json"] == b"half" and {"before", "behind"} <= set(content)
    assert re.search("before: ok.*\nhang: STOPPED.*\nbehind: ok", content[SUMMARY].decode())
    assert "KeyboardInterrupt" in log_of(new) and not processes_of(log_of(new))


def test_what_is_left_behind_by_a_step_ends_with_it(new: Session) -> None:
    program = (
        "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c',"
        "'import time; time.sleep(600)']); print('process', p.pid, flush=True)"
    )
    assert new.run([Step("leaves", 60, python(program))], 100) == 0
    until(lambda: not processes_of(log_of(new)))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_session_that_is_killed_leaves_a_whole_archive_and_no_process(
    number: signal.Signals, tmp_path: Path
) -> None:
    program = (
        "import sys\nfrom benchmarks import gpu_session as s\n"
        "s._LOOK_S, commands = 0.05, dict(zip('abc', sys.argv[2:]))\n"
        "s.steps = lambda: [s.Step(name, 60, commands[name], name) for name in commands]\n"
        "sys.exit(s.main([sys.argv[1]]))"
    )
    command = [sys.executable, "-c", program, str(tmp_path), STAND_IN, HANGS, STAND_IN]
    archive = tmp_path / ARCHIVE
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as running:
        until(lambda: archive.is_file() and packed(archive).get("b") == b"half")
        running.send_signal(number)
        printed, _ = running.communicate()
    content = packed(archive)
    assert set(content) == {"a", "b", LOG, SUMMARY} and content["b"] == b"half"
    assert "a: ok" in content[SUMMARY].decode()
    until(lambda: not processes_of((tmp_path / LOG).read_text()))
    if number != signal.SIGKILL:
        assert running.returncode == 1
        assert re.search("b: STOPPED, .*\nthe session was stopped\n$", content[SUMMARY].decode())
        assert printed.endswith(content[SUMMARY].decode())


# ---- steps of tests ------------------------------------------------------------------------------

TOY = """
import pytest
pytestmark = getattr(pytest.mark, "gpu")
broken = []
def use(breaks=False):
    broken.extend([1] * breaks)
    if broken: raise RuntimeError("an illegal memory access was encountered")
def test_passes(): pass
def test_fails(): assert 1 == 2
def test_is_skipped(): pytest.skip("needs two GPUs")
def test_has_no_gpu(): pytest.skip("no GPU")
@pytest.fixture
def ends_badly():
    yield
    assert 3 == 4
def test_ends_badly(ends_badly): pass
def test_breaks(): use(breaks=True)
def test_behind(): use()
"""


def step_of(folder: Path, text: str) -> Step:
    (folder / "test_toy.py").write_text(text)
    return session.tests("toy", 120, shlex.quote(str(folder)))


def reports_of(one: Session) -> list[tuple[str, str, str]]:
    lines = [json.loads(line) for line in (one.folder / "toy.jsonl").read_text().splitlines()]
    return [(re.split("::|/", r["test"])[-1], r["outcome"], r["reason"]) for r in lines]


def test_each_test_of_a_step_is_reported_and_a_broken_process_replaced(
    tmp_path: Path, new: Session
) -> None:
    (tmp_path / "test_other.py").write_text("import no_such_module\n")
    assert new.run([step_of(tmp_path, TOY)], 1000) == 1
    assert reports_of(new) == [
        ("test_other.py", "failed", "E   ModuleNotFoundError: No module named 'no_such_module'"),
        ("test_passes", "passed", ""),
        ("test_fails", "failed", "assert 1 == 2"),
        ("test_is_skipped", "skipped", "needs two GPUs"),
        ("test_has_no_gpu", "skipped", "no GPU"),
        ("test_ends_badly", "passed", ""),
        ("test_ends_badly", "failed", "assert 3 == 4"),
        ("test_breaks", "failed", "RuntimeError: an illegal memory access was encountered"),
        ("test_other.py", "failed", "E   ModuleNotFoundError: No module named 'no_such_module'"),
        ("test_behind", "passed", ""),
    ], log_of(new)
    assert log_of(new).count(">>>> toy: ") == 2
    summary = (new.folder / SUMMARY).read_text()
    assert "\n1 skipped, which is not declared: no GPU\n" in summary
    assert "\ntoy: FAILED, exit status 1, " in summary


@pytest.mark.parametrize(
    ("outcomes", "status", "printed"),
    [
        ({}, 1, "no test was run"),
        ({"needs two GPUs": "skipped"}, 1, "every test was skipped"),
        ({"": "passed", "the targets are for H100, not for a toy": "skipped"}, 0, ""),
        ({"": "passed", "needs a printer": "skipped"}, 0, ""),  # allowed below
        ({"": "passed", "no GPU": "skipped"}, 1, "1 skipped, which is not declared: no GPU"),
        ({"": "failed"}, 1, ""),  # in an earlier process
    ],
)
def test_what_pytest_lets_pass_is_a_failure_in_words(
    outcomes: dict[str, str],
    status: int,
    printed: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reports = [{"test": "a", "outcome": outcomes[r], "reason": r, "text": r} for r in outcomes]
    (tmp_path / "reports").write_text("".join(f"{json.dumps(each)}\n" for each in reports))
    monkeypatch.setenv(gpu_reports.REPORTS, str(tmp_path / "reports"))
    monkeypatch.setenv(gpu_reports.ALLOWED, "needs a printer\nneeds luck")
    ended, interrupted = SimpleNamespace(exitstatus=0), SimpleNamespace(exitstatus=2)
    for each in (ended, interrupted):
        gpu_reports.pytest_sessionfinish(each)
    assert (ended.exitstatus, interrupted.exitstatus) == (status, 2)
    assert "\n".join(gpu_reports.problems_of(reports)) == printed


def test_the_declared_skips_are_those_of_the_tests() -> None:
    texts = [file.read_text() for file in (ROOT / "tests" / "gpu").glob("test_*.py")]
    for reason in gpu_reports.LEGITIMATE_SKIPS:
        assert any(re.search(rf"pytest\.skip\(f?['\"]{reason}", text) for text in texts), reason


def test_killed_tests_leave_what_they_found(
    tmp_path: Path, new: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"""
import pathlib, pytest, signal, time
pytestmark = getattr(pytest.mark, "gpu")
def test_a(): pass
def test_b(): pytest.skip("no printer")
def test_c():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pathlib.Path({str(tmp_path / "ready")!r}).write_text("1")
    time.sleep(600)
"""
    monkeypatch.setattr(session, "_PATIENCE_S", 0.1)
    monkeypatch.setattr(Session, "_wait", limit_once(tmp_path / "ready", "pytest"))
    assert new.run([step_of(tmp_path, text)], 1000) == 1
    assert reports_of(new) == [("test_a", "passed", ""), ("test_b", "skipped", "no printer")]
    summary = (new.folder / SUMMARY).read_text()
    assert "toy: STOPPED" in summary and "test_toy.py::test_c" in summary  # the one that hung


# ---- what is brought along -----------------------------------------------------------------------

PREPARED, OTHER = gpu_probe.every_variant(90)[:2], gpu_probe.every_variant(90)[2]

# A machine with neither: no package is found but what the session names, and nothing compiles.
FINDS = f"""
from bminf.cuda.compile import compile_kernel
from bminf.cuda.source import Kernel
from bminf.errors import KernelError
for kernel in {PREPARED!r}: assert compile_kernel(kernel, 90)[:4] == b"\\x7fELF"
try: compile_kernel({OTHER!r}, 90)
except KernelError as error: assert "CuPy cannot be imported" in str(error)
else: raise AssertionError("it was compiled")
import jieba
jieba.setLogLevel(60)
assert "/packages/jieba" in jieba.__file__, jieba.__file__
jieba.set_dictionary("words")  # a small one: its own is there, and takes a second
assert jieba.lcut("今天天气很好") == ["今天天气", "很", "好"]
"""


def prepare(folder: Path, chosen: list[Kernel], monkeypatch: pytest.MonkeyPatch) -> None:
    """For `chosen` in place of all kernels, and without pip, which needs a network."""

    def pip(command: list[str], check: bool) -> None:
        packages = str(folder / PACKAGES)
        options = ["--no-deps", "--no-compile", "--target", packages, "jieba==0.42.1"]
        assert command[1:3] == ["-m", "pip"] and command[-5:] == options and check
        shutil.copytree(Path(jieba.__file__).parent, Path(packages, "jieba"))

    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setenv("BMINF_CACHE_DIR", "")  # which is set to the folder, and then as before
    monkeypatch.setattr(gpu_probe, "every_variant", lambda capability: chosen)
    assert session.main(["prepare", str(folder)]) == 0


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        prepare(folder, PREPARED, patch)
    return folder


def test_what_was_prepared_is_found_where_nothing_else_is(
    prepared: Path, new: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PYTHONPATH", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    (tmp_path / "words").write_text("今天天气 5 n\n很 5 d\n好 5 a\n")
    step = Step("finds", 120, f"env -C {tmp_path} {python(FINDS)}")
    new.environment = session.environment_with(prepared)
    assert new.run([step], 1000) == 0, log_of(new)
    assert (prepared / PACKAGES / "jieba" / "dict.txt").is_file()
    assert sum(file.stat().st_size for file in prepared.rglob("*")) < 16 * 2**20
    without = Session(new.folder, new.archive, session.environment_with(new.folder))
    assert without.run([step], 1000) == 1
    assert "CuPy cannot be imported" in log_of(new)


def test_prepare_keeps_what_is_right_and_no_other_machine_code(
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / CODE).iterdir()}
    prepare(tmp_path, [PREPARED[1], OTHER], monkeypatch)
    after = {file: file.stat().st_mtime_ns for file in (tmp_path / CODE).iterdir()}
    assert len(before) == len(after) == 2 and len(before.items() & after.items()) == 1
    version = ".".join(map(str, compiler_version()))
    assert f"jieba, 2 kernels by NVRTC {version}\n" in capsys.readouterr().out


def test_prepare_leaves_a_folder_of_others_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(SystemExit, match="has files that prepare did not make"):
        prepare(tmp_path, PREPARED, monkeypatch)
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


def test_the_probe_misses_jieba_and_kernels_in_words(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu_probe, "every_variant", lambda capability: PREPARED)
    monkeypatch.setenv("BMINF_CACHE_DIR", str(prepared / CODE))
    assert gpu_probe.brought() == {
        "NVRTC": compiler_version(),
        "kernels": 2,
        "kernels to compile": 0,
    }
    monkeypatch.setattr(gpu_probe, "every_variant", lambda capability: [*PREPARED, OTHER])
    with pytest.raises(RuntimeError, match="1 of 3 kernels are not among those brought"):
        gpu_probe.brought()
    monkeypatch.setattr(cuda_compile, "source_of", lambda kernel: f"changed {kernel}")
    with pytest.raises(RuntimeError, match="3 of 3 kernels are not among those brought"):
        gpu_probe.brought()
    monkeypatch.setenv("BMINF_CACHE_DIR", str(prepared / "elsewhere" / "code"))
    assert gpu_probe.brought()["kernels to compile"] == 3
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(RuntimeError, match="jieba is not there"):
        gpu_probe.brought()


# ---- the probe and the inspection ----------------------------------------------------------------


def test_the_probe_keeps_what_it_finds_where_parts_of_it_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent() -> None:
        raise RuntimeError("torch sees no CUDA device")

    monkeypatch.setattr(torch.cuda, "get_device_capability", absent)
    monkeypatch.setattr(gpu_probe, "PARTS", {"a": gpu_probe.brought, "b": lambda: {"n": 1}})
    assert gpu_probe.machine(str(tmp_path / "probe.json")) == 1
    content = json.loads((tmp_path / "probe.json").read_text())
    assert content["failures"] == ["a: RuntimeError: torch sees no CUDA device"]
    assert content["versions"]["torch"] == torch.__version__
    assert content["found"] == {"b": {"n": 1}}
    shown = capsys.readouterr()
    assert "torch sees no CUDA device" in shown.out and "in brought\n" in shown.err


def test_a_tool_that_is_not_there_is_a_failure_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("env", "setpriv"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert session.main(["inspect", str(tmp_path / "out")]) == 1
    text = (tmp_path / "out" / SUMMARY).read_text()
    assert re.search("env: .*compute-sanitizer.*: No such file", text)
    assert re.search("env: .*ncu.*: No such file", text)
    assert text.count(": FAILED, exit status 127") == 4


def test_tools_get_python_after_their_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("compute-sanitizer", "ncu"):
        tool = '#!/bin/sh\necho "$0 $*" "[$PYTORCH_NO_CUDA_MEMORY_CACHING]"\n'
        (tmp_path / name).write_text(tool)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert session.main(["inspect", str(tmp_path / "out")]) == 0
    log = (tmp_path / "out" / LOG).read_text()
    program = f"{sys.executable} tests/kernels/cases.py cuda"
    for tool in ("memcheck", "racecheck"):
        assert f"--error-exitcode 86 --tool {tool} {program} [1]" in log
    products = f"{sys.executable} -m benchmarks.run kernels --device cuda"
    assert f"--export {tmp_path}/out/kernels.ncu-rep {products}" in log
    assert f"--import {tmp_path}/out/kernels.ncu-rep []" in log


def test_wrong_cases_fail_and_do_not_keep_others_from_running(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [
        SimpleNamespace(name="a", run=lambda device: 1 / 0),
        SimpleNamespace(name="b", run=lambda device: None),
    ]
    monkeypatch.setattr(cases, "few_of_each", lambda: {61: found})
    assert cases.main("cuda") == 1
    assert capsys.readouterr().out == "a\nb\n"
    assert found.pop(0).name == "a" and cases.main("cuda") == 0
