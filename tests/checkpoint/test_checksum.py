"""Checksums of blocks: whatever changes in the bytes, or changes places, is noticed."""

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bminf.checkpoint import checksum as module
from bminf.checkpoint.checksum import PIECE_BYTES, Checksum, checksum

NBYTES = 300_001  # many periods, and neither whole words nor a whole period
WORD, PAGE = 8, 4096
PERIOD_BYTES = 1021 * WORD


def random_bytes(nbytes: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)


def exchanged(data: torch.Tensor, first: int, second: int, length: int) -> torch.Tensor:
    """Two spans that do not overlap have changed places."""
    changed = data.clone()
    changed[first : first + length] = data[second : second + length]
    changed[second : second + length] = data[first : first + length]
    return changed


RANDOM = random_bytes(NBYTES)
RANDOM_SUM = checksum(RANDOM)


@given(at=st.integers(0, NBYTES - 1), bit=st.integers(0, 7))
def test_a_flipped_bit_is_noticed(at: int, bit: int) -> None:
    RANDOM[at] ^= 1 << bit
    found = checksum(RANDOM)
    RANDOM[at] ^= 1 << bit
    assert found != RANDOM_SUM == checksum(RANDOM)


@given(st.data())
def test_spans_that_change_places_are_noticed(data: st.DataObject) -> None:
    """Of any length at any place; half of them at a distance at which words share sums."""
    length = data.draw(st.integers(1, 40_000))
    first = data.draw(st.integers(0, NBYTES - 2 * length))
    most = NBYTES - length - first
    distances = [p * n for p in (1021 * WORD, 1031 * WORD) for n in range(1, 40)]
    allowed = [d for d in distances if length <= d <= most]
    distance = data.draw(
        st.sampled_from(allowed) if allowed and data.draw(st.booleans())
        else st.integers(length, most)
    )  # fmt: skip
    changed = exchanged(RANDOM, first, first + distance, length)
    assert (checksum(changed) == RANDOM_SUM) is torch.equal(changed, RANDOM)


@pytest.mark.parametrize("distance", [1, 2, 511, 512, 1020, 1021, 1022, 1031, 2042, 10 * 1021])
def test_words_that_change_places_are_noticed(distance: int) -> None:
    """Also where all others are alike, and only the highest bit differs."""
    for value in (1, -(1 << 63)):
        words = torch.zeros(20_000, dtype=torch.int64)
        words[3] = value
        other = torch.zeros(20_000, dtype=torch.int64)
        other[3 + distance] = value
        assert checksum(words.view(torch.uint8)) != checksum(other.view(torch.uint8))


@pytest.mark.parametrize("distance", [1, 2, 7, 1021])
@pytest.mark.parametrize("places", [(3, 5), (0, 511), (100, 101)])
def test_pages_that_change_places_are_noticed(distance: int, places: tuple[int, int]) -> None:
    """Of matrices with few numbers, as the identity; their sums are alike, and their places not."""
    words = torch.zeros(1024 * PAGE // WORD, dtype=torch.int64)
    words[places[0]] = words[distance * PAGE // WORD + places[1]] = 1
    data = words.view(torch.uint8)
    assert checksum(data) != checksum(exchanged(data, 0, distance * PAGE, PAGE))


def test_pieces_that_change_places_are_noticed() -> None:
    data = random_bytes(2 * PIECE_BYTES + 5)
    changed = exchanged(data, 0, PIECE_BYTES, PIECE_BYTES)
    assert checksum(changed) != checksum(data)


@pytest.mark.parametrize("nbytes", [0, 1, 7, 8, 9, PERIOD_BYTES, PIECE_BYTES + 3])
def test_zeros_that_are_added_or_missing_are_noticed(nbytes: int) -> None:
    sums = {checksum(torch.zeros(nbytes + more, dtype=torch.uint8)) for more in range(20)}
    assert len(sums) == 20


def test_in_which_pieces_it_is_read_does_not_matter() -> None:
    data = random_bytes(3 * PIECE_BYTES + 77)
    whole = checksum(data)
    for sizes in ([1, 1, 1, 1], [2, 2], [1, 3]):
        found = Checksum()
        for piece in data.split(
            [PIECE_BYTES * n for n in sizes[:-1]] + [len(data) - PIECE_BYTES * sum(sizes[:-1])]
        ):
            found.update(piece.numpy())
        assert found.hexdigest() == whole
    with pytest.raises(AssertionError, match="comes last"):
        found.update(data.numpy())


def test_the_checksum_of_a_file_that_is_kept_stays_the_same() -> None:
    """What was written by an older version has to be read by a newer one."""
    data = bytes(range(256)) * 40 + b"tail"
    words = [data[i : i + 8].ljust(8, b"\0") for i in range(0, len(data), 8)]
    digest = hashlib.blake2b(digest_size=16)
    for period in (1021, 1031):
        sums = [
            sum(int.from_bytes(word, "little") for word in words[i::period]) % 2**64
            for i in range(period)
        ]
        digest.update(b"".join(one.to_bytes(8, "little") for one in sums))
    digest.update(len(data).to_bytes(8, "little"))
    assert checksum(torch.frombuffer(bytearray(data), dtype=torch.uint8)) == digest.hexdigest()


def test_words_of_a_piece_share_one_sum_at_most() -> None:
    first, second = module._PERIODS
    assert PIECE_BYTES // WORD <= first * second
    assert all(period % n for period in (first, second) for n in range(2, 33))  # primes
