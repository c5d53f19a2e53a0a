"""What sets the models of the zoo apart before a text is seen: names, layouts, configurations."""

from __future__ import annotations

import torch

from bminf.arch.architecture import Architecture
from bminf.arch.glm import GLM, GLMConfig
from bminf.arch.gpt import CPM1, GPTConfig
from bminf.arch.t5 import CPM2, EVA, T5Config
from bminf.checkpoint.glm10b import glm10b_name, glm10b_tensors
from bminf.checkpoint.glm130b import glm130b_name, glm130b_tensors
from bminf.models import config
from bminf.quantization import glm_rows
from bminf.quantization.packed import FORMATS, Format, PackedWeight, pack

Config = GPTConfig | T5Config | GLMConfig


def _pack_glm(weight: torch.Tensor, form: Format) -> PackedWeight:
    """Four bits and a scale a row as GLM-130B's own code packs them; all else as everywhere."""
    return glm_rows.pack_rows(weight, 4) if form == INT4_ROW else pack(weight, form)


INT4_ROW = Format(4)
GLM_FORMATS = {**FORMATS, "int4-row": INT4_ROW}
"""By the names that users give; the last one is that of GLM-130B's authors."""

GLM130B = Architecture(
    "glm130b", "GLM-130B", GLMConfig, GLM, glm130b_tensors, glm130b_name, config.glm130b_config,
    {}, (), pack=_pack_glm,
)  # fmt: skip
GLM10B = Architecture(
    "glm10b", "GLM-10B", GLMConfig, GLM, glm10b_tensors, glm10b_name, config.glm10b_config,
    {}, ("THUDM/glm-10b", "THUDM/glm-2b", "THUDM/glm-10b-chinese"), pack=_pack_glm,
)  # fmt: skip

FAMILIES = {one.name: one for one in (CPM1, CPM2, EVA, GLM130B, GLM10B)}
