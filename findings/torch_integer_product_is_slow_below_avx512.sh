#!/usr/bin/env bash
# torch on x86: the product of 8-bit integers takes many times as long as that of float32 on a CPU that
# has AVX2 and no AVX-512.
#
# torch._int_mm warns of nothing, and its results are right. Who packs weights to 8 bits to be faster
# is slower with many tokens on consumer CPUs, unless the codes are turned into floats first.
# It needs such a CPU, and says so on others.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6

"$work/venv/bin/python" - <<'PYTHON'
import time
from pathlib import Path

import torch


def least_s(work, repeats=3):
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


flags = Path("/proc/cpuinfo").read_text()
if "avx2" not in flags or "avx512f" in flags:
    raise SystemExit("this CPU is none of those that have AVX2 and no AVX-512: nothing is shown")
torch.set_num_threads(1)
codes = torch.randint(-127, 128, (256, 1024), dtype=torch.int8)
weight = torch.randint(-127, 128, (1024, 1024), dtype=torch.int8)
assert torch.equal(
    torch._int_mm(codes, weight.t()).double(), codes.double() @ weight.double().t()
)
as_integers = least_s(lambda: torch._int_mm(codes, weight.t()))
as_floats = least_s(lambda: codes.float() @ weight.float().t())
ratio = as_integers / as_floats
print("torch", torch.__version__, torch.backends.cpu.get_cpu_capability())
print("guess: 8-bit integers are no slower than float32, the conversion of both sides included")
print(f"integers {as_integers * 1e3:.1f} ms, float32 {as_floats * 1e3:.1f} ms of CPU: {ratio:.1f}x")
assert ratio > 5, ratio
PYTHON
