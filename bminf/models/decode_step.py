"""Passes of one token of each row that are the same work each time, in memory that stays.

What differs between two of them, where rows lie and how long they are, is on the device: such a
pass can be captured as a CUDA graph, and run again with one call in place of some hundred. There is
one for each number of rows and of keys, rounded up: rows that are missing are copies of the first
one, which write what that writes, and keys that are missing are not seen.

On a CPU, and where nothing is captured, the same passes run as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from bminf.checks import check_bool
from bminf.cuda.launcher import fused_by_default
from bminf.engine.rows import Feed
from bminf.errors import ArgumentError
from bminf.layers.packed_cache import Span
from bminf.layers.step_cache import Places
from bminf.ops.attention import MAX_HEAD_DIM
from bminf.ops.rows import KERNEL_COLUMNS

logger = logging.getLogger("bminf")

LEAST_KEYS = 256
"""Of a pass, as many as the kernel of attention gives to one block."""


@dataclass(frozen=True)
class Step:
    """The memory of a pass.

    x: (1, B, C), the embeddings of its tokens.   own: where its rows are, with these tokens.
    prompts: of a pool of their own; None without one.   positions: (1, ..., B) int64, of a network
    that is told them; None for others.
    """

    x: torch.Tensor
    own: Places
    prompts: Places | None = None
    positions: torch.Tensor | None = None


class StepRows(Protocol):
    """What the rows of a model say of such a pass. All spans are of one token."""

    def new_step(self, num_rows: int, num_keys: int) -> Step:
        """Memory for so many rows of at most so many keys."""
        ...

    def fill_step(self, step: Step, feeds: Sequence[Feed], spans: Sequence[Span]) -> None:
        """Say what the tokens are, and where their rows."""
        ...

    def run_step(self, step: Step) -> torch.Tensor:
        """The logits (B, V) float32: no choice in it depends on what `step` holds."""
        ...


class DecodeSteps:
    """Passes of one token of each of some rows, each made when it is first asked for.

    max_rows: that memory was set aside for.   capture: makes a graph of a pass that has run once;
    None runs it as it is.
    """

    def __init__(self, rows: StepRows, max_rows: int, capture: Capture | None = None) -> None:
        self._rows, self.max_rows, self._capture = rows, max_rows, capture
        self._steps: dict[tuple[int, int], Step] = {}
        self._graphs: dict[tuple[int, int], Any] = {}

    def logits(self, feeds: Sequence[Feed], spans: Sequence[Span]) -> torch.Tensor:
        """(R, V) float32 behind the token of each feed; may be overwritten by the next pass."""
        num_rows, num_keys = len(feeds), max(span.num_keys for span in spans)
        size = power_of_two(num_rows), rounded_up(num_keys)
        if size not in self._steps:
            self._steps[size] = self._rows.new_step(*size)
        step, rows = self._steps[size], [*range(num_rows), *[0] * (size[0] - num_rows)]
        self._rows.fill_step(step, [feeds[row] for row in rows], [spans[row] for row in rows])
        return self._run(size, step)[:num_rows]

    def _run(self, size: tuple[int, int], step: Step) -> torch.Tensor:
        if size in self._graphs:
            logits: torch.Tensor = self._graphs[size]()
            return logits
        logits = self._rows.run_step(step)
        if self._capture is not None:
            self._keep_graph(size, step, self._capture)
        return logits

    def _keep_graph(self, size: tuple[int, int], step: Step, capture: Capture) -> None:
        """Capture a pass; where that fails, those that have no graph go on without, said once."""
        try:
            self._graphs[size] = capture(lambda: self._rows.run_step(step))
        except Exception as error:  # of a driver, of torch, of a kernel
            self._capture = None
            logger.warning(
                "a CUDA graph could not be captured, so tokens are computed without, which takes "
                "the host longer: %s",
                error,
            )


class Capture:
    """Makes CUDA graphs of a device, which share their memory: no two of them run at once."""

    def __init__(self, device: torch.device) -> None:
        # torch's own stream for captures is of the current device, which may be another one.
        self._stream = torch.cuda.Stream(device)
        self._pool: Any = None

    def __call__(self, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """What runs `run` again, and gives the memory of its result.

        run: has been called before, so that its kernels are loaded.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            y = run()
        self._pool = self._pool or graph.pool()

        def replay() -> torch.Tensor:
            graph.replay()
            return y

        return replay


def check_graphs(
    is_on: bool,
    device: torch.device,
    is_deterministic: bool = False,
    uses_fused_kernels: bool = True,
    num_ranks: int = 1,
) -> None:
    """Raise ArgumentError where cuda_graph=True asks for what there is not."""
    check_bool("cuda_graph", is_on)
    if not is_on:
        return
    reasons = {
        f"needs a GPU, and the model is for {device}": device.type != "cuda",
        "does not go with deterministic=True": is_deterministic,
        "does not go with fused_kernels=False": not uses_fused_kernels,
        f"does not go with {num_ranks} ranks": num_ranks > 1,
        "does not go with BMINF_FUSED_KERNELS=0": not fused_by_default(),
    }
    for reason, is_given in reasons.items():
        if is_given:
            raise ArgumentError(f"cuda_graph=True {reason}; leave cuda_graph out")


def check_heads(head_dim: int) -> None:
    """Raise ArgumentError for heads that the kernel of attention does not take, and what stands in
    its place asks the device for lengths, which no graph can."""
    if head_dim % KERNEL_COLUMNS or head_dim > MAX_HEAD_DIM:
        raise ArgumentError(
            f"cuda_graph=True needs heads of a multiple of {KERNEL_COLUMNS} columns up to "
            f"{MAX_HEAD_DIM}, and those of this model have {head_dim}; leave cuda_graph out"
        )


def num_sizes(max_rows: int, max_keys: int) -> int:
    """How many passes there are of up to so many rows and keys."""
    num_row_sizes = (max_rows - 1).bit_length() + 1
    return num_row_sizes * (rounded_up(max_keys) // LEAST_KEYS).bit_length()


def rounded_up(num_keys: int) -> int:
    """A power of two: keys that a row has not cost next to nothing, another graph memory."""
    return max(LEAST_KEYS, power_of_two(num_keys))


def power_of_two(count: int) -> int:
    """The least that is not below it."""
    return 1 << (count - 1).bit_length()
