"""The same GLM from every layout it is found in, from its authors' own quantised folders, and from
what convert() makes of either: bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_glm import TinyGLM, Weights, ice_tokenizer, quantized, tiny_glm, tiny_glm10b, tiny_glm130b

from bminf.arch.registry import checkpoint_in
from bminf.errors import ArgumentError, CheckpointError
from bminf.models import GLM, convert
from bminf.ops.dequantize import dequantize_weight
from bminf.quantization.packed import INT4, INT8, Format
from bminf.tokenizers.cog_pretrain import CogPretrainTokenizer

Loader = Callable[..., Any]
NAMES = ("glm130b", "glm10b")
TEXT = "the blocks of a [MASK] wait on the host"
HALF_GROUPS = Format(8, 32)

each_model = pytest.mark.parametrize("name", NAMES)


def least(plan: Any) -> int:
    """A limit with room for two slots of the largest block, and no block beside them."""
    slots = 2 * max(block.nbytes for block in plan.blocks)
    return int(plan.outside_bytes + plan.reserved_bytes + slots)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., torch.Tensor]]:
    """expected("glm10b", "int4"): the logits of the small model, from a folder of one rank."""
    root, found = tmp_path_factory.mktemp("expected"), {}

    def logits(name: str, quantization: Any = None, head: Any = None) -> torch.Tensor:
        key = name, quantization, head
        if key not in found:
            folder = root / name
            if not folder.exists():
                tiny_glm(name).write_original(folder)
            settings = {"quantization": quantization, "head_quantization": head, "device": "cpu"}
            tokenizer = ice_tokenizer() if name == "glm130b" else None
            with GLM(folder, tokenizer=tokenizer, **settings) as model:
                found[key] = model.logits(TEXT)
        return found[key]

    yield logits
    assert all(float(one.std()) > 1 for one in found.values())


def tokenizer_of(name: str) -> Any:
    return ice_tokenizer() if name == "glm130b" else None


# ---- layouts -------------------------------------------------------------------------------------

Writer = Callable[[TinyGLM, Path], Path]
LAYOUTS: list[tuple[str, str, Writer]] = [
    ("glm130b", "2 ranks", lambda made, folder: made.write_original(folder, 2)),
    ("glm130b", "4 ranks", lambda made, folder: made.write_original(folder, 4)),
    ("glm130b", "old files", lambda made, folder: made.write_original(folder, 2, form="old")),
    (
        "glm130b",
        "rank folders",
        lambda made, folder: made.write_original(folder, 2, has_rank_folders=True),
    ),
    (
        "glm130b",
        "inv_freq",
        lambda made, folder: tiny_glm130b(has_inv_freq=True).write_original(folder, 2),
    ),
    ("glm10b", "2 ranks", lambda made, folder: made.write_original(folder, 2, mp_world_size=2)),
    ("glm10b", "4 ranks", lambda made, folder: made.write_original(folder, 4)),
    ("glm10b", "bin", lambda made, folder: made.write_huggingface(folder)),
    ("glm10b", "bin, glm.", lambda made, folder: made.write_huggingface(folder, prefix="glm.")),
    ("glm10b", "safetensors", lambda made, folder: made.write_huggingface(folder, "safetensors")),
    ("glm10b", "sharded", lambda made, folder: made.write_huggingface(folder, "sharded", "glm.")),
    ("glm10b", "SAT", lambda made, folder: made.write_sat(folder)),
    ("glm10b", "SAT, 2 ranks", lambda made, folder: made.write_sat(folder, 2)),
]


@pytest.mark.parametrize(
    ("name", "layout", "write"), LAYOUTS, ids=lambda x: x if isinstance(x, str) else ""
)
def test_every_layout_is_the_same_model(
    name: str, layout: str, write: Writer, load: Loader, expected: Callable[..., torch.Tensor],
    tmp_path: Path,
) -> None:  # fmt: skip
    folder = write(tiny_glm(name), tmp_path / "a")
    for quantization in (None, "int4"):
        model = load(name, checkpoint=folder, quantization=quantization)
        assert torch.equal(model.logits(TEXT), expected(name, quantization))
    made = convert(folder, tmp_path / "b", "int4", tokenizer=tokenizer_of(name))
    streamed = load(name, checkpoint=made, quantization="int4", memory_limit=least(model.plan))
    assert streamed.plan.streamed and torch.equal(streamed.logits(TEXT), expected(name, "int4"))


@each_model
def test_a_file_may_be_named_instead_of_its_folder(
    name: str, load: Loader, expected: Callable[..., torch.Tensor], tmp_path: Path
) -> None:
    folder = tiny_glm(name).write_original(tmp_path / "a", 2)
    (folder / "latest_checkpointed_iteration.txt").rename(folder / "latest")
    for named in (folder / "latest", folder):
        assert torch.equal(load(name, checkpoint=named).logits(TEXT), expected(name))


# ---- converting ----------------------------------------------------------------------------------

PACKINGS: list[tuple[Any, Any]] = [
    ("auto", None), ("int4", "int8"), ("int4-row", None), ("int8", "int4"), (None, None),
    (None, "int8"), (HALF_GROUPS, HALF_GROUPS),
]  # fmt: skip


@each_model
@pytest.mark.parametrize(("quantization", "head"), PACKINGS, ids=str)
def test_a_converted_folder_is_the_same_model(
    name: str, quantization: Any, head: Any, load: Loader, folders: dict[str, Path],
    expected: Callable[..., torch.Tensor], tmp_path: Path,
) -> None:  # fmt: skip
    made = convert(
        folders[name], tmp_path / "b", quantization, tokenizer=tokenizer_of(name),
        head_quantization=head,
    )  # fmt: skip
    asked = "int4" if quantization == "auto" else quantization
    logits = expected(name, asked, head)
    model = load(name, checkpoint=made, quantization=asked)
    assert torch.equal(model.logits(TEXT), logits)
    # Cut for this dtype, too, which is not that of the folder.
    assert model.plan.blocks == load(name, quantization=asked, head_quantization=head).plan.blocks
    settings = {"quantization": asked, "head_quantization": head}
    streamed = load(name, checkpoint=made, memory_limit=least(model.plan), **settings)
    assert streamed.plan.streamed and torch.equal(streamed.logits(TEXT), logits)
    if asked is not None:  # the default stands for what the folder has
        assert torch.equal(load(name, checkpoint=made, quantization="int4").logits(TEXT), logits)
    words = r"is packed as .*leave quantization out|has a packed head and layers that are not"
    for other in {INT8, INT4, Format(4), None} - {model_form(model), INT4}:
        if asked is None and head is None:
            continue
        with pytest.raises(ArgumentError, match=words):
            load(name, checkpoint=made, quantization=other)


def model_form(model: Any) -> Format | None:
    return getattr(model.model.layers[0].attention.qkv, "form", None)


@each_model
def test_what_convert_left_unpacked_is_packed_when_it_is_loaded(
    name: str, load: Loader, folders: dict[str, Path], expected: Callable[..., torch.Tensor],
    tmp_path: Path,
) -> None:  # fmt: skip
    plain = convert(folders[name], tmp_path / "plain", None, tokenizer=tokenizer_of(name))
    assert json.loads((plain / "config.json").read_text())["exceptions"] == {}
    for quantization, head in (("int4", None), ("int8", "int8"), ("int4-row", "int4")):
        packed = {"quantization": quantization, "head_quantization": head}
        model = load(name, checkpoint=plain, **packed)
        assert torch.equal(model.logits(TEXT), expected(name, quantization, head))
        again = convert(plain, tmp_path / quantization, tokenizer=tokenizer_of(name), **packed)
        model = load(name, checkpoint=again, quantization="int4")
        assert torch.equal(model.logits(TEXT), expected(name, quantization, head))


@each_model
def test_a_head_that_is_packed_leaves_the_embedding_as_it_is(
    name: str, folders: dict[str, Path], load: Loader, tmp_path: Path
) -> None:
    files = {}
    for head in (None, "int8"):
        to = tmp_path / str(head)
        made = convert(folders[name], to, tokenizer=tokenizer_of(name), head_quantization=head)
        files[head] = set(checkpoint_in(made).tensors)
    assert "embed_tokens.weight" in files["int8"] and "lm_head.parts.0.qweight" in files["int8"]
    assert "embed_tokens.weight" not in files[None] and "lm_head.parts.0.weight" in files[None]
    with pytest.raises(ArgumentError, match=r"is .*bits=4.*, but the head .*bits=8"):
        load(name, checkpoint=tmp_path / "int8", quantization="int4", head_quantization="int4")
    with pytest.raises(ArgumentError, match=r"is .*, but the head in .* as None"):
        load(name, checkpoint=tmp_path / "None", quantization="int4", head_quantization="int4")


@pytest.mark.parametrize("kind", ["glm130b", "english", "chinese"])
def test_the_folder_alone_is_enough(kind: str, tmp_path: Path) -> None:
    """With 20000 image tokens, as GLM-130B's vocabulary is read from its file."""
    made = tiny_glm130b(image_offset=20000) if kind == "glm130b" else tiny_glm10b(
        is_chinese=kind == "chinese"
    )  # fmt: skip
    folder = made.write_original(tmp_path / "a", 2)
    with GLM(folder, device="cpu") as model:
        answers = [model.generate(text, 6, seed=1) for text in ("the layer", TEXT)]
        assert model.tokenizer.vocab_size > 20000 or kind != "glm130b"
    moved = convert(folder, tmp_path / "there" / "b").rename(tmp_path / "here")
    with GLM(moved) as model:
        assert [model.generate(text, 6, seed=1) for text in ("the layer", TEXT)] == answers
    assert json.loads((moved / "config.json").read_text())["model"] == made.name


