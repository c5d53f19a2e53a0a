"""bminf/models/convert.py: what it writes loads by itself as the same model, and appears whole or
not at all."""

from __future__ import annotations

import itertools
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_source import logits
from tiny_zoo import CPM1_CONFIG, tiny

import bminf
from bminf.arch.registry import checkpoint_in
from bminf.checkpoint.stored import InFile
from bminf.errors import ArgumentError, CheckpointError
from bminf.models import convert
from bminf.offload import disk, reading
from bminf.quantization.packed import Format

Loader = Callable[..., Any]
WITH_MINIMUM = Format(bits=4, group_size=8, has_minimum=True)
# These CPM-1 folders have no sentencepiece model, and the library says so.
pytestmark = pytest.mark.filterwarnings("ignore:.*no sentencepiece model")
QUANTIZATIONS = [None, "int8", "int4", WITH_MINIMUM]


def model_class(name: str) -> Any:
    return getattr(bminf.models, name.upper())


# ---- where it is read from ----------------------------------------------------------------------


@pytest.fixture
def converted(folders: dict[str, Path], tmp_path: Path) -> Path:
    """In the type that it is computed in on a CPU, too."""
    return convert(folders["cpm1"], tmp_path / "made", "int8", dtype=torch.float32)


def least_limit(folder: Path) -> int:
    return bminf.models.plan_model(folder, device="cpu").least_limit


