#!/usr/bin/env bash
# CuPy and cuda-pathfinder: CuPy's build for CUDA 13 compiles with NVRTC 12.9 where that is the
# compiler that lies in the environment, and says nothing.
#
# Which library is loaded is decided by what cuda-pathfinder finds in the folders of installed
# packages, not by the CUDA version that CuPy was built for. Machine code kept under the version of
# CuPy, or of the driver, may be that of another compiler; ask NVRTC for its own. The older one also
# still compiles for compute capability 6.1, which 13.0 refuses.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q \
    cupy-cuda13x==14.2.0 cuda-pathfinder==1.9.1 numpy==2.4.6 nvidia-cuda-nvrtc-cu12==12.9.86

"$work/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

from cupy_backends.cuda.libs import nvrtc

found = nvrtc.getVersion()
program = nvrtc.createProgram('extern "C" __global__ void kernel() {}', "kernel.cu", (), ())
nvrtc.compileProgram(program, ("-arch=sm_61",))
code = bytes(nvrtc.getCUBIN(program))
print("cupy-cuda13x", version("cupy-cuda13x"), "cuda-pathfinder", version("cuda-pathfinder"))
print("guess: no compiler of CUDA 13 is installed, so an error that asks for one")
print("NVRTC", found, "machine code for 6.1:", len(code) > 0)
assert tuple(found) == (12, 9), found
assert code[:4] == b"\x7fELF"
PYTHON
