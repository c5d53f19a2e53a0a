#!/usr/bin/env bash
# transformers, torch: a mixture of experts whose inner width is no multiple of 16 bytes raises in its first
# pass, on a CPU, too: the default way to multiply experts, grouped_mm, takes no other rows. "eager" and
# "batched_mm" give the same model's logits.
#
# Half of 44 is 22: in float32 a width can be right alone and wrong for two ranks that share it.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 transformers==5.23.0

cd "$work" && "$work/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import torch
from transformers import MixtralConfig, MixtralForCausalLM

print("torch", version("torch"), "transformers", version("transformers"))
print("guess: experts of any width are multiplied, as linears of any width are")


def said(width, dtype, way=None):
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=32, intermediate_size=width, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=64, num_local_experts=4,
    )
    model = MixtralForCausalLM(config).to(dtype).eval()
    if way is not None:
        model.set_experts_implementation(way)
    try:
        with torch.no_grad():
            model(torch.tensor([[1, 2, 3]]))
    except RuntimeError as error:
        return str(error)
    return "right"


found = {
    f"{width} {dtype} {way or 'default'}": said(width, dtype, way)
    for width, dtype, way in (
        (22, torch.float32, None), (22, torch.float32, "eager"), (22, torch.float32, "batched_mm"),
        (24, torch.float32, None), (44, torch.float32, None), (44, torch.bfloat16, None),
        (48, torch.bfloat16, None),
    )
}
for name, text in found.items():
    print(f"{name}: {text}")
wrong = [name for name, text in found.items() if text != "right"]
assert wrong == ["22 torch.float32 default", "44 torch.bfloat16 default"], wrong
assert all("16 bytes" in found[name] for name in wrong)
PYTHON
