#!/usr/bin/env bash
# torchao: quantize_() to int4 returns as always where the group does not divide a row, and leaves the
# weight as it is; no warning, and no error. It does so before it looks for the package that it needs.
#
# SmolLM2 has 576 columns in six of seven matrices: with the default groups of 128 nothing is packed
# in them, the predictions are those of the original, and a comparison of qualities is won by it.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 torchao==0.18.0

cd "$work" && "$work/venv/bin/python" - 2>"$work/said" <<'PYTHON'
import warnings
from importlib.metadata import version

import torch
from torchao.quantization import Int4WeightOnlyConfig, quantize_

print("torch", version("torch"), "torchao", version("torchao"))
print("guess: a weight that cannot be packed is refused, or a warning names it")


def quantized(columns):
    linear = torch.nn.Linear(columns, 64, bias=False, dtype=torch.bfloat16)
    before = linear.weight.detach().clone()
    quantize_(linear, Int4WeightOnlyConfig(group_size=128))
    return linear.weight.detach(), before


with warnings.catch_warnings():
    warnings.simplefilter("error")
    weight, before = quantized(576)
assert type(weight) is torch.Tensor and torch.equal(weight, before)
print(f"576 columns: no error; the weight is {weight.dtype}, and equal to what it was")
try:
    quantized(640)
except ImportError as error:
    print("640 columns:", error)
else:
    raise AssertionError("640 columns are packed on a machine that cannot")
PYTHON
if grep -n "Skipping\|576" "$work/said"; then
    echo "it said something" >&2
    exit 1
fi
