"""GLM-130B's and GLM-10B's tensors under our names, from folders of any degree and layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import glm_files
import pytest
import safetensors.torch
import torch
from glm_files import Weights, glm10b, glm130b, rank_file, write

from bminf.arch.glm import GLM10B, GLM130B
from bminf.arch.registry import checkpoint_in, split_tables
from bminf.checkpoint.folder import Checkpoint
from bminf.checkpoint.model_parallel import (
    COLUMNS,
    PER_RANK,
    REPLICATED,
    ROWS,
    Split,
    fused_rows,
    table_for,
)
from bminf.checkpoint.quantized import Quantized
from bminf.checkpoint.stored import Stored
from bminf.errors import ArgumentError, CheckpointError
from bminf.quantization.glm_rows import quantize_rows
from bminf.quantization.packed import Format

LAYER = {
    "input_layernorm": "attention.norm",
    "attention.query_key_value": "attention.qkv",
    "attention.dense": "attention.out",
    "post_attention_layernorm": "norm",
    "mlp.dense_h_to_4h": "feed_forward.up",
    "mlp.dense_4h_to_h": "feed_forward.down",
}


def ours_of(name: str) -> str | None:
    """The name that a tensor should get; None for one that is dropped."""
    if name.endswith("inv_freq"):
        return None
    if name.endswith("word_embeddings.weight"):
        return "embed_tokens.weight"
    if name.endswith("block_position_embeddings.weight"):
        return "embed_block_positions.weight"
    if name.endswith("position_embeddings.weight"):
        return "embed_positions.weight"
    inner, _, kind = name.removeprefix("transformer.").rpartition(".")
    if inner == "final_layernorm":
        return f"norm.{kind}"
    _, number, part = inner.split(".", 2)
    return f"layers.{number}.{LAYER[part]}.{kind}"


def expect(found: dict[str, Stored], weights: Weights) -> None:
    expected = {ours_of(name): tensor for name, tensor in weights.items() if ours_of(name)}
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].shape == tuple(tensor.shape), name  # type: ignore[index]
        assert torch.equal(found[name].read(), tensor), name  # type: ignore[index]


Tensors = Callable[[Checkpoint], dict[str, Stored]]
KINDS: dict[str, tuple[Callable[[], Weights], Tensors]] = {
    "glm130b": (glm130b, GLM130B.tensors),
    "glm130b without inv_freq": (lambda: glm130b(has_inv_freq=False), GLM130B.tensors),
    "glm10b": (glm10b, GLM10B.tensors),
    "glm10b of SAT": (lambda: glm10b(is_sat=True), GLM10B.tensors),
}


@pytest.mark.parametrize("degree", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_together_are_the_model(kind: str, degree: int, tmp_path: Path) -> None:
    make, tensors = KINDS[kind]
    weights = make()
    write(tmp_path, weights, degree)
    opened = checkpoint_in(tmp_path)
    assert opened.kind == "original" and list(opened.tensors) == list(weights)
    expect(tensors(opened), weights)


@pytest.mark.parametrize("prefix", ["", "glm."])
@pytest.mark.parametrize("form", ["bin", "safetensors", "sharded"])
def test_hugging_face_has_the_inner_names(prefix: str, form: str, tmp_path: Path) -> None:
    weights = glm10b()
    named = {prefix + name: tensor for name, tensor in weights.items()}
    if form == "bin":
        torch.save(named, tmp_path / "pytorch_model.bin")
    elif form == "safetensors":
        safetensors.torch.save_file(named, tmp_path / "model.safetensors")
    else:
        places = {name: f"pytorch_model-{n % 2}.bin" for n, name in enumerate(named)}
        for file in set(places.values()):
            part = {name: named[name] for name, place in places.items() if place == file}
            torch.save(part, tmp_path / file)
        index = str({"weight_map": places}).replace("'", '"')
        (tmp_path / "pytorch_model.bin.index.json").write_text(index)
    found = GLM10B.tensors(checkpoint_in(tmp_path))
    assert set(found) == {ours_of(name) for name in weights}
    for name, tensor in weights.items():
        assert torch.equal(found[str(ours_of(name))].read(), tensor), name


def test_their_names_are_known_for_messages() -> None:
    up = "layers.7.feed_forward.up.bias"
    theirs = "transformer.layers.7.mlp.dense_h_to_4h.bias"
    assert (
        GLM130B.original_name("original", up) == theirs == GLM10B.original_name("huggingface", up)
    )
    assert (
        GLM130B.original_name("original", "embed_tokens.weight")
        == "transformer.word_embeddings.weight"
    )
    assert GLM10B.original_name("original", "embed_tokens.weight") == "word_embeddings.weight"
    assert GLM10B.original_name("original", "embed_block_positions.weight") == (
        "transformer.block_position_embeddings.weight"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_of_another_model_is_named(kind: str, tmp_path: Path) -> None:
    make, tensors = KINDS[kind]
    for degree in (1, 2):
        folder = write(tmp_path / str(degree), {**make(), "mystery.weight": torch.ones(2)}, degree)
        with pytest.raises(CheckpointError, match=r"'mystery\.weight'"):
            tensors(checkpoint_in(folder))


def test_two_names_for_one_tensor_are_an_error(tmp_path: Path) -> None:
    weights = glm10b()
    weights["transformer.word_embeddings.weight"] = torch.ones(24, 32)
    write(tmp_path, weights)
    with pytest.raises(CheckpointError, match=r"'word_embeddings\.weight' in .* once"):
        GLM10B.tensors(checkpoint_in(tmp_path))


def test_another_layout_is_an_error(tmp_path: Path) -> None:
    torch.save(glm130b(), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="huggingface folder, a layout that GLM-130B"):
        GLM130B.tensors(checkpoint_in(tmp_path))
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "pytorch_model.pt")
    with pytest.raises(CheckpointError, match="modelcenter folder, a layout that GLM-10B"):
        GLM10B.tensors(checkpoint_in(tmp_path))


# ---- how tensors are cut -------------------------------------------------------------------------


def test_the_tables_of_cuts_depend_on_the_model() -> None:
    layer = "transformer.layers.11"
    same = {
        f"{layer}.input_layernorm.bias": REPLICATED,
        f"{layer}.attention.dense.weight": COLUMNS,
        f"{layer}.attention.dense.bias": REPLICATED,
        f"{layer}.mlp.dense_4h_to_h.weight": COLUMNS,
        "transformer.final_layernorm.weight": REPLICATED,
    }
    of_glm130b = {
        "transformer.word_embeddings.weight": ROWS,
        **{f"{layer}.attention.query_key_value.{k}": ROWS for k in ("weight", "weight_scale")},
        **{f"{layer}.mlp.dense_h_to_4h.{k}": fused_rows(2) for k in ("weight_scale", "bias")},
        f"{layer}.attention.dense.weight_scale": PER_RANK,
        f"{layer}.mlp.dense_4h_to_h.weight_scale": PER_RANK,
        f"{layer}.attention.rotary_emb.inv_freq": REPLICATED,
        "mixins.rotary-embedding.rotary_emb.inv_freq": REPLICATED,
    }
    of_glm10b = {
        "transformer.word_embeddings.weight": ROWS,
        "mixins.block_position_embedding.block_position_embeddings.weight": REPLICATED,
        "transformer.position_embeddings.weight": REPLICATED,
        f"{layer}.attention.query_key_value.weight": fused_rows(3),
        f"{layer}.mlp.dense_h_to_4h.bias": ROWS,
    }
    for own in (of_glm130b, of_glm10b):
        table = table_for([*same, *own], split_tables())
        assert {name: table.split(name) for name in [*same, *own]} == {**same, **own}


@pytest.mark.parametrize("split", [REPLICATED, ROWS, COLUMNS, fused_rows(2), fused_rows(3)])
def test_parts_are_the_inverse_of_merging(split: Split, tmp_path: Path) -> None:
    write(tmp_path, {"w": torch.randn(24, 12)})
    whole: Any = checkpoint_in(tmp_path).tensors["w"]
    for degree in (1, 2, 4):
        parts = tuple(split.part(whole, rank, degree) for rank in range(degree))
        assert torch.equal(split.merge(parts).read(), whole.read())
    if split.axis is not None:
        with pytest.raises(ArgumentError, match=r"shape \(24, 12\), whose axis . 5 ranks"):
            split.part(whole, 0, 5)


def test_what_cannot_be_cut_is_named(tmp_path: Path) -> None:
    write(tmp_path, {"w": torch.randn(24)})
    vector: Any = checkpoint_in(tmp_path).tensors["w"]
    with pytest.raises(CheckpointError, match=r"'w' in .* should have 2 dimensions"):
        COLUMNS.part(vector, 0, 2)
    with pytest.raises(ArgumentError, match="ranks it was made for"):
        PER_RANK.part(vector, 0, 2)


# ---- quantised folders ---------------------------------------------------------------------------


def quantize_folder(folder: Path, bits: int) -> None:
    for path in folder.glob("*/mp_rank_*.pt"):
        weights: Weights = {}
        for name, tensor in torch.load(path)["module"].items():
            weights[name] = tensor
            if tensor.dim() == 2 and ("attention." in name or "mlp." in name):
                weights[name], weights[f"{name}_scale"] = quantize_rows(tensor, bits)
        torch.save({"module": weights}, path)


def numbers_of(codes: torch.Tensor, bits: int) -> torch.Tensor:
    if bits == 8:
        return codes
    pairs = [codes.int() >> 4, ((codes.int() & 15) ^ 8) - 8]
    return torch.stack(pairs, -1).flatten(1)


@pytest.mark.parametrize("degree", [1, 2, 4])
@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_ranks_keep_their_own_scales(bits: int, degree: int, tmp_path: Path) -> None:
    write(tmp_path, glm130b(), degree)
    quantize_folder(tmp_path, bits)
    found = GLM130B.tensors(checkpoint_in(tmp_path))
    whole: list[Weights] = []
    for rank in glm_files.modules(tmp_path):
        values = {name: t for name, t in rank.items() if not name.endswith("_scale")}
        for name in rank.keys() - values.keys():
            key = name.removesuffix("_scale")
            codes = numbers_of(rank[key], bits)
            values[key] = (codes.float() * rank[name].float()[:, None]).half()
        whole.append(values)
    expect(found, glm_files.join(whole))
    out = found["layers.1.attention.out.weight"]
    assert isinstance(out, Quantized)
    assert out.form == Format(bits, None if degree == 1 else 32 // degree)
    up = found["layers.1.feed_forward.up.weight"]
    assert isinstance(up, Quantized) and up.form == Format(bits)


def reshape(path: Path, **changes: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    """Change the tensors whose names end so."""
    module: Weights = {}
    for name, tensor in torch.load(path)["module"].items():
        change = next((f for end, f in changes.items() if name.endswith(end)), None)
        changed = tensor if change is None else change(tensor)
        if changed is not None:
            module[name] = changed
    torch.save({"module": module}, path)


Change = dict[str, Callable[[torch.Tensor], torch.Tensor | None]]
DAMAGES: dict[str, tuple[Change, str]] = {
    "a third of the columns": (
        {"query_key_value.weight": lambda w: w[:, :10].clone()},
        r"query_key_value\.weight' in .* \(96, 10\) beside a LayerNorm of 32",
    ),
    "no norm": (
        {"input_layernorm.weight": lambda w: None}, "beside a LayerNorm of no known width"
    ),
    "a norm of another kind": (
        {"input_layernorm.weight": lambda w: w[None].clone()}, "of no known width"
    ),
    "layers of both": (
        {"1.attention.query_key_value.weight": lambda w: w[:, :16].clone()}, "of 8 and 4 bits"
    ),
    "no codes": ({"query_key_value.weight": lambda w: None}, r"query_key_value\.weight_scale"),
    "codes of another type": ({"0.attention.dense.weight": lambda w: w.half()}, "should be int8"),
    "scales of another type": (
        {"0.attention.dense.weight_scale": lambda w: w.int()}, "floating point"
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_codes_that_are_none_are_named(damage: str, tmp_path: Path) -> None:
    change, message = DAMAGES[damage]
    write(tmp_path, glm130b())
    quantize_folder(tmp_path, 8)
    reshape(rank_file(tmp_path, 0), **change)
    with pytest.raises(CheckpointError, match=message):
        GLM130B.tensors(checkpoint_in(tmp_path))


# ---- trackers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tracker", ["latest", "latest_checkpointed_iteration.txt"])
@pytest.mark.parametrize("iteration", ["300", "release", "0"])
def test_either_tracker_names_a_number_or_release(
    tracker: str, iteration: str, tmp_path: Path
) -> None:
    weights = glm130b()
    write(tmp_path, weights, 2, iteration, tracker)
    for path in (tmp_path, tmp_path / tracker, tmp_path / iteration):
        expect(GLM130B.tensors(checkpoint_in(path)), weights)


def test_two_trackers_that_agree_are_one(tmp_path: Path) -> None:
    write(tmp_path, glm130b())
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(" 0300\n")
    assert checkpoint_in(tmp_path).kind == "original"


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"latest_checkpointed_iteration.txt": "301"}, "iteration 301, but latest beside it 300"),
        ({"latest_checkpointed_iteration.txt": "release"}, "release, but latest beside it 300"),
        ({"latest": "301"}, r"names the iteration 301, but .* no 301/ and no iter_0000301/"),
        ({"latest": "release"}, r"names the iteration release, but the folder holds no release/;"),
        ({"latest": "global_step300"}, "'global_step300'; it should be the number .* 'release'"),
        ({"latest": ""}, "it should be the number"),
    ],
)
def test_trackers_that_lead_nowhere_say_so(
    texts: dict[str, str], message: str, tmp_path: Path
) -> None:
    write(tmp_path, glm130b())
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        checkpoint_in(tmp_path)


def test_what_a_trainer_leaves_beside_other_weights_is_no_checkpoint_of_ours(
    tmp_path: Path,
) -> None:
    torch.save(glm10b(), tmp_path / "pytorch_model.bin")
    (tmp_path / "latest").write_text("global_step300")
    assert checkpoint_in(tmp_path).kind == "huggingface"
    (tmp_path / "latest").write_text("300")
    with pytest.raises(CheckpointError, match="several layouts"):
        checkpoint_in(tmp_path)


def test_a_missing_rank_is_named(tmp_path: Path) -> None:
    write(tmp_path, glm130b(), 4)
    rank_file(tmp_path, 2).unlink()
    with pytest.raises(CheckpointError, match="lacks the file of rank 02"):
        checkpoint_in(tmp_path)
