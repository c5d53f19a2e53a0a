"""`python -m benchmarks.gpu_session FOLDER`: all that needs a GPU, in under 8 minutes.

Tests marked gpu and the benchmarks, each in a process of its own with a time limit; a step that
fails does not keep the next from running. FOLDER gets what they write, session.log, summary.txt,
and session.tgz with all of it. `inspect FOLDER` runs the kernels under compute-sanitizer and ncu;
`prepare`, before and without a GPU, makes what has to be brought along.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ARCHIVE, LOG, SUMMARY = "session.tgz", "session.log", "summary.txt"
BROUGHT = ROOT / ".session"  # git ignores it
PACKAGES, CODE, MARK = "packages", "machine-code", "prepared"  # what prepare puts there

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
        "-p gpu_reports --continue-on-collection-errors -ofaulthandler_timeout=60"
    )
    command = f"env GPU_SESSION_REPORTS={{out}} {{python}} -m pytest {options} {chosen}"
    return Step(name, seconds, command, f"{name.replace(' ', '-')}.jsonl")


def _measured(name: str, seconds: float, options: str) -> Step:
    """The first word of `name` is the case."""
    case, *part = name.split()
    command = f"{{python}} -m benchmarks.run {case} --device cuda --out {{out}} {options}"
    return Step(name, seconds, command, f"{'-'.join([case, 'cuda', *part])}.json")


def steps() -> list[Step]:
    """What matters most comes first; the limits of all but spare ones together are below SECONDS.

    Models run resident first, then streamed. None is kept away from cuDNN, as users run them with.
    """
    kernel_tests, rows = "tests/gpu/test_kernels.py", "--rows 1 4 16 128 2048"
    weights, one_shape = "--ops weight-only --seconds", "--shapes 12288x12288"
    needed = [
        Step("probe", 25, "{python} -m benchmarks.gpu_probe {out}", "probe.json"),
        tests("kernel tests", 60, f"{kernel_tests} -k 'not compiled_layer and not the_targets'"),
        _measured("kernels large", 35, f"{weights} 20 {one_shape} 32768x12288 {rows}"),
        Step("fused kernels", 25, "{python} -m tools.fused_kernels --out {out}", "fused.json"),
        tests("cuda tests", 75, "tests/gpu/test_gpu_attention.py tests/gpu/test_cuda.py"),
        _measured("zoo", 70, "--memory-limit 16GB 6GB --tasks encoder=256 anew=256+24 once=256+24 "
                  "--warmup 0 --repeats 2 --seconds 40"),
        tests("zoo tests", 45, "tests/gpu/test_zoo.py"),
        _measured("glm", 45, "--memory-limit 16GB 4GB --layers 6 --tasks encode=512 decode=16 "
                  "cola=30x32 --seconds 25"),
        _measured("kernels w8a8", 30, f"--ops w8a8 --seconds 15 {rows}"),
        _measured("kernels small", 25, f"{weights} 10 --shapes 4096x4096 10240x4096 {rows} 512"),
        _measured("kernels bfloat16", 30, "--ops weight-only w8a8 --dtype bfloat16 --seconds 15 "
                  f"{one_shape} {rows}"),
    ]  # fmt: skip
    spare = [
        _measured("offload", 50, "--dtype float16 --model random --hidden-size 2048 --layers 8 "
                  "--tokens 16 --rounds 1 --repeats 2 --seconds 35"),
        _measured("kernels formats", 32, f"{weights} 17 {one_shape} {rows} --formats int4 "
                  "int4-g32-integers int4-g32-minimum int4-g64 int4-g128 int4-row int8-g128"),
        tests("compiled layers", 45, f"{kernel_tests} -k compiled_layer"),
        tests("speed", 40, f"{kernel_tests} -k the_targets"),
        _measured("kernels rows", 45, f"{weights} 30 --rows 2 8 32 64 512"),
        tests("benchmark tests", 40, "tests/test_benchmarks.py tests/test_model_benchmark.py "
              "tests/cli/test_tables.py tests/cli/test_doctor.py"),
    ]  # fmt: skip
    return [*needed, *(replace(step, is_spare=True) for step in spare)]


def inspection() -> list[Step]:
    """Accesses outside an allocation, races, and what the products of one row and of 16 wait for.

    Each tensor is an allocation there: torch's pool would hide what is read beyond one. For ncu the
    clocks stay as they are.
    """
    sanitizer = "env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 86 --tool"
    cases = "{python} tests/kernels/cases.py cuda"
    profile = "--set full --kernel-name regex:^linear_ --launch-count 6 --clock-control none"
    products = "--device cuda --ops weight-only --shapes 12288x12288 --rows 1 16 --rounds 1"
    return [
        Step("memcheck", 28, f"{sanitizer} memcheck {cases}"),
        Step("racecheck", 25, f"{sanitizer} racecheck {cases}"),
        Step("ncu", 25, f"env ncu {profile} --force-overwrite --export {{out}} "
             f"{{python}} -m benchmarks.run kernels {products}", "kernels.ncu-rep"),
        Step("ncu, as text", 12, "env ncu --page details --import {out}", "kernels.ncu-rep"),
    ]  # fmt: skip


# ---- the session ---------------------------------------------------------------------------------

_PATIENCE_S = 4.0  # for what a process has to say after SIGINT
_LOOK_S = 5.0
_TAIL = 25  # lines of each step in the summary
NEEDS_NEW_PROCESS = 87  # exit status of tests that go on in another one, see gpu_reports.py
_BOUND = ("setpriv", "--pdeathsig", "KILL")  # a step ends where its session is killed


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
            if step.file:
                (self.folder / step.file).unlink(missing_ok=True)
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
            while (code := self._process(step, end)) == NEEDS_NEW_PROCESS:
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
                [*_BOUND, *words], cwd=ROOT, env={**os.environ, **self.environment},
                start_new_session=True, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
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
                    packed.add(file, file.name)
        unfinished.replace(self.archive)


# ---- the command ---------------------------------------------------------------------------------


def environment_with(brought: Path) -> dict[str, str]:
    """Of the steps: the checkout need not be installed, and nothing reaches for a network."""
    packages, code = (brought / PACKAGES).resolve(), (brought / CODE).resolve()
    paths = [ROOT, ROOT / "tests" / "gpu", packages, os.environ.get("PYTHONPATH", "")]
    environment = {
        "PYTHONPATH": os.pathsep.join(str(path) for path in paths if path != ""),
        "COLUMNS": "200",  # of what pytest prints
        "PYTHONUNBUFFERED": "1",
        "TQDM_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return environment | ({"BMINF_CACHE_DIR": str(code)} if code.is_dir() else {})


def prepare(folder: Path, capability: Sequence[int]) -> None:
    """Fills `folder`: jieba, which is published as source only, and machine code of all kernels by
    the NVRTC that is installed. What it has of an earlier call is not compiled again.

    Raises CalledProcessError, KernelError.
    """
    from benchmarks.gpu_probe import every_variant
    from bminf.cuda.compile import compile_kernel, compiler_version, kept_file

    packages, code = folder.resolve() / PACKAGES, folder.resolve() / CODE
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARK).is_file():
        sys.exit(f"{folder} has files that prepare did not make; name another folder")
    code.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()
    shutil.rmtree(packages, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
    target = ["--no-deps", "--no-compile", "--target", str(packages), "jieba==0.42.1"]
    subprocess.run([*pip, *target], check=True)
    for unused in ("lac_small", "posseg", "analyse"):  # most of its bytes
        shutil.rmtree(packages / "jieba" / unused, ignore_errors=True)
    os.environ["BMINF_CACHE_DIR"], compiler = str(code), compiler_version()
    jobs = [(kernel, each) for each in capability for kernel in every_variant(each)]
    for job in jobs:
        compile_kernel(*job)
    wanted = {kept_file(*job, compiler) for job in jobs}
    for other in {*code.iterdir()} - wanted:  # of changed sources, or another compiler
        other.unlink()
    print(f"{folder}: jieba, {len(wanted)} kernels by NVRTC {'.'.join(map(str, compiler))}")


def main(argv: Sequence[str]) -> int:
    """The exit status of a session, of the inspection, or of prepare."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_session")
    add = parser.add_argument
    if argv[:1] == ["prepare"]:
        add("folder", type=Path, nargs="?", default=BROUGHT)
        add("--capability", type=int, nargs="+", default=[90], metavar="N", help="without its dot")
        prepare(**vars(parser.parse_args(argv[1:])))
        return 0
    for number in (signal.SIGTERM, signal.SIGINT):  # which is ignored behind a shell's &
        signal.signal(number, signal.default_int_handler)
    is_inspection = argv[:1] == ["inspect"]
    chosen = inspection() if is_inspection else steps()
    names = [step.name for step in chosen]
    add("folder", type=Path, metavar="FOLDER", help="for the results")
    add("--archive", type=Path, metavar="FILE", help=f"of the results; default: FOLDER/{ARCHIVE}")
    add("--brought", type=Path, default=BROUGHT, metavar="DIR", help="what prepare made")
    add("--only", nargs="+", choices=names, metavar="STEP", help=", ".join(names))
    add("--allow-skip", nargs="+", default=[], metavar="TEXT",
        help="how the reasons start for which tests may be skipped on this machine")  # fmt: skip
    add("--dry-run", action="store_true", help="print the commands")
    return _run(parser.parse_args(argv[is_inspection:]), chosen)


def _run(arguments: argparse.Namespace, chosen: Sequence[Step]) -> int:
    chosen = [step for step in chosen if step.name in (arguments.only or [step.name])]
    folder = arguments.folder.resolve()
    if arguments.dry_run:
        for step in chosen:
            print(f"{step.name}, {step.seconds:g} s: {shlex.join(step.words(folder))}")
        return 0
    archive = (arguments.archive or folder / ARCHIVE).resolve()
    environment = environment_with(arguments.brought)
    environment["GPU_SESSION_ALLOWED_SKIPS"] = "\n".join(arguments.allow_skip)
    return Session(folder, archive, environment).run(chosen, SECONDS)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
