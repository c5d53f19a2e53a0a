#!/usr/bin/env bash
# transformers, BLOOM in 16 bits: the bias of a key is its slope times its position from the beginning
# of the text, rounded to the type of the model, so that keys beside each other share a bias.
#
# At position 2,000 the bias of the first head of 16 is about 1,400: steps of 8 in bfloat16. A bias
# that is counted from the query, which gives the same probabilities, is exact where it matters.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 transformers==5.23.0

HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import torch
from transformers import BloomConfig, BloomForCausalLM
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

HEADS, TOKENS = 16, 2048
mask = torch.ones(1, TOKENS, dtype=torch.long)
last = build_alibi_tensor(mask, HEADS, torch.bfloat16)[0, 0, -64:]
num_values = len(last.unique())

torch.manual_seed(0)
config = BloomConfig(vocab_size=500, hidden_size=64, n_layer=2, n_head=HEADS)
exact = BloomForCausalLM(config).eval()
with torch.no_grad():
    for parameter in exact.parameters():
        if parameter.dim() == 2:
            parameter.normal_(std=0.3)
        parameter.copy_(parameter.bfloat16())
    rounded = BloomForCausalLM(config).eval()
    rounded.load_state_dict(exact.state_dict())
    rounded.bfloat16()
    ids = torch.randint(500, (1, TOKENS))
    error = (rounded(ids).logits.float() - exact(ids).logits).abs().mean((0, 2))
early, late = float(error[:64].mean()), float(error[-64:].mean())

print(*(f"{name} {version(name)}" for name in ("torch", "transformers")))
print("guess: 64 keys in a row have 64 biases, and rounding costs as much late in a text as early")
print(f"seen: {num_values} biases of the last 64 keys of {TOKENS}; mean error of logits",
      f"{early:.3f} in the first 64 tokens, {late:.3f} in the last")
assert num_values < 16 and late > 2 * early
PYTHON
