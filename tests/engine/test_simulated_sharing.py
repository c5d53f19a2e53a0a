"""What sharing passes is worth where weights are streamed: an engine on the virtual clock."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from fake_decoder import scripted
from fake_rows import FakeRows

import bminf
from bminf.cli.gpus import speeds_of
from bminf.engine.engine import Engine
from bminf.engine.request import Request
from bminf.engine.sampling import Sampling
from bminf.offload.predict import SimulatedBackend, Step, run_pass
from bminf.offload.ring import Ring

FLOPS = 4.4e12  # of a GTX 1060 in float32: 1,280 lanes, two operations each, at 1.7 GHz


class Clock:
    """A Llama of 350 million parameters in float16 on a GTX 1060, of which all blocks stream."""

    def __init__(self) -> None:
        config = transformers.LlamaConfig(
            vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=24
        )
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(config).half()
        arguments: dict[str, Any] = {"quantization": None, "device": "cuda"}
        least = bminf.plan_for(model, **arguments).least_limit
        self.plan = bminf.plan_for(model, memory_limit=least, **arguments)
        self.speeds = speeds_of("GTX 1060")
        sizes = [block.nbytes for block in self.plan.blocks]
        assert list(self.plan.streamed) == [block.name for block in self.plan.blocks]
        self.backend = SimulatedBackend(sizes, self.speeds.link, [], 1.0)
        self.ring = Ring(len(sizes), self.backend)

    def run(self, num_tokens: int) -> None:
        """A pass: products take what reading their weights takes, or their operations."""

        def seconds(nbytes: int) -> float:
            return max(nbytes / self.speeds.memory, nbytes * num_tokens / FLOPS)

        steps = [Step(seconds(block.nbytes), n) for n, block in enumerate(self.plan.blocks)]
        run_pass(self.backend, self.ring, [*steps, Step(seconds(self.plan.outside_bytes))])


def tokens_per_s(together: Sequence[Sequence[Request]]) -> float:
    """Of requests in groups, one group after the other."""
    clock = Clock()
    rows = FakeRows(scripted({0: [1] * 200}, 10))
    rows.before = lambda feeds: clock.run(sum(len(feed.ids) for feed in feeds))
    engine, number = Engine(rows), 0
    for requests in together:
        engine.run([engine.add(request) for request in requests])
        number += sum(len(request.tokens) for request in requests)
    return number / clock.backend.now_s


def test_sixteen_rows_write_twelve_times_as_fast_as_one() -> None:
    chance = random.Random(0)
    lengths = [chance.randint(4, 64) for _ in range(16)]

    def asked() -> list[Request]:
        return [Request([0] * length, 40, Sampling(0.0)) for length in lengths]

    together, apart = tokens_per_s([asked()]), tokens_per_s([[one] for one in asked()])
    assert together >= 12 * apart
