"""How often each block runs in one request, as far as the model says so itself.

A model that generates runs its decoder once a token, and what makes the decoder's input once a
request: the encoder of an encoder-decoder model, towers for images, audio and video, and what
stands between a tower and the decoder. Which is which is read from what a model of transformers
tells about itself: configurations inside its configuration, get_encoder(), get_decoder(),
generate() and the arguments of forward(). Only where none of that tells, names do.
"""

from __future__ import annotations

import inspect
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from bminf.layout import ModuleBlock
from bminf.offload.blocks import LISTS
from bminf.offload.plan import DEFAULT_USES

_ONCE = 1
_CACHES = {"cache", "past_key_values", "past_buckets_states", "cache_params", "state", "mems"}
_OTHER_MODALITY = re.compile(
    r"(^|_)(vision|visual|vit|image|img|pixel|audio|speech|video|perceiver|resampler|q_?former)"
)


def uses_of(model: torch.nn.Module, blocks: Iterable[ModuleBlock]) -> dict[str, float]:
    """Block name -> uses per request, for those that are not used 128 times (once a token).

    1 for what runs once a request, times the places in its lists that a block stands in. Of a model
    that is not of transformers, nor holds one, only the places are known.
    """
    runs_once = _once_predicate(model)
    places = _Places(model)
    uses: dict[str, float] = {}
    for block in blocks:
        module = model.get_submodule(block.name)
        rate = _ONCE if runs_once(block.name, module) else DEFAULT_USES
        uses[block.name] = rate * places.of(module)
    return {name: value for name, value in uses.items() if value != DEFAULT_USES}


def _once_predicate(model: torch.nn.Module) -> Callable[[str, torch.nn.Module], bool]:
    """Whether a block, by name and module, runs once a request."""
    parts = list(_outermost_models(model, _has_transformers_config))
    generating = [part for part in parts if _generates(part)] or [
        part for part in parts if _takes_cache(part)
    ]
    known = {module for part in parts for module in part.modules()}
    per_token = {module for part in generating for module in _run_each_token(part)}
    encoding = {module for encoder in _encoders(model) for module in encoder.modules()}
    has_decoder = bool(generating) or callable(getattr(model, "generate", None))

    def runs_once(name: str, module: torch.nn.Module) -> bool:
        if module in encoding or module in known:
            return module not in per_token
        return has_decoder and _is_of_other_modality(name)

    return runs_once


def _run_each_token(model: Any) -> set[torch.nn.Module]:
    """The modules of a generating model that run once a token."""
    text = _text_config(model)
    decoder = _named_part(model, "get_decoder")
    inner = list(_inner_models(model))
    found: set[torch.nn.Module] = set()
    holds_text = False
    for part in inner:
        is_text = part is decoder or type(part.config) is type(text)
        holds_text = holds_text or is_text
        if is_text or _generates(part):
            found |= _run_each_token(part)
    if not holds_text:  # it is the decoder itself, with towers inside
        in_parts = {module for part in inner for module in part.modules()}
        rest = {name: module for name, module in model.named_modules() if module not in in_parts}
        lists = [name for name, module in rest.items() if isinstance(module, LISTS)]
        # By their names, towers that know nothing of transformers; not where all has such names.
        has_towers = bool(inner) or not all(_is_of_other_modality(name) for name in lists)
        found |= {
            module
            for name, module in rest.items()
            if not (has_towers and _is_of_other_modality(name))
        }
    return found - {module for encoder in _encoders(model) for module in encoder.modules()}


def _encoders(model: Any) -> Iterator[torch.nn.Module]:
    """Of `model`, and of the models inside it that generate something of their own."""
    for part in model.modules():
        if part is model or (_has_transformers_config(part) and _generates(part)):
            config = getattr(part, "config", None)
            is_encoder_decoder = getattr(config, "is_encoder_decoder", False)
            encoder = _named_part(part, "get_encoder") if is_encoder_decoder else None
            if encoder is not None:
                yield encoder


def _outermost_models(
    module: torch.nn.Module, is_wanted: Callable[[torch.nn.Module], bool]
) -> Iterator[Any]:
    if is_wanted(module):
        yield module
        return
    for child in module.children():
        yield from _outermost_models(child, is_wanted)


def _inner_models(model: Any) -> Iterator[Any]:
    """The models inside `model` that have a configuration of their own kind.

    By kind: a part may have a changed copy of the whole model's configuration.
    """
    config_class = type(model.config)
    for child in model.children():
        yield from _outermost_models(
            child,
            lambda part: _has_transformers_config(part) and type(part.config) is not config_class,
        )


def _has_transformers_config(module: Any) -> bool:
    """Whether `module` tells about itself in the words of transformers."""
    return callable(getattr(getattr(module, "config", None), "get_text_config", None))


def _generates(model: Any) -> bool:
    can_generate = getattr(model, "can_generate", None)
    return bool(can_generate()) if callable(can_generate) else hasattr(model, "generate")


def _takes_cache(model: torch.nn.Module) -> bool:
    try:
        return not _CACHES.isdisjoint(inspect.signature(model.forward).parameters)
    except (TypeError, ValueError):  # a forward that is no python function
        return False


def _text_config(model: Any) -> Any:
    try:
        return model.config.get_text_config(decoder=True)
    except ValueError:  # there are several
        return None


def _named_part(model: Any, getter: str) -> torch.nn.Module | None:
    """What get_encoder() or get_decoder() gives, if it is a part of the model."""
    get = getattr(model, getter, None)
    try:
        part = get() if callable(get) else None
    except (AttributeError, NotImplementedError, TypeError, ValueError):
        return None  # they look for attributes by name, which not every model has
    return part if isinstance(part, torch.nn.Module) and part is not model else None


def _is_of_other_modality(name: str) -> bool:
    return any(_OTHER_MODALITY.search(part) for part in name.split("."))


class _Places:
    """In how many places of its lists a module stands: how often it runs when they do."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._holders = defaultdict[torch.nn.Module | None, list[torch.nn.Module]](list)
        for holder in model.modules():
            for child in holder._modules.values():
                self._holders[child].append(holder)
        self._known: dict[torch.nn.Module, int] = {}

    def of(self, module: torch.nn.Module) -> int:
        if module not in self._known:
            self._known[module] = 1  # also ends a walk in a circle
            holders = self._holders[module]
            lists = [holder for holder in holders if isinstance(holder, LISTS)]
            # Beside a list, an attribute is but another name of the module.
            in_lists = sum(self.of(holder) for holder in lists)
            elsewhere = max((self.of(holder) for holder in holders), default=1)
            self._known[module] = in_lists or elsewhere
        return self._known[module]
