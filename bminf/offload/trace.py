"""When blocks were copied and computed: in a model that ran (recording.py), or on the virtual clock
(predict.py)."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Span:
    """A copy of a block into a slot, or its computation. Times in seconds from the beginning of
    the trace on; what began before that has a negative one.

    name: of the block; "" for what lies outside all blocks.   slot: of a copy; -1 otherwise.
    """

    name: str
    start_s: float
    end_s: float
    slot: int = -1

    def earlier(self, by_s: float) -> Span:
        """The same, so much earlier."""
        return replace(self, start_s=self.start_s - by_s, end_s=self.end_s - by_s)


@dataclass(frozen=True)
class Trace:
    """What the link, the computation and the disk did.

    copies: over the link, in order.   computed: blocks, in order.   reads: of the disk, ahead.
    is_predicted: whether the times are those of the virtual clock, and not measured.
    """

    copies: tuple[Span, ...]
    computed: tuple[Span, ...]
    reads: tuple[Span, ...] = ()
    is_predicted: bool = False

    @property
    def end_s(self) -> float:
        """When the last computation ended."""
        return max((span.end_s for span in self.computed), default=0.0)