def test_what_is_not_packed_keeps_its_dtype(folders: dict[str, Path], tmp_path: Path) -> None:
    for dtype, kept in ((None, torch.float16), (torch.bfloat16, torch.bfloat16)):
        made = convert(folders["glm10b"], tmp_path / str(dtype), dtype=dtype)
        tensors = checkpoint_in(made).tensors
        assert tensors["lm_head.parts.0.weight"].dtype == kept == tensors["norm.bias"].dtype


def test_the_rotary_table_is_no_part_of_the_folder(
    folders: dict[str, Path], load: Loader, tmp_path: Path
) -> None:
    made = convert(folders["glm130b"], tmp_path / "b", tokenizer=ice_tokenizer())
    text = " ".join(["the blocks wait"] * 9)
    packed = {"quantization": "int4"}
    found = {
        precision: load("glm130b", checkpoint=made, rotary_precision=precision, **packed)
        for precision in (None, "float16", "float32")
    }
    logits = {precision: model.logits(text) for precision, model in found.items()}
    assert torch.equal(logits[None], logits["float16"])
    assert not torch.equal(logits["float32"], logits["float16"])
    original = load("glm130b", rotary_precision="float32", **packed)
    assert torch.equal(logits["float32"], original.logits(text))


def test_a_converted_folder_carries_the_settings_of_its_tokenizer(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    made = convert(folders["glm130b"], tmp_path / "b", tokenizer=ice_tokenizer())
    with GLM(made, device="cpu") as model:  # other image tokens than in the published model
        assert model.tokenizer.masks == ice_tokenizer().masks
    chinese = tiny_glm10b(is_chinese=True).write_original(tmp_path / "c")
    fixed = CogPretrainTokenizer(chinese / "cog-pretrain.model", fixed_commands=True)
    made = convert(chinese, tmp_path / "d", tokenizer=fixed)
    with GLM(made, device="cpu") as model:
        assert model.tokenizer.masks == fixed.masks
        assert model.tokenizer.masks["[gMASK]"] != model.tokenizer.eop_id
    written = json.loads((made / "config.json").read_text())
    for settings in ({"fixed_commands": True, "more": 1}, [1]):
        (made / "config.json").write_text(json.dumps({**written, "tokenizer": settings}))
        with pytest.raises(CheckpointError, match=r"settings|tokenizer is \[1\]"):
            GLM(made, device="cpu")


def test_a_configuration_may_say_how_exact_positions_are(
    folders: dict[str, Path], load: Loader
) -> None:
    config = json.loads((folders["glm130b"] / "config.json").read_text())
    model = load("glm130b", config={**config, "rotary_precision": "float32"})
    assert model.config.rotary_precision == "float32"


# ---- the authors' quantised folders --------------------------------------------------------------


def dequantised(made: TinyGLM, bits: int, degree: int) -> TinyGLM:
    """The weights that the authors compute with: of each rank, code * scale, rounded to half."""
    ranks = [quantized(made.rank(number, degree), bits) for number in range(degree)]
    for rank in ranks:
        for name in [name for name in rank if name.endswith("_scale")]:
            scale, codes = rank.pop(name).unsqueeze(1), rank[name.removesuffix("_scale")]
            if bits == 4:
                codes = torch.stack([codes >> 4, (codes << 4) >> 4], -1).flatten(1)
            rank[name.removesuffix("_scale")] = codes.half() * scale
    whole = {name: joined(made, name, [rank[name] for rank in ranks]) for name in ranks[0]}
    return replace(made, tensors=whole)


def joined(made: TinyGLM, name: str, parts: list[torch.Tensor]) -> torch.Tensor:
    if name.endswith((".dense.weight", "dense_4h_to_h.weight")):
        return torch.cat(parts, 1)
    if "dense_h_to_4h" in name:
        halves = [part.chunk(2) for part in parts]
        return torch.cat([*(half[0] for half in halves), *(half[1] for half in halves)])
    is_cut = "query_key_value" in name or "word_embeddings" in name
    return torch.cat(parts) if is_cut else made.tensors[name]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], Path]:
    """packed(4, 2): a GLM-130B in 4 bits, of two ranks."""
    root = tmp_path_factory.mktemp("packed")

    def folder(bits: int, degree: int) -> Path:
        found = root / f"int{bits}_tp{degree}"
        return found if found.exists() else tiny_glm130b().write_original(found, degree, bits)

    return folder


