#!/usr/bin/env bash
# HQQ: the relative error depends on how large a weight is. Where groups span less than 1e-4, each
# comes back as one value, and nothing is said.
#
# A group whose weights span at most 1e-4 gets a step of 1, of which none of them is half; and no step
# is smaller than 5e-5, so that small weights have fewer than 16 values. float16 scales go far lower.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 hqq==0.2.8.post1

cd "$work" && "$work/venv/bin/python" -W error::UserWarning - <<'PYTHON'
from importlib.metadata import version

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

torch.manual_seed(0)
weight = torch.randn(64, 1024) * 0.05
print("torch", version("torch"), "hqq", version("hqq"))
print("guess: the relative error is the same for a weight times any number that float16 holds well")
errors, values = {}, {}
for factor in (1.0, 1e-2, 2e-3, 2e-4):
    linear = torch.nn.Linear(1024, 64, bias=False)
    linear.weight.data = weight * factor
    wanted = linear.weight.data.clone()
    config = BaseQuantizeConfig(nbits=4, group_size=64)
    packed = HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu")
    back = packed.dequantize()
    errors[factor] = float((back - wanted).norm() / wanted.norm())
    values[factor] = max(len(group.unique()) for group in back.view(-1, 64))
    print(f"times {factor:g}: relative error {errors[factor]:.3f}, "
          f"at most {values[factor]} values in a group of 64")
assert errors[1.0] < 0.1 and errors[1e-2] < 0.1
assert errors[2e-3] > 1.2 * errors[1.0]
assert errors[2e-4] > 0.9 and values[2e-4] == 1
PYTHON
