"""What sets the models of the zoo apart before a text is seen: names, layouts, configurations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch

from bminf.arch.sizes import Pass, Sizes
from bminf.checkpoint.folder import Checkpoint
from bminf.checkpoint.stored import Stored
from bminf.quantization.packed import Format, PackedWeight, pack


class Config(Protocol):
    """What the configuration of any architecture says; a frozen dataclass.

    max_position_embeddings: tokens in all; None where positions have no end.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_position_embeddings(self) -> int | None: ...


@dataclass(frozen=True)
class Architecture:
    """name: in files and on the command line.   title: in messages.

    build: a configuration -> the architecture.   tensors: a checkpoint -> tensors under its names.
    original_name: kind of a checkpoint, name in the architecture -> name in such a checkpoint.
    parse: a mapping of any dialect, tensors and a place for messages -> a configuration.
    published: models whose shapes are known; none where parse() can do with the shapes alone.
    sizes: a configuration and a pass -> what that holds beside the weights.
    hub_ids: those that can be downloaded.
    uses: of lists of blocks that are not used once a token.   pack: a weight, in a format.
    """

    name: str
    title: str
    config_class: type[Any]
    build: Callable[[Any], torch.nn.Module]
    tensors: Callable[[Checkpoint], dict[str, Stored]]
    original_name: Callable[[str, str], str]
    parse: Callable[[Mapping[str, Any], Mapping[str, Stored], str], Config]
    published: Mapping[str, Config]
    sizes: Callable[[Any, Pass], Sizes]
    hub_ids: tuple[str, ...]
    uses: Mapping[str, float] = field(default_factory=dict)
    pack: Callable[[torch.Tensor, Format], PackedWeight] = pack
