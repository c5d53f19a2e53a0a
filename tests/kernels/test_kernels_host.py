"""The kernels' own text, compiled for the CPU, against plain torch."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, LARGEST, Case
from host_launcher import HostLauncher, served_by

ALL = [(capability, case) for capability, cases in CASES.items() for case in cases]
ORDERS = ("forward", "reverse", 1, 2)
_launchers = {
    (capability, order): HostLauncher(capability=capability, order=order)
    for capability in CASES
    for order in ORDERS
}


@pytest.mark.parametrize(("capability", "case"), ALL, ids=lambda value: str(value))
def test_kernel_agrees_with_torch_in_any_order_of_threads(capability: int, case: Case) -> None:
    for seed, order in enumerate(ORDERS):
        torch.manual_seed(seed)
        with served_by(_launchers[capability, order]):
            case.run("cpu")


@pytest.mark.parametrize("case", LARGEST, ids=str)
def test_kernel_with_as_many_rows_as_a_vocabulary(case: Case) -> None:
    torch.manual_seed(0)
    with served_by(_launchers[80, "forward"]):
        case.run("cpu")
