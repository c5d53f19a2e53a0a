"""Small checkpoints of GLM-130B and GLM-10B, written by the tests: random weights, every layout
that they are found in, and vocabularies of a few hundred tokens."""

from __future__ import annotations

import atexit
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tiny_bloom import tiny_bloom
from tiny_zoo import FUSED, megatron_layers, split, tiny, write_huggingface, write_ranks

from bminf.arch.registry import checkpoint_in
from bminf.models import glm_ranks
from bminf.tokenizers.icetk import IceTokenizer

sys.path.insert(0, str(Path(__file__).parent / "tokenizers"))

from tiny_vocabularies import GPT2_CHARACTERS, write_gpt2, write_piece_model

Weights = dict[str, torch.Tensor]

_HOME = Path(tempfile.mkdtemp(prefix="bminf-tests-"))  # as long as the process lives
atexit.register(shutil.rmtree, _HOME, True)

IMAGE_OFFSET = 8
"""Image tokens of the small GLM-130B, in place of 20000."""

LETTERS = "abcdefghijklmnopqrstuvwxyz"
PIECES = [
    *["<unk>", "<s>", "</s>", "<pad>", "<n>", "\u2581", ",", ".", "?", "今天", "天气", "好"],
    *LETTERS,
    *(f"\u2581{letter}" for letter in LETTERS),
    *["\u2581the", "\u2581of", "\u2581layer", "\u2581blocks", "\u2581wait", "\u2581host"],
    *["th", "he", "in", "er", "an", "re", "on", "at", "en", "nd", "st", "or", "ing", "ed"],
]
"""Of both sentencepiece models."""

NUM_UNUSED = 3  # rows of the embedding that no token has

_MERGES = ["t h", "th e", "\u0120 the", "i n", "\u0120 a", "e r"]
ENTRIES = [*GPT2_CHARACTERS, *(merge.replace(" ", "") for merge in _MERGES), "<|endoftext|>"]
"""Of GPT-2's vocabulary."""

GLM130B_CONFIG = {
    "num_layers": 2,
    "hidden_size": 64,
    "inner_hidden_size": 96,
    "num_attention_heads": 4,
    "max_sequence_length": 160,
    "layernorm_epsilon": 1e-05,
}
GLM10B_CONFIG = {
    "model_type": "glm",
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "max_sequence_length": 160,
    "block_position_encoding": True,
    "attention_scale": 1.0,
    "output_predict": True,
}
GLM130B_FUSED = {"dense_h_to_4h": 2}
"""As tiny_zoo.FUSED; GLM-10B is cut as CPM-1 is."""

_SAT_NAMES = {
    "word_embeddings.weight": "transformer.word_embeddings.weight",
    "transformer.block_position_embeddings.weight": (
        "mixins.block_position_embedding.block_position_embeddings.weight"
    ),
}


