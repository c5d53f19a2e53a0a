"""`python -m benchmarks.gpu_probe FILE`: what the machine of a GPU session is.

In half a minute, before anything else: what it finds explains what the other steps find.
"""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_session import MARK, ROOT

sys.path.append(str(ROOT / "tests" / "kernels"))

from variants import every_variant

from benchmarks.harness import Settings, write_json
from bminf.cli.gpus import THIS, speeds_of
from bminf.cli.tables.document import document
from bminf.cuda.compile import cache_folder, compiler_version, kept_file, read_kept

Found = dict[str, Any]


def machine(out: str) -> int:
    """0, or 1 where a part failed; each part is written as soon as it is known."""
    content = document("probe", {}, asdict(Settings()), ROOT) | {"found": {}, "failures": []}
    for name, part in PARTS.items():
        try:
            content["found"][name] = part()
        except Exception as error:
            traceback.print_exc()
            content["failures"].append(f"{name}: {type(error).__name__}: {error}")
        write_json(Path(out), content)
    for name in ("versions", "hardware", "found", "failures"):
        print(f"{name}: {content[name]}")
    return int(bool(content["failures"]))


def brought() -> Found:
    """Raises RuntimeError where jieba is not there, or kernels have changed since prepare."""
    remedy = "run python -m benchmarks.gpu_session prepare and bring the folder along"
    if importlib.util.find_spec("jieba") is None:
        raise RuntimeError(f"jieba is not there, models of Chinese text cannot run; {remedy}")
    major, minor = torch.cuda.get_device_capability()
    capability, compiler = 10 * major + minor, compiler_version()
    wanted = every_variant(capability)
    missing = [k for k in wanted if read_kept(kept_file(k, capability, compiler)) is None]
    if missing and (cache_folder().parent / MARK).is_file():
        raise RuntimeError(
            f"{len(missing)} of {len(wanted)} kernels are not among those brought for {capability} "
            f"and NVRTC {compiler}, such as {missing[0]}; {remedy}"
        )
    return {"NVRTC": compiler, "kernels": len(wanted), "kernels to compile": len(missing)}


PARTS: dict[str, Callable[[], Found]] = {
    "brought": brought,
    # Bytes a second through the link, out of page-locked memory, and on the device.
    "speeds": lambda: speeds_of(THIS)._asdict(),
}

if __name__ == "__main__":
    sys.exit(machine(sys.argv[1]))
