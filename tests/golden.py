"""Reference outputs of the models' own authors' code, and the checkpoints they were made with.

They lie in a folder of their own, ../shared/golden unless BMINF_GOLDEN names another; any set with
the same layout will do: nothing here or in the tests knows a size, a degree or a number of a step.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import bminf

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / os.environ.get("BMINF_GOLDEN", "../shared/golden")
CLASSES = {"cpm1": "CPM1", "cpm2": "CPM2", "eva": "EVA"}
TOLERANCE = 2e-5  # of float32 against the authors' float32


class GoldenSet:
    """The folder of one model."""

    def __init__(self, name: str) -> None:
        self.name, self.path = name, FOLDER / name

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        """All reference tensors, of every file."""
        found: dict[str, torch.Tensor] = {}
        for file in sorted(self.path.glob("golden*.safetensors")):
            found |= load_file(file)
        return found

    @cached_property
    def info(self) -> dict[str, Any]:
        return json.loads((self.path / "info.json").read_text())

    @property
    def tolerance(self) -> float:
        """Of float32: what the reference itself differs by between one pass and many."""
        return max(TOLERANCE, 3 * float(self.info.get("max_abs_cached_step_vs_full", 0)))

    @cached_property
    def bminf1(self) -> dict[str, Any]:
        """What was recorded of BMInf 1.x."""
        return json.loads((self.path / "bminf1_golden.json").read_text())

    def layouts(self) -> list[str]:
        """The checkpoints: folders that have files in them, somewhere."""
        return sorted(p.name for p in self.path.iterdir() if p.is_dir() and any(p.rglob("*.*")))

    def config(self, layout: str) -> Any:
        """What is to be said about a layout; None where its folder or its parent says it."""
        beside = [self.path / layout, self.path]
        names = ("config.json", "model_config.json")
        is_there = any((folder / name).is_file() for folder in beside for name in names)
        return None if is_there else self.info["config"]

    def load(self, layout: str, **arguments: Any) -> Any:
        settings = {
            "quantization": None, "device": "cpu", "dtype": torch.float32, "max_length": None,
            "max_batch_size": 2, "config": self.config(layout), **arguments,
        }  # fmt: skip
        settings["max_length"] = settings["max_length"] or self.most_tokens()
        return getattr(bminf.models, CLASSES[self.name])(self.path / layout, **settings)

    def load_streaming(self, layout: str, plan: Any, **arguments: Any) -> Any:
        """With no more memory than two slots of the largest block take."""
        slots = 2 * max(block.nbytes for block in plan.blocks)
        limit = plan.outside_bytes + plan.reserved_bytes + slots
        return self.load(layout, memory_limit=limit, **arguments)

    def most_tokens(self) -> int:
        """Of all that is fed to the models."""
        if self.name == "cpm1":
            return int(self.info["config"]["max_position_embeddings"])
        ids = [t.shape[1] for name, t in self.tensors.items() if name.endswith("input_ids")]
        return max([*ids, self.tensors["greedy_ids"].shape[1] + 1])


def is_int8(given: GoldenSet, layout: str) -> bool:
    """Whether DeepSpeed stored its linears as codes, which are other weights than the reference's.

    Its versions spell the name of the index in two ways.
    """
    files = [*(given.path / layout).glob("ds*inference_config.json")]
    return any(json.loads(file.read_text()).get("dtype") == "int8" for file in files)


def is_absent(name: str) -> bool:
    return not (FOLDER / name).is_dir()


@lru_cache
def golden(name: str) -> Any:
    if name.startswith("glm"):
        from golden_glm import GLMSet

        return GLMSet(name)
    return GoldenSet(name)


def cases(names: Iterable[str], of: Callable[[Any], Iterable[Any]]) -> Iterator[Any]:
    """pytest parameters for what each model's set holds; a skip only where its folder is absent."""
    for name in names:
        if is_absent(name):
            reason = f"there is no golden folder {name!r}; BMINF_GOLDEN names where it is"
            yield pytest.param(name, None, marks=pytest.mark.skip(reason=reason), id=name)
            continue
        for case in of(golden(name)):
            words = [case] if isinstance(case, str) else case
            yield pytest.param(name, case, id="-".join([name, *words]))


def for_each(names: Iterable[str], of: Callable[[Any], Iterable[Any]]) -> Any:
    """Make one test (name, case) of each; where there is nothing of the kind, no test at all."""
    found = [*cases(names, of)]

    def decorate(test: Any) -> Any:
        if not found:
            test.__test__ = False  # an empty parameter list would count as a skipped test
            return test
        return pytest.mark.parametrize(("name", "case"), found)(test)

    return decorate


def expect_streamed_is_resident(
    given: Any, layout: str, outputs: Callable[[Any], dict[str, torch.Tensor]], **arguments: Any
) -> None:
    """Bit for bit.   outputs: of a loaded model.   arguments: what it is loaded with."""
    with given.load(layout, **arguments) as model:
        assert not model.plan.streamed
        plan, resident = model.plan, outputs(model)
    with given.load_streaming(layout, plan, **arguments) as model:
        assert len(model.plan.streamed) > len(model.plan.resident)
        streamed = outputs(model)
        assert model.stats.bytes_copied > 0
    assert resident and list(streamed) == list(resident)
    for key, x in resident.items():
        assert torch.equal(streamed[key], x), key


@contextmanager
def calls_of(layers: Iterable[torch.nn.Module]) -> Iterator[list[Any]]:
    """(layer, what it was given, its output) of each call within."""
    calls: list[Any] = []
    hooks = [layer.register_forward_hook(lambda *call: calls.append(call)) for layer in layers]
    yield calls
    for hook in hooks:
        hook.remove()


def largest(given: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference."""
    assert given.shape == expected.shape
    return float((given.float() - expected.float()).abs().max())
