"""`python -m tools.simulated_experts`: tokens/s of mixtures of experts on cards that are not here.

Plans published models in the int4 default, from what transformers takes for their sizes, and runs
the pool of experts on a virtual clock: each layer reads its dense part, the host waits for what the
router chose (tools/routing.py), hits are computed while misses cross the link, and each miss when
it has come. Prints a line of JSON a model, card and routing: hits, time, what that is made of, and
what binds. With --guesses, once more for each share of the next layer's experts that a guess would
be right about, with what it brings for nothing.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import bminf
from bminf.cli.sources import build_on_meta
from bminf.errors import ArgumentError
from bminf.offload.plan import DEFAULT_USES, Experts, Plan
from bminf.offload.pool import ExpertPool
from bminf.offload.predict import SimulatedBackend
from tools.routing import Routing

HOST_WAIT_S = 20e-6
"""A layer: the ids of its experts come to the host, which then asks for copies and launches."""

CONTEXT, HOST_MEMORY = 2048, "96GB"
_SETTLING, _MEASURED = 300, 200  # tokens


@dataclass(frozen=True)
class Card:
    """memory_bytes: that a model may take, about 90% of what the card is sold with.
    link, memory: sustained bytes a second, below those of the data sheets."""

    name: str
    memory_bytes: int
    link: float
    memory: float


CARDS = {
    "GTX 1060 6 GB": Card("GTX 1060 6 GB", 5_400_000_000, 12e9, 150e9),
    "RTX 3060 12 GB": Card("RTX 3060 12 GB", 10_800_000_000, 24e9, 320e9),
    "24 GB": Card("24 GB", 22_000_000_000, 25e9, 850e9),
}

QWEN, GPT_OSS = "Qwen3.6-35B-A3B", "gpt-oss-120b"
CONFIGS = {
    QWEN: {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"], "model_type": "qwen3_5_moe",
        "dtype": "bfloat16",
    },
    GPT_OSS: {
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "dtype": "bfloat16",
    },
}  # fmt: skip
"""Those for whose sizes transformers' defaults are the published ones."""

# Fitted, so that a cache of all layers hits 67 and 81% with room for an eighth and a quarter of the
# experts, as was published for one model; and 30 and 46%.
ROUTINGS = {
    QWEN: {"81%": Routing(40, 256, 8, 0.709, 0.826), "46%": Routing(40, 256, 8, 0.351, 0.474)},
    GPT_OSS: {"81%": Routing(36, 128, 4, 0.722, 0.826), "46%": Routing(36, 128, 4, 0.34, 0.469)},
}
"""Model -> by the hits of a cache with room for a quarter of the experts."""

CASES = ((QWEN, "GTX 1060 6 GB"), (QWEN, "RTX 3060 12 GB"), (GPT_OSS, "24 GB"))


@dataclass(frozen=True)
class Simulated:
    """A token in steady state. Times in seconds, of which one does not hide another where it waits.

    hit_rate: of all experts wanted.   missed_bytes: copied.   unused_bytes: of these, what was
    guessed and not chosen.   memory_s, copy_s, host_s: what
    reading device memory takes, the link, and the host's waits for ids.
    """

    token_s: float
    hit_rate: float
    missed_bytes: float
    memory_s: float
    copy_s: float
    host_s: float
    unused_bytes: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        return 1 / self.token_s

    @property
    def binds(self) -> str:
        """What takes longest: "device memory", "link" or "host"."""
        needs = {"device memory": self.memory_s, "link": self.copy_s, "host": self.host_s}
        return max(needs, key=needs.__getitem__)


def plan_of(model_name: str, card: Card) -> Plan:
    """In int4, with room for a text of CONTEXT tokens."""
    return bminf.plan_for(
        build_on_meta(CONFIGS[model_name]), "int4", card.memory_bytes, max_length=CONTEXT,
        host_memory=HOST_MEMORY, device="cuda",
    )  # fmt: skip


def simulate(
    plan: Plan, routing: Routing, card: Card, right_guesses: float | None = None
) -> Simulated:
    """Decode tokens one by one under `plan`.

    right_guesses: of the experts that the next layer chooses, the part that a guess names, made
    when this layer's are known; for each of the others it names any. None guesses nothing.
    Raises ArgumentError for a plan of other sizes, or under which more than experts moves.
    """
    experts = plan.experts
    if experts is None or experts.number != routing.layers * routing.experts:
        raise ArgumentError(f"the plan has {experts}, which is not by need or not of {routing}")
    if plan.streamed or experts.on_disk:
        raise ArgumentError(
            f"{len(plan.streamed)} blocks stream and {len(experts.on_disk)} experts wait on disk; "
            "give a plan of a larger limit and more host memory"
        )
    return _Run(plan, experts, routing, card, right_guesses).measured()


