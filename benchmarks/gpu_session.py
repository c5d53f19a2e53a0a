"""`python -m benchmarks.gpu_session FOLDER`: all that needs a GPU, in under 8 minutes.

Tests marked gpu and the benchmarks, each in a process of its own with a time limit; a step that
fails does not keep the next from running. FOLDER gets what they write, session.log, summary.txt,
and session.tgz with all of it. `inspect FOLDER` runs the kernels under compute-sanitizer and ncu;
`prepare`, before and without a GPU, makes what has to be brought along.

No torch is imported here: kernels are compiled where there is none.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ARCHIVE, LOG, SUMMARY = "session.tgz", "session.log", "summary.txt"
BROUGHT = ROOT / ".session"  # git ignores it
PACKAGES, CODE, MARK = "packages", "machine-code", "prepared.json"  # what prepare puts there

# ---- what is run ---------------------------------------------------------------------------------

SECONDS = 470.0
"""Of all steps; with the inspection's 90, and 310 of starts and transfers, less than 15 minutes."""
_LEAST_S = 12.0  # a step is not started with less time left


@dataclass(frozen=True)
class Step:
    """A command, with a limit in seconds.

    command: {python} and {out}, the file in the folder of the results, are filled into its words.
    is_spare: it runs only in time that the others leave, and may be left out.
    """

    name: str
    seconds: float
    command: str
    file: str = ""
    is_spare: bool = False

    def words(self, folder: Path) -> list[str]:
        out = folder / self.file
        return [w.format(python=sys.executable, out=out) for w in shlex.split(self.command)]


def tests(name: str, seconds: float, chosen: str) -> Step:
    """A line for each test also where pytest is killed, so -vv; warnings differ from machine to
    machine, as versions of packages do."""
    options = (
        "-m gpu -vv --durations=5 --tb=short -W default -p no:cacheprovider "
        "-p benchmarks.gpu_session --continue-on-collection-errors -ofaulthandler_timeout=60"
    )
    command = f"env {_REPORTS}={{out}} {{python}} -m pytest {options} {chosen}"
    return Step(name, seconds, command, f"{name.replace(' ', '-')}.jsonl")


def _measured(name: str, seconds: float, options: str) -> Step:
    """The first word of `name` is the case."""
    case, *part = name.split()
    command = f"{{python}} -m benchmarks.run {case} --device cuda --out {{out}} {options}"
    return Step(name, seconds, command, f"{'-'.join([case, 'cuda', *part])}.json")


def steps() -> list[Step]:
    """What matters most comes first; the limits of all but spare ones together are below SECONDS.

    Models are measured resident first, then streamed as on a small card. No step is told to keep
    attention away from cuDNN: wrapped models have to be right as their users run them.
    """
    kernel_tests, rows = "tests/gpu/test_kernels.py", "--rows 1 4 16 128 2048"
    weights, one_shape = "--ops weight-only --seconds", "--shapes 12288x12288"
    needed = [
        Step("probe", 25, "{python} -m benchmarks.gpu_probe machine {out}", "probe.json"),
        tests("kernel tests", 60, f"{kernel_tests} -k 'not compiled_layer and not the_targets'"),
        _measured("kernels large", 40, f"{weights} 25 {one_shape} 32768x12288 {rows}"),
        tests("cuda tests", 75, "tests/gpu/test_gpu_attention.py tests/gpu/test_cuda.py"),
        _measured("zoo", 70, "--memory-limit 16GB 6GB --steps 24 --warmup 0 --repeats 2 "
                  "--seconds 40"),
        tests("zoo tests", 45, "tests/gpu/test_zoo.py"),
        _measured("glm", 45, "--memory-limit 16GB 4GB --layers 6 --encode 512 --decode 16 "
                  "--seconds 25"),
        _measured("kernels w8a8", 45, f"--ops w8a8 gated rows dequantize --seconds 30 {rows}"),
        _measured("kernels small", 30, f"{weights} 15 --shapes 4096x4096 10240x4096 {rows} 512"),
        _measured("kernels bfloat16", 30, "--ops weight-only w8a8 --dtype bfloat16 --seconds 15 "
                  f"{one_shape} {rows}"),
    ]  # fmt: skip
    spare = [
        _measured("offload", 50, "--dtype float16 --model random --hidden-size 2048 --layers 8 "
                  "--tokens 16 --rounds 1 --repeats 2 --seconds 35"),
        _measured("kernels formats", 32, f"{weights} 17 {one_shape} {rows} --formats int4 "
                  "int4-g32-minimum int4-g64 int4-g128 int4-row int8-g128"),
        tests("compiled layers", 45, f"{kernel_tests} -k compiled_layer"),
        tests("speed", 40, f"{kernel_tests} -k the_targets"),
        _measured("kernels rows", 45, f"{weights} 30 --rows 2 8 32 64 512"),
        tests("benchmark tests", 40, " ".join(files_with_gpu_tests())),
    ]  # fmt: skip
    return [*needed, *(replace(step, is_spare=True) for step in spare)]


