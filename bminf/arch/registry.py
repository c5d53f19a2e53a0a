"""The architectures, and how files tell which of them they hold."""

from __future__ import annotations

from pathlib import Path

from bminf.arch import glm, gpt, t5
from bminf.arch.architecture import Architecture
from bminf.checkpoint.folder import Checkpoint, open_checkpoint

ARCHITECTURES = (gpt.CPM1, t5.CPM2, t5.EVA, glm.GLM130B, glm.GLM10B)

SPLIT_TABLES = (gpt.SPLITS, t5.SPLITS, glm.SPLITS_OF_GLM130B, glm.SPLITS_OF_GLM10B)


def named(name: object) -> Architecture | None:
    """The one of this name, if there is one."""
    return next((one for one in ARCHITECTURES if one.name == name), None)


def checkpoint_in(path: Path) -> Checkpoint:
    """The checkpoint in a folder, whichever architecture it is of; see open_checkpoint()."""
    return open_checkpoint(path, SPLIT_TABLES)
