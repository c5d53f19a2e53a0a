"""Both forms of torch's files: the values, the shapes, and files that are something else."""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from saved_files import DTYPES, FORMS, same, write_pickle
from tiny_zoo import save

from bminf.checkpoint.torch_file import read_torch_file, weights_of
from bminf.errors import CheckpointError

# Saved by torch's newer functions.
NEW_DTYPES = [
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
    *(getattr(torch, n) for n in ("float8_e8m0fnu", "float4_e2m1fn_x2") if hasattr(torch, n)),
    torch.uint16, torch.uint32, torch.uint64, torch.complex32,
]  # fmt: skip


class Tagged(torch.Tensor):
    """A subclass whose values may be anything."""


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_dtype_is_read(dtype: torch.dtype, form: str, tmp_path: Path) -> None:
    saved = {"a": torch.arange(7).to(dtype), "b": torch.tensor(1).to(dtype)}
    assert same(read_torch_file(save(saved, tmp_path / "a.pt", form)), saved) == 2


@pytest.mark.parametrize("form", FORMS)
def test_strides_offsets_and_shared_storages_are_kept(form: str, tmp_path: Path) -> None:
    whole = torch.randn(6, 8)
    saved = {
        "whole": whole,
        "transposed": whole.t(),
        "columns": whole[:, 2:5],
        "every_other": whole.view(-1)[1::3],
        "row": whole[4],
        "empty": torch.empty(0, 3),
        "number": torch.tensor(2.5),
        "permuted": torch.randn(2, 3, 4).permute(2, 0, 1),
        "expanded": torch.randn(4, 1).expand(4, 3),
    }
    found = read_torch_file(save(saved, tmp_path / "a.pt", form))
    assert same(found, saved) == len(saved)
    assert isinstance(found, dict)
    assert found["row"].offset - found["whole"].offset == 4 * 8 * 4


@pytest.mark.parametrize("form", FORMS)
def test_containers_come_as_they_were_saved(form: str, tmp_path: Path) -> None:
    saved = [
        OrderedDict(a=torch.ones(2), b=(1, 2.5, True, None, "text", b"bytes", -(2**70))),
        {(1, "a"): [torch.zeros(1), {2, 3}], 4: {}},
        (),
    ]
    assert same(read_torch_file(save(saved, tmp_path / "a.pt", form)), saved) == 2


