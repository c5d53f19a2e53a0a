"""Checksums of the bytes of a block, for little beside the time that it takes to read them.

CRCs and cryptographic hashes take longer than the read. Here the bytes are added up, as words of 64
bits, and the few sums are hashed. A piece of 4 MiB has two sets of sums: word i is counted in sum
i mod 1021 of the one and in sum i mod 1031 of the other. These are primes, and a piece has fewer
words than their product: two words with a common sum in one set have none in the other, so that
words that change places are noticed as are those that change.

Always noticed: whatever happens inside 16,408 bytes, and two spans of up to 8,168 bytes that change
places, whole words apart. (The change of the words, as coefficients of a polynomial: one that
leaves all sums is a multiple of (x^1021 - 1)(x^1031 - 1) / (x - 1), of degree 2051.) Anything else
is missed as a hash misses it, but for what is computed to be: this is no signature.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

PIECE_BYTES = 2**22
"""What is added up at once: little enough to be in a cache still, where it was just read to."""

Bytes = np.ndarray[Any, Any]
_PERIODS = (1021, 1031)
_WORD_BYTES = 8
_DIGEST_BYTES = 16


@dataclass(frozen=True)
class Span:
    """Some bytes of a file, from `start` to before `end`, and what their checksum has to be."""

    start: int
    end: int
    checksum: str


class Checksum:
    """Of bytes that come in order, a piece at a time."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=_DIGEST_BYTES)
        self._nbytes = 0

    def update(self, data: Bytes) -> None:
        """Count more bytes in: (bytes,) uint8, without gaps.

        Whole pieces of PIECE_BYTES; only the last may be shorter.
        """
        assert self._nbytes % PIECE_BYTES == 0, "a piece that is not whole comes last"
        for piece in pieces_of(data):
            words = _words(piece)
            for period in _PERIODS:
                self._hash.update(_sums(words, period).data)
        self._nbytes += len(data)

    def hexdigest(self) -> str:
        """32 digits."""
        whole = self._hash.copy()
        whole.update(self._nbytes.to_bytes(8, "little"))
        return whole.hexdigest()


def checksum(data: torch.Tensor) -> str:
    """Of (bytes,) uint8 on the CPU, without gaps: 32 hexadecimal digits."""
    found = Checksum()
    found.update(data.numpy())
    return found.hexdigest()


def pieces_of(data: Bytes) -> Iterator[Bytes]:
    """`data`, PIECE_BYTES at a time. As an array: where a default device is set, torch takes as
    long to cut a tensor as to add up half a piece."""
    return (data[start : start + PIECE_BYTES] for start in range(0, len(data), PIECE_BYTES))


def _words(data: Bytes) -> Bytes:
    """As uint64; zeros fill up the last one."""
    if missing := -len(data) % _WORD_BYTES:
        data = np.concatenate([data, np.zeros(missing, dtype=np.uint8)])
    return data.view(np.uint64)


def _sums(words: Bytes, period: int) -> Bytes:
    """(period,) uint64, modulo 2**64: of each period's first words, of its second ones, ..."""
    whole, rest = np.split(words, [len(words) // period * period])
    sums: Bytes = whole.reshape(-1, period).sum(axis=0)
    sums[: len(rest)] += rest
    return sums
