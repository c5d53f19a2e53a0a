"""What a model of the zoo did since it was loaded."""

from __future__ import annotations

from dataclasses import dataclass

from bminf.offload.hooks import Stats


@dataclass(frozen=True)
class ModelStats(Stats):
    """What the scheduler did, and how fast texts came. Bytes; times in seconds.

    num_tokens, generated_s: tokens generated, over all rows, and the time that took.
    resident_bytes: of what stays on the device.   streamed_bytes: of the blocks that do not.
    """

    num_tokens: int = 0
    generated_s: float = 0.0
    resident_bytes: int = 0
    streamed_bytes: int = 0

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.generated_s if self.generated_s else 0.0
