"""`python -m benchmarks.gpu_session prepare`: what a machine that reaches no network has to bring.

jieba, which is published as source only and without which models of Chinese text read nothing; and
the machine code of all kernels, which takes a minute to compile. The machine code is used there if
the NVRTC is of the same version and the sources of the kernels are the same.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.gpu_session import brought, machine_code
from benchmarks.gpu_session.compiling import as_json
from benchmarks.gpu_session.process import ROOT
from benchmarks.whole_file import write_json
from bminf.cuda.compile import kept_file
from bminf.cuda.source import Kernel
from bminf.units import format_bytes

JIEBA = "jieba==0.42.1"
# Other ways to cut, parts of speech, key words: most of the package's bytes.
_UNUSED = ("jieba/lac_small/", "jieba/posseg/", "jieba/analyse/")

NVRTC = "13.0.88"
"""What comes with PyTorch's wheels for CUDA 13.0."""


def main(argv: Sequence[str]) -> int:
    """0, after all was made and its size printed; 1 where something could not be had."""
    arguments = _parser().parse_args(argv)
    folder: Path = arguments.folder.resolve()
    try:
        print(prepare(folder, arguments.capability, arguments.nvrtc, arguments.jieba))
    except (PreparationError, subprocess.CalledProcessError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_session prepare")
    add = parser.add_argument
    add("folder", type=Path, nargs="?", default=brought.FOLDER, metavar="FOLDER",
        help="default: .session in the checkout, where a session looks")  # fmt: skip
    add("--capability", type=int, nargs="+", default=[90], metavar="N",
        help="compute capabilities without their dot; default: 90")  # fmt: skip
    add("--nvrtc", default=NVRTC, metavar="VERSION",
        help=f'that the GPU\'s machine has, or "installed", as here; default: {NVRTC}')  # fmt: skip
    add("--jieba", type=Path, metavar="WHEEL", help=f"default: {JIEBA}, made into a wheel by pip")
    return parser


class PreparationError(Exception):
    """The folder cannot be prepared."""


def prepare(
    folder: Path, capabilities: Sequence[int], nvrtc: str, wheel: Path | None = None
) -> str:
    """Fills `folder`, and says with what; what it has of an earlier call is not compiled again.

    Raises PreparationError, CalledProcessError.
    """
    _claim(folder)
    with tempfile.TemporaryDirectory(prefix="bminf-prepare-") as text:
        temporary = Path(text)
        _unpack(wheel or _jieba_wheel(temporary), folder / brought.PACKAGES)
        python = _python_with(nvrtc, temporary)
        jobs = [(kernel, each) for each in capabilities for kernel in machine_code.kernels(each)]
        compiler = compile_all(jobs, folder / brought.CODE, python)
    write_json(folder / brought.MARK, {"capabilities": list(capabilities), **compiler})
    files = [file for file in folder.rglob("*") if file.is_file()]
    size = format_bytes(sum(file.stat().st_size for file in files))
    nvrtc = ".".join(map(str, compiler["nvrtc"]))
    return f"{folder}: jieba, {len(jobs)} kernels by NVRTC {nvrtc}; {len(files)} files, {size}"


def _claim(folder: Path) -> None:
    """A folder of ours, or an empty one."""
    if folder.exists() and any(folder.iterdir()) and not (folder / brought.MARK).is_file():
        raise PreparationError(f"{folder} has files that prepare did not make; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / brought.MARK, {})


def _jieba_wheel(folder: Path) -> Path:
    command = ["wheel", "--no-deps", "--wheel-dir", str(folder), JIEBA]
    _pip(sys.executable, *command)
    return next(folder.glob("*.whl"))


def _unpack(wheel: Path, folder: Path) -> None:
    """An import path out of a wheel of plain Python, in place of what was there."""
    shutil.rmtree(folder, ignore_errors=True)
    with zipfile.ZipFile(wheel) as content:
        names = [name for name in content.namelist() if not name.startswith(_UNUSED)]
        content.extractall(folder, names)


def _python_with(nvrtc: str, folder: Path) -> str:
    """A Python whose CuPy finds that NVRTC. CuPy takes what its finder of libraries comes upon in
    the environment's own packages, so that an environment of its own is the only sure way."""
    if nvrtc == "installed":
        return sys.executable
    major = int(nvrtc.partition(".")[0])
    suffix = "-cu12" if major < 13 else ""
    environment = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    python = str(environment / "bin" / "python")
    cupy = f"cupy-cuda{major}x=={_cupy_version()}"
    _pip(python, "install", cupy, f"nvidia-cuda-nvrtc{suffix}=={nvrtc}")
    return python


def _cupy_version() -> str:
    """Of the CuPy here, whichever CUDA it is for."""
    for name in ("cupy-cuda12x", "cupy-cuda13x"):
        with suppress(PackageNotFoundError):
            return version(name)
    raise PreparationError("CuPy is not installed, and its version is to be that of here")


def _pip(python: str, *arguments: str) -> None:
    command = [python, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True)


def compile_all(
    jobs: Sequence[tuple[Kernel, int]], folder: Path, python: str = sys.executable
) -> dict[str, Any]:
    """Fills `folder` with this machine code and no other; says by which compiler.

    Raises PreparationError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "BMINF_CACHE_DIR": str(folder), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [python, "-m", "benchmarks.gpu_session.compiling"],
        input=as_json(jobs),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    if done.returncode != 0:
        raise PreparationError(f"kernels could not be compiled:\n{done.stderr.strip()[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    version = (found["nvrtc"][0], found["nvrtc"][1])
    wanted = {kept_file(kernel, each, version).name for kernel, each in jobs}
    for file in folder.iterdir():
        if file.name not in wanted:  # of sources that have changed, or another compiler
            file.unlink()
    return found
