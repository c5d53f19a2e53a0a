"""Copies of tensors between pages that nobody may touch."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


@contextmanager
def guarded(
    tensors: list[torch.Tensor | None], at_end: bool
) -> Iterator[list[torch.Tensor | None]]:
    """Each tensor ends where a forbidden page begins, or else begins where one ends.

    What is read beyond ends this process: that is how the test fails.
    """
    given, kept = [], []
    for tensor in tensors:
        copy, memory = (None, None) if tensor is None else _copy(tensor, at_end)
        given.append(copy)
        kept.append(memory)
    yield given
    for memory in kept:
        if memory is not None:
            _allow(memory, mmap.PROT_READ | mmap.PROT_WRITE)


def _copy(tensor: torch.Tensor, at_end: bool) -> tuple[torch.Tensor, mmap.mmap]:
    size, page = tensor.numel() * tensor.element_size(), mmap.PAGESIZE
    inner = -(-size // page) * page
    memory = mmap.mmap(-1, inner + 2 * page)
    offset = page + (inner - size if at_end else 0)
    copy = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=offset)
    copy = copy.view(tensor.dtype).view(tensor.shape).copy_(tensor)
    _allow(memory, 0)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    _libc.mprotect(start + page, inner, mmap.PROT_READ | mmap.PROT_WRITE)
    return copy, memory


def _allow(memory: mmap.mmap, protection: int) -> None:
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert _libc.mprotect(start, len(memory), protection) == 0