@pytest.mark.parametrize("form", FORMS)
def test_modules_state_dicts_and_parameters_are_read(form: str, tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    path = save(module.state_dict(keep_vars=True), tmp_path / "a.pt", form)
    weights = weights_of(read_torch_file(path), path)
    state = module.state_dict()
    assert list(weights) == list(state)
    for name, tensor in state.items():
        assert torch.equal(weights[name].read(), tensor)
        assert weights[name].where == f"{name!r} in {path}"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", NEW_DTYPES, ids=str)
@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_dtypes_of_newer_torch_are_read(dtype: torch.dtype, form: str, tmp_path: Path) -> None:
    """torch saves them by the bytes and a dtype; its own reader of the old form knows none."""
    whole = torch.arange(48, dtype=torch.uint8).view(dtype).view(2, -1)
    noted = whole.clone()
    noted.note = "an attribute"  # type: ignore[attr-defined]
    saved = {"whole": whole, "column": whole[:, 1], "transposed": whole.t(), "noted": noted}
    path = save(saved, tmp_path / "a.pt", form)
    for name, stored in weights_of(read_torch_file(path), path).items():
        read = stored.read()
        assert (stored.dtype, stored.shape) == (dtype, tuple(saved[name].shape))
        assert (read.dtype, read.stride()) == (dtype, saved[name].stride())
        assert raw_values(read) == raw_values(saved[name])


def raw_values(tensor: torch.Tensor) -> list[bytes]:
    """Those of each element, in order; not all dtypes can be compared, or copied."""
    data = tensor.untyped_storage()
    size = tensor.element_size()
    begin = tensor.storage_offset()
    places = torch.arange(data.nbytes() // size).as_strided(tensor.shape, tensor.stride(), begin)
    return [bytes(data[place * size : (place + 1) * size]) for place in places.flatten().tolist()]


@pytest.mark.parametrize("form", FORMS)
def test_a_tensor_of_a_device_without_storages_is_that_on_the_cpu(
    form: str, tmp_path: Path
) -> None:
    """As torch saves what was on an XLA device."""

    class Moved:
        def __init__(self, dtype: torch.dtype) -> None:
            self.dtype = dtype

        def __reduce__(self) -> object:
            rebuild = torch._utils._rebuild_device_tensor_from_cpu_tensor
            return rebuild, (torch.arange(3.0), self.dtype, "xla:0", False)

    path = save({"w": Moved(torch.float32)}, tmp_path / "a.pt", form)
    assert weights_of(read_torch_file(path), path)["w"].read().tolist() == [0, 1, 2]
    path = save({"w": Moved(torch.float16)}, tmp_path / "b.pt", form)
    with pytest.raises(CheckpointError, match="another device"):
        weights_of(read_torch_file(path), path)


@pytest.mark.parametrize("form", FORMS)
def test_attributes_of_a_tensor_are_left_out(form: str, tmp_path: Path) -> None:
    """A flag that training code left, a buffer's mark, or an object of any class at all."""
    saved = {name: torch.randn(2, 3) for name in ("flag", "object", "plain")}
    saved["flag"].model_parallel = True  # type: ignore[attr-defined]
    saved["object"].owner = Path("somewhere")  # type: ignore[attr-defined]
    saved["buffer"] = (
        torch.nn.Buffer(torch.randn(3)) if hasattr(torch.nn, "Buffer") else saved["flag"]
    )
    saved["parameter"] = torch.nn.Parameter(torch.randn(3))
    saved["parameter"].shared = saved["flag"]  # type: ignore[attr-defined]
    path = save(saved, tmp_path / "a.pt", form)
    found = weights_of(read_torch_file(path), path)
    assert {name: stored.read().tolist() for name, stored in found.items()} == {
        name: tensor.tolist() for name, tensor in saved.items()
    }


def test_tensors_of_the_zip_form_are_mapped(tmp_path: Path) -> None:
    path = save({"w": torch.randn(100)}, tmp_path / "a.pt", "zip")
    tensor = weights_of(read_torch_file(path), path)["w"].read()
    address = tensor.data_ptr()
    spans = [
        [int(end, 16) for end in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(path))
    ]
    assert any(begin <= address < end for begin, end in spans)


def test_writing_to_a_tensor_does_not_reach_the_file(tmp_path: Path) -> None:
    path = save({"w": torch.zeros(4)}, tmp_path / "a.pt", "zip")
    before = path.read_bytes()
    stored = weights_of(read_torch_file(path), path)["w"]
    stored.read().fill_(1)
    assert path.read_bytes() == before and not stored.read().any()


def test_a_tensor_that_is_not_aligned_is_copied(tmp_path: Path) -> None:
    saved = {f"w{n}": torch.randn(5) for n in range(8)} | {"bytes": torch.ones(3, dtype=torch.int8)}
    odd = 0
    for length in range(4):
        saved["text"] = "x" * length  # type: ignore[assignment]
        path = save(saved, tmp_path / "a.pt", "old")
        found = read_torch_file(path)
        assert isinstance(found, dict)
        for name in ("w0", "w7"):
            read = found[name].read()
            odd += found[name].offset % 4 != 0
            assert torch.equal(read, saved[name]) and read.data_ptr() % 4 == 0
    assert odd


def test_sizes_beyond_4_gib_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    large = torch.empty(2**32 + 2**16, dtype=torch.uint8)  # never touched: it takes no memory
    with torch.serialization.skip_data():  # and no room on the disk
        torch.save({"large": large, "small": torch.ones(3)}, path)
    weights = weights_of(read_torch_file(path), path)
    assert weights["large"].shape == large.shape and weights["small"].offset > 2**32
    with open(path, "r+b") as file:
        file.seek(weights["small"].offset)
        file.write(torch.tensor([1.0, 2.0, 3.0]).numpy().tobytes())
    assert weights["small"].read().tolist() == [1.0, 2.0, 3.0]
    assert weights["large"].read()[-1] == 0


@pytest.mark.parametrize("form", FORMS)
def test_a_file_that_shrinks_after_it_was_opened_is_an_error(form: str, tmp_path: Path) -> None:
    path = save({"w": torch.randn(10**5)}, tmp_path / "a.pt", form)
    stored = weights_of(read_torch_file(path), path)["w"]
    os.truncate(path, 10**5)
    with pytest.raises(CheckpointError, match=r"the tensor 'w' should lie at bytes") as caught:
        stored.read()
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ([torch.ones(1)], "holds a list where the weights should be"),
        (None, "holds None where"),
        ({"w": None}, "holds None under the name 'w'"),
        ({"w": 1.5}, "holds a float under the name 'w'"),
        ({"w": {"x": torch.ones(1)}}, "holds a dict under the name 'w'"),
        ({1: torch.ones(1)}, "names a tensor by a int"),
        ({"w": torch.ones(2, device="meta")}, "_rebuild_meta_tensor_no_storage"),
        ({"w": torch.ones(2).as_subclass(Tagged)}, "Tagged"),
        ({"w": torch.ones(2, dtype=torch.complex64).conj()}, "conjugate"),
        ({"w": torch.ones(2, 2).to_sparse()}, "_rebuild_sparse_tensor"),
        ({"w": torch.ones(2).untyped_storage()}, "UntypedStorage"),
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_weights_that_are_none_are_named(
    saved: object, message: str, form: str, tmp_path: Path
) -> None:
    path = save(saved, tmp_path / "a.pt", form)
    with pytest.raises(CheckpointError, match=message) as caught:
        weights_of(read_torch_file(path), path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore:.*quantize", "ignore:TypedStorage")
def test_a_quantized_tensor_is_named_and_what_is_behind_it_is_found(
    form: str, tmp_path: Path
) -> None:
    quantized = torch.quantize_per_tensor(torch.ones(5), 1.0, 0, torch.qint32)
    path = save({"beside": quantized, "module": {"w": torch.randn(3)}}, tmp_path / "a.pt", form)
    found = read_torch_file(path)
    assert isinstance(found, dict)
    assert torch.equal(found["module"]["w"].read(), torch.load(path)["module"]["w"])
    with pytest.raises(CheckpointError, match=r"_rebuild_qtensor\(\)\) under the name 'beside'"):
        weights_of({"beside": found["beside"]}, path)


def tar() -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for name in ("storages", "tensors", "pickle"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    return data.getvalue()


def zipped(**entries: bytes) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, content in entries.items():
            archive.writestr(f"a/{name}", content)
    return data.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"\n<!DOCTYPE html><html>404</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git-lfs pointer"),
        (tar(), "tar file"),
        (b"\x1f\x8b\x08\x00", "compressed"),
        (b"\x10" + b"\0" * 7 + b'{"a":{}}        ', "safetensors"),
        (b"GGUF" + b"\0" * 20, "it starts with b'GGUF"),
        (zipped(x=b"1"), "not one of torch.save"),
        (zipped(**{"data.pkl": b"N.", "constants.pkl": b"N."}), "TorchScript"),
        (b"\x80\x02K\x01.", "a pickle, but not one of torch.save"),
        (b"\x80\x02" + b"\xff" * 20, "no pickle"),
        (b"PK\x03\x04" + b"\0" * 40, "damaged or truncated, .* not a zip file"),
    ],
)
def test_a_file_of_another_kind_says_what_it_looks_like(
    content: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_torch_file(path)
    assert str(path) in str(caught.value)


def test_a_compressed_archive_says_so(tmp_path: Path) -> None:
    source = save({"w": torch.zeros(100)}, tmp_path / "a.pt", "zip")
    target = tmp_path / "b.pt"
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(CheckpointError, match=r"is compressed .*save it again with torch\.save"):
        read_torch_file(target)


def test_a_big_endian_file_says_so(tmp_path: Path) -> None:
    path = save({"w": torch.zeros(3)}, tmp_path / "a.pt", "zip")
    with zipfile.ZipFile(path) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, data in entries.items():
            new.writestr(name, b"big" if name.endswith("byteorder") else data)
    with pytest.raises(CheckpointError, match="little-endian"):
        read_torch_file(path)
    path = write_pickle(b"\x80\x02}.", tmp_path / "b.pt", "old")
    path.write_bytes(
        path.read_bytes().replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89")
    )
    with pytest.raises(CheckpointError, match="little-endian"):
        read_torch_file(path)


def test_a_damaged_pickle_fails_its_checksum(tmp_path: Path) -> None:
    path = save({"weight": torch.ones(3)}, tmp_path / "a.pt", "zip")
    path.write_bytes(path.read_bytes().replace(b"weight", b"height"))
    with pytest.raises(CheckpointError, match="checksum"):
        read_torch_file(path)


def resized(path: Path, old: torch.Tensor, shape: tuple[int, int], stride: tuple[int, int]) -> None:
    """Give the (3, 5) tensor in an old-form file another shape and strides."""
    before, after = b"K\x03K\x05\x86", b"K\x05K\x01\x86"
    data = path.read_bytes()
    assert before in data and after in data and old.shape == (3, 5)
    new = [b"K%cK%c\x86" % pair for pair in (shape, stride)]
    path.write_bytes(data.replace(before, new[0]).replace(after, new[1]))


@pytest.mark.parametrize(
    ("shape", "stride", "message"),
    [
        ((4, 5), (5, 1), "beyond its storage"),
        ((3, 5), (6, 1), "beyond its storage"),
        ((250, 250), (0, 0), "larger than the whole file"),
    ],
)
def test_a_tensor_beyond_its_storage_is_an_error(
    shape: tuple[int, int], stride: tuple[int, int], message: str, tmp_path: Path
) -> None:
    tensor = torch.randn(3, 5)
    path = save({"w": tensor}, tmp_path / "a.pt", "old")
    resized(path, tensor, (3, 5), (5, 1))
    assert same(read_torch_file(path), {"w": tensor}) == 1
    resized(path, tensor, shape, stride)
    with pytest.raises(CheckpointError, match=message):
        read_torch_file(path)


def test_a_view_of_a_storage_in_files_of_old_torch_is_found(tmp_path: Path) -> None:
    tensor = torch.arange(6.0)
    path = save({"w": tensor}, tmp_path / "a.pt", "old")
    # The last item of the persistent id: None today, (key, first element, number of elements) then.
    part = b"X\x01\x00\x00\x00vK\x02K\x03\x87"
    data = path.read_bytes()
    at = data.index(b"K\x06N") + 2
    data = data[:at] + part + data[at + 1 :]
    size = data.index(b"K\x06\x85", at)  # the shape (6,) becomes (3,)
    path.write_bytes(data[:size] + b"K\x03" + data[size + 2 :])
    found = read_torch_file(path)
    assert isinstance(found, dict) and torch.equal(found["w"].read(), tensor[2:5])
    assert torch.equal(torch.load(path)["w"], tensor[2:5])
    path.write_bytes(path.read_bytes().replace(part, b"X\x01\x00\x00\x00vK\x04K\x03\x87"))
    with pytest.raises(CheckpointError, match="beyond"):
        read_torch_file(path)


@pytest.mark.parametrize(
    ("shape", "stride"),
    [((2,), (1, 1)), ((-1,), (1,)), ((2**61,), (1,)), ((2,) * 65, (0,) * 65), (2, 1)],
)
def test_impossible_tensors_are_refused(shape: object, stride: object, tmp_path: Path) -> None:
    class Impossible:
        def __reduce__(self) -> object:
            storage = torch.ones(8).storage()
            return torch._utils._rebuild_tensor_v2, (storage, 0, shape, stride, False, {})

    path = save({"w": Impossible()}, tmp_path / "a.pt", "zip")
    with pytest.raises(CheckpointError, match=r"impossible shape, stride or offset|2 strides"):
        read_torch_file(path)


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "nul"])
def test_what_is_no_file_is_an_error(kind: str, tmp_path: Path) -> None:
    path = tmp_path / ("a\0b" if kind == "nul" else "a")
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_torch_file(path)