def files_with_gpu_tests() -> Iterator[str]:
    """Those outside of tests/gpu, wherever they lie: to collect all of tests takes too long."""
    for file in sorted(ROOT.glob("tests/**/test_*.py")):
        if file.parent.name != "gpu" and "pytest.mark.gpu" in file.read_text(encoding="utf-8"):
            yield str(file.relative_to(ROOT))


def inspection() -> list[Step]:
    """Accesses outside an allocation, races, and what kernels wait for.

    Each tensor is an allocation there: torch's pool would hide what is read beyond one. For ncu the
    clocks stay as they are, and a warm-up comes before it is started.
    """
    sanitizer = "env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 86 --tool"
    profile = "--set full --profile-from-start off --clock-control none --force-overwrite"
    probe = "{python} -m benchmarks.gpu_probe"
    return [
        Step("memcheck", 28, f"{sanitizer} memcheck {probe} cases"),
        Step("racecheck", 25, f"{sanitizer} racecheck {probe} cases"),
        Step("ncu", 25, f"env ncu {profile} --export {{out}} {probe} products", "kernels.ncu-rep"),
        Step("ncu, as text", 12, "env ncu --page details --import {out}", "kernels.ncu-rep"),
    ]


# In place of each command in a dry run: it takes no GPU and no time.
_STAND_IN = """
sh -c 'test -d "$1" || echo "$0" >"$1"'
'{{"test": "none", "outcome": "passed", "reason": "", "text": ""}}' {out}
"""

# ---- a plugin of pytest, for steps of tests ------------------------------------------------------

LEGITIMATE_SKIPS = {
    "needs two GPUs": "a machine with one cannot show it",
    "the targets are for": "nothing is promised of the speed of other cards",
}
"""How the reasons start for which a test may be skipped where there is a GPU, and why. Free memory
is none of them: a card that has too little of it after other tests has lost it."""

_REPORTS, _ALLOWED = "GPU_SESSION_REPORTS", "GPU_SESSION_ALLOWED_SKIPS"  # variables
_INTERRUPTED, _BROKEN = 2, 87  # exit statuses: of pytest; and where tests need a new process
# After one of these nothing runs in a process any more: what fails behind it says nothing.
_BREAKS = re.compile(
    "illegal memory access|illegal address|illegal instruction|misaligned address|"
    "unspecified launch failure|device-side assert|hardware stack error",
    re.IGNORECASE,
)


