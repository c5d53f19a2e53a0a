"""The compiled kernels of the CPU: found, or why not, and at which level."""

from __future__ import annotations

import logging
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import bminf
from bminf.cpu import library
from bminf.errors import ArgumentError

LIBRARY = library._LIBRARY
needs_kernels = pytest.mark.skipif(not LIBRARY.exists(), reason="the kernels are not compiled")


@pytest.fixture(autouse=True)
def _asked_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is found is found once a process."""
    monkeypatch.delenv("BMINF_CPU_LEVEL", raising=False)
    _forget()
    yield
    _forget()


def _forget() -> None:
    library.kernels.cache_clear()
    library._found.cache_clear()


def levels() -> list[str]:
    return list(library.levels_of(library.open_library(LIBRARY)))


def test_where_there_is_a_compiler_the_kernels_are_used() -> None:
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    info = bminf.cpu_info()
    assert info.level != "none", f"{info.reason}; run: python setup.py build_ext --inplace"
    assert info.library == str(LIBRARY) and info.reason is None
    assert info.num_threads == torch.get_num_threads()


@needs_kernels
def test_every_processor_has_the_portable_level_and_the_best_comes_first() -> None:
    assert levels()[-1] == "portable"
    assert bminf.cpu_info().level == levels()[0]


@needs_kernels
def test_a_level_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    for level in levels():
        monkeypatch.setenv("BMINF_CPU_LEVEL", level)
        _forget()
        found = library.kernels()
        assert found is not None and found.level == bminf.cpu_info().level == level


def test_none_is_a_level_without_a_word(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("BMINF_CPU_LEVEL", "none")
    assert library.kernels() is None and not caplog.records
    assert bminf.cpu_info() == library.CpuInfo(
        "none", torch.get_num_threads(), None, "BMINF_CPU_LEVEL=none"
    )


@needs_kernels
def test_a_level_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BMINF_CPU_LEVEL", "sse9")
    with pytest.raises(ArgumentError, match=r"this processor has: .*portable, none"):
        library.kernels()
    monkeypatch.setattr(library, "levels_of", lambda _: {"portable": 2})
    monkeypatch.setenv("BMINF_CPU_LEVEL", "avx512")
    with pytest.raises(ArgumentError, match="'avx512'; this processor has: portable, none"):
        bminf.cpu_info()


def test_kernels_that_are_missing_are_missed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library, "_LIBRARY", tmp_path / "_kernels.so")
    with caplog.at_level(logging.WARNING, "bminf"):
        assert library.kernels() is None and library.kernels() is None
    (record,) = caplog.records
    assert "_kernels.so, the compiled kernels" in record.message
    assert "install a C++ compiler" in record.message
    assert bminf.cpu_info().level == "none"


def test_a_level_of_kernels_that_are_missing_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "_LIBRARY", tmp_path / "_kernels.so")
    monkeypatch.setenv("BMINF_CPU_LEVEL", "avx2")
    with pytest.raises(ArgumentError, match="BMINF_CPU_LEVEL='avx2', but there is no"):
        library.kernels()


def test_a_file_that_is_no_library_is_said_to_be_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "_kernels.so"
    path.write_bytes(b"no library")
    monkeypatch.setattr(library, "_LIBRARY", path)
    assert "cannot be loaded" in str(bminf.cpu_info().reason)


@needs_kernels
def test_kernels_of_another_version_are_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    others = {"PRODUCT": struct.Struct("=17q"), "_ARGUMENTS": {"bminf_cpu_of_tomorrow": []}}
    for name, other in others.items():
        with monkeypatch.context() as patched:
            patched.setattr(library, name, other)
            _forget()
            assert "another version" in str(bminf.cpu_info().reason)
