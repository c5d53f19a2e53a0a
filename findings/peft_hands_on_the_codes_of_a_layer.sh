#!/usr/bin/env bash
# peft and transformers: an adapter around a linear that has an attribute `qweight` answers with it
# where the model asks for `weight`, and T5 then casts its activations to integers.
#
# The adapter takes any layer with that attribute for one of GPTQ's. T5 casts to the dtype of the
# weight of its feed-forward layer, unless that is int8. So a packed linear that is right without an
# adapter computes with rounded activations, or fails, with one.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 transformers==5.23.0 peft==0.21.2

HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import torch
import transformers
from peft import IA3Config, get_peft_model


class Packed(torch.nn.Linear):
    """A linear beside whose weight lie codes; it computes with the weight."""

    seen = []

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = linear.weight
        self.register_buffer("qweight", torch.zeros(2, 2, dtype=torch.uint8))

    def forward(self, x):
        self.seen.append(x.dtype)
        return super().forward(x.float())


config = transformers.T5Config(
    vocab_size=32, d_model=16, d_ff=24, d_kv=8, num_layers=1, num_heads=2, dropout_rate=0
)
model = transformers.T5ForConditionalGeneration(config).eval()
for stack in (model.encoder, model.decoder):
    feed_forward = stack.block[0].layer[-1].DenseReluDense
    feed_forward.wo = Packed(feed_forward.wo)
ids = torch.tensor([[3, 4, 5]])
model(input_ids=ids, decoder_input_ids=ids)
alone = set(Packed.seen)
Packed.seen.clear()
adapter = IA3Config(target_modules=["q", "wo"], feedforward_modules=["wo"])
get_peft_model(model, adapter)
asked = model.encoder.block[0].layer[-1].DenseReluDense.wo.weight.dtype
print(*(f"{name} {version(name)}" for name in ("torch", "transformers", "peft")))
print("guess: the adapter's weight has the dtype of the layer's:", torch.float32)
print("seen:", asked, "- activations without an adapter arrive as", alone)
assert alone == {torch.float32}
assert asked == torch.uint8
try:
    model(input_ids=ids, decoder_input_ids=ids)
    print("with one, they were cast on the way to", asked)
except Exception as error:
    print("with one:", type(error).__name__, error)
PYTHON