ALL_PACKED = [(bits, degree) for bits in (4, 8) for degree in (1, 2, 4)]


@pytest.mark.parametrize(("bits", "degree"), ALL_PACKED)
def test_a_quantised_folder_unpacked(
    bits: int, degree: int, packed: Callable[[int, int], Path], load: Loader, tmp_path: Path
) -> None:
    made = dequantised(tiny_glm130b(), bits, degree)
    reference = load("glm130b", checkpoint=made.write_original(tmp_path / "a"))
    expected = reference.logits(TEXT)
    assert not torch.equal(expected, load("glm130b").logits(TEXT))
    model = load("glm130b", checkpoint=packed(bits, degree), quantization=None)
    assert torch.equal(model.logits(TEXT), expected)
    streamed = load("glm130b", checkpoint=packed(bits, degree), memory_limit=least(model.plan))
    assert streamed.plan.streamed and torch.equal(streamed.logits(TEXT), expected)


@pytest.mark.parametrize(("bits", "degree"), ALL_PACKED)
def test_a_quantised_folder_keeps_its_codes(
    bits: int, degree: int, packed: Callable[[int, int], Path], load: Loader
) -> None:
    """What belongs to one rank has a scale a row, what lies across ranks one a rank and row."""
    made = dequantised(tiny_glm130b(), bits, degree)
    model = load("glm130b", checkpoint=packed(bits, degree), quantization="int4")
    layer = model.model.layers[1]
    for linear, name in (
        (layer.attention.qkv, "attention.query_key_value"),
        (layer.attention.out, "attention.dense"),
        (layer.feed_forward.up, "mlp.dense_h_to_4h"),
        (layer.feed_forward.down, "mlp.dense_4h_to_h"),
    ):
        is_across = degree > 1 and name in ("attention.dense", "mlp.dense_4h_to_h")
        width = linear.in_features // degree if is_across else None
        assert linear.form == Format(bits, width)
        exact = made.tensors[f"transformer.layers.1.{name}.weight"]
        assert torch.equal(dequantize_weight(linear.packed, torch.float16), exact)
        bias = made.tensors[f"transformer.layers.1.{name}.bias"]
        assert torch.equal(linear.bias, bias.float()) and bias.any()
    streamed = load(
        "glm130b", checkpoint=packed(bits, degree), quantization="int4",
        memory_limit=least(model.plan),
    )  # fmt: skip
    assert streamed.plan.streamed and torch.equal(streamed.logits(TEXT), model.logits(TEXT))