class _Run:
    """A model on the virtual clock."""

    def __init__(
        self,
        plan: Plan,
        experts: Experts,
        routing: Routing,
        card: Card,
        right_guesses: float | None,
    ) -> None:
        self._right_guesses, self._draw = right_guesses, random.Random(1)
        self._layers_s, self._rest_s = _dense_s(plan, card)
        self._routing = routing
        self._size = experts.nbytes // experts.number
        self._expert_s = self._size / card.memory
        self._copy_s = self._size / card.link
        self.backend = SimulatedBackend([self._size] * experts.number, card.link)
        sizes = [self._size] * experts.number
        self.pool = ExpertPool(sizes, experts.num_slots, self.backend, 0, 0)

    def measured(self) -> Simulated:
        tokens = self._routing.tokens(_SETTLING + _MEASURED)
        for _ in range(_SETTLING):
            self._token(next(tokens))
        since_s, hits, misses = self.backend.now_s, self.pool.hits, self.pool.misses
        unused_bytes, copies = self.pool.bytes_unused, len(self.backend.copies)
        for token in tokens:
            self._token(token)
        hits, misses = self.pool.hits - hits, self.pool.misses - misses
        per_token = (len(self.backend.copies) - copies) / _MEASURED
        wanted_s = (hits + misses) / _MEASURED * self._expert_s
        return Simulated(
            token_s=(self.backend.now_s - since_s) / _MEASURED,
            hit_rate=hits / (hits + misses),
            missed_bytes=per_token * self._size,
            memory_s=sum(self._layers_s) + self._rest_s + wanted_s,
            copy_s=per_token * self._copy_s,
            host_s=self._routing.layers * HOST_WAIT_S,
            unused_bytes=(self.pool.bytes_unused - unused_bytes) / _MEASURED,
        )

    def _token(self, token: Sequence[Sequence[int]]) -> None:
        num_dense = len(self._layers_s) - len(token)
        for dense_s in self._layers_s[:num_dense]:
            self.backend.compute(dense_s)
        for layer, chosen in enumerate(token):
            self.backend.compute(self._layers_s[num_dense + layer])
            self.backend.synchronize(HOST_WAIT_S)
            wanted = self.pool.want(self._numbers(layer, chosen))
            self.pool.settle(self._layer(layer))
            if self._right_guesses is not None and layer + 1 < len(token):
                guessed = self._numbers(layer + 1, self._guess(token[layer + 1]))
                self.pool.expect(guessed, self._layer(layer + 1), is_guess=True)
            for expert in wanted:
                self.backend.read(expert, self.pool.enter(expert), self._expert_s)
                self.pool.leave(expert)
        self.backend.compute(self._rest_s)

    def _layer(self, layer: int) -> range:
        return range(layer * self._routing.experts, (layer + 1) * self._routing.experts)

    def _numbers(self, layer: int, chosen: Iterable[int]) -> list[int]:
        return [self._layer(layer)[expert] for expert in chosen]

    def _guess(self, chosen: Sequence[int]) -> list[int]:
        assert self._right_guesses is not None
        any_of_them = range(self._routing.experts)
        return sorted(
            {
                expert
                if self._draw.random() < self._right_guesses
                else self._draw.choice(any_of_them)
                for expert in chosen
            }
        )


def _dense_s(plan: Plan, card: Card) -> tuple[list[float], float]:
    """Of each layer, and of what lies outside them and the keys and values of a full context."""
    layers = [block.nbytes for block in plan.blocks if plan.uses[block.name] == DEFAULT_USES]
    cache_bytes = 0 if plan.context is None else plan.context.cache_bytes
    outside_bytes = plan.fixed_bytes - plan.reserved_bytes
    return [nbytes / card.memory for nbytes in layers], (outside_bytes + cache_bytes) / card.memory


def main(argv: Sequence[str] | None = None) -> int:
    """0, after each case was printed."""
    parser = argparse.ArgumentParser("tools.simulated_experts", description=__doc__)
    parser.add_argument("--guesses", type=float, nargs="+", metavar="SHARE", default=[])
    guesses = parser.parse_args(argv).guesses
    for model_name, card_name in CASES:
        card = CARDS[card_name]
        plan = plan_of(model_name, card)
        for routing in ROUTINGS[model_name].values():
            for right_guesses in (None, *guesses):
                found = simulate(plan, routing, card, right_guesses)
                print(json.dumps(_line(model_name, card, plan, found, right_guesses)))
    return 0


def _line(
    model_name: str, card: Card, plan: Plan, found: Simulated, right_guesses: float | None
) -> dict[str, Any]:
    experts = plan.experts
    assert experts is not None
    return {
        "model": model_name, "card": card.name, "slots": experts.num_slots,
        "experts": experts.number,
        "right_guesses": right_guesses, "tokens_per_s": found.tokens_per_s, "binds": found.binds,
        **asdict(found),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
