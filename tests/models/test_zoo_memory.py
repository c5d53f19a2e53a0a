"""Converting, loading and generating keep to the memory that was promised for them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import told_by
from tiny_bloom import tiny_bloom
from tiny_glm import ice_tokenizer, tiny_glm130b
from tiny_zoo import (
    CPM1_CONFIG,
    T5_CONFIG,
    TinyModel,
    cpm1_tensors,
    split,
    t5_tensors,
    tiny,
    vocabulary,
    write_ranks,
)

from bminf.models import convert

MB = 10**6
LEAST = "the least that would do"


def run(*arguments: object) -> dict[str, int]:
    return dict(told_by(Path(__file__).with_name("zoo_memory.py"), *arguments))


def write_big(folder: Path, name: str, num_tokens: int, degree: int, **config: Any) -> Path:
    """A checkpoint of any size: all tensors are the same few random numbers over again."""
    tokens = vocabulary(0 if name == "cpm1" else 190)
    more = [f"字{n}" for n in range(num_tokens - len(tokens))]
    tokens = tokens[:11] + more + tokens[11:]
    made = TinyModel(name, {**(CPM1_CONFIG if name == "cpm1" else T5_CONFIG), **config}, {}, tokens)
    make = cpm1_tensors if name == "cpm1" else t5_tensors
    with torch.device("meta"):
        shapes = make(made.config, num_tokens)
        ranks = split(shapes, degree)
    numbers = torch.randn(max(t.numel() for t in ranks[0].values())).half()
    data = bytearray(
        (numbers / config["hidden_size" if name == "cpm1" else "d_model"] ** 0.5).numpy().tobytes()
    )
    return write_ranks(made.write_beside(folder), [filled(rank, data) for rank in ranks])


def filled(shapes: Mapping[str, torch.Tensor], data: bytearray) -> dict[str, torch.Tensor]:
    """A storage for each tensor, all over the same bytes: torch.save writes each of them whole."""
    tensors = {
        name: torch.frombuffer(data, dtype=torch.float16, count=t.numel()).view(t.shape)
        for name, t in shapes.items()
    }
    for name in tensors:
        if name.endswith(".word_embeds.weight"):  # an alias in the authors' files, too
            tensors[name] = tensors["word_embeds.weight"]
    return tensors


def test_a_checkpoint_of_1_gb(tmp_path: Path) -> None:
    """Two ranks, so that every tensor is put together; the published limits of converting and
    loading. A file in the page cache is not the process's memory, and is not counted."""
    sizes = {"d_model": 2048, "d_ff": 5120, "d_kv": 64, "num_heads": 32}
    depths = {"num_layers": 4, "num_decoder_layers": 4}
    source = write_big(tmp_path / "from", "cpm2", 12000, degree=2, **sizes, **depths)
    assert sum(file.stat().st_size for file in source.rglob("*.pt")) > 1000 * MB
    report = run("checkpoint", source, tmp_path / "to")
    largest = 12000 * sizes["d_model"] * 2
    most = report["packed"] + largest + 300 * MB
    assert report["packed"] < 560 * MB and most < 950 * MB  # less than the original in memory
    assert report["loading"] < most
    assert report["loading_converted"] < report["packed"] + 50 * MB  # nothing to be done to it
    assert report["converting"] < largest + 300 * MB  # what is packed goes into the file at once


GPT_SIZES = {"hidden_size": 512, "num_attention_heads": 8, "max_position_embeddings": 512}
GLM_SIZES = {"hidden_size": 512, "inner_hidden_size": 1024, "max_sequence_length": 512}
T5_SIZES = {"d_model": 512, "d_ff": 1024, "d_kv": 64, "num_heads": 8}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of each kind one that takes room, and a tiny one."""
    root = tmp_path_factory.mktemp("limits")
    depths = {"num_layers": 2, "num_decoder_layers": 1}
    return {
        "cpm1": write_big(root / "a", "cpm1", 2000, degree=1, num_layers=3, **GPT_SIZES),
        "cpm2": write_big(root / "b", "cpm2", 2000, degree=1, **depths, **T5_SIZES),
        "tiny_cpm1": tiny("cpm1").write_original(root / "c"),
        "tiny_cpm2": tiny("cpm2").write_original(root / "d"),
        "glm": write_glm(root / "e", **GLM_SIZES),
        "tiny_glm": write_glm(root / "f"),
        "bloom": tiny_bloom(hidden_size=512, n_head=8, n_layer=3).write_original(root / "g"),
        "tiny_bloom": tiny_bloom().write_original(root / "h"),
    }


def write_glm(folder: Path, **sizes: int) -> Path:
    """Converted, so that it carries the number of its few image tokens."""
    original = tiny_glm130b(**sizes).write_original(folder / "original")
    return convert(original, folder / "float", None, tokenizer=ice_tokenizer())


@pytest.mark.parametrize(
    ("name", "quantization", "limit"),
    [
        ("cpm1", "int8", LEAST),
        ("cpm2", None, "8GB"),
        ("cpm2", "int4", LEAST),
        ("glm", "int4-row", LEAST),
        ("bloom", "int8", LEAST),
    ],
)
def test_a_model_keeps_to_its_limit(
    name: str, quantization: str | None, limit: str, sources: dict[str, Path]
) -> None:
    """With as many rows and tokens as it was loaded for, in RssAnon; and it asks for no more than
    half as much again as it needs, a GLM and a BLOOM for a little more."""
    arguments = {
        "quantization": quantization,
        "max_length": 512,
        "max_batch_size": 8,
        "memory_limit": limit,
    }
    report = run("limit", name, sources[f"tiny_{name}"], sources[name], json.dumps(arguments))
    assert (report["num_streamed"] > 0) is (limit == LEAST)
    assert report["reserved"] > 150 * MB
    assert report["used"] <= report["planned"] <= report["limit"], report
    beside_weights = report["used"] - report["weights"]
    # A GLM and a BLOOM leave less behind than is reckoned for all models.
    most = 1.6 if name in ("glm", "bloom") else 1.5
    assert report["reserved"] <= most * beside_weights, report
