"""What a case of a kernel is: a check on a device, with a name that says its arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Concatenate, ParamSpec

import torch

from bminf.quantization.packed import Format

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# The rounding of the result; float32 sums of some thousand products for float32 itself.
BOUNDS = {torch.float16: 1e-3, torch.bfloat16: 6e-3, torch.float32: 2e-6}

P = ParamSpec("P")


@dataclass(frozen=True)
class Case:
    """name: what a report shows.   run: the check, for tensors on a device."""

    name: str
    run: Callable[[str], None] = field(repr=False)

    def __str__(self) -> str:
        return self.name


def case(check: Callable[Concatenate[str, P], None]) -> Callable[P, Case]:
    """Makes of a check on a device what returns a Case, named by its arguments."""

    def make(*arguments: P.args, **options: P.kwargs) -> Case:
        words = map(_word, (*arguments, *options.values()))
        name = "-".join([check.__name__.removesuffix("_case"), *words])
        return Case(name, lambda device: check(device, *arguments, **options))

    return make


def _word(argument: object) -> str:
    if isinstance(argument, Format):
        kind = "minimum" if argument.has_minimum else "symmetric"
        integers = "-integers" if argument.scale_bits == 8 else ""
        return f"{argument.bits}bit-{argument.group_size}-{kind}{integers}"
    if isinstance(argument, tuple):
        return "x".join(map(str, argument))
    return str(argument).removeprefix("torch.")


def relative_error(given: torch.Tensor, expected: torch.Tensor) -> float:
    given, expected = given.detach().double().cpu(), expected.double().cpu()
    assert given.shape == expected.shape
    return float((given - expected).norm() / expected.norm().clamp_min(1e-30))
