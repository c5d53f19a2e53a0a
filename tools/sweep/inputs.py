"""Inputs for a forward, made from the names of its parameters and the model's configuration."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch

BATCH, LENGTH = 2, 8
_MAIN = ("pixel_values", "pixel_values_videos", "input_features", "input_values", "input_ids")

Inputs = dict[str, Any]


def inputs_for(model: torch.nn.Module) -> Iterator[Inputs]:
    """Sets of inputs to try, the likeliest first. All values are random, with a fixed seed."""
    parameters = inspect.signature(model.forward).parameters
    required = {
        name
        for name, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    main = getattr(model, "main_input_name", "input_ids")
    decoder = {"decoder_input_ids"} if _is_encoder_decoder(model) else set()
    for more in (decoder, set(), {"decoder_input_ids"}):
        for names in _names(main, set(parameters), required | more & set(parameters)):
            yield from _filled(model, sorted(names))


def _names(main: str, accepted: set[str], required: set[str]) -> Iterator[set[str]]:
    start = {main, "bbox"} & accepted
    yield start | required
    if "input_ids" in accepted and main != "input_ids":
        yield start | required | {"input_ids"}
    for other in _MAIN:
        if other in accepted and other != main:
            yield start | required | {other}
            yield required | {other}


def _filled(model: torch.nn.Module, names: list[str]) -> Iterator[Inputs]:
    choices = {name: _values(name, model) for name in names}
    if not names or not all(choices.values()):
        return
    for number in range(max(map(len, choices.values()))):
        yield {name: values[min(number, len(values) - 1)] for name, values in choices.items()}


def _values(name: str, model: torch.nn.Module) -> list[Any]:
    """Possible values of one parameter; none for one that is not known."""
    config = getattr(model, "config", None)
    if name.endswith("input_ids"):
        return _ids(config)
    if "attention_mask" in name or name in ("padding_mask", "pixel_mask"):
        return [torch.ones(BATCH, LENGTH, dtype=torch.long)]
    if name in ("hidden_states", "inputs_embeds", "encoder_hidden_states"):
        return [_normal(BATCH, LENGTH, _first(config, ("hidden_size", "d_model", "n_embd"), 32))]
    if name == "bbox":
        return [torch.tensor([1, 2, 30, 40]).expand(BATCH, LENGTH, 4).contiguous()]
    return _pictures(name, config) or _sounds(name, config)


def _ids(config: Any) -> list[torch.Tensor]:
    """Tokens; the second shape is that of multiple choice, those after it of audio codes."""
    shapes: list[tuple[int, ...]] = [(BATCH, LENGTH), (BATCH, 2, LENGTH)]
    if codebooks := _first(config, ("num_codebooks", "num_vq", "n_q"), 0):
        shapes += [(BATCH, LENGTH, codebooks), (BATCH, codebooks, LENGTH)]
    most = min(96, _first(config, ("vocab_size",), 96))
    return [torch.randint(3, most, shape, generator=_generator()) for shape in shapes]


def _pictures(name: str, config: Any) -> list[torch.Tensor]:
    if name in ("pixel_values", "pixel_values_images"):
        return [_normal(BATCH, *shape) for shape in _image_shapes(config)]
    if name in ("pixel_values_videos", "video"):
        frames = _first(config, ("num_frames", "frames_per_clip", "tubelet_frames"), 2)
        return [_normal(BATCH, frames, *shape) for shape in _image_shapes(config)]
    if name in ("grid_thw", "image_grid_thw"):
        return [torch.tensor([[1, 4, 4], [1, 4, 4]])]
    return []


def _sounds(name: str, config: Any) -> list[torch.Tensor]:
    """Spectrograms, with time last or first, or waves."""
    mel = _first(config, ("num_mel_bins", "feature_size", "input_feat_per_channel"), 80)
    if name == "input_features":
        length = 2 * _first(config, ("max_source_positions",), 32)
        return [_normal(BATCH, mel, length), _normal(BATCH, 64, mel), _normal(BATCH, 1, 1001, 64)]
    if name in ("input_values", "audio_values", "audio"):
        length = _first(config, ("max_length",), 64)
        return [_normal(BATCH, 4000), _normal(BATCH, length, mel), _normal(BATCH, 1, 4000)]
    return []


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=_generator())


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def _image_shapes(config: Any) -> list[tuple[int, int, int]]:
    size = _first(config, ("image_size", "img_size", "input_size"), 224)
    channels = _first(config, ("num_channels", "in_channels", "num_input_channels"), 3)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return [(channels, height, width), (channels, 64, 64), (channels, 224, 224)]


def _first(config: Any, names: tuple[str, ...], default: Any) -> Any:
    """The first of these that the configuration, or one in it, has."""
    for inner in [config, *_inner(config)]:
        for name in names:
            value = getattr(inner, name, None)
            if value is not None and not isinstance(value, dict | str | bool):
                return value
    return default


def _inner(config: Any) -> list[Any]:
    values = vars(config).values() if config is not None else ()
    return [value for value in values if hasattr(value, "to_dict")]


def _is_encoder_decoder(model: torch.nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
