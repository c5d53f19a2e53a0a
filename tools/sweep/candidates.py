"""Which classes are tried, and how each is built small."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from tools.sweep.inputs import BATCH, Build, Feed, Inputs, inputs_for, latents_for
from tools.sweep.shrink import Shrinker

Values = Mapping[str, Any]

# What the general rules of shrink.py and inputs.py get wrong, by family or class.
_WIDE = {"block_out_channels": (32, 32, 32, 32)}  # normalised in 32 groups, whatever is asked for
_OVERRIDES: dict[str, Values] = {
    "esm": {"vocab_size": 33},
    "mamba2": {"chunk_size": 8, "state_size": 16},
    "AutoencoderKLCogVideoX": _WIDE,
    "AutoencoderKLMagvit": _WIDE,
    "AuraFlowTransformer2DModel": {"sample_size": 16},
    "DreamLiteTransformer2DModel": {"in_channels": 8},
    "FluxTransformer2DModel": {"attention_head_dim": 16, "axes_dims_rope": (4, 6, 6)},
    "Transformer2DModel": {"in_channels": 8, "norm_num_groups": 4, "cross_attention_dim": 16},
    "TransformerTemporalModel": {"in_channels": 8, "norm_num_groups": 4},
    "PixArtTransformer2DModel": {"sample_size": 16},
    "UNet2DModel": {"block_out_channels": (32, 32, 64, 64)},
}


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
    return [each for library in libraries for each in LIBRARIES[library][0]()]


def builders(candidate: Candidate) -> tuple[list[Build], Feed]:
    """Ways to build `candidate`, small and with random weights, and what it is fed with."""
    return LIBRARIES[candidate.library][1](candidate)


def _small(make: Callable[[Values], torch.nn.Module], values: Values, more: Values) -> list[Build]:
    """A way for each way to shrink `values`; `more` are as they are."""

    def build(shrinker: Shrinker) -> torch.nn.Module:
        return make({**shrinker.shrink(values), **more})

    return [partial(build, shrinker) for shrinker in Shrinker.all_for(values)]


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


def _build_transformers(candidate: Candidate) -> tuple[list[Build], Feed]:
    module, _, name = candidate.name.rpartition(".")
    cls: Any = getattr(importlib.import_module(module or "transformers"), name)
    values, more = cls.config_class().to_dict(), _OVERRIDES.get(candidate.family, {})
    return _small(lambda small: cls(cls.config_class(**small)), values, more), inputs_for


def _diffusers() -> Iterator[Candidate]:
    import diffusers

    for name in sorted(dir(diffusers.models)):
        cls = getattr(diffusers.models, name)
        if isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin):
            yield Candidate("diffusers", cls.__module__.split(".")[2], name)


def _build_diffusers(candidate: Candidate) -> tuple[list[Build], Feed]:
    import diffusers

    cls = getattr(diffusers.models, candidate.name)
    parameters = inspect.signature(cls.__init__).parameters.values()
    values = {p.name: p.default for p in parameters if p.default is not p.empty}
    more = _OVERRIDES.get(candidate.name, {})
    return _small(lambda small: cls(**small), values, more), latents_for


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


def _build_timm(candidate: Candidate) -> tuple[list[Build], Feed]:
    timm: Any = importlib.import_module("timm")

    def inputs(model: torch.nn.Module) -> Iterator[Inputs]:
        shape = timm.data.resolve_model_data_config(model)["input_size"]
        yield {"x": torch.randn(BATCH, *shape, generator=torch.Generator().manual_seed(1))}

    return [partial(timm.create_model, candidate.name, pretrained=False)], inputs


# What finds the classes of a library, and what builds one.
LIBRARIES = {
    "transformers": (_transformers, _build_transformers),
    "diffusers": (_diffusers, _build_diffusers),
    "timm": (_timm, _build_timm),
}
