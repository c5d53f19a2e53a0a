"""Run as a program by test_request_memory.py: what requests leave in a process of its own.

Arguments: how many requests, and the name of a tiny model; of the zoo with its folder. Prints JSON:
after each tenth of the requests the bytes of RssAnon, once what can be given back was, and the
numbers of blocks that Python holds, and of objects that the garbage collector knows.
"""

from __future__ import annotations

import gc
import json
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the builders of tiny models

import torch

import bminf
from bminf.cli.measure import rss_anon_bytes
from bminf.engine.engine import Engine
from bminf.engine.request import Request
from bminf.engine.sampling import Sampling
from bminf.errors import ArgumentError
from bminf.models import LanguageModel
from bminf.offload import memory

ROUND = 50


def of_transformers(name: str) -> Callable[[int], None]:
    """Requests that end in each of the ways there are, on a model that is streamed."""
    from streaming import stream  # with transformers: seconds that the other model does not need
    from tiny_models import make

    model = stream(make(name, num_hidden_layers=3))
    engine = Engine(model, max_length=16, max_batch_size=16)

    def run(number: int) -> None:
        requests = [engine.add(asked(number + n)) for n in range(ROUND - 2)]
        engine.cancel(requests[number % len(requests)])
        with suppress(ValueError):
            for _ in engine.tokens(engine.add(asked(number))):
                pass
        with suppress(ValueError):
            next(engine.tokens(engine.add(asked(number))))  # an iterator that is left as it is
        with suppress(ArgumentError):
            engine.add(Request([1], 10**6))
        while engine.step():
            pass

    return run


def asked(number: int) -> Request:
    """As none of the last ones is; some of them fail."""
    ids = [3 + (number * k) % 50 for k in range(1, 2 + number % 5)]
    return Request(
        ids, 1 + number % 3, Sampling(0.5 * (number % 3), seed=number), stop_ids=[4 + number % 7],
        num_logprobs=number % 4 or None, keep=number % 5 == 0,
        on_token=_fail if number % 11 == 0 else None,
    )  # fmt: skip


def _fail(token: int) -> None:
    raise ValueError(token)


def of_zoo(name: str, folder: str) -> Callable[[int], None]:
    kind: type[LanguageModel] = {"cpm1": bminf.models.CPM1, "cpm2": bminf.models.CPM2}[name]
    least = kind(folder, device="cpu", max_length=16, max_batch_size=16).plan.least_limit
    model: Any = kind(folder, least, device="cpu", max_length=16, max_batch_size=16)
    assert model.plan.streamed

    def run(number: int) -> None:
        for k in range(3):
            texts = ["今天", "天气", "今天天气", "今"] * 4
            model.generate_batch(texts, max_tokens=1 + k % 2, seed=number + k)
        model.generate("今天", max_tokens=1 + number % 3)
        next(model.generate_iter("今天", max_tokens=3), None)  # an iterator that is left as it is

    return run


def settled() -> int:
    """RssAnon after what can be given back was."""
    gc.collect()
    memory.trim()
    return rss_anon_bytes()


def main(num_requests: int, name: str, *folder: str) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*one after another")
    run = of_zoo(name, *folder) if folder else of_transformers(name)
    held, blocks, objects = [], [], []
    for number in range(0, num_requests, ROUND):
        run(number)
        if (number + ROUND) % (num_requests // 10) == 0:
            held.append(settled())
            blocks.append(sys.getallocatedblocks())
            objects.append(len(gc.get_objects()))
    print(json.dumps({"held": held, "blocks": blocks, "objects": objects}))


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
