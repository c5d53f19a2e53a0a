"""safetensors: as strict a reader as the library's, and a writer of aligned, contiguous blocks."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from saved_files import DTYPES

from bminf.checkpoint.checksum import Checksum
from bminf.checkpoint.safetensors_file import (
    read_safetensors,
    run_of,
    write_safetensors,
)
from bminf.checkpoint.stored import Scaled
from bminf.errors import ArgumentError, CheckpointError
from bminf.layout import Layout, TensorSpec

Blocks = dict[str, dict[str, torch.Tensor]]


def layouts_of(blocks: Blocks) -> dict[str, Layout]:
    def spec(tensor: torch.Tensor) -> TensorSpec:
        return TensorSpec(tuple(tensor.shape), tensor.stride(), tensor.dtype)

    return {
        block: Layout.of({name: spec(t) for name, t in tensors.items()}, keep_addresses=False)
        for block, tensors in blocks.items()
    }


def giver(blocks: Blocks) -> Callable[[str], Iterator[tuple[str, torch.Tensor]]]:
    """Tensors of a block, in another order than that of the layout."""
    return lambda block: reversed(blocks[block].items())


def make_blocks() -> Blocks:
    def block(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return {
            "qweight": torch.randint(-127, 128, (6, 48), dtype=torch.int8),
            "scale": torch.rand(6),
            "empty": torch.empty(0, 3, dtype=torch.float16),
            "norm.weight": torch.randn(33).half(),
            "number": torch.tensor(3),
        }

    return {"": {"head": torch.randn(5, 7)}, "layers.0": block(0), "none": {}, "layers.1": block(1)}


def write(path: Path, blocks: Blocks, **metadata: str) -> Path:
    write_safetensors(path, layouts_of(blocks), giver(blocks), metadata)
    return path


def named(blocks: Blocks) -> dict[str, torch.Tensor]:
    return {
        f"{block}.{name}" if block else name: tensor
        for block, tensors in blocks.items()
        for name, tensor in tensors.items()
    }


def test_what_was_written_is_read_by_us_and_by_the_library(tmp_path: Path) -> None:
    """Which takes no holes: paddings are tensors to it."""
    blocks = make_blocks()
    path = write(tmp_path / "model.safetensors", blocks, format="bminf", note="ä")
    found = read_safetensors(path)
    assert set(found) == set(named(blocks))
    with safe_open(path, "pt") as file:
        for name, tensor in named(blocks).items():
            for read in (found[name].read(), file.get_tensor(name)):
                assert read.dtype == tensor.dtype and torch.equal(read, tensor), name
            assert found[name].offset % 256 == 0
        assert {"format": "bminf", "note": "ä"}.items() <= file.metadata().items()
        paddings = set(file.keys()) - set(named(blocks))
    assert paddings and all(name.startswith("padding.") for name in paddings)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_each_block_is_one_read_of_its_blob(tmp_path: Path) -> None:
    blocks = make_blocks()
    layouts = layouts_of(blocks)
    path = write(tmp_path / "model.safetensors", blocks)
    tensors = read_safetensors(path)
    for block, layout in layouts.items():
        run = run_of(tensors, block, layout)
        assert (run is None) == (block == "none")
        blob = torch.empty(layout.extent, dtype=torch.uint8)
        if run is None:
            continue
        run.read_into(blob)
        for name in layout.specs:
            view = layout.view(blob, name)
            assert torch.equal(view, blocks[block][name]), (block, name)


def test_a_byte_that_changed_is_an_error_or_belongs_to_nothing(tmp_path: Path) -> None:
    """What has changed is either noticed, or is in no block: in paddings, or in how a checksum is
    called that is not looked for then."""
    blocks = make_blocks()
    path = write(tmp_path / "a.safetensors", blocks)
    content, expected = path.read_bytes(), named(blocks)
    spans = {
        name: (t.offset, t.offset + t.span_bytes) for name, t in read_safetensors(path).items()
    }
    for at in range(0, len(content), 31):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        try:
            found = {name: tensor.read() for name, tensor in read_safetensors(path).items()}
        except CheckpointError as error:
            assert str(path) in str(error)
            continue
        assert not [name for name, (start, end) in spans.items() if start <= at < end]
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), (at, name)


def test_all_of_a_block_is_compared_before_any_of_it_is_given(tmp_path: Path) -> None:
    blocks = make_blocks()
    path = write(tmp_path / "a.safetensors", blocks)
    tensors = read_safetensors(path)
    changed = bytearray(path.read_bytes())
    changed[tensors["layers.1.norm.weight"].offset] ^= 1
    path.write_bytes(changed)
    tensors = read_safetensors(path)
    for name, tensor in tensors.items():
        if name.startswith("layers.1.") and 0 not in tensor.shape:
            with pytest.raises(CheckpointError, match=f"where the tensor '{name}' lies, some are"):
                tensor.read()
        else:
            assert torch.equal(tensor.read(), named(blocks)[name])


def test_a_block_is_compared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.safetensors", make_blocks())
    counted: list[int] = []
    update = Checksum.update
    monkeypatch.setattr(
        Checksum, "update", lambda self, data: (counted.append(len(data)), update(self, data))
    )
    tensors = read_safetensors(path)
    for _ in range(2):
        for tensor in tensors.values():
            tensor.read()
    assert sum(counted) == sum(layout.extent for layout in layouts_of(make_blocks()).values())


def test_a_file_without_checksums_is_read(tmp_path: Path) -> None:
    """Of an earlier version, or of another library."""
    blocks = make_blocks()
    path = write(tmp_path / "a.safetensors", blocks)
    content = path.read_bytes()
    header_bytes = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + header_bytes])
    for key in ("bminf.blocks", "bminf.header"):
        del header["__metadata__"][key]
    raw(path, header, content[8 + header_bytes :])
    for name, tensor in read_safetensors(path).items():
        assert torch.equal(tensor.read(), named(blocks)[name])


@pytest.mark.parametrize(
    "blocks", ["x", "0-1", "0-1:12", "0-99999999:" + "0" * 32, "5-1:" + "0" * 32]
)
def test_checksums_of_no_meaning_are_refused(blocks: str, tmp_path: Path) -> None:
    header = {"__metadata__": {"bminf.blocks": blocks}, "a": entry(0, 4)}
    path = raw(tmp_path / "a.safetensors", header, b"abcd")
    with pytest.raises(CheckpointError, match=r"a\.safetensors (is damaged|has .* for a checksum)"):
        read_safetensors(path)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_each_dtype_goes_there_and_back(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = torch.arange(5).to(dtype)
    path = write(tmp_path / "a.safetensors", {"b": {"t": tensor}})
    for read in (read_safetensors(path)["b.t"].read(), safetensors.torch.load_file(path)["b.t"]):
        assert read.dtype == dtype
        assert torch.equal(read.view(torch.uint8), tensor.view(torch.uint8))


def test_files_of_the_library_are_read(tmp_path: Path) -> None:
    saved = {"a": torch.randn(3, 4), "b": torch.randn(5).half(), "c": torch.ones(3).bool()}
    saved["padding.0"] = torch.zeros(3, dtype=torch.uint8)  # theirs: it is a tensor like any
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file(saved, path, metadata={"format": "pt"})
    found = read_safetensors(path)
    assert set(found) == set(saved)
    for name, tensor in saved.items():
        assert torch.equal(found[name].read(), tensor)


@pytest.mark.parametrize(
    "dtype",
    (
        "BOOL U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ I16 U16 F16 BF16 I32 U32 F32 "
        "C64 F64 I64 U64"
    ).split(),
)
def test_each_type_of_the_format_has_the_values_that_the_library_reads(
    dtype: str, tmp_path: Path
) -> None:
    data = bytes(range(1, 65)) if dtype != "BOOL" else bytes([0, 1] * 32)
    header = {"a": entry(0, 64, dtype=dtype)}
    for size in (1, 2, 4, 8):  # bytes of an element: one of them is right
        header["a"]["shape"] = [2, 32 // size]
        path = raw(tmp_path / f"{size}.safetensors", header, data)
        try:
            expected = safetensors.torch.load_file(path)["a"]
        except SafetensorError:
            continue
        read = read_safetensors(path)["a"].read()
        assert (read.dtype, read.shape) == (expected.dtype, expected.shape)
        assert torch.equal(read.view(torch.uint8), expected.view(torch.uint8))
        return
    raise AssertionError("the library reads none")


@pytest.mark.parametrize(("dtype", "bits"), [("F4", 4), ("F6_E2M3", 6), ("F6_E3M2", 6)])
def test_a_type_that_cannot_be_read_is_an_error_only_where_it_is_needed(
    dtype: str, bits: int, tmp_path: Path
) -> None:
    header = {"a": entry(0, bits, [2, 4], dtype), "b": entry(bits, bits + 4, [4])}
    path = raw(tmp_path / "a.safetensors", header, bytes(bits) + b"abcd")
    with safe_open(path, "pt") as file:  # the library takes it, too
        assert set(file.keys()) == {"a", "b"}
    found = read_safetensors(path)
    assert bytes(found["b"].read()) == b"abcd"
    assert found["a"].shape == (2, 4) and not found["a"].dtype.is_floating_point
    for use in (found["a"].read, lambda: found["a"].rows(0, 1), lambda: found["a"].columns(0, 1)):
        with pytest.raises(CheckpointError, match=f"'a' .of the type {dtype}, which cannot"):
            use()


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3"])
def test_elements_that_end_within_a_byte_are_refused(dtype: str, tmp_path: Path) -> None:
    for nbytes in (1, 2, 3):
        path = raw(tmp_path / "a.safetensors", {"a": entry(0, nbytes, [3], dtype)}, bytes(nbytes))
        with pytest.raises(CheckpointError, match=f"dtype {dtype}, but {nbytes} bytes"):
            read_safetensors(path)
        with pytest.raises(SafetensorError), safe_open(path, "pt"):
            pass


def raw(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(begin: Any, end: Any, shape: Any = None, dtype: Any = "U8") -> dict[str, Any]:
    shape = [end - begin] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


BAD = {
    "overlap": ({"a": entry(0, 4), "b": entry(2, 6)}, 6, "starts at byte"),
    "hole": ({"a": entry(0, 4), "b": entry(5, 6)}, 6, "starts at byte"),
    "hole at the beginning": ({"a": entry(1, 4)}, 4, "starts at byte"),
    "short file": ({"a": entry(0, 8)}, 7, "truncated"),
    "long file": ({"a": entry(0, 4)}, 5, "truncated"),
    "wrong size": ({"a": entry(0, 4, [3])}, 4, "but 4 bytes"),
    "wrong size of the dtype": ({"a": entry(0, 4, [4], "F32")}, 4, "but 4 bytes"),
    "backwards": ({"a": entry(4, 0, [4])}, 4, "but -4 bytes"),
    "unknown dtype": ({"a": entry(0, 4, dtype="F5")}, 4, "no dtype"),
    "dtype that is a list": ({"a": entry(0, 4, dtype=["U8"])}, 4, "no dtype"),
    "negative shape": ({"a": entry(0, 4, [-4, -1])}, 4, "no dtype"),
    "shape of floats": ({"a": entry(0, 4, [4.0])}, 4, "no dtype"),
    "shape of bools": ({"a": entry(0, 1, [True])}, 1, "no dtype"),
    "shape that is a number": ({"a": entry(0, 4, 4)}, 4, "no dtype"),
    "many dimensions": ({"a": entry(0, 1, [1] * 65)}, 1, "no dtype"),
    "huge shape": ({"a": entry(0, 4, [2**59] * 64)}, 4, "'a'"),
    "huge offsets": ({"a": entry(2**63, 2**63 + 4, [4])}, 4, "no dtype"),
    "three offsets": ({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1, 1]}}, 1, "two"),
    "entry that is a list": ({"a": [1]}, 0, "no dtype"),
    "twice": (b'{"a":' + json.dumps(entry(0, 4)).encode() + b',"a":'
              + json.dumps(entry(0, 4)).encode() + b"}", 4, "comes twice"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, 0, "__metadata__"),
    "metadata that is a list": ({"__metadata__": []}, 0, "__metadata__"),
    "no JSON": (b"{nonsense", 0, "is not JSON"),
    "not UTF-8": (b'{"\xff": 1}', 0, "is not JSON"),
    "a list": ([], 0, "a JSON object is needed"),
    "deep nest": (b'{"a":' + b"[" * 10**5, 0, "is not JSON"),
    "long number": (b'{"a":' + b"1" * 10**4 + b"}", 0, "is not JSON|no dtype"),
}  # fmt: skip


WHERE_WE_ARE_STRICTER = {"twice", "many dimensions"}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_header_is_an_error(case: str, tmp_path: Path) -> None:
    header, data_bytes, message = BAD[case]
    path = raw(tmp_path / "a.safetensors", header, b"\0" * data_bytes)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_safetensors(path)
    assert str(path) in str(caught.value)
    if case not in WHERE_WE_ARE_STRICTER:
        with pytest.raises((SafetensorError, TypeError)), safe_open(path, "pt"):
            pass


def test_a_pointer_of_git_lfs_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is a git-lfs pointer .* pull"):
        read_safetensors(path)


@pytest.mark.parametrize(
    ("length", "message"), [(10**8 + 1, "at most"), (2**64 - 1, "at most"), (10**7, "truncated")]
)
def test_a_header_that_is_too_long_is_an_error(length: int, message: str, tmp_path: Path) -> None:
    path = raw(tmp_path / "a.safetensors", {}, length=length)
    with pytest.raises(CheckpointError, match=message):
        read_safetensors(path)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ({"a": {"b.c": torch.ones(1)}, "a.b": {"c": torch.ones(1)}}, "'a.b.c' is taken"),
        ({"": {"padding.0": torch.ones(1)}}, "is taken"),
        ({"": {"__metadata__": torch.ones(1)}}, "is taken"),
        ({"a": {"t": torch.ones(3, 4).t()}}, r"'a.t' is .* strides \(1, 4\)"),
        ({"a": {"t": torch.ones(1).expand(3)}}, r"strides \(0,\)"),
        ({"a": {"t": torch.ones(1, dtype=torch.complex128)}}, "complex128"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(
    blocks: Blocks, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ArgumentError, match=message):
        write(tmp_path / "a.safetensors", blocks)
    assert list(tmp_path.iterdir()) == []


def test_layouts_that_are_not_aligned_or_overlap_are_refused(tmp_path: Path) -> None:
    two = {
        name: TensorSpec((4,), (1,), torch.float32, start)
        for name, start in zip("ab", (64, 80), strict=True)
    }
    with pytest.raises(ArgumentError, match="keep_addresses=False"):
        write_safetensors(tmp_path / "a", {"": Layout.of(two)}, lambda _: [], {})
    tied = {name: TensorSpec((4,), (1,), torch.float32, 64) for name in "ab"}
    layout = Layout.of(tied, keep_addresses=False)
    with pytest.raises(ArgumentError, match="overlaps"):
        write_safetensors(tmp_path / "a", {"": layout}, lambda _: [], {})
    with pytest.raises(ArgumentError, match=r"bminf\.padding"):
        write_safetensors(tmp_path / "a", {}, lambda _: [], {"bminf.padding": "x"})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([("t", torch.ones(2, 3)), ("u", torch.ones(1))], "'b.u' came twice, or is not"),
        ([("t", torch.ones(2, 3)), ("t", torch.ones(2, 3))], "'b.t' came twice"),
        ([("t", torch.ones(3))], r"'b.t' came as torch.float32 \(3,\)"),
        ([("t", torch.ones(2, 3).half())], "float16"),
        ([], "'b.t' did not come"),
    ],
)
def test_other_tensors_than_the_layout_has_are_refused(
    given: list[tuple[str, torch.Tensor]], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"what was there before")
    layouts = layouts_of({"b": {"t": torch.ones(2, 3)}})
    with pytest.raises(ArgumentError, match=message):
        write_safetensors(path, layouts, lambda _: given, {})
    assert path.read_bytes() == b"what was there before"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def interrupted(block: str) -> Iterator[tuple[str, torch.Tensor]]:
        yield "t", torch.ones(2, 3)
        raise KeyboardInterrupt

    layouts = layouts_of({"b": {"t": torch.ones(2, 3)}})
    with pytest.raises(KeyboardInterrupt):
        write_safetensors(tmp_path / "a.safetensors", layouts, interrupted, {})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no_such_folder.* cannot be written"):
        write(tmp_path / "no_such_folder" / "a.safetensors", make_blocks())


def test_each_tensor_is_let_go_of_before_the_next_is_asked_for(tmp_path: Path) -> None:
    import weakref

    alive: list[weakref.ref[torch.Tensor]] = []

    def one_at_a_time(block: str) -> Iterator[tuple[str, torch.Tensor]]:
        for name in ("a", "b", "c"):
            assert [ref for ref in alive if ref() is not None] == []
            tensor = torch.ones(3)
            alive.append(weakref.ref(tensor))
            holder = [(name, tensor)]
            del tensor
            yield holder.pop()

    blocks: Blocks = {"x": {name: torch.ones(3) for name in "abc"}}
    write_safetensors(tmp_path / "a.safetensors", layouts_of(blocks), one_at_a_time, {})
    assert len(alive) == 3


def test_tensors_that_lie_otherwise_are_no_run(tmp_path: Path) -> None:
    blocks = make_blocks()
    path = write(tmp_path / "a.safetensors", blocks)
    tensors = read_safetensors(path)
    block = blocks["layers.1"]
    for other in (
        {**block, "scale": torch.rand(100)},
        {**block, "scale": torch.rand(6).half()},
        {**block, "more": torch.rand(6)},
        {**block, "qweight": block["qweight"].T.contiguous().T},
        dict(reversed(block.items())),
    ):
        assert run_of(tensors, "layers.1", layouts_of({"b": other})["b"]) is None
    assert run_of(tensors, "layers.2", layouts_of({"b": block})["b"]) is None
    scaled = {**tensors, "layers.1.scale": Scaled(tensors["layers.1.scale"], 0.5)}
    assert run_of(scaled, "layers.1", layouts_of(blocks)["layers.1"]) is None
    safetensors.torch.save_file(named(blocks), path)
    packed = read_safetensors(path)  # without the gaps of alignment
    assert run_of(packed, "layers.1", layouts_of(blocks)["layers.1"]) is None
    assert run_of(packed, "", layouts_of(blocks)[""]) is not None  # one tensor is a run anyway
