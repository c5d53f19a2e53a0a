"""Small checkpoints of BLOOM, written by the tests: random weights, every layout that it is found
in, and a vocabulary of bytes and a few merges."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny_zoo import megatron_layers, save, write_huggingface

Weights = dict[str, torch.Tensor]

CONFIG = {
    "model_type": "bloom",
    "hidden_size": 48,
    "n_layer": 2,
    "n_head": 6,
    "layer_norm_epsilon": 1e-05,
    "apply_residual_connection_post_layernorm": False,
}
NUM_UNUSED = 11  # rows of the embedding that no token has; in all they are a multiple of 12
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")
_MERGES = (("t", "h"), ("th", "e"), ("\u0120", "the"), ("i", "n"), ("\u0120", "a"))
_BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]  # that stand for themselves


def vocabulary() -> dict[str, int]:
    """Byte-level, in BLOOM's order: special tokens, the bytes, what was merged."""
    letters = sorted([*map(chr, _BYTES), *(chr(256 + n) for n in range(256 - len(_BYTES)))])
    return {t: n for n, t in enumerate([*SPECIAL, *letters, *map("".join, _MERGES)])}


def write_tokenizer(folder: Path) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    folder.mkdir(parents=True, exist_ok=True)
    made = Tokenizer(models.BPE(vocabulary(), [*_MERGES]))
    made.add_special_tokens([*SPECIAL])
    words = pre_tokenizers.Split(_word_pattern(), "isolated")
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([words, by_bytes])
    made.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False)
    made.decoder = decoders.ByteLevel()
    made.save(str(folder / "tokenizer.json"))
    return folder


def _word_pattern() -> Any:
    from tokenizers import Regex

    return Regex(r" ?[^(\s|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])]+")


@dataclass(frozen=True)
class TinyBloom:
    """One model of the tests.

    config: as it is written to a config.json.   tensors: whole, under Hugging Face's names without
    a prefix, in half precision.
    """

    config: dict[str, Any]
    tensors: Weights
    name: str = "bloom"

    @property
    def num_rows(self) -> int:
        """Of the embedding."""
        return len(self.tensors["word_embeddings.weight"])

    def write_beside(self, folder: Path) -> Path:
        """The vocabulary and the configuration."""
        write_tokenizer(folder)
        (folder / "config.json").write_text(json.dumps(self.config))
        return folder

    def write_original(self, folder: Path, degree: int = 1, drift: float = 0.0) -> Path:
        """Megatron-DeepSpeed's files of layers.   drift: by which what all ranks hold differs from
        rank to rank; the mean is what it was."""
        step = self.write_beside(folder) / "global_step7"
        (folder / "latest").write_text("global_step7")
        for rank, tensors in enumerate(self.ranks(degree, drift)):
            for place, own in _by_place(tensors).items():
                save(own, step / f"layer_{place:02d}-model_{rank:02d}-model_states.pt")
            save({"args": 0}, step / f"mp_rank_{rank:02d}_model_states.pt")
        return folder

    def write_huggingface(self, folder: Path, form: str = "zip", prefix: str = "") -> Path:
        """form: see tiny_zoo.write_huggingface.   prefix: "", or "transformer." with a head."""
        named = {prefix + name: tensor for name, tensor in self.tensors.items()}
        if prefix:
            named["lm_head.weight"] = self.tensors["word_embeddings.weight"]
        return write_huggingface(self.write_beside(folder), named, form)

    def ranks(self, degree: int, drift: float = 0.0) -> list[Weights]:
        """What each rank of so many has."""
        found: list[Weights] = [{} for _ in range(degree)]
        for name, tensor in self.tensors.items():
            axis = split_axis(name)
            for rank, own in enumerate(found):
                if axis is None:
                    own[name] = tensor + drift * (2 * rank - degree + 1)
                else:
                    own[name] = tensor.chunk(degree, axis)[rank].clone()
        return found


def split_axis(name: str) -> int | None:
    """Which axis of a tensor ranks share; None for one that each has."""
    if name.endswith(("dense.weight", "dense_4h_to_h.weight")):
        return 1
    is_shared = "query_key_value" in name or "dense_h_to_4h" in name
    return 0 if is_shared or name == "word_embeddings.weight" else None


def _by_place(tensors: Mapping[str, torch.Tensor]) -> dict[int, Weights]:
    """The files of a pipeline: embedding, layers, the last norm."""
    num_layers = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("h."))
    found: dict[int, Weights] = {}
    for name, tensor in tensors.items():
        if name.startswith("h."):
            _, layer, own = name.split(".", 2)
            found.setdefault(3 + int(layer), {})[own] = tensor
        elif name.startswith("ln_f."):
            found.setdefault(4 + num_layers, {})[name.removeprefix("ln_f.")] = tensor
        else:
            own = name.replace("word_embeddings_layernorm.", "word_embeddings.norm.")
            found.setdefault(1, {})[own] = tensor
    return found


def tiny_bloom(seed: int = 3, **changed: Any) -> TinyBloom:
    """changed: fields of the configuration."""
    config = {**CONFIG, **changed}
    size, num_layers = config["hidden_size"], config["n_layer"]
    torch.manual_seed(seed)
    made = {
        "word_embeddings.weight": 0.3 * torch.randn(len(vocabulary()) + NUM_UNUSED, size),
        "word_embeddings_layernorm.weight": 1 + torch.randn(size) / 8,
        "word_embeddings_layernorm.bias": torch.randn(size) / 8,
    }
    for name, tensor in megatron_layers(num_layers, size, 4 * size, 4 * size, 1.5, 1 / 4).items():
        own = name.replace("transformer.layers.", "h.").replace(".attention.", ".self_attention.")
        made[own.replace("transformer.final_layernorm", "ln_f")] = tensor
    return TinyBloom(config, {name: tensor.half() for name, tensor in made.items()})
