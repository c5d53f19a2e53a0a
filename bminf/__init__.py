"""bminf: run models far bigger than the memory at hand.

The public names are loaded when they are first used, so that `import bminf` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bminf import models as models
    from bminf import plot as plot
    from bminf.block_list import TransformerBlockList as TransformerBlockList
    from bminf.cpu.library import CpuInfo as CpuInfo
    from bminf.cpu.library import cpu_info as cpu_info
    from bminf.engine.engine import Engine as Engine
    from bminf.engine.request import Request as Request
    from bminf.engine.sampling import Sampling as Sampling
    from bminf.layers.quantized_linear import QuantizedLinear as QuantizedLinear
    from bminf.loading import load as load
    from bminf.offload.hooks import Stats as Stats
    from bminf.offload.plan import Plan as Plan
    from bminf.quantization.packed import Format as Format
    from bminf.saving import save as save
    from bminf.wrapping import plan_for as plan_for
    from bminf.wrapping import plan_of as plan_of
    from bminf.wrapping import stats_of as stats_of
    from bminf.wrapping import unwrap as unwrap
    from bminf.wrapping import wrapper as wrapper

__version__ = "3.0.0"

_LAZY_IMPORTS = {
    "CpuInfo": "bminf.cpu.library",
    "Engine": "bminf.engine.engine",
    "Format": "bminf.quantization.packed",
    "Plan": "bminf.offload.plan",
    "QuantizedLinear": "bminf.layers.quantized_linear",
    "Request": "bminf.engine.request",
    "Sampling": "bminf.engine.sampling",
    "Stats": "bminf.offload.hooks",
    "TransformerBlockList": "bminf.block_list",
    "cpu_info": "bminf.cpu.library",
    "load": "bminf.loading",
    "plan_for": "bminf.wrapping",
    "plan_of": "bminf.wrapping",
    "save": "bminf.saving",
    "stats_of": "bminf.wrapping",
    "unwrap": "bminf.wrapping",
    "wrapper": "bminf.wrapping",
}

__all__ = list(_LAZY_IMPORTS)


def __getattr__(name: str) -> Any:
    if name in ("models", "plot"):  # so that bminf.models.CPM2 needs no other import
        return import_module(f"bminf.{name}")
    if name not in _LAZY_IMPORTS:
        raise AttributeError(f"module 'bminf' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_LAZY_IMPORTS[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY_IMPORTS])
