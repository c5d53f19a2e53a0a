"""The architectures, and how files tell which of them they hold."""

from __future__ import annotations

from pathlib import Path

from bminf.arch import glm, gpt, t5
from bminf.checkpoint.folder import Checkpoint, open_checkpoint

SPLIT_TABLES = (gpt.SPLITS, t5.SPLITS, glm.SPLITS_OF_GLM130B, glm.SPLITS_OF_GLM10B)


def checkpoint_in(path: Path) -> Checkpoint:
    """The checkpoint in a folder, whichever architecture it is of; see open_checkpoint()."""
    return open_checkpoint(path, SPLIT_TABLES)
