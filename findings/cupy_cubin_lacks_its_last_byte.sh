#!/usr/bin/env bash
# CuPy: nvrtc.getCUBIN() gives machine code without its last byte. CuPy takes what NVRTC writes for a
# string with an end of its own, and leaves that end out; a cubin, unlike PTX, has none.
#
# A driver reads it all the same, since Python's bytes end in a zero as the cubin does. Who writes it to
# a file has one that NVIDIA's disassembler refuses; with a zero behind it, it reads every instruction.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q numpy==2.4.6 cupy-cuda12x==14.2.0 nvidia-cuda-nvrtc-cu12==12.9.86 \
    nvidia-cuda-nvdisasm==13.5.37

cd "$work" && "$work/venv/bin/python" - <<'PYTHON'
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from cupy_backends.cuda.libs import nvrtc

print("cupy-cuda12x", version("cupy-cuda12x"), "NVRTC", ".".join(map(str, nvrtc.getVersion())))
print("guess: the bytes of getCUBIN() are a file that nvdisasm reads")
source = 'extern "C" __global__ void one(float* y) { *y = 1.0f; }'
program = nvrtc.createProgram(source, "one.cu", [], [])
nvrtc.compileProgram(program, ["-arch=sm_90"])
cubin = nvrtc.getCUBIN(program)
(disassembler,) = Path(sys.prefix).rglob("bin/nvdisasm")


def disassembled(code):
    Path("one.cubin").write_bytes(code)
    return subprocess.run([disassembler, "one.cubin"], capture_output=True, text=True)


as_given, with_a_zero = disassembled(cubin), disassembled(cubin + b"\0")
print(f"{len(cubin)} bytes: nvdisasm ends with {as_given.returncode}: {as_given.stderr.strip()[:80]}")
print(f"{len(cubin) + 1} bytes, a zero more: it ends with {with_a_zero.returncode}")
assert as_given.returncode and not with_a_zero.returncode and "EXIT" in with_a_zero.stdout
PYTHON
