"""Which classes are tried, and how each is built small."""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from tools.sweep import overrides
from tools.sweep.inputs import BATCH, inputs_for
from tools.sweep.latents import latents_for
from tools.sweep.shrink import Shrinker

Build = Callable[[], torch.nn.Module]
Inputs = Callable[[torch.nn.Module], Iterable[dict[str, Any]]]


@dataclass(frozen=True)
class Candidate:
    """A class of a library. family: model type of transformers, kind or module elsewhere.

    name: of the class in the library, or with the module that it is in, joined by a dot.
    """

    library: str
    family: str
    name: str

    @property
    def key(self) -> str:
        return f"{self.library}:{self.family}:{self.name}"


def candidates(libraries: Iterable[str]) -> list[Candidate]:
    """Every class of these libraries, in a fixed order."""
    return [each for library in libraries for each in _FINDERS[library]()]


def builders(candidate: Candidate) -> tuple[list[Build], Inputs]:
    """Ways to build `candidate`, small and with random weights, and what it is fed with."""
    return _BUILDERS[candidate.library](candidate)


def _transformers() -> Iterator[Candidate]:
    """The classes of all MODEL_..._MAPPINGs, by model type."""
    from transformers.models.auto import modeling_auto

    families: dict[str, str] = {}
    for mapping, names in vars(modeling_auto).items():
        if mapping.startswith("MODEL_") and mapping.endswith("_NAMES"):
            for family, classes in names.items():
                for name in [classes] if isinstance(classes, str) else classes:
                    families.setdefault(name, family)
    for name, family in sorted(families.items(), key=lambda item: item[::-1]):
        yield Candidate("transformers", family, name)


def _build_transformers(candidate: Candidate) -> tuple[list[Build], Inputs]:
    module, _, name = candidate.name.rpartition(".")
    cls: Any = getattr(importlib.import_module(module or "transformers"), name)
    more = overrides.TRANSFORMERS.get(candidate.family, {})

    def build(shrinker: Shrinker) -> torch.nn.Module:
        small = overrides.merged(shrinker.shrink(cls.config_class().to_dict()), more)
        model: torch.nn.Module = cls(cls.config_class(**small))
        return model

    shrinkers = Shrinker.all_for(cls.config_class().to_dict())
    return [functools.partial(build, shrinker) for shrinker in shrinkers], inputs_for


def _diffusers() -> Iterator[Candidate]:
    import diffusers

    for name in sorted(dir(diffusers.models)):
        cls = getattr(diffusers.models, name)
        if isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin):
            yield Candidate("diffusers", cls.__module__.split(".")[2], name)


def _build_diffusers(candidate: Candidate) -> tuple[list[Build], Inputs]:
    import diffusers

    cls = getattr(diffusers.models, candidate.name)

    parameters = inspect.signature(cls.__init__).parameters.values()
    values = {p.name: p.default for p in parameters if p.default is not p.empty}
    more = overrides.DIFFUSERS.get(candidate.name, {})

    def build(shrinker: Shrinker) -> torch.nn.Module:
        model: torch.nn.Module = cls(**overrides.merged(shrinker.shrink(values), more))
        return model

    return [functools.partial(build, each) for each in Shrinker.all_for(values)], latents_for


def _timm() -> Iterator[Candidate]:
    """The smallest model, to judge by its name, of each of timm's modules."""
    import timm

    for module in timm.list_modules():
        names = timm.list_models(module=module)
        if names:
            yield Candidate("timm", module, min(names, key=_size_of_name))


_SIZES = (
    *("test", "atto", "femto", "zepto", "pico", "nano", "xxs", "xxt", "tiny", "xs", "mini"),
    *("small", "_s", "18", "base"),
)


def _size_of_name(name: str) -> tuple[int, float, str]:
    size = next((at for at, word in enumerate(_SIZES) if word in name), len(_SIZES))
    numbers = [float(number) for number in re.findall(r"\d+", name)]
    return size, sum(numbers), name


def _build_timm(candidate: Candidate) -> tuple[list[Build], Inputs]:
    timm: Any = importlib.import_module("timm")

    def inputs(model: torch.nn.Module) -> Iterator[dict[str, Any]]:
        shape = timm.data.resolve_model_data_config(model)["input_size"]
        yield {"x": torch.randn(BATCH, *shape, generator=torch.Generator().manual_seed(1))}

    build = functools.partial(timm.create_model, candidate.name, pretrained=False)
    return [build], inputs


_FINDERS = {"transformers": _transformers, "diffusers": _diffusers, "timm": _timm}
_BUILDERS = {
    "transformers": _build_transformers,
    "diffusers": _build_diffusers,
    "timm": _build_timm,
}
