"""`python smoke.py`, with an installed bminf: that it is whole, and that a model streams.

Prints one line of JSON; tools/release.py and the tests run it in an environment or a folder where
nothing of the checkout is found. Needs torch alone.
"""

from __future__ import annotations

import json
import logging
from importlib import resources
from typing import Any

import torch

import bminf


def main() -> dict[str, Any]:
    """What is there, and whether it is right."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("bminf").addHandler(handler)
    return {
        "version": bminf.__version__,
        "file": bminf.__file__,
        "is_right": _packed_is_right() and _streamed_is_resident(),
        "level": bminf.cpu_info().level,
        "library": bminf.cpu_info().library,
        "kernels": len([one for one in _files("bminf.kernels") if one.endswith((".cu", ".cuh"))]),
        "page": "page.html" in _files("bminf.server"),
        "said": said,
    }


def _files(package: str) -> list[str]:
    return [one.name for one in resources.files(package).iterdir()]


def _packed_is_right() -> bool:
    layer, x = bminf.QuantizedLinear(torch.nn.Linear(64, 8)), torch.ones(1, 64)
    expected = torch.nn.functional.linear(x, layer.dequantize(), layer.bias)
    return all(bool(((layer(x) - expected).abs() < 1e-3).all()) for _ in range(2))


def _streamed_is_resident() -> bool:
    layers = [torch.nn.Linear(64, 64) for _ in range(8)]
    model = torch.nn.Sequential(torch.nn.Sequential(*layers)).eval()
    x = torch.ones(1, 64)
    with torch.inference_mode():
        expected = model(x)
        plan = bminf.plan_for(model, False, blocks=[f"0.{at}" for at in range(8)], device="cpu")
        names = [block.name for block in plan.blocks]
        wrapped = bminf.wrapper(model, False, plan.least_limit, "cpu", blocks=names)
        is_equal = torch.equal(wrapped(x), expected)
        made = bminf.plan_of(wrapped)
        return is_equal and made is not None and bool(made.streamed)


if __name__ == "__main__":
    print(json.dumps(main()))
