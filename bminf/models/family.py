"""What sets the models of the zoo apart before a text is seen: names, layouts, configurations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bminf.arch.gpt import GPT, GPTConfig
from bminf.arch.t5 import T5, T5Config
from bminf.checkpoint.cpm1 import cpm1_name, cpm1_tensors
from bminf.checkpoint.folder import Checkpoint
from bminf.checkpoint.stored import Stored
from bminf.checkpoint.t5 import t5_name, t5_tensors
from bminf.models import config

Config = GPTConfig | T5Config


@dataclass(frozen=True)
class Family:
    """name: in files and on the command line.   title: in messages.

    build: a configuration -> the architecture.   tensors: a checkpoint -> tensors under its names.
    original_name: kind of a checkpoint, name in the architecture -> name in such a checkpoint.
    parse: a mapping of any dialect, tensors and a place for messages -> a configuration.
    published: models whose shapes are known.   hub_ids: those that can be downloaded.
    uses: of lists of blocks that are not used once a token.
    """

    name: str
    title: str
    config_class: type[GPTConfig] | type[T5Config]
    build: Callable[[Any], torch.nn.Module]
    tensors: Callable[[Checkpoint], dict[str, Stored]]
    original_name: Callable[[str, str], str]
    parse: Callable[[Mapping[str, Any], Mapping[str, Stored], str], Config]
    published: Mapping[str, Config]
    hub_ids: tuple[str, ...]
    uses: Mapping[str, float]


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

FAMILIES = {family.name: family for family in (CPM1, CPM2, EVA)}