@pytest.mark.parametrize(
    ("bits", "degree", "head"),
    [(4, 1, "int8"), (4, 2, None), (4, 4, "int4"), (8, 1, None), (8, 2, "int8")],
)
def test_converting_a_quantised_folder_rounds_nothing(
    bits: int, degree: int, head: Any, packed: Callable[[int, int], Path], load: Loader,
    tmp_path: Path,
) -> None:  # fmt: skip
    rows, folder = {4: "int4-row", 8: "int8"}[bits], packed(bits, degree)
    model = load("glm130b", checkpoint=folder, quantization="int4", head_quantization=head)
    expected = model.logits(TEXT)
    for quantization in ("auto", rows):
        made = convert(
            folder, tmp_path / quantization, quantization, tokenizer=ice_tokenizer(),
            head_quantization=head,
        )  # fmt: skip
        model = load("glm130b", checkpoint=made, quantization=rows, head_quantization=head)
        assert torch.equal(model.logits(TEXT), expected)
    streamed = load("glm130b", checkpoint=made, quantization="int4", memory_limit=least(model.plan))
    assert streamed.plan.streamed and torch.equal(streamed.logits(TEXT), expected)
    for wrong in (None, {4: "int8", 8: "int4-row"}[bits]):
        with pytest.raises(ArgumentError, match=rf"packed as Format\(bits={bits}"):
            load("glm130b", checkpoint=made, quantization=wrong)
    with pytest.raises(CheckpointError, match="is packed already"):
        convert(made, tmp_path / "again", tokenizer=ice_tokenizer())
    with pytest.raises(CheckpointError, match="it is a bminf folder"):
        convert(made, tmp_path / "again", tp=1)


