"""A dialogue with EVA; an empty line ends it.

python examples/dialogue.py thu-coai/EVA2.0-base
"""

import argparse
import sys

import bminf

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("checkpoint", help="a folder with EVA, in any layout, or a hub id")
parser.add_argument("--memory-limit", default=None, help='such as "4GB"; default: what is free')
parser.add_argument("--seed", type=int, default=None)
arguments = parser.parse_args()

with bminf.models.EVA(arguments.checkpoint, arguments.memory_limit) as model:
    context: list[str] = []
    print("> ", end="", flush=True)
    for line in sys.stdin:
        if not (utterance := line.strip()):
            break
        context.append(utterance)
        answer, _ = model.dialogue(context, seed=arguments.seed)
        context.append(answer or "。")
        print(answer, "> ", sep="\n", end="", flush=True)
