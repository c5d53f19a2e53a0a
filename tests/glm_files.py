"""Small random checkpoints of GLM-130B and GLM-10B, cut for any number of ranks.

The cutting is written out for each tensor here, apart from the library's tables.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bminf.arch.registry import checkpoint_in
from bminf.models import glm_ranks

HEADS = 4
Weights = dict[str, torch.Tensor]


def glm130b(dtype: torch.dtype = torch.float16, **arguments: Any) -> Weights:
    """arguments: of glm130b_sizes."""
    sizes = glm130b_sizes(**arguments)
    return {name: torch.randn(size).to(dtype) for name, size in sizes.items()}


def glm130b_sizes(
    num_layers: int = 2,
    hidden: int = 32,
    inner: int = 48,
    rows: int = 24,
    has_inv_freq: bool = True,
) -> dict[str, tuple[int, ...]]:
    sizes: dict[str, tuple[int, ...]] = {"transformer.word_embeddings.weight": (rows, hidden)}
    for n in range(num_layers):
        layer = f"transformer.layers.{n}"
        sizes |= _layer(layer, hidden, 2 * inner, inner)
        if has_inv_freq:
            sizes[f"{layer}.attention.rotary_emb.inv_freq"] = (hidden // HEADS // 2,)
    if has_inv_freq:
        sizes["mixins.rotary-embedding.rotary_emb.inv_freq"] = (hidden // HEADS // 2,)
    return sizes | _norm("transformer.final_layernorm", hidden)


def glm10b(is_sat: bool = False, dtype: torch.dtype = torch.float16, hidden: int = 32) -> Weights:
    word, block = "word_embeddings.weight", "transformer.block_position_embeddings.weight"
    if is_sat:
        word = f"transformer.{word}"
        block = "mixins.block_position_embedding.block_position_embeddings.weight"
    sizes: dict[str, tuple[int, ...]] = {
        word: (24, hidden),
        "transformer.position_embeddings.weight": (9, hidden),
        block: (9, hidden),
    }
    for n in range(2):
        sizes |= _layer(f"transformer.layers.{n}", hidden, 4 * hidden, 4 * hidden)
    sizes |= _norm("transformer.final_layernorm", hidden)
    return {name: torch.randn(size).to(dtype) for name, size in sizes.items()}


def _layer(layer: str, hidden: int, up: int, inner: int) -> dict[str, tuple[int, ...]]:
    return {
        **_norm(f"{layer}.input_layernorm", hidden),
        f"{layer}.attention.query_key_value.weight": (3 * hidden, hidden),
        f"{layer}.attention.query_key_value.bias": (3 * hidden,),
        f"{layer}.attention.dense.weight": (hidden, hidden),
        f"{layer}.attention.dense.bias": (hidden,),
        **_norm(f"{layer}.post_attention_layernorm", hidden),
        f"{layer}.mlp.dense_4h_to_h.weight": (hidden, inner),
        f"{layer}.mlp.dense_4h_to_h.bias": (hidden,),
        f"{layer}.mlp.dense_h_to_4h.weight": (up, hidden),
        f"{layer}.mlp.dense_h_to_4h.bias": (up,),
    }


def _norm(name: str, hidden: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (hidden,), f"{name}.bias": (hidden,)}


def is_glm130b(weights: Weights) -> bool:
    return not any("block_position" in name for name in weights)


def matrices(name: str, of_glm130b: bool) -> int:
    """How many stand one below another in a tensor whose rows are cut."""
    if "dense_h_to_4h" in name and of_glm130b:
        return 2
    return 3 if "query_key_value" in name and not of_glm130b else 1


def cut(weights: Weights, rank: int, degree: int) -> Weights:
    """What one rank has."""
    found: Weights = {}
    for name, tensor in weights.items():
        if name.endswith((".dense.weight", "dense_4h_to_h.weight")):
            tensor = tensor.chunk(degree, 1)[rank]
        elif "word_embeddings" in name or "query_key_value" in name or "dense_h_to_4h" in name:
            parts = tensor.chunk(matrices(name, is_glm130b(weights)))
            tensor = torch.cat([part.chunk(degree)[rank] for part in parts])
        found[name] = tensor.clone()
    return found


def join(ranks: list[Weights]) -> Weights:
    """The whole of what the ranks have."""
    found: Weights = {}
    for name, first in ranks[0].items():
        parts = [rank[name] for rank in ranks]
        if name.endswith((".dense.weight", "dense_4h_to_h.weight")):
            found[name] = torch.cat(parts, 1)
        elif "word_embeddings" in name or "query_key_value" in name or "dense_h_to_4h" in name:
            count = matrices(name, is_glm130b(ranks[0]))
            cuts = [part.chunk(count) for part in parts]
            found[name] = torch.cat([cut[n] for n in range(count) for cut in cuts])
        else:
            found[name] = first
    return found


def write(
    folder: Path,
    weights: Weights,
    degree: int = 1,
    number: str = "300",
    tracker: str | None = "latest",
    **beside: Any,
) -> Path:
    (folder / number).mkdir(parents=True)
    if tracker is not None:
        (folder / tracker).write_text(number)
    for rank in range(degree):
        saved = {"module": cut(weights, rank, degree), **beside}
        torch.save(saved, folder / number / f"mp_rank_{rank:02d}_model_states.pt")
    return folder


def rank_file(folder: Path, rank: int) -> Path:
    (path,) = folder.glob(f"*/mp_rank_{rank:02d}_model_states.pt")
    return path


def load(folder: Path) -> list[dict[str, Any]]:
    """What torch finds in the file of each rank."""
    paths = sorted(folder.glob("*/mp_rank_*_model_states.pt"))
    return [torch.load(path, weights_only=True) for path in paths]


def modules(folder: Path) -> list[Weights]:
    return [saved["module"] for saved in load(folder)]


def reshard(source: Path, destination: Path, degree: int, *options: Any, **more: Any) -> None:
    """bminf.models.glm_ranks.reshard() of the checkpoint in a folder."""
    glm_ranks.reshard(checkpoint_in(source), destination, degree, *options, **more)
