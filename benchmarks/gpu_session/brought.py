"""What was brought along to a machine that reaches no network: a package, and machine code."""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks.gpu_session.process import ROOT

FOLDER = ROOT / ".session"
"""Where it is looked for; git ignores it."""

PACKAGES, CODE, MARK = "packages", "machine-code", "prepared.json"


def environment(folder: Path) -> dict[str, str]:
    """Of the steps: the checkout need not be installed, and nothing reaches for a network. What is
    in `folder` is found; where there is no such folder, kernels are compiled as they are needed."""
    paths = [str(ROOT)]
    code: dict[str, str] = {}
    if (folder / PACKAGES).is_dir():
        paths.append(str((folder / PACKAGES).resolve()))
    if (folder / CODE).is_dir():
        code = {"BMINF_CACHE_DIR": str((folder / CODE).resolve())}
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    return code | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "TQDM_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
    }
