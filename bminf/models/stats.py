"""Counters of a built-in model since it was loaded."""

from __future__ import annotations

from dataclasses import dataclass

from bminf.offload.hooks import Stats


@dataclass(frozen=True)
class ModelStats(Stats):
    """Counters of the scheduler and of generation. Sizes in bytes; times in seconds.

    num_tokens, generated_s: tokens generated, over all rows, and the time that took.
    num_sweeps, rows_per_sweep: passes that texts shared, and how many of them had a part in each.
    resident_bytes: of all that stays on the device.   streamed_bytes: of the streamed blocks.
    """

    num_tokens: int = 0
    generated_s: float = 0.0
    resident_bytes: int = 0
    streamed_bytes: int = 0
    num_sweeps: int = 0
    rows_per_sweep: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.generated_s if self.generated_s else 0.0
