"""Fills the blanks of a text with GLM-130B or GLM-10B; each blank is written [MASK].

python examples/glm_fill_blank.py FOLDER "The [MASK] of a GPU is far smaller than its [MASK]."
"""

import argparse

import bminf

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("checkpoint", help="a folder, in any layout")
parser.add_argument("text")
parser.add_argument("--memory-limit", default=None, help='such as "20GB"; default: what is free')
parser.add_argument("--max-tokens", type=int, default=16, help="of each blank")
arguments = parser.parse_args()

with bminf.models.GLM(arguments.checkpoint, arguments.memory_limit) as model:
    blanks = model.fill_blank(arguments.text, arguments.max_tokens, temperature=0)

filled, end = "", 0
for blank in blanks:
    filled += arguments.text[end : blank["position"]] + f"[{blank['text']}]"
    end = blank["position"] + len("[MASK]")
print(filled + arguments.text[end:])
