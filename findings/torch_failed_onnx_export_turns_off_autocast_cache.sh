#!/usr/bin/env bash
# torch: an ONNX export (dynamo=False) of a model that raises leaves the cache of autocast turned off.
#
# The exporter turns the cache off while it traces, and on again only when the trace has succeeded.
# From then on each torch.autocast of the process casts every weight anew each time it is used.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6

"$work/venv/bin/python" -W ignore - <<'PYTHON'
import io

import torch


class Unwilling(torch.nn.Module):
    def forward(self, x):
        raise ValueError("not while it is traced")


before = torch.is_autocast_cache_enabled()
try:
    torch.onnx.export(Unwilling(), (torch.ones(1),), io.BytesIO(), dynamo=False)
except ValueError:
    pass
after = torch.is_autocast_cache_enabled()
print("torch", torch.__version__)
print("guess: an export that fails leaves settings of the process as they were")
print("cache of autocast before:", before, "after:", after)
assert before and not after, (before, after)
PYTHON
