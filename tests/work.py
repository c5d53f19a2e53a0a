"""How much work a call does, counted: how long it takes depends on what else the machine does."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np


def executed_lines(work: Callable[[], Any]) -> int:
    """Lines of Python that `work` executes in this thread; each turn of a loop counts anew."""
    count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


class CountingNumpy:
    """numpy for a module under test: `num_elements` is how many elements its functions gave.

    Lines of Python do not tell the work of an operation on a whole array.
    """

    def __init__(self) -> None:
        self.num_elements = 0

    def __getattr__(self, name: str) -> Any:
        found = getattr(np, name)
        return self._counting(found) if callable(found) and not isinstance(found, type) else found

    def _counting(self, function: Any) -> Any:
        def counted(*arguments: Any, **keywords: Any) -> Any:
            result = function(*arguments, **keywords)
            self.num_elements += sum(np.size(a) for a in _as_tuple(result))
            return result

        for method in ("outer", "accumulate"):  # of a ufunc
            if hasattr(function, method):
                setattr(counted, method, self._counting(getattr(function, method)))
        return counted


def _as_tuple(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)
