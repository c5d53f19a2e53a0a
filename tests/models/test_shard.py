"""What the ranks of a model have, together, is the whole: no process but this one is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import ANY_DEGREE
from tiny_glm import tiny_glm130b, tiny_model
from toy_arch import TOY, ToyConfig

from bminf.arch.registry import named
from bminf.checkpoint.model_parallel import Split
from bminf.errors import ArgumentError
from bminf.layers.embedding import HostEmbedding
from bminf.layers.parallel import Group
from bminf.layers.quantized_linear import QuantizedLinear
from bminf.layers.rendezvous import Place
from bminf.models.assemble import Assembly, Formats, assemble, reserved_bytes
from bminf.models.convert import convert
from bminf.models.fill import contents_of
from bminf.models.shard import why_not
from bminf.models.source import find_sizes, sizes_of
from bminf.offload.reading import read_block
from bminf.quantization.packed import INT4, INT8, Format, Packing

ROW = Format(4)
NAMES = ["cpm1", "cpm2", "glm130b", "glm10b", "bloom"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("shared")
    return {
        name: tiny_model(name, **ANY_DEGREE[name]).write_original(root / name) for name in NAMES
    }


def assembled(source: Any, form: Format | None, rank: int, size: int, is_auto: bool = False) -> Any:
    formats = Formats(form, is_auto=is_auto)
    return assemble(find_sizes(source), formats, torch.float32, group=Group(Place(rank, size)))


def weights_of(assembly: Assembly) -> dict[str, torch.Tensor]:
    """Every matrix, vector and table, in float32, under the names of a network that is whole."""
    contents, found = contents_of(assembly), {}
    for block in ("", *(one.name for one in assembly.blocks)):
        layout = contents.layout(block)
        blob = torch.zeros(layout.extent, dtype=torch.uint8)
        read_block(contents, block, blob)
        layout.bind(assembly.network.get_submodule(block), blob)
    for name, module in assembly.network.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if isinstance(module, QuantizedLinear):
            own["weight"] = module.dequantize()
        found |= {f"{name}.{key}".replace(".linear.", "."): t for key, t in own.items()}
    return found


def joined(split: Split, parts: list[torch.Tensor]) -> torch.Tensor:
    if split.axis is None:
        return parts[0]
    pieces = [part.chunk(split.num_fused, 0) if split.num_fused > 1 else [part] for part in parts]
    return torch.cat([piece for own in zip(*pieces, strict=True) for piece in own], split.axis)


def check_together(name: str, one: Assembly, ranks: list[Assembly]) -> None:
    """Codes and scales, too: what they stand for is the same to the last bit."""
    architecture: Any = named(name)
    whole, parts = weights_of(one), [weights_of(rank) for rank in ranks]
    check_tables(one, ranks)
    if (table := whole.pop("embed_tokens.weight", None)) is not None and name == "cpm1":
        whole["lm_head.weight"] = table  # tied to it: rows of it, of each rank
    heads = [torch.cat([t for n, t in own.items() if "lm_head.parts" in n] or [torch.zeros(0)])
             for own in parts]  # fmt: skip
    head = [t for n, t in whole.items() if "lm_head.parts" in n]
    assert torch.equal(torch.cat(head or [torch.zeros(0)]), torch.cat(heads))
    for tensor, expected in whole.items():
        module, _, key = tensor.rpartition(".")
        if "lm_head.parts" in tensor:
            continue
        own = [part[tensor] for part in parts if tensor in part]
        is_shared = key in ("weight", "bias") and ".norm" not in tensor and "embed" not in tensor
        known = "embed_tokens" if (name, module) == ("cpm1", "lm_head") else module
        split = architecture.split_of(known) if is_shared and module != "norm" else Split(None)
        if key == "bias" and split.axis == 1:
            assert len(own) == 1, "only the first adds it"
            split = Split(None)
        assert torch.equal(joined(split, own), expected), tensor


def check_tables(one: Assembly, ranks: list[Assembly]) -> None:
    """No rank has rows of the embedding on its device: all gather them from one file."""
    weights = one.source.weights
    expected = weights.table or weights.tensors["embed_tokens.weight"]
    for rank in ranks:
        assert type(rank.network.embed_tokens) is HostEmbedding
        assert rank.source.weights.table is not None
        assert torch.equal(rank.source.weights.table.read(), expected.read())


@pytest.mark.parametrize("form", [None, INT8, INT4, ROW])
@pytest.mark.parametrize("name", NAMES)
def test_the_ranks_together_have_the_codes_and_scales_of_one(
    folders: dict[str, Path], name: str, form: Format | None
) -> None:
    ranks = [assembled(folders[name], form, rank, 4) for rank in range(4)]
    check_together(name, assembled(folders[name], form, 0, 1), ranks)


@pytest.mark.parametrize("name", ["cpm2", "bloom"])
@pytest.mark.parametrize("quantization", ["int8", "int4", None])
def test_a_folder_of_ours_is_cut_as_it_is_packed(
    folders: dict[str, Path], tmp_path: Path, name: str, quantization: str | None
) -> None:
    more = {"head_quantization": "int8"} if name == "bloom" and quantization else {}
    convert(folders[name], tmp_path / "ours", quantization, name, **more)
    ranks = [assembled(tmp_path / "ours", None, rank, 2, True) for rank in range(2)]
    check_together(name, assembled(tmp_path / "ours", None, 0, 1, True), ranks)


@pytest.mark.parametrize(("degree", "size"), [(1, 2), (2, 2), (4, 2), (2, 4)])
def test_ranks_on_disk_keep_their_scales(tmp_path: Path, degree: int, size: int) -> None:
    """As many, more or fewer than there are now."""
    tiny_glm130b(inner_hidden_size=128).write_original(tmp_path, degree, bits=4)
    ranks = [assembled(tmp_path, None, rank, size, True) for rank in range(size)]
    check_together("glm130b", assembled(tmp_path, None, 0, 1, True), ranks)
    down = "layers.0.feed_forward.down.linear"
    columns = 128 // max(degree, size)
    expected = ROW if degree <= size else Format(4, columns)
    assert ranks[1].packing.of(down) == expected


def test_a_number_of_ranks_that_does_not_divide_is_refused_with_those_that_do() -> None:
    glm = find_sizes("GLM-130B")
    for number in (2, 4, 8, 16, 32):
        assert why_not(glm, Packing(INT4), number) is None
    assert why_not(glm, Packing(), 5) == "it has 96 attention heads"
    assert why_not(glm, Packing(), 96) == "it has 32768 columns of the feed-forward"
    with pytest.raises(ArgumentError, match=r"3 ranks cannot .*feed-forward; .*: 1, 2, 4, 8, 16"):
        assembled("GLM-130B", None, 0, 3)


def test_a_cut_inside_a_group_is_refused_with_the_numbers_that_do() -> None:
    """The codes in it have one scale."""
    big = find_sizes("EVA2.0-base").config
    with pytest.raises(ArgumentError, match=r"2 ranks cannot .*: it has 3 groups of 256 columns"):
        assembled(big, Format(4, 256), 0, 2)
    assert assembled(big, Format(4, 128), 0, 2).packing.default == Format(4, 128)


def test_a_model_that_does_not_know_ranks_is_refused() -> None:
    source = sizes_of(TOY, ToyConfig(64, 32, 2, 4, 64), "a toy")
    with pytest.raises(ArgumentError, match="cannot be shared by ranks"):
        assembled(source, None, 0, 2)


@pytest.mark.parametrize("name", ["CPM-1", "CPM-2 (Chinese), CPM-2.1", "GLM-130B", "bloom"])
def test_a_rank_needs_a_share_of_the_room(name: str) -> None:
    """Of the cache, and of what a layer holds, but for its own input."""
    source = {"CPM-1": "TsinghuaAI/CPM-Generate", "bloom": "bigscience/bloom"}.get(name, name)
    one, four = (assembled(source, INT8, 0, size) for size in (1, 4))
    needed = [reserved_bytes(assembly, 512, 4, "cuda") for assembly in (one, four)]
    assert needed[0] / 4 < needed[1] < needed[0]
    assert four.blobs.outside.nbytes <= one.blobs.outside.nbytes
    blocks = [sum(layout.nbytes for layout in a.blobs.blocks.values()) for a in (one, four)]
    assert 0.99 * blocks[0] < 4 * blocks[1] < 1.02 * blocks[0]
