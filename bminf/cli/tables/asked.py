"""What a table is asked for on the command line: the model, how much of it, and where."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from bminf.arch.t5 import T5Config
from bminf.cli.bench import Default
from bminf.cli.gpus import Card, card_of
from bminf.cli.tables.predicted import OnCard, assembled_for_a_card
from bminf.cli.tables.tasks import Run, Task, shortened
from bminf.errors import ArgumentError
from bminf.models.assemble import dtype_for
from bminf.models.source import Source, find_sizes, published
from bminf.offload.backends import device_for, free_budget, host_budget

_MODELS = {"bloom": "bigscience/bloom", "glm130b": "GLM-130B", "cpm2": "CPM-2 (Chinese), CPM-2.1"}
_ENOUGH = 2**60  # bytes
_GPUS = {"bloom": "A100 80GB", "glm130b": "RTX 3090", "cpm2": "GTX 1060"}
"""Of the published tables, or the card that people have."""


@dataclass(frozen=True)
class Asked:
    """numbers: batch sizes or lengths that are measured.   new_tokens: of each text.
    limit: bytes; None is 90% of what is free.   streams_all: the least limit of each cell in place
    of that, with which nothing stays.   runs: timed, of which the mean counts."""

    whole: Source
    num_layers: int | None
    quantization: str
    limit: int | None
    streams_all: bool
    device: str
    card: Card
    numbers: tuple[int, ...]
    new_tokens: int
    runs: int
    is_measured: bool

    def run(self, source: Source, *tasks: Task) -> Run:
        """`source` as this table has it, with room for `tasks`."""
        is_packed = source.architecture.split_head is not None and self.quantization != "none"
        head, dtype = "int8" if is_packed else "none", dtype_for(None, self.device)
        run = Run(source, dtype, self.quantization, head, tasks, self.limit, self.device)
        if not (self.streams_all and tasks):
            return run
        return replace(run, limit=run.planned(_ENOUGH)[1].least_limit)

    @cached_property
    def cut(self) -> Source:
        """The model with as many layers as are measured."""
        return shortened(self.whole, self.num_layers or self._layers_with_room())

    @cached_property
    def on_card(self) -> OnCard:
        return OnCard(assembled_for_a_card(self.run(self.whole)), self.card)

    @property
    def row(self) -> str:
        """What the rows of bminf are called."""
        return f"bminf {self.quantization}"

    def scale(self) -> float:
        """By what the whole model reads more than the layers that are measured: of an
        encoder-decoder, of which nothing but layers is timed, so many times as it has layers; of
        others the bytes of all weights."""
        sources = (self.whole, self.cut)
        is_t5 = isinstance(self.whole.config, T5Config)
        whole, cut = map(num_layers_of if is_t5 else self._weight_bytes, sources)
        return whole / cut

    def _layers_with_room(self) -> int | None:
        """As many as the memory of this machine holds; None is all."""
        device = device_for(self.device)
        room = (self.limit or free_budget(device)) if device.type == "cuda" else free_budget(device)
        room += host_budget(device) or 0
        one, two = (self._weight_bytes(shortened(self.whole, n)) for n in (1, 2))
        number = 1 + max(0, room - one) // (two - one)
        return None if number >= num_layers_of(self.whole) else number

    def _weight_bytes(self, source: Source) -> int:
        return self.run(source).assembled().blobs.nbytes

    def facts(self) -> dict[str, Any]:
        """For a JSON file."""
        return {
            "model": self.whole.title,
            "measured_model": self.cut.title,
            "num_layers": num_layers_of(self.cut),
            "num_layers_of_all": num_layers_of(self.whole),
            "scale": self.scale(),
            "quantization": self.quantization,
            "head_quantization": self.run(self.whole).head_quantization,
            "memory_limit": self.limit,
            "streams_all": self.streams_all,
            "device": self.device,
            "dtype": str(dtype_for(None, self.device)).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "numbers": list(self.numbers),
            "new_tokens": self.new_tokens,
            "runs": self.runs,
            "is_measured": self.is_measured,
            "card": self.on_card.facts(),
        }


def asked_of(arguments: argparse.Namespace, numbers: tuple[int, ...]) -> Asked:
    """numbers: that are measured where none are given.   Raises ArgumentError."""
    table = arguments.table
    whole = _model(table, arguments.size)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device_for(device).index:
        raise ArgumentError(f"--device {device}: tables are made on the first GPU, or on the CPU")
    glm = whole.architecture.default_format.bits == 4
    quantization = arguments.quantization or ("int4-row" if glm else "int8")
    asked = Asked(
        whole,
        arguments.layers,
        quantization,
        arguments.memory_limit,
        arguments.stream_all,
        device_for(device).type,
        card_of(arguments.gpu or _GPUS[table]),
        tuple(sorted({*(arguments.batch_sizes or arguments.lengths or numbers)})),
        _given(arguments.max_new_tokens, 100),
        _given(arguments.runs, 1),
        not arguments.predict_only,
    )
    asked.on_card  # noqa: B018  # raises what is wrong with the format
    if asked.num_layers is not None and asked.num_layers > num_layers_of(whole):
        raise ArgumentError(
            f"--layers {asked.num_layers} is more than {whole.title} has, {num_layers_of(whole)}"
        )
    return asked


def _given(value: int, default: int) -> int:
    return default if isinstance(value, Default) else value


def num_layers_of(source: Source) -> int:
    """Of each stack."""
    config = source.config
    found = getattr(config, "num_hidden_layers", None) or config.num_decoder_layers
    return int(found)


def _model(table: str, size: str | None) -> Source:
    found = find_sizes(_MODELS[table]) if size is None else published(size)
    default = find_sizes(_MODELS[table]).architecture.name
    if found is None or found.architecture.name != default:
        known = find_sizes(_MODELS[table]).architecture.published
        raise ArgumentError(
            f"--size={size!r} is no model of --table {table}; accepted: {', '.join(known)}"
        )
    return found