@pytest.mark.parametrize(("bits", "degree"), [(4, 2), (8, 1)])
def test_converting_a_quantised_folder_to_no_packing(
    bits: int, degree: int, packed: Callable[[int, int], Path], load: Loader, tmp_path: Path
) -> None:
    folder = packed(bits, degree)
    made = convert(folder, tmp_path / "b", None, tokenizer=ice_tokenizer())
    expected = load("glm130b", checkpoint=folder, quantization=None).logits(TEXT)
    assert torch.equal(load("glm130b", checkpoint=made).logits(TEXT), expected)


@pytest.mark.parametrize(("bits", "degree"), [(4, 1), (4, 4), (8, 2)])
def test_a_quantised_folder_takes_its_own_format_alone(
    bits: int, degree: int, packed: Callable[[int, int], Path], load: Loader, tmp_path: Path
) -> None:
    rows = {4: "int4-row", 8: "int8"}[bits]
    own = load("glm130b", checkpoint=packed(bits, degree), quantization="int4").logits(TEXT)
    model = load("glm130b", checkpoint=packed(bits, degree), quantization=rows)
    assert torch.equal(model.logits(TEXT), own)
    for other in ({"int8", "int4-row"} - {rows}) | {HALF_GROUPS, Format(4, 16, True)}:
        with pytest.raises(ArgumentError, match=f"holds codes of {bits} bits already"):
            load("glm130b", checkpoint=packed(bits, degree), quantization=other)
        with pytest.raises(ArgumentError, match=f"holds codes of {bits} bits already"):
            convert(packed(bits, degree), tmp_path / "b", other, tokenizer=ice_tokenizer())
    assert list(tmp_path.iterdir()) == []


