"""Inputs for a forward, made from the names of its parameters and the model's configuration.

All values are random, with a fixed seed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

BATCH, LENGTH = 2, 8
SIDE, FRAMES = 16, 5  # of latents
_MAIN = ("pixel_values", "pixel_values_videos", "input_features", "input_values", "input_ids")

Inputs = dict[str, Any]
Build = Callable[[], torch.nn.Module]
Feed = Callable[[torch.nn.Module], Iterable[Inputs]]  # sets of inputs to try, the likeliest first


def inputs_for(model: torch.nn.Module) -> Iterator[Inputs]:
    """Sets of inputs to try with a model of transformers, the likeliest first."""
    parameters = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    is_encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    decoder = {"decoder_input_ids"} if is_encoder_decoder else set()
    for more in (decoder, set(), {"decoder_input_ids"}):
        required = _required(model) | more & set(parameters)
        for names in _names(main, set(parameters), required):
            yield from _filled(model, sorted(names))


def _required(model: torch.nn.Module) -> set[str]:
    return {
        name
        for name, parameter in inspect.signature(model.forward).parameters.items()
        if parameter.default is inspect.Parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }


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
    choices = {name: _values(name, getattr(model, "config", None)) for name in names}
    if not names or not all(choices.values()):
        return
    for number in range(max(map(len, choices.values()))):
        yield {name: values[min(number, len(values) - 1)] for name, values in choices.items()}


def _values(name: str, config: Any) -> list[Any]:
    """Possible values of one parameter; none for one that is not known."""
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


def _image_shapes(config: Any) -> list[tuple[int, int, int]]:
    height, width = _sides(_first(config, ("image_size", "img_size", "input_size"), 224))
    channels = _first(config, ("num_channels", "in_channels", "num_input_channels"), 3)
    return [(channels, height, width), (channels, 64, 64), (channels, 224, 224)]


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


def _first(config: Any, names: tuple[str, ...], default: Any) -> Any:
    """The first of these that the configuration, or one in it, has."""
    attributes = vars(config).values() if config is not None else ()
    for part in [config, *(value for value in attributes if hasattr(value, "to_dict"))]:
        for name in names:
            value = getattr(part, name, None)
            if value is not None and not isinstance(value, dict | str | bool):
                return value
    return default


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=_generator())


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def _sides(size: Any) -> tuple[int, int]:
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return height, width


# ---- diffusers -----------------------------------------------------------------------------------

_TEXT_WIDTHS = (
    *("joint_attention_dim", "cross_attention_dim", "text_embed_dim", "text_dim"),
    *("caption_channels", "encoder_hid_dim", "text_states_dim", "condition_dim"),
    *("conditioning_embedding_dim", "embedding_dim", "cap_feat_dim", "caption_projection_dim"),
)
_OPTIONAL = (
    *("encoder_hidden_states", "timestep", "pooled_projections", "img_ids", "txt_ids"),
    *("guidance", "class_labels", "encoder_attention_mask"),
)


def latents_for(model: torch.nn.Module) -> Iterator[Inputs]:
    """Sets of inputs to try: images, videos, packed images; with all that is optional, or less."""
    parameters = inspect.signature(model.forward).parameters
    required = [n for n, p in parameters.items() if p.default is p.empty]
    optional = [name for name in _OPTIONAL if name in parameters and name not in required]
    without = [name for name in optional if name not in ("class_labels", "guidance")]
    for dtype in (torch.long, torch.float32):
        for dimensions in (4, 5, 3):
            for names in (required + optional, required + without, required):
                given = {name: _latent(name, model.config, dimensions, dtype) for name in names}
                if all(value is not None for value in given.values()):
                    yield given


def _latent(
    name: str, config: Any, dimensions: int, time_dtype: torch.dtype
) -> torch.Tensor | None:
    """A value of one parameter; None for one that is not known."""
    if name in ("hidden_states", "sample", "x", "z", "latents", "mel"):
        return _normal(*_latent_shape(config, dimensions))
    if name == "controlnet_cond":
        return _normal(BATCH, config.get("conditioning_channels", 3), 8 * SIDE, 8 * SIDE)
    if name in ("timestep", "timesteps", "t", "timestep_ratio", "r_timestep", "timestep_r"):
        return torch.full((BATCH,), 3).to(time_dtype)
    if name.startswith("encoder_hidden_states") and "image" not in name:
        return _normal(BATCH, LENGTH, _text_width(config))
    if name in ("pooled_projections", "pooled_text_emb"):
        return _normal(BATCH, config.get("pooled_projection_dim") or 32)
    if "attention_mask" in name or name == "encoder_mask":
        return torch.ones(BATCH, LENGTH, dtype=torch.long)
    if name in ("img_ids", "txt_ids"):
        return torch.zeros(SIDE if name == "img_ids" else LENGTH, _num_axes(config))
    if name in ("guidance", "class_labels"):
        return torch.ones(BATCH) if name == "guidance" else torch.ones(BATCH, dtype=torch.long)
    if name in ("original_size", "target_size", "crop_coords"):
        return torch.tensor([[SIDE, SIDE]]).expand(BATCH, 2)
    return None


def _latent_shape(config: Any, dimensions: int) -> tuple[int, ...]:
    channels = next((config[n] for n in ("in_channels", "latent_channels") if config.get(n)), 4)
    height, width = (min(side, 64) for side in _sides(config.get("sample_size") or SIDE))
    shapes: dict[int, tuple[int, ...]] = {
        3: (BATCH, SIDE, channels),
        4: (BATCH, channels, height, width),
        5: (BATCH, channels, FRAMES, SIDE, SIDE),
    }
    return shapes[dimensions]


def _text_width(config: Any) -> int:
    widths = (config.get(name) for name in _TEXT_WIDTHS)
    width = next((width for width in widths if width), 32)
    return int(width[0] if isinstance(width, list | tuple) else width)


def _num_axes(config: Any) -> int:
    axes = (config.get(name) for name in ("axes_dims_rope", "axes_dim", "rope_axes_dim"))
    return next((len(each) for each in axes if each), 3)
