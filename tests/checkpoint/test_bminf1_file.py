"""checkpoint.pt of BMInf 1.x, a format with no magic number."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_files import FORMS
from tiny_zoo import bminf1_bytes, save
from work import executed_lines

from bminf.checkpoint.bminf1_file import read_bminf1
from bminf.errors import CheckpointError


def tree() -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "layers": {
            str(n): {
                "project": {
                    "weight": torch.randint(-127, 128, (3, 5), dtype=torch.int8),
                    "scale": torch.rand(3).half(),
                },
            }
            for n in range(11)
        },
        "norm": {"weight": torch.randn(7).half(), "bias": torch.randn(7).half()},
        "embedding": {"weight": torch.randn(4, 6).half()},
    }


def test_every_tensor_has_its_dotted_name(tmp_path: Path) -> None:
    path, given = tmp_path / "checkpoint.pt", tree()
    path.write_bytes(bminf1_bytes(given))
    found = read_bminf1(path)
    names = [f"layers.{n}.project.{kind}" for n in range(11) for kind in ("weight", "scale")]
    assert list(found) == [*names, "norm.weight", "norm.bias", "embedding.weight"]
    for name, stored in found.items():
        expected: Any = given
        for word in name.split("."):
            expected = expected[word]
        read = stored.read()
        assert stored.shape == tuple(expected.shape) and stored.dtype == expected.dtype
        assert torch.equal(read, expected) and read.data_ptr() % read.dtype.itemsize == 0


@pytest.mark.parametrize("form", FORMS)
def test_a_file_of_torch_save_says_what_to_name_it(form: str, tmp_path: Path) -> None:
    path = save({"w": torch.ones(2)}, tmp_path / "checkpoint.pt", form)
    with pytest.raises(
        CheckpointError, match=r"written by torch\.save.*name it pytorch_model\.bin"
    ):
        read_bminf1(path)


def parameter(name: bytes, shape: list[int], nbytes: int, code: int, data: bytes) -> bytes:
    head = struct.pack("<2II", 1, 0, len(name)) + name
    return head + struct.pack(f"<B{len(shape)}IIB", len(shape), *shape, nbytes, code) + data


def layers(depth: int) -> bytes:
    one = struct.pack("<2I", 0, 1) + struct.pack("<I", 1) + b"a"
    return one * depth + parameter(b"w", [1], 1, 0, b"\0")


BAD = {
    "empty": b"",
    "zeros": b"\0" * 1000,
    "ones": b"\xff" * 1000,
    "text": b"a web page or some other text, long enough for several numbers",
    "no tensors": struct.pack("<2I", 0, 0),
    "more behind": parameter(b"w", [2], 2, 0, b"12") + b"\0",
    "more bytes than the shape": parameter(b"w", [2], 3, 0, b"123"),
    "more bytes than the file": parameter(b"w", [2**30], 2**30, 0, b"12"),
    "unknown dtype": parameter(b"w", [2], 2, 2, b"12"),
    "many dimensions": parameter(b"w", [1] * 9, 1, 0, b"1"),
    "name that is not UTF-8": parameter(b"\xff", [1], 1, 0, b"1"),
    "name of no bytes": parameter(b"", [1], 1, 0, b"1"),
    "long name": parameter(b"w" * 1025, [1], 1, 0, b"1"),
    "many layers": struct.pack("<2I", 0, 2**32 - 1) + b"\0" * 100,
    "many parameters": struct.pack("<2I", 2**32 - 1, 0) + b"\0" * 100,
    "deep": layers(10**4),
    "the same name twice": struct.pack("<2I", 2, 0)
    + 2 * parameter(b"w", [1], 1, 0, b"1")[8:],
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_anything_else_is_an_error(case: str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(BAD[case])
    with pytest.raises(CheckpointError, match=r"BMInf 1\.x|truncated") as caught:
        read_bminf1(path)
    assert str(path) in str(caught.value)


def test_a_tree_of_some_depth_is_read(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(layers(8))
    assert list(read_bminf1(path)) == ["a.a.a.a.a.a.a.a.w"]


def test_garbage_of_any_size_is_refused_at_once(tmp_path: Path) -> None:
    path, generator = tmp_path / "checkpoint.pt", random.Random(0)

    def refuse() -> None:
        with pytest.raises(CheckpointError):
            read_bminf1(path)

    for _ in range(50):
        path.write_bytes(generator.randbytes(2**16))
        assert executed_lines(refuse) < 10_000
