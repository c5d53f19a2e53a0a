#!/usr/bin/env bash
# transformers, BLOOM: with slow_but_exact, which sums products in the order of the training's ranks,
# the biases of two of the four linears of a layer are left out, and the result is another model's.
#
# No published configuration sets it; pretraining_tp, which it needs, is in that of the largest.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 transformers==5.23.0

HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import torch
from transformers import BloomConfig, BloomForCausalLM

sizes = dict(vocab_size=100, hidden_size=64, n_layer=2, n_head=4, pretraining_tp=2)
torch.manual_seed(0)
plain = BloomForCausalLM(BloomConfig(**sizes)).eval()
exact = BloomForCausalLM(BloomConfig(**sizes, slow_but_exact=True)).eval()
ids = torch.arange(12)[None]


def difference() -> float:
    exact.load_state_dict(plain.state_dict())
    with torch.no_grad():
        return float((plain(ids).logits - exact(ids).logits).abs().max())


with torch.no_grad():
    for name, parameter in plain.named_parameters():
        if name.endswith("bias"):
            parameter.normal_()
with_biases = difference()
with torch.no_grad():
    for name, parameter in plain.named_parameters():
        if name.endswith(("dense.bias", "dense_4h_to_h.bias")):
            parameter.zero_()
without = difference()

print(*(f"{name} {version(name)}" for name in ("torch", "transformers")))
print("guess: logits differ by the rounding of sums, by less than 1e-4")
print(f"seen: by {with_biases:.2g}; and by {without:.2g} once dense and dense_4h_to_h have no biases")
assert with_biases > 0.01 and without < 1e-4
PYTHON
