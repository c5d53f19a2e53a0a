"""The cases of the kernel tests that reach every line of every kernel, on the GPU, one by one."""

from __future__ import annotations

import sys
import traceback
from typing import Any

import torch

from benchmarks.gpu_session.process import ROOT


def main(device: str = "cuda") -> int:
    """0 if all give the right result, otherwise 1."""
    sys.path.append(str(ROOT / "tests" / "kernels"))
    from cases import few_of_each

    torch.manual_seed(0)
    cases = [case for group in few_of_each().values() for case in group]
    wrong = [case.name for case in cases if not _is_right(case, device)]
    print(f"{len(cases)} cases, {len(wrong)} wrong: {', '.join(wrong)}")
    return int(bool(wrong))


def _is_right(case: Any, device: str) -> bool:
    """A failure is printed and does not keep the next case from running."""
    print(case.name, flush=True)
    try:
        case.run(device)
    except Exception:
        traceback.print_exc()
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
