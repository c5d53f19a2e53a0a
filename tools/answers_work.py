"""What tools.answers runs in a process of its own, with the bminf of some checkout: it reads names
of models, one a line, and prints the CPU seconds of a token of an answer of each.

Only bminf's public names are used, so that checkouts of any age can be compared; the checkpoints
are written by the tests of the checkout that this file is of.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

import bminf

_HERE = Path(__file__).resolve().parent
sys.path += [str(_HERE), str(_HERE.parent / "tests")]

from overheads_work import write_glm  # noqa: E402
from tiny_zoo import tiny  # noqa: E402

CHINESE = "今天天气很好，我们去"
ENGLISH = "ab"  # the GLM has room for 64 tokens in all
GREEDY = {"temperature": 0, "frequency_penalty": 3.0}
"""Without a penalty a small random model says one word again and again."""


def main() -> None:
    print(json.dumps(str(bminf.__file__)), flush=True)
    warnings.simplefilter("ignore")  # that a tokenizer is one of the tests
    torch.set_num_threads(1)
    num_tokens = int(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        models = {name: _load(name, Path(folder) / name) for name in ("cpm1", "glm", "cpm2")}
        for line in sys.stdin:
            print(json.dumps(token_s(models[line.strip()], num_tokens)), flush=True)


def _load(name: str, folder: Path) -> Any:
    folder.mkdir()
    kinds: dict[str, Any] = {
        "cpm1": bminf.models.CPM1, "glm": bminf.models.GLM, "cpm2": bminf.models.CPM2,
    }  # fmt: skip
    if name == "glm":
        write_glm(folder)
    elif name == "cpm1":
        tiny(name, num_layers=2).write_original(folder)
    else:
        tiny(name, num_decoder_layers=2).write_original(folder)
    length = {"glm": 64}.get(name, 128)
    return kinds[name](folder, quantization=None, device="cpu", max_length=length)


def token_s(model: Any, num_tokens: int) -> float:
    """CPU seconds of a token, that of the prompt and of the text around it left out: the difference
    of a long answer and a short one."""
    text = ENGLISH if type(model).__name__ == "GLM" else CHINESE
    long_s, short_s = (answer_s(model, text, number) for number in (num_tokens, num_tokens // 6))
    return (long_s - short_s) / (num_tokens - num_tokens // 6)


def answer_s(model: Any, text: str, num_tokens: int) -> float:
    began_s = time.process_time()
    model.generate(text, max_tokens=num_tokens, banned_tokens=_ends(model), **GREEDY)
    return time.process_time() - began_s


def _ends(model: Any) -> list[str]:
    """What ends a text of CPM-2, and comes at once; the other models go on by themselves."""
    sentinels = [f"<s_{number}>" for number in range(190)]
    return ["<eod>", *sentinels] if type(model).__name__ == "CPM2" else []


if __name__ == "__main__":
    main()
