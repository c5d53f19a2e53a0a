#!/usr/bin/env bash
# bitsandbytes: NF4 with double quantization gives a row of small weights back several times too
# large, or with its signs turned. With zeros in their place it would be nearer.
#
# The largest absolute values of 256 blocks of 64 weights, less their mean, are stored in 8 bits. For
# a block far below the mean the error of that is larger than what it stands for, and the sum with the
# mean may be negative. What comes out changes with the largest of the other blocks. Zeros stay zeros.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 bitsandbytes==0.50.2

cd "$work" && "$work/venv/bin/python" -W ignore - <<'PYTHON'
import logging
from importlib.metadata import version

import torch

logging.disable(logging.ERROR)
import bitsandbytes.functional as bnb

print("torch", version("torch"), "bitsandbytes", version("bitsandbytes"))
print("guess: quantized scales cost little more than the 9% of NF4 itself, in each row")


def kept(weight, is_double):
    """What the first row is multiplied by, and the relative error of the second."""
    packed, state = bnb.quantize_4bit(
        weight, blocksize=64, compress_statistics=is_double, quant_type="nf4"
    )
    back = bnb.dequantize_4bit(packed, state)
    gain = float(back[0] @ weight[0] / (weight[0] @ weight[0]))
    return gain, float((back[1] - weight[1]).norm() / weight[1].norm())


gains = []
for largest in range(1, 9):
    torch.manual_seed(0)
    weight = torch.randn(64, 1024) * 0.05
    weight[0] *= 1e-3
    weight[5] *= largest
    (plain, plain_error), (double, double_error) = kept(weight, False), kept(weight, True)
    print(f"small row, another times {largest}: comes back times {plain:.2f}, double {double:.2f}")
    assert 0.9 < plain < 1.1 and plain_error < 0.12 and double_error < 0.12
    gains.append(double)
assert min(gains) < -2 and max(gains) > 4, gains
PYTHON
