"""The decode loop: a pass and a sampling step in turn, for all architectures."""

from __future__ import annotations

from collections.abc import Collection, Generator
from typing import Protocol

import torch

from bminf.checks import check_ids
from bminf.engine.sampling import Sampler
from bminf.errors import ArgumentError


class Decoder(Protocol):
    """One batch: a model, and the caches of what its rows have been fed."""

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The logits (B, V) after the last of `input_ids`, (B, T) int64; caches grow by T."""
        ...

    def select(self, rows: torch.Tensor) -> None:
        """Keep the caches of `rows`, (n,) int64, in this order.

        A beam search repeats rows; the decode loop leaves out rows that have ended.
        """
        ...


def decode(
    decoder: Decoder,
    start: torch.Tensor,
    sampler: Sampler,
    stop_ids: Collection[int],
    max_new_tokens: int,
) -> Generator[list[int | None], None, None]:
    """The tokens of all rows, a step at a time.

    decoder: not fed with anything of `start` yet.   start: (B, T) int64, its first input.
    sampler: for the B rows.   stop_ids: a row ends with one of them.   max_new_tokens: at least 1.
    Yields the token of each row, None for rows that ended before. A stop token is yielded, as the
    last one of its row. Ends when all rows have, or after `max_new_tokens` steps. A step is one
    pass, and one synchronization with its device.
    Raises ArgumentError, before the first pass; UnsupportedModelError (see Sampler.draw).

    The next pass starts only when the next token is asked for, so a caller that stops early leaves
    nothing running. Starting it ahead would hide the few microseconds in which the host reads a
    token, but delay every token by a pass on a CPU, and compute one pass in vain at the end;
    streamed blocks are copied during the sampling anyhow.
    """
    check_ids("stop_ids", stop_ids, sampler.vocab_size)
    if len(start) != sampler.num_rows:
        raise ArgumentError(
            f"start has {len(start)} rows, the sampler {sampler.num_rows}; give it one prompt a row"
        )
    return _steps(decoder, start, sampler, frozenset(stop_ids), max_new_tokens)


def _steps(
    decoder: Decoder,
    input_ids: torch.Tensor,
    sampler: Sampler,
    stop_ids: frozenset[int],
    max_new_tokens: int,
) -> Generator[list[int | None], None, None]:
    num_rows = len(input_ids)
    active_rows = list(range(num_rows))  # the row of `start` that each row of the caches belongs to
    for _ in range(max_new_tokens):
        tokens = _pass(decoder, input_ids, sampler)
        sampled = tokens.tolist()
        yield _scatter(sampled, active_rows, num_rows)
        unfinished = [i for i, token in enumerate(sampled) if token not in stop_ids]
        if not unfinished:
            return
        if len(unfinished) < len(sampled):
            rows = torch.tensor(unfinished, device=tokens.device)
            decoder.select(rows)
            sampler.select(rows)
            tokens, active_rows = tokens[rows], [active_rows[i] for i in unfinished]
        input_ids = tokens.unsqueeze(1)


@torch.no_grad()  # here, and not around a yield: it would reach into the caller's code
def _pass(decoder: Decoder, input_ids: torch.Tensor, sampler: Sampler) -> torch.Tensor:
    return sampler.draw(decoder(input_ids))


def _scatter(sampled: list[int], active_rows: list[int], num_rows: int) -> list[int | None]:
    step: list[int | None] = [None] * num_rows
    for row, token in zip(active_rows, sampled, strict=True):
        step[row] = token
    return step
