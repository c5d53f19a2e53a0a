"""What the simulated backend predicts for all of GLM-130B on a card that need not be there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.card import Card, plan_entries, streamed_bytes
from benchmarks.glm_model import PUBLISHED, TITLE, Sizes, planned
from bminf.offload.plan import Plan
from bminf.offload.predict import Prediction, predict

CARD = Card("24 GB card", int(0.9 * 24 * 2**30), 25 * 10**9, 936 * 10**9)
"""90% of an RTX 3090's memory, whose data sheet says 936 GB/s; PCIe 4.0 x16 carries about 25 GB/s
out of page-locked memory."""

MAX_LENGTH = 512  # tokens of cache


@dataclass(frozen=True)
class Predicted:
    """A token after another on a card."""

    card: Card
    quantization: str
    head_quantization: str
    plan: Plan
    prediction: Prediction

    @property
    def name(self) -> str:
        return f"{self.card.name} {self.quantization}, head {self.head_quantization}: decode"

    @property
    def tokens_per_s(self) -> float:
        return 1 / self.prediction.pass_s

    def as_json(self) -> dict[str, Any]:
        """What goes into the JSON file."""
        return {
            "name": self.name,
            "details": {
                "model": TITLE,
                "quantization": self.quantization,
                "head_quantization": self.head_quantization,
                "card": vars(self.card),
                "max_length": MAX_LENGTH,
                **plan_entries(self.plan),
                "streamed_bytes_per_step": streamed_bytes(self.plan),
            },
            "prediction": vars(self.prediction)
            | {"tokens_per_s": self.tokens_per_s, "bound": self.prediction.bound},
        }


def predictions(
    card: Card, quantizations: Sequence[str], head_quantization: str
) -> Iterator[Predicted]:
    """GLM-130B in full, float16 but for the packed weights.

    Raises BudgetError for a card that is too small.
    """
    for quantization in quantizations:
        sizes = Sizes(
            PUBLISHED, torch.float16, quantization, head_quantization, batches=((1, MAX_LENGTH),)
        )
        _, plan = planned(sizes, card.memory_limit, "cuda")
        found = predict(plan, card.link_bytes_per_s, card.memory_bytes_per_s)
        yield Predicted(card, quantization, head_quantization, plan, found)
