"""Compiles the kernels that standard input names; runs in an environment with the NVRTC wanted.

Imports no torch, so that such an environment needs CuPy and a compiler only.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from bminf.cuda.compile import compile_kernel, compiler_version
from bminf.cuda.source import Kernel


def as_json(jobs: Sequence[tuple[Kernel, int]]) -> str:
    """Kernels, each with the compute capability it is for, for main()."""
    return json.dumps([[k.file, k.name, k.macros, capability] for k, capability in jobs])


def main() -> int:
    """Prints the version of the compiler as JSON."""
    jobs: list[Any] = json.load(sys.stdin)
    for file, name, macros, capability in jobs:
        kernel = Kernel(file, name, tuple((name, value) for name, value in macros))
        compile_kernel(kernel, capability)
    print(json.dumps({"nvrtc": list(compiler_version())}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
