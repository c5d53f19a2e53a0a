from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bminf.cpu import library
from bminf.cpu.library import Kernels, at_level, levels_of, open_library


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    """Tensors are tiny here: waking a second thread takes longer than what it would do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["avx512", "avx2", "portable"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    """Those of kernels/cpu/, at each level."""
    opened = open_library(library._LIBRARY)
    if request.param not in levels_of(opened):
        pytest.skip(f"this processor has no {request.param}")
    return at_level(opened, request.param)


@pytest.fixture
def threads() -> Iterator[None]:
    """For tests that change their number."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
