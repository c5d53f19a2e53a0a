"""The architectures, and which of them files are of.

One more is a file beside this one and a line in ARCHITECTURES.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bminf.arch.architecture import Architecture
from bminf.arch.bloom import BLOOM
from bminf.arch.glm import GLM10B, GLM130B
from bminf.arch.gpt import CPM1
from bminf.arch.t5 import CPM2, EVA
from bminf.checkpoint.binary_file import read_json
from bminf.checkpoint.config import find_config
from bminf.checkpoint.folder import Checkpoint, open_checkpoint
from bminf.checkpoint.model_parallel import SplitTable
from bminf.quantization.packed import Format

ARCHITECTURES: tuple[Architecture, ...] = (CPM1, CPM2, EVA, GLM130B, GLM10B, BLOOM)
"""What two of them claim belongs to the later one: GLM-10B has the names of CPM-1, and more."""


def named(name: object) -> Architecture | None:
    """The architecture of this name, if there is one."""
    return next((one for one in ARCHITECTURES if one.name == name), None)


def all_formats() -> dict[str, Format]:
    """Of linears, in any architecture, by the names that users give."""
    return {name: known for one in ARCHITECTURES for name, known in one.formats.items()}


def split_tables() -> list[SplitTable]:
    return [one.splits for one in ARCHITECTURES]


def checkpoint_in(path: Path) -> Checkpoint:
    """The checkpoint in a folder, whichever architecture it is of; see open_checkpoint()."""
    return open_checkpoint(path, split_tables())


def config_in(folder: Path) -> Path | None:
    """The configuration of the checkpoint in a folder; see find_config()."""
    return find_config(folder, [one.model_type for one in ARCHITECTURES])


def detect(opened: Checkpoint) -> Architecture | None:
    """The architecture by the files themselves; None where CPM-2 and EVA look alike."""
    if opened.kind == "bminf":
        return named(read_json(opened.path / "config.json").get("model"))
    return next((one for one in reversed(ARCHITECTURES) if one.matches(opened)), None)


def detect_from_config(source: Mapping[str, Any]) -> Architecture:
    """The architecture of a configuration without weights; CPM-2 where it says nothing else."""
    return next(one for one in reversed(ARCHITECTURES) if one.matches_config(source))
