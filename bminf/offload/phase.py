"""What a phase of generating took: the prefill of a prompt, or the decoding of its answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from bminf.units import format_bytes

if TYPE_CHECKING:
    from bminf.offload.hooks import Stats

_BOUND_FRACTION = 0.1
"""Of a phase: what faster copies could save of it at the most is what it waited for them."""


@dataclass(frozen=True)
class Phase:
    """Times in seconds; sizes in bytes.

    seconds: that it took.   waited_s: of these, in which computing waited for copies.
    bytes_copied: of streamed blocks, meanwhile.   expert_hits, expert_misses: see Stats.
    """

    seconds: float = 0.0
    waited_s: float = 0.0
    bytes_copied: int = 0
    expert_hits: int = 0
    expert_misses: int = 0

    @property
    def bound(self) -> Literal["copying", "computing"] | None:
        """What its speed depends on: copying where more than a tenth of it was waiting for copies.

        None before anything was done.
        """
        if self.seconds <= 0:
            return None
        return "copying" if self.waited_s > _BOUND_FRACTION * self.seconds else "computing"

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "bound": self.bound}

    def __str__(self) -> str:
        copied = "nothing was copied"
        if self.bytes_copied:
            copied = (
                f"{format_bytes(self.bytes_copied)} copied, {self.waited_s:.2f} s waiting for it"
            )
        return f"{self.seconds:.2f} s, {copied}; bound by {self.bound or 'nothing'}"

    def __add__(self, other: Phase) -> Phase:
        return Phase(
            self.seconds + other.seconds,
            self.waited_s + other.waited_s,
            self.bytes_copied + other.bytes_copied,
            self.expert_hits + other.expert_hits,
            self.expert_misses + other.expert_misses,
        )

    def __sub__(self, other: Phase) -> Phase:
        """What came after `other`, an earlier state of the same."""
        return Phase(
            self.seconds - other.seconds,
            self.waited_s - other.waited_s,
            self.bytes_copied - other.bytes_copied,
            self.expert_hits - other.expert_hits,
            self.expert_misses - other.expert_misses,
        )


class PhaseTally:
    """Phases added up; cheaper than a Phase for each sum, where each token of a row makes one."""

    def __init__(self) -> None:
        self._seconds = self._waited_s = 0.0
        self._bytes_copied = self._expert_hits = self._expert_misses = 0

    def add(self, phase: Phase) -> None:
        self._seconds += phase.seconds
        self._waited_s += phase.waited_s
        self._bytes_copied += phase.bytes_copied
        self._expert_hits += phase.expert_hits
        self._expert_misses += phase.expert_misses

    @property
    def phase(self) -> Phase:
        return Phase(
            self._seconds, self._waited_s, self._bytes_copied, self._expert_hits,
            self._expert_misses,
        )  # fmt: skip


NO_PHASE = Phase()
"""Before anything was done."""


def phase_between(before: Stats, after: Stats, seconds: float) -> Phase:
    """Of what was counted in so many seconds. On a GPU, waits count once they are over, which those
    of a pass are when a token was drawn from its logits."""
    return Phase(
        seconds,
        after.waited_s - before.waited_s,
        after.bytes_copied - before.bytes_copied,
        after.expert_hits - before.expert_hits,
        after.expert_misses - before.expert_misses,
    )
