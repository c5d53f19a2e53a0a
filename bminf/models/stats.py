"""Counters of a built-in model since it was loaded."""

from __future__ import annotations

from dataclasses import dataclass

from bminf.offload.hooks import Stats
from bminf.offload.phase import NO_PHASE, Phase


@dataclass(frozen=True)
class ModelStats(Stats):
    """Counters of the scheduler and of generation. Sizes in bytes; times in seconds.

    num_tokens, generated_s: tokens generated, over all rows, and the time that took.
    num_sweeps, rows_per_sweep: passes that texts shared, and how many of them had a part in each.
    num_requests, first_token_s: texts that have got their first token, and the mean time to it.
    prefill, decode: sweeps in which a prompt was read, and those that did nothing but decode: what
    they took, and what bound them. Beam searches have no part in these, nor in sweeps.
    resident_bytes: of all that stays on the device.   streamed_bytes: of the streamed blocks.
    ready_s: from the beginning of loading until a text could be generated.   loaded_bytes: as they
    are packed, brought to their place in that time; blocks of a folder of ours that are streamed
    from the folder itself are not among them.
    """

    num_tokens: int = 0
    generated_s: float = 0.0
    resident_bytes: int = 0
    streamed_bytes: int = 0
    num_sweeps: int = 0
    rows_per_sweep: float = 0.0
    num_requests: int = 0
    first_token_s: float = 0.0
    prefill: Phase = NO_PHASE
    decode: Phase = NO_PHASE
    ready_s: float = 0.0
    loaded_bytes: int = 0

    @property
    def loaded_bytes_per_s(self) -> float:
        return self.loaded_bytes / self.ready_s if self.ready_s else 0.0

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.generated_s if self.generated_s else 0.0
