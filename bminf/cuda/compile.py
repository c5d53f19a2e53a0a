"""Source text to machine code with NVRTC, once for each text, set of options and device.

No GPU is needed, no CUDA toolkit and no header: the kernels include nothing but their own common
text. The machine code is kept on disk, in BMINF_CACHE_DIR or the user's cache folder.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from bminf.cuda.source import Kernel, source_of
from bminf.errors import KernelError

logger = logging.getLogger(__name__)

MIN_CAPABILITY = 61
"""The first with dp4a, the 8-bit dot product."""

_DIGEST_BYTES = hashlib.sha256().digest_size

_INSTALL_COMPILER = (
    "install one with pip install nvidia-cuda-nvrtc-cu12: 12.9 is the last version that compiles "
    "for compute capabilities below 7.5, and new GPUs need a new one (nvidia-cuda-nvrtc)"
)


def compile_kernel(kernel: Kernel, capability: int) -> bytes:
    """The machine code (cubin) of `kernel` for devices of `capability` (61, 80, ...).

    Taken from the disk where it was compiled before and is not damaged; where there is no compiler,
    whichever compiled it. Raises KernelError: no compiler and nothing on the disk, a device too old
    for the kernels or unknown to the compiler, an error in the source.
    """
    if capability < MIN_CAPABILITY:
        raise KernelError(
            f"a GPU of compute capability {_dotted(capability)} is too old for the kernels of "
            f"bminf; they need {_dotted(MIN_CAPABILITY)} (GTX 10 series) or later"
        )
    try:
        nvrtc = _nvrtc()
    except KernelError:
        for file in kept_files(kernel, capability):
            if (code := read_kept(file)) is not None:
                return code
        raise
    file = kept_file(kernel, capability, nvrtc.getVersion())
    code = read_kept(file)
    if code is None:
        code = _compile(nvrtc, kernel, capability)
        _write(file, code)
    return code


def compiler_version() -> tuple[int, int]:
    """Of NVRTC, such as (12, 9).   Raises KernelError where it is not found."""
    version: tuple[int, int] = _nvrtc().getVersion()
    return version


def _options(capability: int) -> tuple[str, ...]:
    return (f"-arch=sm_{capability}", "-std=c++17")


def _dotted(capability: int) -> str:
    return f"{capability // 10}.{capability % 10}"


def _nvrtc() -> Any:
    """CuPy's binding of NVRTC, with a compiler behind it."""
    try:
        from cupy_backends.cuda.libs import nvrtc
    except ImportError as error:
        raise KernelError(
            f"CuPy cannot be imported ({error}); install it with pip install cupy-cuda12x "
            "(or cupy-cuda13x, to match the driver)"
        ) from error
    try:
        nvrtc.getVersion()
    except Exception as error:  # CuPy's loader raises several types, none of them its own
        raise KernelError(
            f"the CUDA compiler library NVRTC is not found ({_first_line(error)}); "
            f"{_INSTALL_COMPILER}"
        ) from error
    return nvrtc


def _compile(nvrtc: Any, kernel: Kernel, capability: int) -> bytes:
    program = nvrtc.createProgram(source_of(kernel), f"kernels/{kernel.file}", (), ())
    options = _options(capability)
    try:
        nvrtc.compileProgram(program, options)
        return bytes(nvrtc.getCUBIN(program))
    except nvrtc.NVRTCError as error:
        log = str(nvrtc.getProgramLog(program))
        raise KernelError(_failure(nvrtc, kernel, options[0], error, log)) from error
    finally:
        nvrtc.destroyProgram(program)


def _failure(nvrtc: Any, kernel: Kernel, architecture: str, error: Exception, log: str) -> str:
    version = ".".join(map(str, nvrtc.getVersion()))
    if "libnvrtc-builtins" in log:
        return (
            f"NVRTC {version} does not find a library of its own ({_first_line(log)}): "
            "update what loads it, pip install -U cuda-pathfinder, or put its folder, "
            "nvidia/*/lib among the installed packages, into LD_LIBRARY_PATH"
        )
    if "ARCHITECTURE" in str(error).upper() or "INVALID_OPTION" in str(error).upper():
        return f"NVRTC {version} cannot compile for this GPU ({architecture}); {_INSTALL_COMPILER}"
    return (
        f"NVRTC {version} cannot compile {kernel} of kernels/{kernel.file} "
        f"for {architecture}: {error}\n{log}\n"
        "The sources that come with bminf compile: install bminf anew if they were changed"
    )


def _first_line(text: object) -> str:
    return str(text).strip().partition("\n")[0]


def kept_file(kernel: Kernel, capability: int, version: tuple[int, int]) -> Path:
    """Where the machine code by NVRTC `version` is kept."""
    major, minor = version
    return cache_folder() / f"{_key(kernel, capability)}-{major}.{minor}.cubin"


def kept_files(kernel: Kernel, capability: int) -> list[Path]:
    """Those that are there, whichever NVRTC has made them."""
    return sorted(cache_folder().glob(f"{_key(kernel, capability)}-*.cubin"))


def _key(kernel: Kernel, capability: int) -> str:
    text = "\0".join([source_of(kernel), *_options(capability)])
    return hashlib.sha256(text.encode()).hexdigest()


def cache_folder() -> Path:
    """Where machine code is kept. Raises KernelError where there is no such place."""
    folder = os.environ.get("BMINF_CACHE_DIR")
    if folder:
        return Path(folder)
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "bminf"
    except RuntimeError as error:
        raise KernelError(
            "there is no home folder to keep compiled kernels in; set BMINF_CACHE_DIR"
        ) from error


def read_kept(file: Path) -> bytes | None:
    """The machine code in `file`; None where there is none or it is damaged."""
    try:
        content = file.read_bytes()
    except OSError:
        return None
    code, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
    return code if digest == hashlib.sha256(code).digest() else None


def _write(file: Path, code: bytes) -> None:
    """The code, and its digest after it, where tools that read machine code do not mind it. Under
    another name first, so that no other process reads half a file."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            unfinished = Path(folder) / file.name
            unfinished.write_bytes(code + hashlib.sha256(code).digest())
            os.replace(unfinished, file)
    except OSError as error:
        logger.warning("compiled kernels are not kept: %s; set BMINF_CACHE_DIR", error)
