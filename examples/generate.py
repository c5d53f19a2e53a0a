"""Continues a text with CPM-1 or CPM-2, printing it as it is generated, under a memory limit.

python examples/generate.py cpm2 FOLDER "今天天气很好，" --memory-limit 6GB
"""

import argparse

import bminf

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model", choices=["cpm1", "cpm2"])
parser.add_argument("checkpoint", help="a folder, in any layout, or a hub id")
parser.add_argument("text")
parser.add_argument("--memory-limit", default=None, help='such as "6GB"; default: what is free')
parser.add_argument("--quantization", default="int8", choices=["int8", "int4"])
parser.add_argument("--max-tokens", type=int, default=64)
parser.add_argument("--seed", type=int, default=None)
arguments = parser.parse_args()

Model = {"cpm1": bminf.models.CPM1, "cpm2": bminf.models.CPM2}[arguments.model]
with Model(arguments.checkpoint, arguments.memory_limit, arguments.quantization) as model:
    print(arguments.text, end="", flush=True)
    for piece in model.generate_iter(
        arguments.text, max_tokens=arguments.max_tokens, top_p=0.9, seed=arguments.seed
    ):
        print(piece, end="", flush=True)
    stats = model.stats
    print(f"\n{stats.num_tokens} tokens, {stats.tokens_per_s:.1f} a second")
