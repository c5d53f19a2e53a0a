"""Torch files written tensor by tensor are torch's own in all that matters to their readers."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_files import DTYPES, Given, same

from bminf.checkpoint import torch_writer
from bminf.checkpoint.stored import InFile, Rows, nbytes_of
from bminf.checkpoint.torch_file import read_torch_file, weights_of
from bminf.checkpoint.torch_writer import Saved, write_torch_file
from bminf.errors import ArgumentError


def tensors() -> dict[str, torch.Tensor]:
    return {
        **{f"of {dtype}": torch.arange(7).to(dtype) for dtype in DTYPES},
        "number": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "matrix": torch.randn(5, 7).half(),
        "transposed": torch.randn(5, 7).t(),
        "expanded": torch.randn(4, 1).expand(4, 3),
        "cube": torch.randn(2, 3, 4),
    }


def write(path: Path, beside: dict[str, Any] | None = None) -> dict[str, Any]:
    """Both what is to be found."""
    found = tensors()
    saved = {name: Saved(Given(tensor)) for name, tensor in found.items()}
    write_torch_file(path, {"module": saved, **(beside or {})})
    return {"module": {name: t.contiguous() for name, t in found.items()}, **(beside or {})}


def equal(loaded: Any, expected: Any) -> None:
    assert list(loaded) == list(expected)
    for name, tensor in expected["module"].items():
        ours = loaded["module"][name]
        assert ours.dtype == tensor.dtype and ours.shape == tensor.shape, name
        assert ours.is_contiguous() and torch.equal(ours, tensor), name


@pytest.mark.parametrize("sizes_of_64_bits_from", [None, 8])
def test_torch_loads_it_as_weights_alone_and_our_reader_reads_it(
    sizes_of_64_bits_from: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sizes_of_64_bits_from is not None:
        monkeypatch.setattr(torch_writer, "_ZIP64_FROM", sizes_of_64_bits_from)
    path = tmp_path / "a.pt"
    expected = write(path)
    for is_mapped in (False, True):
        equal(torch.load(path, weights_only=True, mmap=is_mapped), expected)
    assert same(read_torch_file(path), expected) == len(tensors())
    check_alignment(path)


def test_what_lies_beside_the_tensors_is_kept(tmp_path: Path) -> None:
    beside = {"iteration": 2**40, "list": [1.5, None, True, "text", (1, {})], "size": -1}
    expected = write(tmp_path / "a.pt", beside)
    loaded = torch.load(tmp_path / "a.pt", weights_only=True)
    equal(loaded, expected)
    assert {name: loaded[name] for name in beside} == beside


def check_alignment(path: Path) -> int:
    """That every entry begins at a multiple of 64, with a right checksum; how many there are."""
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        with open(path, "rb") as file:
            for entry in archive.infolist():
                file.seek(entry.header_offset + 26)
                name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
                assert (entry.header_offset + 30 + name + extra) % 64 == 0, entry.filename
                assert entry.extra == b"", "only the header before the data needs it"
        return len(archive.infolist())


def test_entries_are_named_and_aligned_as_torchs_own(tmp_path: Path) -> None:
    path = tmp_path / "mp_rank_00_model_states.pt"
    write(path)
    names = zipfile.ZipFile(path).namelist()
    data = [f"{path.stem}/data/{n}" for n in range(len(tensors()))]
    assert names == [f"{path.stem}/{n}" for n in ("data.pkl", "byteorder")] + data + [
        f"{path.stem}/version"
    ]
    assert check_alignment(path) == len(names)


def test_a_tensor_is_read_piece_by_piece(tmp_path: Path) -> None:
    sizes, whole = [], torch.randn(3 * 2**12, 2**7)  # 6 MiB
    stored = Rows((Given(whole[:5000]), Given(whole[5000:])))
    write_torch_file(tmp_path / "a.pt", {"w": Saved(stored)}, sizes.append)
    assert sum(sizes) == nbytes_of(stored) == whole.nbytes
    assert max(sizes) <= 2**20
    assert torch.equal(torch.load(tmp_path / "a.pt", weights_only=True)["w"], whole)


def test_a_tensor_in_two_places_is_written_once(tmp_path: Path) -> None:
    tied = Saved(Given(torch.randn(30)))
    write_torch_file(tmp_path / "a.pt", {"a": tied, "b": tied})
    loaded = torch.load(tmp_path / "a.pt", weights_only=True)
    assert loaded["a"].data_ptr() == loaded["b"].data_ptr()


def test_a_tensor_of_a_file_is_written_from_it(tmp_path: Path) -> None:
    torch.save({"w": torch.randn(6, 8)[:, 1:4]}, tmp_path / "a.pt")
    stored = weights_of(read_torch_file(tmp_path / "a.pt"), tmp_path / "a.pt")["w"]
    assert isinstance(stored, InFile) and stored.stride == (8, 1)
    write_torch_file(tmp_path / "b.pt", Saved(stored))
    assert torch.equal(torch.load(tmp_path / "b.pt", weights_only=True), stored.read())


def test_a_dtype_that_torch_files_do_not_name_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"'w' in a file is torch\.float8_e5m2"):
        Saved(Given(torch.ones(2).to(torch.float8_e5m2)))