def read_reports() -> list[dict[str, Any]]:
    """Of tests, and of files that could not be collected; also of processes that are broken."""
    file = Path(os.environ[_REPORTS])
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return [json.loads(line) for line in lines]


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Leaves out what an earlier process has run."""
    known = {report["test"] for report in read_reports()}
    items[:] = [item for item in items if item.nodeid not in known]


def pytest_runtest_logreport(report: Any) -> None:
    """Written at once, so that it is there where pytest is killed."""
    if report.outcome == "passed" and getattr(report, "when", None) != "call":
        return
    text, crash = report.longreprtext, getattr(report.longrepr, "reprcrash", None)
    reason = crash.message if crash else text.strip().rpartition("\n")[2]
    if isinstance(report.longrepr, tuple):  # of a skip: file, line, reason
        reason = report.longrepr[2].removeprefix("Skipped: ")
    line = {"test": report.nodeid, "outcome": report.outcome, "reason": reason}
    line |= {"text": text[-4000:], "seconds": round(getattr(report, "duration", 0.0), 3)}
    with open(os.environ[_REPORTS], "a", encoding="utf-8") as file:
        file.write(f"{json.dumps(line)}\n")


pytest_collectreport = pytest_runtest_logreport


def pytest_runtest_logfinish(nodeid: str) -> None:
    """Ends pytest behind a test that has broken the process."""
    if any(r["test"] == nodeid and _BREAKS.search(r["text"]) for r in read_reports()):
        raise KeyboardInterrupt


def pytest_sessionfinish(session: Any) -> None:
    """The exit status says what was wrong in any of the processes, and what pytest lets pass."""
    reports = read_reports()
    is_broken = any(_BREAKS.search(last["text"]) for last in reports[-1:])
    if session.exitstatus == _INTERRUPTED and is_broken:
        session.exitstatus = _BROKEN
    elif problems_of(reports) or any(report["outcome"] == "failed" for report in reports):
        session.exitstatus = session.exitstatus or 1


def pytest_unconfigure(config: Any) -> None:
    """Says it last, where it is seen."""
    for problem in problems_of(read_reports()):
        config.get_terminal_writer().line(problem)


def problems_of(reports: Sequence[dict[str, Any]]) -> list[str]:
    """What pytest lets pass."""
    allowed = (*LEGITIMATE_SKIPS, *os.environ[_ALLOWED].splitlines())
    skipped = Counter(report["reason"] for report in reports if report["outcome"] == "skipped")
    problems = [
        f"{count} skipped, which is not declared: {reason}"
        for reason, count in skipped.items()
        if not reason.startswith(allowed)
    ]
    if skipped.total() == len(reports):
        problems.append("every test was skipped" if reports else "no test was run")
    return problems


# ---- the session ---------------------------------------------------------------------------------

_PATIENCE_S = 4.0  # for what a process has to say after SIGINT
_LOOK_S = 5.0
_TAIL = 25  # lines of each step in the summary
# The kernel kills the process where its session is killed; which may have happened before.
_BOUND = (
    "import ctypes, os, sys\n"
    "ctypes.CDLL(None).prctl(1, 9)\n"
    "os.getppid() == int(sys.argv[1]) and os.execvp(sys.argv[2], sys.argv[2:])"
)


@dataclass
class Session:
    """Runs steps; after each one `folder` has the log and the summary, `archive` all of it."""

    folder: Path
    archive: Path
    environment: Mapping[str, str]
    verdicts: list[str] = field(default_factory=list)

    def run(self, chosen: Sequence[Step], seconds: float) -> int:
        """0 if every step that was to be run ended well, otherwise 1."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / LOG).touch()
        for step in chosen:  # what an earlier session left is not what this one finds
            with suppress(FileNotFoundError, IsADirectoryError):
                (self.folder / step.file).unlink()
        end = time.monotonic() + seconds
        try:
            is_good = all([self._run_one(step, end) for step in chosen])
        except KeyboardInterrupt:
            is_good = False
            self._note("the session was stopped")
        print((self.folder / SUMMARY).read_text(encoding="utf-8"), end="")
        return int(not is_good)

    def _run_one(self, step: Step, end: float) -> bool:
        """Whether it ended well, or was a spare one for which no time was left."""
        start, code = time.monotonic(), None
        end = min(start + step.seconds, end)
        if end - start < _LEAST_S:
            self._note(f"{step.name}: not started, no time was left")
            return step.is_spare
        try:
            while (code := self._process(step, end)) == _BROKEN:
                pass
        finally:
            verdict = "STOPPED" if code is None else f"FAILED, exit status {code}" if code else "ok"
            self._note(f"{step.name}: {verdict}, {time.monotonic() - start:.0f} s")
        return code == 0

    def _process(self, step: Step, end: float) -> int | None:
        """The exit status; None if it was not there at `end`, a time of time.monotonic()."""
        words = step.words(self.folder)
        with (self.folder / LOG).open("ab", buffering=0) as log:
            log.write(f"\n>>>> {step.name}: {shlex.join(words)}\n".encode())
            process = subprocess.Popen(
                [sys.executable, "-S", "-c", _BOUND, str(os.getpid()), *words],
                cwd=ROOT, env={**os.environ, **self.environment}, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        try:
            code = self._wait(process, end)
            if code is None:  # Python unwinds at SIGINT, unless it is inside a compiler or a driver
                os.killpg(process.pid, signal.SIGINT)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_PATIENCE_S)
            return code
        finally:
            with suppress(ProcessLookupError):  # what it had started may outlive it
                os.killpg(process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):  # where a driver does not let go of it
                process.wait(_PATIENCE_S)

    def _wait(self, process: subprocess.Popen[bytes], end: float) -> int | None:
        while (left := end - time.monotonic()) > 0:
            with suppress(subprocess.TimeoutExpired):
                return process.wait(min(_LOOK_S, left))
            self._pack()
        return None

    def _note(self, verdict: str) -> None:
        """Writes the summary, of which the end is seen, and the archive."""
        print(verdict, flush=True)
        self.verdicts.append(verdict)
        log = (self.folder / LOG).read_text(encoding="utf-8", errors="replace")
        parts = [part.splitlines() for part in log.split("\n>>>> ")[1:]]
        tails = ["\n".join([f"==== {head}", *lines[-_TAIL:]]) for head, *lines in parts]
        text = "\n".join([*tails, "==== steps", *self.verdicts])
        (self.folder / SUMMARY).write_text(f"{text}\n", encoding="utf-8")
        self._pack()

    def _pack(self) -> None:
        """The files of this moment, as a step may be writing more of them."""
        unfinished = self.archive.with_name(f"{self.archive.name}.unfinished")
        with tarfile.open(unfinished, "w:gz") as packed:
            for file in sorted(self.folder.iterdir()):
                if file.is_file() and file != self.archive and file.suffix != ".unfinished":
                    content, entry = file.read_bytes(), tarfile.TarInfo(file.name)
                    entry.size, entry.mtime = len(content), int(time.time())
                    packed.addfile(entry, io.BytesIO(content))
        unfinished.replace(self.archive)


