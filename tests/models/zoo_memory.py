"""Run as a program by test_zoo_memory.py: memory of a process of its own, printed as JSON.

Arguments: the name of a function below, and its arguments.
"""

from __future__ import annotations

import gc
import json
import re
import sys
import warnings
from typing import Any

import torch

import bminf
from bminf.cli.measure import PeakMemory, rss_anon_bytes
from bminf.errors import BudgetError
from bminf.offload import memory


def measured() -> PeakMemory:
    """From now on, above RssAnon after what can be given back was."""
    gc.collect()
    memory.trim()
    return PeakMemory(is_cuda=False, baseline_bytes=rss_anon_bytes())


def checkpoint(source: str, destination: str) -> dict[str, int]:
    """Convert a CPM-2, then load it from where it was, and from where it is now."""
    report: dict[str, Any] = {}
    with measured() as peak:
        made = bminf.models.convert(source, destination, "int8", model="cpm2")
    report["converting"] = peak.peak_bytes
    report["packed"] = (made / "model.safetensors").stat().st_size
    for name, folder in (("loading", source), ("loading_converted", destination)):
        with measured() as peak:
            model = bminf.models.CPM2(
                folder, device="cpu", dtype=torch.float16, max_length=8, memory_limit="8GB"
            )
            assert not model.plan.streamed
        report[name] = peak.peak_bytes
        model.close()
        del model
    return report


def limit(name: str, tiny: str, folder: str, arguments: str) -> dict[str, Any]:
    """Generate with as many rows and tokens as a model was loaded for.

    tiny: the folder of another model of the kind, for what this process needs once.
    """
    kind: Any = getattr(bminf.models, name.upper())
    run(kind(tiny, device="cpu", max_batch_size=2, max_length=64))
    given = json.loads(arguments)
    if not given["memory_limit"][0].isdigit():
        given["memory_limit"] = least_limit(kind, folder, given)
    with measured() as peak:
        model = kind(folder, device="cpu", **given)
        plan = model.plan
        run(model)
    return {
        "used": peak.peak_bytes,
        "limit": plan.budget,
        "planned": plan.total_bytes,
        "reserved": plan.reserved_bytes,
        "weights": plan.resident_bytes + plan.slot_bytes,
        "num_streamed": len(plan.streamed),
    }


def least_limit(kind: Any, folder: str, given: dict[str, Any]) -> int:
    """What the error for a limit that is too small says."""
    try:
        kind(folder, device="cpu", **{**given, "memory_limit": 1})
    except BudgetError as error:
        found = re.search(r"would do, .*? \((\d+) bytes\)", str(error))
        assert found is not None
        return int(found[1])
    raise AssertionError("a byte was enough")


def run(model: Any) -> None:
    """The longest prompts, the longest answers; rows of two lengths, so that padding is hidden."""
    is_glm = isinstance(model, bminf.models.GLM)
    length = model.max_length - (12 if is_glm else 8)  # a mask and sop stand behind it
    num_tokens = 8  # the cache is all there from the beginning, and a prompt is the wider pass
    tokenizer = model.tokenizer
    word = "好" if is_glm else "今天，"
    count = length // (len(tokenizer.encode(2 * word)) - len(tokenizer.encode(word))) - is_glm
    texts = [word * (count - row % 2) for row in range(model.max_batch_size)]
    assert length - 8 < len(tokenizer.encode(texts[0])) <= length
    ends = tokenizer.tokens(model._end_ids())
    for _ in range(2):  # a sample may miss a peak that lasts for less than the samples are apart
        model.generate_batch(
            texts, max_tokens=num_tokens, banned_tokens=ends, top_p=0.9, frequency_penalty=0.1,
            seed=1,
        )  # fmt: skip
    if is_glm:
        model.logits(texts[0])
        model.close()
        return
    ids = [11] * model.max_length
    model.logits(
        *([ids] if isinstance(model, (bminf.models.CPM1, bminf.models.BLOOM)) else [ids, ids])
    )
    model.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # no sentencepiece model
    torch.ones(9, 9) @ torch.ones(9, 9)
    function = {"checkpoint": checkpoint, "limit": limit}[sys.argv[1]]
    print(json.dumps(function(*sys.argv[2:])))