@dataclass(frozen=True)
class TinyGLM:
    """One model of the tests.

    config: as it is written to a config.json.   tensors: whole, under the authors' names.
    is_chinese: of a GLM-10B, whether its vocabulary is GLM-10B-chinese's.
    """

    name: str
    config: dict[str, Any]
    tensors: Weights
    is_chinese: bool = False

    @property
    def num_rows(self) -> int:
        """Of the embedding."""
        return next(iter(self.tensors.values())).shape[0]

    def write_beside(self, folder: Path) -> Path:
        """The vocabulary and the configuration."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.name == "glm130b":
            write_piece_model(folder / "ice_text.model", PIECES)
        elif self.is_chinese:
            write_piece_model(folder / "cog-pretrain.model", PIECES)
        else:
            lines = "\n".join(["#version: 0.2", *_MERGES, ""])
            write_gpt2(folder, entries=ENTRIES, merges=lines)
        (folder / "config.json").write_text(json.dumps(self.config))
        return folder

    def write_original(
        self, folder: Path, degree: int = 1, bits: int | None = None, **how: Any
    ) -> Path:
        """The authors' layout.   bits: 8 or 4, of each rank's linears.   how: see write_ranks."""
        return write_ranks(self.write_beside(folder), self.ranks(degree, bits), **how)

    def write_huggingface(self, folder: Path, form: str = "zip", prefix: str = "") -> Path:
        """Of a GLM-10B. form: see tiny_zoo.write_huggingface.   prefix: "", or "glm."."""
        named = {prefix + name: tensor for name, tensor in self.tensors.items()}
        return write_huggingface(self.write_beside(folder), named, form)

    def as_sat(self) -> TinyGLM:
        """A GLM-10B under the names that SwissArmyTransformer gives it."""
        named = {_SAT_NAMES.get(name, name): tensor for name, tensor in self.tensors.items()}
        return replace(self, tensors=named)

    def ranks(self, degree: int, bits: int | None = None) -> list[Weights]:
        """What each rank of so many has.   bits: see write_original."""
        found = split(self.tensors, degree, GLM130B_FUSED if self.name == "glm130b" else FUSED)
        return found if bits is None else [quantized(rank, bits) for rank in found]


def quantized(rank: Mapping[str, torch.Tensor], bits: int) -> Weights:
    """The linears as codes and scales of their rows: scale = half(largest / most)."""
    found, most = {}, 2 ** (bits - 1) - 1
    for name, tensor in rank.items():
        found[name] = tensor
        if tensor.dim() == 2 and "word_embeddings" not in name:
            scale = (tensor.abs().amax(1) / most).half()
            codes = (tensor / scale.unsqueeze(1)).round().clamp(-most, most).to(torch.int8)
            if bits == 4:
                codes = (codes[:, ::2] << 4) | (codes[:, 1::2] & 15)
            found[name], found[f"{name}_scale"] = codes, scale
    return found


def tiny_glm130b(
    seed: int = 2, has_inv_freq: bool = False, image_offset: int = IMAGE_OFFSET, **changed: Any
) -> TinyGLM:
    """changed: fields of the configuration.   seed: 2 gives answers of many different tokens."""
    config = {**GLM130B_CONFIG, **changed}
    size, inner = config["hidden_size"], config["inner_hidden_size"]
    num_tokens = image_offset + len(PIECES) + 8 + NUM_UNUSED
    shapes = {"transformer.word_embeddings.weight": (-(-num_tokens // 8) * 8, size)}
    made = _random(shapes, config["num_layers"], size, 2 * inner, inner, seed)
    if has_inv_freq:
        half = size // config["num_attention_heads"] // 2
        for layer in range(config["num_layers"]):
            made[f"transformer.layers.{layer}.attention.rotary_emb.inv_freq"] = torch.ones(half)
        made["mixins.rotary-embedding.rotary_emb.inv_freq"] = torch.ones(half)
    return TinyGLM("glm130b", config, made)


def tiny_glm10b(seed: int = 10, is_chinese: bool = False, **changed: Any) -> TinyGLM:
    """changed: fields of the configuration.   seed: as for tiny_glm130b."""
    config = {**GLM10B_CONFIG, **changed}
    size, num_positions = config["hidden_size"], config["max_sequence_length"] + 1
    num_tokens = NUM_UNUSED + (len(PIECES) + 9 if is_chinese else len(ENTRIES) + 8)
    shapes = {
        "word_embeddings.weight": (-(-num_tokens // 8) * 8, size),
        "transformer.position_embeddings.weight": (num_positions, size),
        "transformer.block_position_embeddings.weight": (num_positions, size),
    }
    made = _random(shapes, config["num_layers"], size, 4 * size, 4 * size, seed)
    return TinyGLM("glm10b", config, made, is_chinese)


def tiny_glm(name: str, **changed: Any) -> TinyGLM:
    return {"glm130b": tiny_glm130b, "glm10b": tiny_glm10b}[name](**changed)


def tiny_model(name: str, **changed: Any) -> Any:
    """Any of the small models.   changed: fields of its configuration."""
    if name == "bloom":
        return tiny_bloom(**changed)
    return tiny_glm(name, **changed) if name.startswith("glm") else tiny(name, **changed)


def dequantized(rank: Mapping[str, torch.Tensor], bits: int | None) -> Weights:
    """What the codes of one rank stand for: code * scale, rounded to half.   bits: None: floats."""
    found = {name: tensor for name, tensor in rank.items() if not name.endswith("_scale")}
    for name in rank.keys() - found.keys():
        codes = rank[weight := name.removesuffix("_scale")]
        if bits == 4:
            codes = torch.stack([codes >> 4, (codes << 4) >> 4], -1).flatten(1)
        found[weight] = (codes.double() * rank[name].double().unsqueeze(1)).half()
    return found


def reshard(source: Path, destination: Path, degree: int, *options: Any, **more: Any) -> None:
    """bminf.models.glm_ranks.reshard() of the checkpoint in a folder."""
    glm_ranks.reshard(checkpoint_in(source), destination, degree, *options, **more)


def _random(
    shapes: Mapping[str, tuple[int, ...]], num_layers: int, size: int, up: int, down: int, seed: int
) -> Weights:
    """Half precision, as in the authors' files. The logits come out with a deviation of 2 to 3."""
    torch.manual_seed(seed)
    found = {name: 0.3 * torch.randn(shape).half().float() for name, shape in shapes.items()}
    found |= megatron_layers(num_layers, size, up, down, gain=1.5, bias=1 / 4)
    return {name: tensor.half() for name, tensor in found.items()}


@lru_cache(maxsize=1)
def ice_tokenizer() -> IceTokenizer:
    """GLM-130B's tokenizer on the small model, with few image tokens."""
    path = _HOME / "ice_text.model"
    write_piece_model(path, PIECES)
    return IceTokenizer(path, IMAGE_OFFSET)


def tokenizer_of(name: str) -> IceTokenizer | None:
    """What a small model has to be given, because its folder does not tell it."""
    return ice_tokenizer() if name == "glm130b" else None
