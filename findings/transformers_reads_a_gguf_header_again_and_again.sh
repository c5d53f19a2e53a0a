#!/usr/bin/env bash
# transformers and gguf: a model of a .gguf file is loaded with its header read twice (once more for
# its tokenizer), and the table of names that tensors may have is made anew for every module.
#
# The header holds the vocabulary, and gguf's reader makes several arrays in Python for each of its
# entries: 5 s of CPU time for 49,152 of them. Each table tries the names of every architecture.
# A model of 135 million parameters takes 18 s, of which unpacking its weights takes 2.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 transformers==5.23.0 gguf==0.19.0 \
    accelerate==1.15.0

HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore - "$work/tiny.gguf" <<'PYTHON'
import sys
from importlib.metadata import version
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers

SIZE, LAYERS = 32, 2
path = Path(sys.argv[1])
writer = gguf.GGUFWriter(path, "llama")
writer.add_context_length(64)
writer.add_embedding_length(SIZE)
writer.add_feed_forward_length(2 * SIZE)
writer.add_block_count(LAYERS)
writer.add_head_count(4)
writer.add_head_count_kv(4)
writer.add_vocab_size(100)
writer.add_layer_norm_rms_eps(1e-5)
writer.add_rope_dimension_count(SIZE // 4)
config = transformers.LlamaConfig(
    vocab_size=100, hidden_size=SIZE, intermediate_size=2 * SIZE, num_hidden_layers=LAYERS,
    num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True,
)
with torch.device("meta"):
    model = transformers.LlamaForCausalLM(config)
names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
for name, tensor in model.named_parameters():
    stem, _, end = name.rpartition(".")
    writer.add_tensor(f"{names.get_name(stem)}.{end}", np.ones(tuple(tensor.shape), np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

counts = {}
for name in ("GGUFReader", "get_tensor_name_map"):

    def counting(*arguments, name=name, made=getattr(gguf, name)):
        counts[name] = counts.get(name, 0) + 1
        return made(*arguments)

    setattr(gguf, name, counting)
transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
print(*(f"{name} {version(name)}" for name in ("torch", "transformers", "gguf")))
num_modules = len(list(model.modules()))
print("guess: the header is read once, and the table of names is made once")
print(f"seen: read {counts['GGUFReader']} times, made {counts['get_tensor_name_map']} times;",
      f"the model has {num_modules} modules")
assert counts == {"GGUFReader": 2, "get_tensor_name_map": num_modules}
PYTHON
