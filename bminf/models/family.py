"""What sets the models of the zoo apart before a text is seen: names, layouts, configurations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from bminf.arch.glm import GLM, GLMConfig
from bminf.arch.gpt import GPT, GPTConfig
from bminf.arch.t5 import T5, T5Config
from bminf.checkpoint.cpm1 import cpm1_name, cpm1_tensors
from bminf.checkpoint.folder import Checkpoint
from bminf.checkpoint.glm10b import glm10b_name, glm10b_tensors
from bminf.checkpoint.glm130b import glm130b_name, glm130b_tensors
from bminf.checkpoint.stored import Stored
from bminf.checkpoint.t5 import t5_name, t5_tensors
from bminf.models import config
from bminf.quantization import glm_rows
from bminf.quantization.packed import FORMATS, Format, PackedWeight, pack

Config = GPTConfig | T5Config | GLMConfig


@dataclass(frozen=True)
class Family:
    """name: in files and on the command line.   title: in messages.

    build: a configuration -> the architecture.   tensors: a checkpoint -> tensors under its names.
    original_name: kind of a checkpoint, name in the architecture -> name in such a checkpoint.
    parse: a mapping of any dialect, tensors and a place for messages -> a configuration.
    published: models whose shapes are known; none where parse() can do with the shapes alone.
    hub_ids: those that can be downloaded.
    uses: of lists of blocks that are not used once a token.   pack: a weight, in a format.
    """

    name: str
    title: str
    config_class: type[GPTConfig] | type[T5Config] | type[GLMConfig]
    build: Callable[[Any], torch.nn.Module]
    tensors: Callable[[Checkpoint], dict[str, Stored]]
    original_name: Callable[[str, str], str]
    parse: Callable[[Mapping[str, Any], Mapping[str, Stored], str], Config]
    published: Mapping[str, Config]
    hub_ids: tuple[str, ...]
    uses: Mapping[str, float] = field(default_factory=dict)
    pack: Callable[[torch.Tensor, Format], PackedWeight] = pack


def _pack_glm(weight: torch.Tensor, form: Format) -> PackedWeight:
    """Four bits and a scale a row as GLM-130B's own code packs them; all else as everywhere."""
    return glm_rows.pack_rows(weight, 4) if form == INT4_ROW else pack(weight, form)


INT4_ROW = Format(4)
GLM_FORMATS = {**FORMATS, "int4-row": INT4_ROW}
"""By the names that users give; the last one is that of GLM-130B's authors."""

_ONCE_A_PROMPT = {"encoder.layers": 1, "cross_projections.layers": 1}

CPM1 = Family(
    "cpm1", "CPM-1", GPTConfig, GPT, cpm1_tensors, cpm1_name, config.gpt_config,
    config.PUBLISHED_GPT, ("TsinghuaAI/CPM-Generate", "mymusise/CPM-Generate-distill"), {},
)  # fmt: skip
CPM2 = Family(
    "cpm2", "CPM-2", T5Config, T5, t5_tensors, t5_name, config.t5_config, config.PUBLISHED_CPM2,
    (), _ONCE_A_PROMPT,
)  # fmt: skip
EVA = Family(
    "eva", "EVA", T5Config, T5, t5_tensors, t5_name, config.t5_config, config.PUBLISHED_EVA,
    ("thu-coai/EVA1.0", "thu-coai/EVA2.0-base", "thu-coai/EVA2.0-large", "thu-coai/EVA2.0-xlarge"),
    _ONCE_A_PROMPT,
)  # fmt: skip

GLM130B = Family(
    "glm130b", "GLM-130B", GLMConfig, GLM, glm130b_tensors, glm130b_name, config.glm130b_config,
    {}, (), pack=_pack_glm,
)  # fmt: skip
GLM10B = Family(
    "glm10b", "GLM-10B", GLMConfig, GLM, glm10b_tensors, glm10b_name, config.glm10b_config,
    {}, ("THUDM/glm-10b", "THUDM/glm-2b", "THUDM/glm-10b-chinese"), pack=_pack_glm,
)  # fmt: skip

FAMILIES = {family.name: family for family in (CPM1, CPM2, EVA, GLM130B, GLM10B)}