# ---- what is brought along -----------------------------------------------------------------------


def environment_with(brought: Path) -> dict[str, str]:
    """Of the steps: the checkout need not be installed, and nothing reaches for a network."""
    packages, code = (brought / PACKAGES).resolve(), (brought / CODE).resolve()
    paths = [str(ROOT), str(packages), os.environ.get("PYTHONPATH", "")]
    environment = {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "COLUMNS": "200",  # of what pytest prints
        "PYTHONUNBUFFERED": "1",
        "TQDM_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return environment | ({"BMINF_CACHE_DIR": str(code)} if code.is_dir() else {})


def prepare(folder: Path, capability: Sequence[int], nvrtc: str, jieba: str) -> None:
    """Fills `folder`: jieba, which is published as source only, and machine code of all kernels;
    what it has of an earlier call is not compiled again. Raises CalledProcessError."""
    from benchmarks.gpu_probe import every_variant

    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARK).is_file():
        sys.exit(f"{folder} has files that prepare did not make; name another folder")
    packages, code = folder.resolve() / PACKAGES, folder.resolve() / CODE
    code.mkdir(parents=True, exist_ok=True)
    (folder / MARK).write_text(json.dumps({"capabilities": capability, "nvrtc": nvrtc}))
    shutil.rmtree(packages, ignore_errors=True)
    _pip(sys.executable, "--no-deps", "--no-compile", "--target", str(packages), jieba)
    for unused in ("lac_small", "posseg", "analyse"):  # most of its bytes
        shutil.rmtree(packages / "jieba" / unused, ignore_errors=True)
    jobs = json.dumps(
        [(k.file, k.name, k.macros, each) for each in capability for k in every_variant(each)]
    )
    environment = {**os.environ, "BMINF_CACHE_DIR": str(code), "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory(prefix="bminf-prepare-") as temporary:
        python = sys.executable if nvrtc == "installed" else _python_with(nvrtc, temporary)
        command = [python, "-c", "from benchmarks import gpu_session as s; s.compile_jobs()"]
        done = subprocess.check_output(command, input=jobs, text=True, env=environment)
    num_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: jieba, {done.strip()}; {num_bytes / 1e6:.1f} MB")


def _python_with(nvrtc: str, folder: str) -> str:
    """A Python whose CuPy finds that NVRTC: in an environment of its own, as CuPy takes what it
    comes upon in the environment's packages."""
    major, cupy = nvrtc.partition(".")[0], version(packages_distributions()["cupy"][0])
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python, suffix = f"{folder}/bin/python", "-cu12" if major == "12" else ""
    _pip(python, f"cupy-cuda{major}x=={cupy}", f"nvidia-cuda-nvrtc{suffix}=={nvrtc}")
    return python


def _pip(python: str, *arguments: str) -> None:
    command = [python, "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
    subprocess.run([*command, *arguments], check=True)


def compile_jobs() -> None:
    """Those of standard input, with the Python that has the compiler; what else is there goes."""
    from bminf.cuda.compile import cache_folder, compile_kernel, compiler_version, kept_file
    from bminf.cuda.source import Kernel

    wanted, compiler = set(), compiler_version()
    for file, name, macros, capability in json.load(sys.stdin):
        kernel = Kernel(file, name, tuple((key, value) for key, value in macros))
        compile_kernel(kernel, capability)
        wanted.add(kept_file(kernel, capability, compiler))
    for other in {*cache_folder().iterdir()} - wanted:  # of changed sources, or another compiler
        other.unlink()
    print(f"{len(wanted)} kernels by NVRTC {compiler[0]}.{compiler[1]}")


# ---- the command ---------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> int:
    """The exit status of a session, of the inspection, or of prepare."""
    if argv[:1] == ["prepare"]:
        prepare(**vars(_prepare_parser().parse_args(argv[1:])))
        return 0
    for number in (signal.SIGTERM, signal.SIGINT):  # which is ignored behind a shell's &
        signal.signal(number, signal.default_int_handler)
    is_inspection = argv[:1] == ["inspect"]
    chosen = inspection() if is_inspection else steps()
    arguments = _parser([step.name for step in chosen]).parse_args(argv[is_inspection:])
    chosen = [step for step in chosen if step.name in (arguments.only or [step.name])]
    if arguments.dry_run:
        chosen = [replace(step, command=_STAND_IN) for step in chosen]
    folder = arguments.folder.resolve()
    archive = (arguments.archive or folder / ARCHIVE).resolve()
    environment = environment_with(arguments.brought)
    environment[_ALLOWED] = "\n".join(arguments.allow_skip)
    return Session(folder, archive, environment).run(chosen, arguments.seconds)


def _parser(names: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_session [inspect]")
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="for the results")
    add("--archive", type=Path, metavar="FILE", help=f"of them; default: FOLDER/{ARCHIVE}")
    add("--brought", type=Path, default=BROUGHT, metavar="DIR", help="what prepare made")
    add("--seconds", type=float, default=SECONDS, help=f"for all; default: {SECONDS:g}")
    add("--only", nargs="+", choices=names, metavar="STEP", help=", ".join(names))
    add("--allow-skip", nargs="+", default=[], metavar="TEXT",
        help="how the reasons start for which tests may be skipped on this machine")  # fmt: skip
    add("--dry-run", action="store_true", help="with stand-ins, which take no GPU and no time")
    return parser


def _prepare_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_session prepare")
    add = parser.add_argument
    add("folder", type=Path, nargs="?", default=BROUGHT, metavar="FOLDER")
    add("--capability", type=int, nargs="+", default=[90], metavar="N", help="without its dot")
    add("--nvrtc", default="13.0.88", metavar="VERSION",
        help='as there; the default comes with PyTorch for CUDA 13.0; or "installed"')  # fmt: skip
    add("--jieba", default="jieba==0.42.1", metavar="WHEEL", help="in place of that of PyPI")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
