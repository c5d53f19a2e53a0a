"""The golden sets of GLM-130B and GLM-10B: folders ckpt_*, and files of reference outputs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from golden import GoldenSet
from safetensors.torch import load_file

import bminf
from bminf.models.glm_text import Blank, blank
from bminf.tokenizers.icetk import IceTokenizer

TOLERANCE = 5e-5  # of float32 against the authors' float32
HALF_TOLERANCE = 0.1  # of float16 against theirs
LONG = "long_rope.safetensors"
_FOLDER = re.compile(r"ckpt_(?:int(?P<bits>\d+)_)?(?:tp|mp)(?P<degree>\d+)")
Tensors = dict[str, torch.Tensor]


class GLMSet(GoldenSet):
    """Its files are read when a test is collected: what is not there makes no test."""

    @cached_property
    def config(self) -> dict[str, Any]:
        return json.loads((self.path / "config.json").read_text())

    def folders(self, packed: bool | None = None) -> list[str]:
        """The checkpoints; packed: only those that are quantized, or are not."""
        found = {path.name: _FOLDER.fullmatch(path.name) for path in self.path.glob("ckpt_*")}
        return sorted(
            name
            for name, match in found.items()
            if match is not None and packed in (None, match["bits"] is not None)
        )

    def packed_folder(self, prefix: str) -> str | None:
        """The folder of the outputs that begin so: "int4" is of one rank, "int4_tp2" of two."""
        name = f"ckpt_{prefix}" if "_tp" in prefix else f"ckpt_{prefix}_tp1"
        return name if name in self.folders(packed=True) else None

    @lru_cache  # noqa: B019 - a set lives as long as the tests
    def file(self, name: str) -> Tensors:
        path = self.path / name
        return load_file(path) if path.is_file() else {}

    @lru_cache  # noqa: B019
    def json(self, name: str) -> Any:
        path = self.path / name
        return json.loads(path.read_text()) if path.is_file() else []

    def cases(self, file: str, key: str) -> list[str]:
        """The cases of a file that have this key."""
        return sorted(n.removesuffix(f".{key}") for n in self.file(file) if n.endswith(f".{key}"))

    def tokenizer(self) -> Any:
        """One for which every row of the embedding is a word: the authors' code rules none out."""
        if self.name == "glm10b":
            return NamedIds(self.config["special_tokens"], self.config["model"]["vocab_size"])
        layout = self.config["tokenizer"]
        found = IceTokenizer(self.path / layout["file"], layout["image_token_offset"])
        found.unspoken_ids, found.vocab_size = (), self.config["model"]["vocab_size"]
        return found

    @lru_cache  # noqa: B019
    def most_tokens(self) -> int:
        """Of all texts with their answers, but for the far positions, which load for themselves."""
        files = [path.name for path in self.path.glob("*.safetensors") if path.name != LONG]
        found = [t.shape[-1] for f in files for n, t in self.file(f).items() if "tokens" in n]
        batches = self.json("generation_batch.json")
        found += [max(found, default=0) + case["max_gen_length"] for case in batches]
        found += [case["out_seq_length"] for case in self.json("generation_text.json")]
        for case in self.json("generation.json"):
            num_blanks = len(case["mask_positions"])
            each = case["args"]["out_seq_length"] + 1
            found.append(len(case["context"]) + num_blanks * each)
        positions = int(self.config["model"]["max_sequence_length"])
        return min(positions, max(found, default=positions))

    def load(self, layout: str, **arguments: Any) -> Any:
        settings = {
            "quantization": None, "device": "cpu", "dtype": torch.float32, "max_batch_size": 16,
            "max_length": self.most_tokens(), "tokenizer": self.tokenizer(), **arguments,
        }  # fmt: skip
        return bminf.models.GLM(self.path / layout, **settings)


class NamedIds:
    """A tokenizer of special ids alone, for models that are given ids."""

    files: tuple[Path, ...] = ()
    unspoken_ids: tuple[int, ...] = ()
    strips_before_masks = True

    def __init__(self, ids: dict[str, int], vocab_size: int) -> None:
        self.ids, self.vocab_size = ids, vocab_size
        self.sop_id, self.eop_id, self.eos_id = ids["sop"], ids["eop"], ids["eos"]
        self.pad_id, self.prefix_ids = ids["pad"], (ids["ENC"],)
        self.masks = {f"[{name}]": ids[name] for name in ("MASK", "sMASK", "gMASK") if name in ids}

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))

    def tokens(self, ids: Sequence[int]) -> list[str]:
        return [str(number) for number in ids]

    def token_id(self, token: str) -> int:
        from bminf.errors import ArgumentError

        if token not in self.ids:
            raise ArgumentError(f"there is no {token!r}")
        return self.ids[token]


def rows(given: Tensors, case: str) -> Iterator[tuple[int, int]]:
    """(row, tokens that count) of a batch."""
    lengths = given.get(f"{case}.context_length")
    for row in range(len(given[f"{case}.tokens"])):
        yield row, given[f"{case}.tokens"].shape[1] if lengths is None else int(lengths[row])


def run(model: Any, ids: torch.Tensor, positions: torch.Tensor, hidden: Any, cache: Any) -> Any:
    """The network's states after the last norm."""
    with torch.inference_mode():
        return model.model(ids, positions, cache, hidden)


def head(model: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model.model.head(x)


def batch_logits(model: Any, given: Tensors, case: str) -> torch.Tensor:
    """Of a padded batch, with the masks and positions that the authors made."""
    ids = given[f"{case}.tokens"]
    hidden = given[f"{case}.attention_mask"]
    hidden = hidden[:, 0] if hidden.dim() == 4 else hidden
    cache = model.model.new_cache(*ids.shape)
    return head(model, run(model, ids, given[f"{case}.position_ids"], hidden, cache))


def at_context_end(logits: torch.Tensor, given: Tensors, case: str) -> torch.Tensor:
    return torch.stack([logits[row, length - 1] for row, length in rows(given, case)])


def blank_of_ids(model: Any, ids: list[int]) -> Blank:
    """The first blank of a context that ends with sop or does not."""
    sop, masks = model.tokenizer.sop_id, model.tokenizer.masks
    ids = ids[:-1] if ids[-1] == sop else ids
    place = next(n for n, number in enumerate(ids) if number in masks.values())
    is_continued = model.config.is_rotary and ids[place] == masks.get("[gMASK]")
    return blank(ids, place, sop, is_continued)
