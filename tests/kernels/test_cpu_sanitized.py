"""kernels/cpu/ under sanitizers: every format at every level, and the threads."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from cpu_build import build_library, build_program
from host_build import sanitizer_runtime
from programs import said_by

HERE = Path(__file__).parent


def test_the_kernels_are_clean_under_address_and_undefined() -> None:
    library = build_library("address,undefined")
    settings = {"LD_PRELOAD": str(sanitizer_runtime("address")), "ASAN_OPTIONS": "detect_leaks=0"}
    path = os.pathsep.join([str(HERE), str(HERE.parents[1])])
    environment = {**os.environ, **settings, "PYTHONPATH": path}
    said = said_by(HERE / "cpu_products.py", library, env=environment)
    assert said.endswith("clean\n")


def test_threads_share_parts_without_a_race() -> None:
    program = build_program(HERE / "cpu_threads.cpp", ["threads.cpp"], "thread")
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "shared\n", done.stderr
