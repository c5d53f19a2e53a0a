"""A file that is cut off or has bits flipped is an error or is read; nothing else ever happens."""

from __future__ import annotations

import argparse
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from saved_files import read_all
from tiny_zoo import bminf1_bytes, save
from work import executed_lines

from bminf.checkpoint.bminf1_file import read_bminf1
from bminf.checkpoint.safetensors_file import read_safetensors
from bminf.checkpoint.torch_file import read_torch_file
from bminf.errors import CheckpointError

MOST_BYTES = 2**24  # far above what reading such a file takes, far below what a wrong size asks for


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {f"layers.{n}.weight": torch.randn(5, 7).half() for n in range(8)}


def training_state() -> dict[str, object]:
    np.random.seed(0)
    return {
        "module": weights(),
        "args": argparse.Namespace(lr=0.1),
        "numpy": np.random.get_state(),
        "rng": torch.get_rng_state()[:100].clone(),
    }


def write_without_checksum(path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        save(training_state(), path, "zip")
    finally:
        torch.serialization.set_crc32_options(True)


def write_bminf1(path: Path) -> None:
    layers = {f"{n}": {"project": {"weight": torch.ones(5, 7).half()}} for n in range(8)}
    path.write_bytes(bminf1_bytes({"layers": layers}))


FORMATS: dict[str, tuple[Callable[[Path], object], Callable[[Path], object]]] = {
    "zip": (write_without_checksum, read_torch_file),
    "old": (lambda path: save(training_state(), path, "old"), read_torch_file),
    "safetensors": (lambda path: safetensors.torch.save_file(weights(), path), read_safetensors),
    "bminf1": (write_bminf1, read_bminf1),
}


@pytest.mark.parametrize("form", FORMATS)
def test_a_truncated_file_is_an_error(form: str, tmp_path: Path) -> None:
    write, read = FORMATS[form]
    path = tmp_path / "a.pt"
    write(path)
    assert read_all(read(path)) > 0
    content = path.read_bytes()
    for length in range(0, len(content), 97):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError) as caught:
            read(path)
        assert str(path) in str(caught.value), length


def flipped(content: bytes, generator: random.Random) -> bytes:
    """Some bits, bytes or words of the file changed; sizes and offsets are the most dangerous."""
    changed = bytearray(content)
    for _ in range(generator.choice([1, 1, 2, 8])):
        at = generator.randrange(len(changed))
        kind = generator.randrange(3)
        if kind == 0:
            changed[at] ^= 1 << generator.randrange(8)
        elif kind == 1:
            changed[at] = generator.choice([0, 1, 0x7F, 0x80, 0xFF, generator.randrange(256)])
        else:
            changed[at : at + 4] = generator.choice([b"\xff" * 4, b"\0" * 4, b"\xff\xff\xff\x7f"])
    return bytes(changed)


@pytest.mark.parametrize("form", FORMATS)
def test_flipped_bits_are_an_error_or_are_read_with_little_work(form: str, tmp_path: Path) -> None:
    write, read = FORMATS[form]
    path, generator = tmp_path / "a.pt", random.Random(0)
    write(path)
    content, num_errors = path.read_bytes(), 0

    def read_or_refuse() -> None:
        nonlocal num_errors
        try:
            assert read_all(read(path)) <= 100 * len(content)
        except CheckpointError as error:
            num_errors += 1
            assert str(path) in str(error)

    undamaged = executed_lines(read_or_refuse)
    tracemalloc.start()
    try:
        for _ in range(200):
            path.write_bytes(flipped(content, generator))
            assert executed_lines(read_or_refuse) < 2 * undamaged
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()
    assert 10 < num_errors < 200, "the damage was not seen, or nothing was ever read"
