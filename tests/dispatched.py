"""How many operations torch dispatches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class _Counter(TorchDispatchMode):
    number = 0

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return function(*args, **(kwargs or {}))


def dispatched(work: Callable[[], object]) -> int:
    """In `work`."""
    with _Counter() as counter:
        work()
    return counter.number