# ---- for another number of ranks -----------------------------------------------------------------


def ranks_of(folder: Path) -> list[Weights]:
    files = sorted(folder.glob("*/mp_rank_*_model_states.pt"))
    return [torch.load(file, weights_only=True)["module"] for file in files]


@each_model
@pytest.mark.parametrize("degree", [1, 2, 4])
def test_convert_cuts_as_the_authors_do(
    name: str, degree: int, load: Loader, expected: Callable[..., torch.Tensor], tmp_path: Path
) -> None:
    made = tiny_glm(name)
    folder = made.write_original(tmp_path / "a", 2)
    cut = convert(folder, tmp_path / "cut", tp=degree)
    assert_same(ranks_of(cut), [made.rank(number, degree) for number in range(degree)])
    model = load(name, checkpoint=made.write_beside(cut))
    assert torch.equal(model.logits(TEXT), expected(name))
    again = convert(cut, tmp_path / "again", None, tp=2, model=name, config=made.config)
    assert_same(ranks_of(again), ranks_of(folder))


def assert_same(found: list[Weights], wanted: list[Weights]) -> None:
    assert [list(rank) for rank in found] == [list(rank) for rank in wanted]
    for ours, theirs in zip(found, wanted, strict=True):
        assert all(ours[name].dtype == theirs[name].dtype for name in ours)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("prefix", ["", "glm."])
def test_convert_cuts_a_hugging_face_folder(prefix: str, tmp_path: Path) -> None:
    made = tiny_glm10b()
    cut = convert(made.write_huggingface(tmp_path / "a", prefix=prefix), tmp_path / "b", tp=2)
    assert_same(ranks_of(cut), [made.rank(number, 2) for number in range(2)])


@pytest.mark.parametrize(("bits", "degree"), [(4, 1), (4, 4), (8, 2)])
def test_convert_quantises_each_rank_by_itself(
    bits: int, degree: int, packed: Callable[[int, int], Path], load: Loader, tmp_path: Path
) -> None:
    made = tiny_glm130b()
    source = made.write_original(tmp_path / "a", 2)
    form = {4: "int4-row", 8: "int8"}[bits]
    cut = convert(source, tmp_path / "b", form, tp=degree)
    assert_same(ranks_of(cut), [quantized(made.rank(n, degree), bits) for n in range(degree)])
    model = load("glm130b", checkpoint=made.write_beside(cut), quantization="int4")
    same = load("glm130b", checkpoint=packed(bits, degree), quantization="int4")
    assert torch.equal(model.logits(TEXT), same.logits(TEXT))


@pytest.mark.parametrize("bits", [4, 8])
def test_packing_while_loading_makes_the_authors_codes(
    bits: int, packed: Callable[[int, int], Path], load: Loader
) -> None:
    """Of one rank: 4 bits as the authors round them. 8 bits are ours, with scales in float32."""
    own = load("glm130b", quantization={4: "int4-row", 8: "int8"}[bits])
    theirs = load("glm130b", checkpoint=packed(bits, 1), quantization="int4")
    logits = own.logits(TEXT), theirs.logits(TEXT)
    assert torch.equal(*logits) is (bits == 4) and torch.allclose(*logits, atol=0.3)
