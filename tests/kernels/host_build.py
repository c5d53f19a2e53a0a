"""Compiles the real .cu text for the CPU, with g++ and the headers in host/.

A build is a shared object with an entry `shim_launch_NAME` for each kernel asked for. It is kept in
a temporary folder under a hash of everything it depends on, so another process finds it.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

SHIM = Path(__file__).parent / "host"
SANITIZERS = ("address", "undefined", "thread")
Macros = tuple[tuple[str, str | int], ...]

COMMON_FLAGS = (
    "-std=c++17",
    # The GPU's compiler may contract to fma as well, but g++ must do the same thing everywhere.
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-fno-exceptions",
    "-fno-rtti",
    "-fPIC",
    "-shared",
    "-pipe",
    f"-I{SHIM}",
)
KERNEL_FLAGS = (
    "-g1",  # lines, for the messages of sanitizers and of addr2line
    "-nostdinc",  # NVRTC has no headers, so kernels must not need any
    "-fvisibility=hidden",
    "-Wl,-Bsymbolic",
    "-Wl,-z,start-stop-visibility=hidden",
    # No libubsan: the runtime has handlers of its own, which name the thread.
    "-nodefaultlibs",
    "-ftrivial-auto-var-init=pattern",  # what is read before it is written is at least absurd
    "-fstack-clash-protection",  # a frame of any size meets the page below its stack
    "-Werror=uninitialized",
    "-Werror=return-type",
)
# What a GPU traps on as well, and what costs little; all of it is tested in "undefined".
CHEAP_CHECKS = ("-fsanitize=alignment,bounds", "-fno-sanitize-recover=all")
SANITIZER_FLAGS = {
    None: (),
    "undefined": ("-fsanitize=undefined,float-cast-overflow", "-fno-sanitize=vptr,shift-base"),
    "address": ("-fsanitize=address", "-fsanitize-sections=shim_shared"),
    "thread": ("-fsanitize=thread",),
}


class BuildError(Exception):
    """g++ is missing, or refused a kernel: its message says why."""


@dataclass(frozen=True)
class Build:
    """What to compile: the full text of a .cu file, and which of its kernels are wanted."""

    source: str
    entries: tuple[str, ...]
    macros: Macros = ()
    capability: int = 80
    sanitizer: str | None = None
    coverage: bool = False
    portable_fibers: bool = False  # ucontext in place of assembly, as on other processors


def build(request: Build) -> Path:
    """The shared object of `request`, compiled unless that was done before."""
    folder = _folder(request.portable_fibers)
    command = [_compiler(), *COMMON_FLAGS, *_kernel_flags(request)]
    text = _translation_unit(request)
    key = hashlib.sha256("\0".join([*command, text]).encode()).hexdigest()[:32]
    target = folder / f"{request.entries[0]}-{key}.so"
    if not target.exists():
        runtime = _runtime(folder, request.portable_fibers)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            _compile(command, text, Path(scratch), target, runtime)
    return target


def build_all(requests: Iterable[Build], processes: int = 2) -> list[Path]:
    """The shared objects of all `requests`, so many compiled at a time."""
    requests = list(requests)
    for portable in {request.portable_fibers for request in requests}:
        _runtime(_folder(portable), portable)
    with ThreadPoolExecutor(processes) as pool:
        return list(pool.map(build, requests))


def runtime_of(library: Path) -> Path:
    """The runtime that a built kernel is linked with."""
    return _runtime_path(library.parent)


def coverage_notes(counts: str) -> Path:
    """What g++ wrote about the lines of a build, which it counts in a file named `counts`."""
    return _folder(False) / f"{counts.split('.so-')[0]}.gcno"


def run_compiler(arguments: Sequence[str]) -> None:
    """g++ with these arguments. Raises BuildError with what it says."""
    _run([_compiler(), *arguments])


def sanitizer_runtime(sanitizer: str) -> Path | None:
    """The library to preload before a build with `sanitizer` is loaded; None where none is."""
    names = {"address": "libasan.so", "thread": "libtsan.so"}
    if sanitizer not in names:
        return None
    path = Path(_output([_compiler(), f"-print-file-name={names[sanitizer]}"]).strip())
    if not path.is_absolute():
        raise BuildError(f"g++ has no {names[sanitizer]}; install the sanitizers that belong to it")
    return path.resolve()


def _translation_unit(request: Build) -> str:
    exports = "".join(
        f"SHIM_EXPORT({entry}, {_launch_bound(request.source, entry)})\n"
        for entry in request.entries
    )
    return f'#include "cuda_shim.h"\n#line 1 "kernel.cu"\n{request.source}\n{exports}'


def _launch_bound(source: str, entry: str) -> str:
    """The expression in the kernel's __launch_bounds__, which C++ has no place for."""
    bounds = rf"__launch_bounds__\s*\(([^,)]*)[^)]*\)\s*(?:void\s+)?{entry}\s*\("
    found = re.search(bounds, source)
    return found[1] if found else "1024"


