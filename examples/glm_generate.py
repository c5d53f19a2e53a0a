"""Continues a text with GLM-130B or GLM-10B, printing it as it is generated, or searches beams.

python examples/glm_generate.py FOLDER "The first thing to know about a GPU is" --memory-limit 20GB
python examples/glm_generate.py FOLDER "The first thing to know about a GPU is" --num-beams 4
"""

import argparse

import bminf

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("checkpoint", help="a folder, in any layout")
parser.add_argument("text")
parser.add_argument("--memory-limit", default=None, help='such as "20GB"; default: what is free')
parser.add_argument("--max-tokens", type=int, default=64)
parser.add_argument("--num-beams", type=int, default=1)
parser.add_argument("--seed", type=int, default=None)
arguments = parser.parse_args()

model = bminf.models.GLM(
    arguments.checkpoint, arguments.memory_limit, max_batch_size=arguments.num_beams
)
length = {"max_tokens": arguments.max_tokens}
if arguments.num_beams == 1:
    for piece in model.generate_iter(arguments.text, top_p=0.7, seed=arguments.seed, **length):
        print(piece, end="", flush=True)
    print(f"\n{model.stats.tokens_per_s:.2f} tokens a second")
else:
    beams = {"num_beams": arguments.num_beams, "num_return_sequences": arguments.num_beams}
    for answer in model.generate(arguments.text, length_penalty=1.0, **length, **beams):
        print(f"{answer.score:8.3f}  {answer.text}")
model.close()
