#!/usr/bin/env bash
# transformers, BLOOM in float16: in a batch that is padded on the left, a row whose padding sees scores
# of -16 or less gives NaN for all of its tokens; alone, without padding, it does not.
#
# What is hidden gets the least number of float16 added; that and such a score are -inf, for every key
# that a padding token has, and what softmax makes of it spreads through its value to the others.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 transformers==5.23.0

HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import torch
from transformers import BloomConfig, BloomForCausalLM

torch.manual_seed(0)
config = BloomConfig(vocab_size=100, hidden_size=64, n_layer=2, n_head=4)
model = BloomForCausalLM(config).eval()
with torch.no_grad():
    for layer in model.transformer.h:
        qkv = layer.self_attention.query_key_value
        qkv.weight.normal_(std=0.02)
        # Queries and keys that point away from each other: every score is about -64.
        by_head = qkv.bias.view(4, 3, 16)
        by_head[:, 0], by_head[:, 1] = 4.0, -4.0
model.half()
text = torch.randint(4, 100, (1, 6))
padded = torch.cat([torch.full((1, 3), 3), text], 1)
mask = (torch.arange(9) >= 3).long()[None]
with torch.no_grad():
    alone = model(text).logits
    in_batch = model(padded, attention_mask=mask).logits[:, 3:]

print(*(f"{name} {version(name)}" for name in ("torch", "transformers")))
print("guess: the tokens of a text have the same logits with padding before it, but for rounding")
print(f"seen: NaN in {int(in_batch.isnan().any(-1).sum())} of {text.shape[1]} tokens with padding,",
      f"in {int(alone.isnan().any(-1).sum())} without")
assert in_batch.isnan().any(-1).all() and alone.isfinite().all()
PYTHON