def _kernel_flags(request: Build) -> list[str]:
    macros: dict[str, str | int] = {
        "BMINF_HOST_SHIM": 1,
        "__CUDA_ARCH__": request.capability * 10,
        **dict(request.macros),
    }
    flags = [*KERNEL_FLAGS, *_processor_flags(), *CHEAP_CHECKS]
    flags += SANITIZER_FLAGS[request.sanitizer]
    if request.coverage:
        # The seed makes the notes of two processes that build the same thing the same.
        flags += ["-O0", "--coverage", "-frandom-seed=0"]
        flags += ["-fkeep-static-functions", "-fkeep-inline-functions"]
    else:
        # Kernels that were not asked for are left out, and their shared memory.
        flags += ["-O2", "-fwhole-program"]
    return flags + [f"-D{name}={value}" for name, value in macros.items()]


def _compile(command: Sequence[str], text: str, scratch: Path, target: Path, runtime: Path) -> None:
    source = scratch / f"{target.stem}.cpp"
    output = scratch / target.name
    source.write_text(text)
    link = [str(runtime), "-Wl,-rpath,$ORIGIN", "-lm", "-lc", "-lgcc"]
    if "--coverage" in command:
        link.append("-lgcov")
    names = f"-fdebug-prefix-map={scratch}/="  # files are named as #line names them
    _run([*command, names, "-o", str(output), str(source), *link], cwd=scratch)
    for notes in scratch.glob("*.gcno"):
        notes.replace(target.with_suffix(".gcno"))
    output.replace(target)


def _runtime(folder: Path, portable: bool) -> Path:
    """The scheduler, compiled once and never instrumented."""
    target = _runtime_path(folder)
    if not target.exists():
        _remove_old(folder.parent)
        # One translation unit: the standard headers take longer than the rest.
        text = "".join(f'#include "{path.name}"\n' for path in sorted(SHIM.glob("*.cpp")))
        flags = ["-O2", "-ftree-vectorize", "-fno-tree-loop-distribute-patterns", "-g1"]
        flags += [*_processor_flags(), *(["-DSHIM_UCONTEXT"] if portable else [])]
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            output, source = Path(scratch) / target.name, Path(scratch) / "runtime.cpp"
            source.write_text(text)
            soname = f"-Wl,-soname,{target.name}"
            _run([_compiler(), *COMMON_FLAGS, *flags, soname, "-o", str(output), str(source)])
            output.replace(target)
    return target


def _runtime_path(folder: Path) -> Path:
    # Two runtimes in one process must not have one name, by which they are found.
    return folder / f"libshim-{folder.name}.so"


def _folder(portable: bool) -> Path:
    """Where builds with the present shim and compiler are kept."""
    root = Path(tempfile.gettempdir()) / f"bminf-host-kernels-{os.getuid()}"
    root.mkdir(exist_ok=True, mode=0o700)
    if _owner(root) != os.getuid():
        raise BuildError(f"{root}, for compiled kernels, belongs to user {_owner(root)}")
    folder = root / (f"{_shim_hash()}-portable" if portable else _shim_hash())
    folder.mkdir(exist_ok=True)
    return folder


def _remove_old(root: Path) -> None:
    """Forgets the builds of earlier shims that nobody has added to for a week."""
    for folder in root.iterdir():
        if time.time() - folder.stat().st_mtime > 7 * 86400:
            shutil.rmtree(folder, ignore_errors=True)


def _owner(path: Path) -> int:
    return path.stat().st_uid


@functools.cache
def _shim_hash() -> str:
    digest = hashlib.sha256(_output([_compiler(), "--version"]).encode())
    for path in [*sorted(SHIM.iterdir()), Path(__file__)]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def _compiler() -> str:
    found = shutil.which("g++")
    if found is None:
        raise BuildError("kernels are tested on the CPU with g++, which is not installed")
    return found


def _processor_flags() -> tuple[str, ...]:
    return ("-march=x86-64-v3",) if platform.machine() in ("x86_64", "AMD64") else ()


def _output(command: Sequence[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _run(command: Sequence[str], cwd: Path | None = None) -> None:
    # A sanitizer that this process was started with is not for g++.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)
    if done.returncode != 0:
        raise BuildError(done.stderr)
