"""The list of all kernels has whatever the tests and benchmarks on a GPU ask for."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "gpu"))

import cases
from host_launcher import NotingLauncher, served_by
from test_kernels import PATHS, SHAPES, has_path, run_path
from variants import every_variant

from benchmarks.products import FORMATS
from bminf.quantization.packed import empty


def asked_for() -> Iterator[Callable[[], Any]]:
    """By the tests on a GPU, and by the benchmarks: with their formats, and any number of rows."""
    groups = [*cases.CASES.values(), cases.LARGEST, *cases.few_of_each().values()]
    yield from (case.run for group in groups for case in group)
    forms, columns = {*cases.WHOLE, *cases.CUT, *FORMATS.values()}, [256, *(k for _, k in SHAPES)]
    for form, k, dtype, path in product(forms, columns, cases.ROUNDED, PATHS):
        for m in (m for m in (1, 2, 4, 8, 16, 40, 128) if has_path(path, 90, m, dtype)):
            x, weight = torch.zeros(m, k, dtype=dtype), empty(4, k, form, "cpu")
            yield lambda _, path=path, x=x, weight=weight: run_path(path, x, weight)


def test_every_kernel_that_is_asked_for_is_listed() -> None:
    launcher = NotingLauncher(capability=90, num_processors=132)
    with served_by(launcher), torch.no_grad():
        for work in asked_for():
            with suppress(AssertionError):  # nothing was computed
                work("cpu")
    asked, listed = {kernel for kernel, _ in launcher.launches}, every_variant(90)
    assert asked <= {*listed} and len(asked) > 100
    assert {*launcher.names} == {kernel.name for kernel in listed}
