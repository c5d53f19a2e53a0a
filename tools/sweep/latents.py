"""Inputs for the models of diffusers, made from the names of their forward's parameters."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch

from tools.sweep.inputs import BATCH, LENGTH, Inputs

SIDE, FRAMES = 16, 5
_TEXT_WIDTHS = (
    "joint_attention_dim",
    "cross_attention_dim",
    "text_embed_dim",
    "text_dim",
    "caption_channels",
    "encoder_hid_dim",
    "text_states_dim",
    "condition_dim",
    "conditioning_embedding_dim",
    "embedding_dim",
    "cap_feat_dim",
    "caption_projection_dim",
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
                given = {name: _value(name, model, dimensions, dtype) for name in names}
                if all(value is not None for value in given.values()):
                    yield given


def _value(name: str, model: torch.nn.Module, dimensions: int, dtype: torch.dtype) -> Any:
    generator = torch.Generator().manual_seed(1)
    config: Any = model.config

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    if name in ("hidden_states", "sample", "x", "z", "latents", "mel"):
        return normal(*_latent_shape(config, dimensions))
    if name == "controlnet_cond":
        return normal(BATCH, config.get("conditioning_channels", 3), 8 * SIDE, 8 * SIDE)
    if name in ("timestep", "timesteps", "t", "timestep_ratio", "r_timestep", "timestep_r"):
        return torch.full((BATCH,), 3).to(dtype)
    if name.startswith("encoder_hidden_states") and "image" not in name:
        return normal(BATCH, LENGTH, _text_width(config))
    if name in ("pooled_projections", "pooled_text_emb"):
        return normal(BATCH, config.get("pooled_projection_dim") or 32)
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
    size = config.get("sample_size") or SIDE
    height, width = size if isinstance(size, list | tuple) else (size, size)
    height, width = (min(side, 64) for side in (height, width))
    if dimensions == 4:
        return BATCH, channels, height, width
    return (BATCH, channels, FRAMES, SIDE, SIDE) if dimensions == 5 else (BATCH, SIDE, channels)


def _text_width(config: Any) -> int:
    widths = (config.get(name) for name in _TEXT_WIDTHS)
    width = next((width for width in widths if width), 32)
    return int(width[0] if isinstance(width, list | tuple) else width)


def _num_axes(config: Any) -> int:
    for name in ("axes_dims_rope", "axes_dim", "rope_axes_dim"):
        if config.get(name):
            return len(config[name])
    return 3