def test_streamed_blocks_are_read_where_they_lie(
    converted: Path, load: Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written, and what streams is not read before it is used."""
    written = []
    monkeypatch.setattr(disk, "_write_at", lambda file, data, start: written.append(data) or 1)
    whole = load("cpm1", checkpoint=converted, quantization="int8")
    model = load("cpm1", checkpoint=converted, quantization="int8",
                 memory_limit=least_limit(converted))  # fmt: skip
    assert len(model.plan.streamed) == 3
    stats = model.stats
    assert stats.loaded_bytes < whole.stats.loaded_bytes / 2 and stats.ready_s > 0
    assert whole.stats.loaded_bytes == whole.plan.resident_bytes
    assert stats.loaded_bytes_per_s == stats.loaded_bytes / stats.ready_s
    shutil.rmtree(converted)  # its files are open
    assert torch.equal(model.logits("今天天气"), whole.logits("今天天气"))
    assert torch.equal(model.logits("今天天气"), whole.logits("今天天气"))
    assert not written


def test_a_folder_for_streamed_blocks_is_where_they_are(
    converted: Path, load: Loader, tmp_path: Path
) -> None:
    model = load("cpm1", checkpoint=converted, quantization="int8", offload_dir=tmp_path,
                 memory_limit=least_limit(converted))  # fmt: skip
    assert model.stats.loaded_bytes == sum(block.nbytes for block in model.plan.blocks) + (
        model.plan.outside_bytes
    )


def test_damage_of_a_streamed_block_is_found_when_it_is_first_read(
    converted: Path, load: Loader
) -> None:
    path = converted / "model.safetensors"
    content = bytearray(path.read_bytes())
    stored = checkpoint_in(converted).tensors["layers.1.attention.qkv.qweight"]
    assert isinstance(stored, InFile)
    content[stored.offset + 5] ^= 1
    path.write_bytes(content)
    model = load("cpm1", checkpoint=converted, quantization="int8",
                 memory_limit=least_limit(converted))  # fmt: skip
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged: between bytes"):
            model.generate("今天天气", max_tokens=2)


# ---- the same model ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cpm1", "cpm2", "eva"])
@pytest.mark.parametrize("quantization", QUANTIZATIONS, ids=str)
def test_the_folder_alone_is_the_same_model(
    name: str, quantization: Any, load: Loader, folders: dict[str, Path], tmp_path: Path
) -> None:
    made = convert(folders[name], tmp_path / "a" / "made", quantization, model=name)
    moved = (tmp_path / "elsewhere").resolve()
    made.rename(moved)
    (tmp_path / "a").rmdir()
    assert sorted(path.name for path in moved.iterdir()) == [
        "config.json", "model.safetensors", "vocab.txt",
    ]  # fmt: skip
    with model_class(name)(moved) as model:
        assert model.generate("今天", max_tokens=3, seed=1)
    expected = logits(load(name, quantization=quantization))
    # Where nothing is packed, "int8" means to pack it now.
    given = {"quantization": quantization} if quantization is None else {}
    model = load(name, checkpoint=moved, **{"quantization": "int8", **given})
    assert torch.equal(logits(model), expected)
    limit = model.plan.least_limit
    model = load(name, checkpoint=moved, **{"quantization": "int8", **given, "memory_limit": limit})
    assert model.plan.streamed and torch.equal(logits(model), expected)


@pytest.mark.parametrize(
    ("layout", "name", "quantization"),
    [
        ("bminf1", "cpm1", "int8"),
        ("bminf1", "cpm2", "int4"),
        ("modelcenter", "cpm2", "int8"),
        ("huggingface", "eva", "int4"),
        ("huggingface", "cpm1", None),
    ],
)
def test_any_layout(
    layout: str, name: str, quantization: Any, load: Loader,
    tmp_path: Path,
) -> None:  # fmt: skip
    """Weights that are changed as they are read are stored so, and not changed again."""
    how = {"length_scale": True} if layout == "modelcenter" else {}
    folder = getattr(tiny(name), f"write_{layout}")(tmp_path / "inner" / "from", **how)
    config = tiny(name).config if layout == "bminf1" else None
    made = convert(folder, tmp_path / "to", quantization, model=name, config=config)
    settings = {"quantization": quantization, "config": config}
    original = load(name, checkpoint=folder, **settings)
    asked = quantization and "int8"
    assert torch.equal(logits(load(name, checkpoint=made, quantization=asked)), logits(original))


def test_what_is_not_packed_keeps_its_dtype(folders: dict[str, Path], tmp_path: Path) -> None:
    for dtype, expected in ((None, torch.float16), (torch.bfloat16, torch.bfloat16)):
        made = convert(folders["cpm1"], tmp_path / str(dtype), dtype=dtype)
        with safe_open(made / "model.safetensors", "pt") as file:
            assert file.get_tensor("embed_tokens.weight").dtype == expected
            assert file.get_tensor("layers.0.attention.qkv.qweight").dtype == torch.int8


def test_a_sentencepiece_model_goes_along(tmp_path: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "tokenizers"))
    from tiny_vocabularies import PIECES, write_piece_model

    folder = tiny("cpm1").write_original(tmp_path / "from")
    (folder / "vocab.txt").unlink()
    write_piece_model(folder / "chinese_vocab.model", PIECES)
    with pytest.raises(CheckpointError, match=f"vocabulary has {len(PIECES)} tokens"):
        convert(folder, tmp_path / "to")
    write_piece_model(folder / "chinese_vocab.model", [*PIECES, *map(str, range(64))][:64])
    made = convert(folder, tmp_path / "to")
    assert (made / "chinese_vocab.model").read_bytes() == (
        folder / "chinese_vocab.model"
    ).read_bytes()
    with bminf.models.CPM1(made, device="cpu") as model:
        assert model.tokenizer.vocab_size == 64


def test_a_tokenizer_that_is_no_file_cannot_go_along(
    folders: dict[str, Path], load: Loader, tmp_path: Path
) -> None:
    tokenizer = load("cpm1").tokenizer
    tokenizer.files = ()
    with pytest.raises(ArgumentError, match="give the path of a vocabulary"):
        convert(folders["cpm1"], tmp_path / "to", tokenizer=tokenizer)
    assert list(tmp_path.iterdir()) == []


# ---- the file ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cpm1", "cpm2"])
@pytest.mark.parametrize("quantization", ["int8", WITH_MINIMUM], ids=str)
def test_each_block_is_one_aligned_run_of_bytes(
    name: str, quantization: Any, folders: dict[str, Path], load: Loader, tmp_path: Path
) -> None:
    file = convert(folders[name], tmp_path / "to", quantization, model=name) / "model.safetensors"
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    assert header.pop("__metadata__")["format"] == "pt"
    places = {n: tuple(8 + size + at for at in e["data_offsets"]) for n, e in header.items()}
    padding = {n for n in places if n.startswith("padding.")}
    assert all(begin % 256 == 0 for n, (begin, _) in places.items() if n not in padding)
    model = load(name, quantization=quantization)
    runs = []
    for block in [b.name for b in model.plan.blocks]:
        own = [place for n, place in places.items() if n.startswith(f"{block}.")]
        assert len(own) > 1
        begin, end = min(own)[0], max(own, key=lambda place: place[1])[1]
        inside = {n for n, (at, _) in places.items() if begin <= at < end} - padding
        assert all(n.startswith(f"{block}.") for n in inside) and len(inside) == len(own)
        runs.append((begin, end))
    assert all(first[1] <= second[0] for first, second in itertools.pairwise(runs))
    with safe_open(file, "pt") as opened:
        assert set(opened.keys()) == set(places)
        for n, tensor in model.model.state_dict().items():
            ours = opened.get_tensor(n)
            assert torch.equal(ours.to(tensor.dtype), tensor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_each_block_of_a_folder_is_read_at_once(
    dtype: torch.dtype, load: Loader, folders: dict[str, Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Where it is loaded in the dtype that it has; else its norms come one by one."""
    made = convert(folders["cpm2"], tmp_path / "made", "int8", model="cpm2", dtype=torch.float16)
    reads: list[tuple[int, ...]] = []

    def count(method: Callable[..., Any]) -> Callable[..., Any]:
        def counting(stored: InFile, *given: torch.Tensor) -> Any:
            reads.append(stored.shape)
            return method(stored, *given)

        return counting

    for method in (InFile.read, InFile.read_into):
        monkeypatch.setattr(InFile, method.__name__, count(method))
    given = logits(model := load("cpm2", checkpoint=made, quantization="int8", dtype=dtype))
    num_runs = 1 + len(model.plan.blocks)
    assert len(reads) == num_runs if dtype == torch.float16 else len(reads) > 2 * num_runs
    monkeypatch.setattr(reading, "lying_in_files", lambda *_: (None, []))  # tensor by tensor
    assert torch.equal(
        logits(load("cpm2", checkpoint=made, quantization="int8", dtype=dtype)), given
    )


def test_config_json_tells_it_all(folders: dict[str, Path], tmp_path: Path) -> None:
    made = convert(folders["eva"], tmp_path / "to", WITH_MINIMUM)
    written = json.loads((made / "config.json").read_text())
    assert written["format"] == "bminf" and written["model"] == "eva"
    assert written["quantization"] == {"bits": 4, "group_size": 8, "has_minimum": True}
    assert written["config"]["is_attention_scaled"] is True


# ---- whole or not at all -------------------------------------------------------------------------


def test_progress_is_shown_of_what_takes_time(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {"done": 0}

    class Bar:
        def __init__(self, **more: Any) -> None:
            seen.update(more)

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: Any) -> None:
            pass

        def update(self, count: int) -> None:
            seen["done"] += count

    monkeypatch.setattr(sys.modules["bminf.checkpoint.folder"], "progress_bar", Bar)
    convert(folders["cpm1"], tmp_path / "to")
    assert seen["unit"] == "B" and 0 < seen["done"] <= seen["total"] < 1.2 * seen["done"]


@pytest.mark.parametrize("error", [CheckpointError("x"), KeyboardInterrupt(), MemoryError()])
def test_an_exception_leaves_nothing(
    error: BaseException, folders: dict[str, Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    module = sys.modules["bminf.models.convert"]
    original = module.tensors_of_block

    def failing(model: Any, block: str, *rest: Any) -> Iterator[Any]:
        for number, pair in enumerate(original(model, block, *rest)):
            if block and number == 3:
                raise error
            yield pair

    monkeypatch.setattr(module, "tensors_of_block", failing)
    (tmp_path / "to").mkdir()
    with pytest.raises(type(error)):
        convert(folders["cpm1"], tmp_path / "to" / "made")
    assert [*(tmp_path / "to").iterdir()] == []
    monkeypatch.undo()
    assert convert(folders["cpm1"], tmp_path / "to" / "made").is_dir()


KILLED = """
import sys, time
import bminf.models
module = sys.modules["bminf.models.convert"]
stage = sys.argv[3]

def stop(*_):
    print("half way", flush=True)
    while True:
        time.sleep(60)

if stage == "weights":
    original = module.tensors_of_block
    def slow(model, block, *rest):
        for number, pair in enumerate(original(model, block, *rest)):
            if block.endswith("1") and number == 2:
                stop()
            yield pair
    module.tensors_of_block = slow
else:
    module.shutil.copyfile = stop
module.convert(sys.argv[1], sys.argv[2], model="cpm2")
"""


@pytest.mark.parametrize("stage", ["weights", "files"])
def test_a_killed_run_leaves_nothing_that_looks_finished(
    stage: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    target = tmp_path / "made"
    program = [sys.executable, "-c", KILLED, str(folders["cpm2"]), str(target), stage]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as run:
        try:
            assert run.stdout is not None
            assert run.stdout.readline() == "half way\n"
        finally:
            run.send_signal(signal.SIGKILL)
    left = list(tmp_path.iterdir())
    assert [path.suffix for path in left] == [".partial"] and left[0].name.startswith(".made.")
    with pytest.raises(CheckpointError):
        bminf.models.CPM2(left[0], device="cpu")
    convert(folders["cpm2"], target, model="cpm2")
    with bminf.models.CPM2(target, device="cpu") as model:
        assert model.plan.blocks


# ---- what is refused -----------------------------------------------------------------------------


def test_a_destination_that_exists(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for name in ("full", "file"):
        with pytest.raises(ArgumentError, match=f"{name} exists already; name a folder"):
            convert(folders["cpm1"], tmp_path / name)
    assert (tmp_path / "full" / "mine").read_text() == "precious"
    (tmp_path / "empty").mkdir()
    assert (convert(folders["cpm1"], tmp_path / "empty") / "config.json").is_file()


def test_a_source_that_is_packed(folders: dict[str, Path], tmp_path: Path, load: Loader) -> None:
    packed = convert(folders["cpm1"], tmp_path / "packed", "int8")
    for quantization in ("int8", "int4", None):
        with pytest.raises(CheckpointError, match=r"is packed already, as Format\(bits=8"):
            convert(packed, tmp_path / "again", quantization)
    assert not (tmp_path / "again").exists()
    plain = convert(folders["cpm1"], tmp_path / "plain", None)
    again = convert(plain, tmp_path / "again", "int4")
    found = logits(load("cpm1", checkpoint=again, quantization="int8"))
    assert torch.equal(found, logits(load("cpm1", quantization="int4")))


def test_a_folder_stays_in_the_format_that_int4_was(
    folders: dict[str, Path], load: Loader, tmp_path: Path
) -> None:
    """Whose configuration says nothing of the bits of scales."""
    half = Format(4, 16)
    made = convert(folders["cpm1"], tmp_path / "made", half)
    assert json.loads((made / "config.json").read_text())["quantization"] == {
        "bits": 4, "group_size": 16, "has_minimum": False,
    }  # fmt: skip
    expected = logits(load("cpm1", quantization=half))
    for asked in ("int4", half):
        assert torch.equal(logits(load("cpm1", checkpoint=made, quantization=asked)), expected)
    with pytest.raises(ArgumentError, match="is packed as"):
        load("cpm1", checkpoint=made, quantization=Format(4, 32, scale_bits=8))


def test_a_packed_folder_is_taken_as_it_is(
    folders: dict[str, Path], load: Loader, tmp_path: Path
) -> None:
    made = convert(folders["cpm1"], tmp_path / "made", "int4")
    with pytest.raises(ArgumentError, match=r"is packed as Format\(bits=4.*leave quantization out"):
        load("cpm1", checkpoint=made, quantization=WITH_MINIMUM)
    with pytest.raises(ArgumentError, match="is packed as"):
        load("cpm1", checkpoint=made, quantization=None)
    with pytest.raises(CheckpointError, match="holds CPM-1, not CPM-2"):
        load("cpm2", checkpoint=made)
    config = json.loads((made / "config.json").read_text())
    del config["checksums"]  # as an earlier version wrote it
    for changed, words in [
        ({"config": None}, 'has no object "config"'),
        ({"quantization": {"bits": 5}}, "quantization is {'bits': 5}"),
        ({"quantization": None}, "lacks 'layers.0.attention.qkv.weight'"),
        ({"quantization": {"bits": 8}}, "lacks 'layers.0.attention.qkv.code_sum'"),
        ({"format_version": 2}, "format_version 2; this library reads 1"),
        ({"model": "gpt5"}, "holds 'gpt5', not CPM-1"),
    ]:
        (made / "config.json").write_text(json.dumps({**config, **changed}))
        with pytest.raises(CheckpointError, match=words):
            load("cpm1", checkpoint=made, quantization="int8")


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("layers.1.norm.bias", None, "lacks 'layers.1.norm.bias'"),
        ("layers.2.feed_forward.up.scale", lambda t: t[:-1], r"'.*up\.scale' in .* has the shape"),
        ("layers.2.feed_forward.up.scale", torch.Tensor.half, r"up\.scale' in .* is torch.float16"),
        ("layers.0.attention.out.bias", torch.Tensor.long, "is torch.int64; it must be floating"),
        (
            "layers.0.more.weight",
            lambda _: torch.ones(3),
            "has unexpected tensors: 'layers.0.more.weight'",
        ),
    ],
)
def test_a_damaged_folder_of_ours(
    name: str, change: Any, words: str, folders: dict[str, Path], load: Loader, tmp_path: Path
) -> None:
    made = convert(folders["cpm1"], tmp_path / "made")
    tensors = load_file(made / "model.safetensors")
    old = tensors.pop(name, torch.ones(1))
    if change is not None:
        tensors[name] = change(old)
    save_file(tensors, made / "model.safetensors", {"bminf.padding": "padding."})
    with pytest.raises(CheckpointError, match=words):
        load("cpm1", checkpoint=made, quantization="int8")


@pytest.mark.parametrize(
    ("name", "given", "error", "words"),
    [
        *(
            (name, *case)
            for name in ("cpm1", "glm10b")
            for case in [
                ({"quantization": "int3"}, ArgumentError, "quantization='int3'"),
                (
                    {"model": "gpt"},
                    ArgumentError,
                    "model='gpt'; accepted: cpm1, .*eva, glm130b, gl",
                ),
                ({"config": 3}, ArgumentError, "config is a int"),
                ({"tokenizer": 3}, ArgumentError, "tokenizer=3"),
                ({"tokenizer": "nowhere"}, CheckpointError, "there is no such"),
                (
                    {"dtype": torch.int8},
                    ArgumentError,
                    r"dtype=torch\.int8; accepted: torch\.float",
                ),
            ]
        ),
        ("cpm1", {"dtype": "float16"}, ArgumentError, "dtype='float16'; accepted"),
        ("cpm1", {"model": "eva"}, CheckpointError, "holds CPM-1, not EVA"),
        ("glm10b", {"model": "glm130b"}, CheckpointError, "holds GLM-10B, not GLM-130B"),
        ("glm10b", {"model": "cpm1"}, CheckpointError, "holds GLM-10B.*, not CPM-1"),
        ("glm10b", {"head_quantization": "int3"}, ArgumentError, "head_quantization='int3'"),
        ("glm10b", {"config": {"num_attention_heads": 5}}, CheckpointError, "64 is not a multiple"),
        (
            "cpm1",
            {"head_quantization": "int8"},
            ArgumentError,
            "is for GLM-130B, GLM-10B, BLOOM; leave",
        ),
    ],
    ids=lambda x: str(x)[:30],
)
def test_arguments(
    name: str, given: dict[str, Any], error: Any, words: str, folders: dict[str, Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    with pytest.raises(error, match=words):
        convert(folders[name], tmp_path / "to", **given)
    assert list(tmp_path.iterdir()) == []


# ---- hub ids -------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Hub id -> folder, or an error; "asked" is what was asked for."""
    import huggingface_hub

    known: dict[str, Any] = {"asked": []}

    def download(repo_id: str, **options: Any) -> str:
        known["asked"].append((repo_id, options))
        if isinstance(known[repo_id], Exception):
            raise known[repo_id]
        return str(known[repo_id])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return known


def test_a_hub_id(hub: dict[str, Any], tmp_path: Path) -> None:
    hub["thu-coai/EVA2.0-base"] = tiny("eva").write_huggingface(tmp_path / "snapshot")
    with bminf.models.EVA("thu-coai/EVA2.0-base", device="cpu") as model:
        expected = logits(model)
    made = convert("thu-coai/EVA2.0-base", tmp_path / "to")
    with bminf.models.EVA(made, device="cpu") as model:
        assert torch.equal(logits(model), expected)
    patterns = hub["asked"][0][1]["allow_patterns"]
    assert {"*.json", "*.bin", "*.safetensors", "*.model", "*.txt"} <= set(patterns)
    assert not any(pattern.endswith((".py", ".h5")) for pattern in patterns)


def test_a_hub_id_that_nobody_knows_needs_its_model(hub: dict[str, Any], tmp_path: Path) -> None:
    hub["someone/cpm"] = tiny("cpm1").write_original(tmp_path / "snapshot")
    with pytest.raises(ArgumentError, match="there is no 'someone/cpm'; for a hub id, say which"):
        convert("someone/cpm", tmp_path / "to")
    assert convert("someone/cpm", tmp_path / "to", model="cpm1").is_dir()


def test_a_hub_that_does_not_answer(hub: dict[str, Any], tmp_path: Path) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    for error in (
        LocalEntryNotFoundError("the network is off\nand more"),
        ConnectionError("no route to host"),
        OSError("No space left on device"),
    ):
        hub["thu-coai/EVA1.0"] = error
        words = f"the hub does not give it: {str(error).splitlines()[0]}; accepted: .*EVA2.0-large"
        with pytest.raises(CheckpointError, match=words):
            bminf.models.EVA("thu-coai/EVA1.0", device="cpu")
        with pytest.raises(CheckpointError, match=words):
            convert("thu-coai/EVA1.0", tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_a_folder_comes_before_a_hub_id(
    hub: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny("cpm1").write_original(tmp_path / "TsinghuaAI" / "CPM-Generate")
    monkeypatch.chdir(tmp_path)
    with bminf.models.CPM1("TsinghuaAI/CPM-Generate", device="cpu") as model:
        assert model.config.hidden_size == CPM1_CONFIG["hidden_size"]
    assert hub["asked"] == []
