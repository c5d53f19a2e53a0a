"""What the general rules of shrink.py and inputs.py get wrong, by family or class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TRANSFORMERS: dict[str, dict[str, Any]] = {
    "autoformer": {"prediction_length": 4},
    "deepseek_v2": {"n_group": 1, "topk_group": 1},
    "esm": {"vocab_size": 33},
    "informer": {"prediction_length": 4},
    "mamba2": {"chunk_size": 8, "state_size": 16},
    "time_series_transformer": {"prediction_length": 4},
}

_WIDE = {"block_out_channels": (32, 32, 32, 32)}  # normalised in 32 groups, whatever is asked for

DIFFUSERS: dict[str, dict[str, Any]] = {
    "AutoencoderKLCogVideoX": _WIDE,
    "AutoencoderKLAllegro": _WIDE,
    "AutoencoderKLMagvit": _WIDE,
    "AuraFlowTransformer2DModel": {"sample_size": 16},
    "DreamLiteTransformer2DModel": {"in_channels": 8},
    "FluxTransformer2DModel": {"attention_head_dim": 16, "axes_dims_rope": (4, 6, 6)},
    "HunyuanDiT2DModel": {"sample_size": 16, "patch_size": 2, "in_channels": 4},
    "LTXVideoTransformer3DModel": {"in_channels": 8},
    "LatteTransformer3DModel": {"sample_size": 16, "patch_size": 2, "in_channels": 4},
    "Transformer2DModel": {"in_channels": 8, "norm_num_groups": 4, "cross_attention_dim": 16},
    "TransformerTemporalModel": {"in_channels": 8, "norm_num_groups": 4},
    "PixArtTransformer2DModel": {"sample_size": 16},
    "UNet2DModel": {"block_out_channels": (32, 32, 64, 64)},
}


def merged(values: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with those of `more` in their place, configurations inside one by one."""
    both = dict(values)
    for key, value in more.items():
        inner = both.get(key)
        if isinstance(value, Mapping) and isinstance(inner, Mapping):
            value = merged(inner, value)
        both[key] = value
    return both
