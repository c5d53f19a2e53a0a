"""Checks of what users give: what passes, and what the error says of what does not."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy
import pytest

from bminf.checks import (
    check_banned,
    check_bool,
    check_eps,
    check_ids,
    check_int,
    check_positive,
    check_sizes,
    is_number,
    non_finite_logits,
    plain,
)
from bminf.errors import ArgumentError

CONFIG = SimpleNamespace(hidden_size=64, num_layers=0, ratio=1.5)


@pytest.mark.parametrize(
    ("check", "said"),
    [
        (lambda: check_ids("ids", [0, 9, True, 10, -1], 10), "holds True, 10, -1; .* 0 to 9"),
        (lambda: check_ids("ids", range(10, 20), 10), "10, 11, 12, 13, 14 and 5 more"),
        (lambda: check_banned([0, 1, 1, 2], 3), "holds all 3 ids"),
        (lambda: check_banned([3], 3), "banned_ids holds 3"),
        (lambda: check_int("n", -1, 0), "n=-1; accepted: an int of at least 0$"),
        (lambda: check_int("n", 2.0, 0), "n=2.0"),  # type: ignore[arg-type]
        (lambda: check_int("n", None, 0), "n=None"),
        (lambda: check_positive("n", 0, "all of them"), "at least 1, or all of them"),
        (lambda: check_positive("n", True), "n=True"),
        (lambda: check_bool("on", 1), "on=1; accepted: True, False"),  # type: ignore[arg-type]
        (lambda: check_sizes(CONFIG, "hidden_size", "num_layers"), "num_layers=0; a whole number"),
        (lambda: check_sizes(CONFIG, "ratio"), "ratio=1.5"),
        (lambda: check_eps("eps", 0), "eps=0; a number between 0 and 1"),
        (lambda: check_eps("eps", float("nan")), "eps=nan"),
    ],
)
def test_what_is_wrong_is_said_with_what_is_accepted(check: Callable[[], None], said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        check()


def test_what_is_right_passes() -> None:
    check_ids("ids", [0, 9], 10)
    check_banned([0, 1], 3)
    check_int("n", 0, 0)
    check_positive("n", None, "all of them")
    check_bool("on", False)
    check_sizes(CONFIG, "hidden_size")
    check_eps("eps", 1e-5)
    assert is_number(0) and is_number(-2.5)
    assert is_number(plain(numpy.float32(0.5))) and plain([numpy.int64(3)]) == [3]
    assert not any(map(is_number, (True, "1", None, float("inf"), float("nan"))))
    assert "in row 0, 3 of this step" in str(non_finite_logits([0, 3]))
