"""What sets the models of the zoo apart before a text is seen: names, layouts, configurations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

from bminf.arch.sizes import Pass, Sizes
from bminf.checkpoint.folder import Checkpoint
from bminf.checkpoint.model_parallel import Split, SplitTable
from bminf.checkpoint.names import Rule, rename, source_name_of
from bminf.checkpoint.stored import Stored
from bminf.errors import CheckpointError
from bminf.quantization.packed import FORMATS, INT8, Format, PackedWeight
from bminf.quantization.packing import pack


class Config(Protocol):
    """What the configuration of any architecture says; a frozen dataclass.

    max_position_embeddings: tokens in all; None where positions have no end.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_position_embeddings(self) -> int | None: ...


def lists_of(model: torch.nn.Module) -> list[str]:
    """The names of its lists, whose items are layers: by name, because a list of one layer is not
    seen to repeat."""
    return [n for n, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)]


def matrices_of(model: torch.nn.Module) -> list[str]:
    """The names of all matrices of the layers and the head, in the order of a pass.

    A layer of 130 billion parameters is large beside a small card: two slots of one matrix leave
    more room for what stays than two slots of a layer.
    """
    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """name: in files and on the command line.   title: in messages.

    Of the network
    build: a configuration -> the network.   blocks: a network -> names of its blocks, or of lists
    of them.   uses: of lists of blocks that are not used once a token.
    sizes: a configuration and a pass -> what that holds beside the weights.

    Of files
    parse: a mapping of any dialect, tensors and a place for messages -> a configuration.
    matches: whether a checkpoint is of it; of several that say so, the last in the list.
    rules: kind of a checkpoint -> from its names to those of the network.
    splits: how its authors split it across ranks, by the names of the first kind in `rules`.
    """

    name: str
    title: str
    config_class: type[Any]
    build: Callable[[Any], torch.nn.Module]
    sizes: Callable[[Any, Pass], Sizes]
    parse: Callable[[Mapping[str, Any], Mapping[str, Stored], str], Config]
    matches: Callable[[Checkpoint], bool]
    rules: Mapping[str, Sequence[Rule]]
    splits: SplitTable
    blocks: Callable[[torch.nn.Module], list[str]] = lists_of
    uses: Mapping[str, float] = field(default_factory=dict)

    raw_tensors: Callable[[Checkpoint], Mapping[str, Stored]] = lambda opened: opened.tensors
    """The tensors of a checkpoint, under its names.   Raises CheckpointError for one that no rule
    can be right for."""
    published: Mapping[str, Config] = field(default_factory=dict)
    """By name: models whose shapes are known."""
    is_implied_by_shapes: bool = False
    """Whether parse() can do with shapes alone; otherwise a checkpoint without a configuration has
    to be a published model."""
    needed_fields: str = ""
    """What parse() needs where shapes are of no published model, for messages."""
    hub_ids: tuple[str, ...] = ()
    """Those that can be downloaded."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other names of published models, in small letters and digits."""

    model_type: str | None = None
    """What a configuration of Hugging Face says."""
    classes: tuple[str, ...] = ()
    """What such a configuration may call the class of the model, if it does; none is any."""
    has_generic_names: bool = False
    """Whether models that are none of these have the same names: their model_type tells."""
    is_config_of: Callable[[Any], bool] = lambda config: True
    """Whether one of config_class is of it, where another architecture has that class, too."""
    matches_config: Callable[[Mapping[str, Any]], bool] = lambda source: False
    """Whether a configuration without weights is of it; of several, the last in the list."""

    num_extra_tokens: int = 0
    """That the decoder is fed beyond the max_length of a model."""

    formats: Mapping[str, Format] = field(default_factory=lambda: FORMATS)
    """Of linears, by the names that users give."""
    default_format: Format = INT8
    pack: Callable[[torch.Tensor, Format], PackedWeight] = pack
    split_head: Callable[[Any, int], None] | None = None
    """Network and number of parts -> the output head of the network, which lies on the meta device,
    in so many blocks; its embedding, which has the same weights, stays on the host. None is a head
    in one piece."""

    tokenizer: str = ""
    """What tokenizers/find.py calls its tokenizer; "" is as itself."""
    vocabulary_name: Callable[[Path], str] = lambda path: "vocab.txt"
    """What a file of the tokenizer is called in a folder that loads by itself."""
    tokenizer_settings: Callable[[Any], Mapping[str, Any] | None] = lambda config: None
    """What a configuration says of the tokenizer."""
    has_padded_vocabulary: bool = False
    """Whether the embedding may have more rows than the vocabulary has tokens."""

    def tensors(self, checkpoint: Checkpoint) -> dict[str, Stored]:
        """The tensors of a checkpoint under the names of the network.

        Raises CheckpointError for another layout, for names of another model, and for parts that
        are missing.
        """
        path, kind = checkpoint.path, checkpoint.kind
        given = self.raw_tensors(checkpoint)
        if kind not in self.rules:
            raise CheckpointError(
                f"{path} is a {kind} folder, a layout that {self.title} is not found in; accepted "
                f"layouts: {', '.join(self.rules)}"
            )
        return rename(given, self.rules[kind], path, f"a {self.title} ({kind})")

    def split_of(self, module: str) -> Split:
        """How ranks share the weight of a module of the network: as they do in checkpoints of its
        authors."""
        kind = next(iter(self.rules))  # the one that `splits` has the names of
        first, _, _ = self.original_name(kind, f"{module}.weight").partition(" + ")
        return self.splits.split(first)

    def original_name(self, kind: str, name: str) -> str:
        """What a checkpoint of this kind calls a tensor of the network."""
        return source_name_of(name, self.rules[kind])
