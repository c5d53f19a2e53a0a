"""Fills the blanks of a text with CPM-2; each blank is written <span>.

python examples/fill_blank.py FOLDER "北京环球影城指定单日门票将采用<span>制度，<span>元起。"
"""

import argparse

import bminf

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("checkpoint", help="a folder with CPM-2, in any layout")
parser.add_argument("text")
parser.add_argument("--memory-limit", default=None, help='such as "6GB"; default: what is free')
parser.add_argument("--seed", type=int, default=None)
arguments = parser.parse_args()

with bminf.models.CPM2(arguments.checkpoint, arguments.memory_limit) as model:
    blanks = model.fill_blank(arguments.text, top_p=0.9, temperature=0.7, seed=arguments.seed)

filled, end = "", 0
for blank in blanks:
    filled += arguments.text[end : blank["position"]] + f"[{blank['text']}]"
    end = blank["position"] + len("<span>")
print(filled + arguments.text[end:])
