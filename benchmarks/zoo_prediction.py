"""What the simulated backend predicts for CPM-2 on a card that nobody here has, beside what was
published for it. Nothing is measured and no weight is made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.card import Card, plan_entries, streamed_bytes
from benchmarks.zoo_model import PUBLISHED, TITLE, Sizes, planned
from bminf.offload.plan import Plan
from bminf.offload.predict import Prediction, predict


@dataclass(frozen=True)
class Phase:
    """A piece of work that is timed. lists: the blocks that one step of it goes through, in order.
    is_bound: that a step multiplies many rows, which takes time that bytes do not tell."""

    name: str
    lists: tuple[str, ...]
    is_bound: bool


ENCODER = Phase("encoder", ("encoder.layers",), True)
ANEW = Phase("decoder, projections anew", ("cross_projections.layers", "decoder.layers"), True)
ONCE = Phase("decoder, projections once", ("decoder.layers",), False)
PHASES = (ENCODER, ANEW, ONCE)

PUBLISHED_SPEEDS = {
    "encoder": {"BMInf 1.0 to 2.0": 718, "BMInf 0.0.5": 533},
    "decoder": {"BMInf 1.0 to 2.0": 4.4, "BMInf 0.0.5": 1.6},
}
"""Tokens a second of CPM-2 on a GTX 1060 6 GB: the tables in the READMEs of these versions.

Encoder: 256 tokens through 24 layers and the last norm. Decoder: 255 steps through 24 layers and
the last norm, keys and values of the 256 prompt tokens projected anew in each. Batch 1, 8-bit
weights; no embedding, head or sampling. That is benchmark/cpm2 of BMInf 1.0.
"""


@dataclass(frozen=True)
class Predicted:
    """A phase on a card. num_tokens: of a pass."""

    card: Card
    quantization: str
    phase: Phase
    plan: Plan
    prediction: Prediction
    num_tokens: int

    @property
    def name(self) -> str:
        return f"{self.card.name} {self.quantization}: {self.phase.name}"

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.prediction.pass_s

    def as_json(self) -> dict[str, Any]:
        """What goes into the JSON file."""
        kind = self.phase.name.partition(",")[0]
        return {
            "name": self.name,
            "details": {
                "model": TITLE,
                "phase": self.phase.name,
                "quantization": self.quantization,
                "card": vars(self.card),
                **plan_entries(self.plan),
                "streamed_bytes_per_step": streamed_bytes(self.plan, self.phase.lists),
                "tokens": self.num_tokens,
            },
            "prediction": vars(self.prediction) | {"tokens_per_s": self.tokens_per_s},
            "is_bound": self.phase.is_bound,
            "published_tokens_per_s": PUBLISHED_SPEEDS[kind],
        }


def predictions(
    card: Card, quantizations: Sequence[str], prompt_length: int = 256, max_length: int = 512
) -> Iterator[Predicted]:
    """CPM-2 as it was published, float16 but for the packed weights, in each phase.

    prompt_length: tokens of an encoder's pass.   max_length: see Sizes.
    Raises BudgetError for a card that is too small.
    """
    for quantization in quantizations:
        sizes = Sizes(PUBLISHED, torch.float16, quantization, max_length=max_length)
        _, plan = planned(sizes, card.memory_limit, "cuda")
        for phase in PHASES:
            num_tokens = prompt_length if phase is ENCODER else 1
            yield Predicted(
                card, quantization, phase, plan, of_phase(plan, card, phase), num_tokens
            )


def of_phase(plan: Plan, card: Card, phase: Phase) -> Prediction:
    """One step of `phase` in steady state."""
    return predict(plan, card.link_bytes_per_s, card.memory_bytes_per_s, phase.lists)
