#!/usr/bin/env bash
# torch on the CPU: to ask whether a tensor holds NaN, isnan().any() takes many times as long as max(),
# which is NaN where any element is.
#
# For half precision isnan() widens and writes a byte for each element; the maximum is one pass over
# what is there. Who looks for NaN in a checkpoint that is loaded spends more on that than on reading.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6

"$work/venv/bin/python" - <<'PYTHON'
import time

import torch


def least_s(work, repeats=5):
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


torch.set_num_threads(1)
print("torch", torch.__version__, torch.backends.cpu.get_cpu_capability())
print("guess: isnan().any() takes about as long as max()")
for dtype in (torch.bfloat16, torch.float16):
    weights = torch.randn(2**24).to(dtype)
    asked = least_s(lambda: weights.isnan().any())
    found = least_s(lambda: weights.max())
    assert not weights.max().isnan()
    weights[2**23] = torch.nan
    assert weights.max().isnan() and weights.isnan().any()
    print(f"{dtype}: {asked * 1e3:.1f} ms against {found * 1e3:.1f} of CPU: {asked / found:.1f}x")
    assert asked > 3 * found, asked / found
PYTHON
