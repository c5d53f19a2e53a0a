"""One GLM that reads texts, writes and chooses: loaded once, each task checked and timed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import model_run
from benchmarks.card import streamed_bytes
from benchmarks.glm_model import Loaded, Sizes, loaded, planned
from benchmarks.harness import Result, Settings, Variant, Work
from benchmarks.model_run import Copies, Facts, digest
from bminf.layers.kv_cache import KVCache
from bminf.models.glm_text import blank, pack_choices, position_tensor
from bminf.offload.backends import backend_for, free_budget
from bminf.units import format_bytes

_ID = 1  # of all tokens that are read, as in the authors' benchmark


@dataclass(frozen=True)
class Task:
    """What is timed.

    kind: "encode" reads `length` tokens in one pass, half of the cells of the mask hidden, and
    scores what comes next; "decode" writes `length` tokens, a pass each, from an empty text on, the
    likeliest each time; "cola" reads `rows` texts of `length` tokens, each with its blank and two
    choices for it, in one pass, and scores the choices.
    """

    kind: str
    length: int
    rows: int = 1

    @property
    def name(self) -> str:
        return f"{self.kind} {self.length if self.rows == 1 else f'{self.rows} x {self.length}'}"

    @property
    def num_steps(self) -> int:
        return self.length if self.kind == "decode" else 1

    @property
    def num_tokens(self) -> int:
        return self.rows * self.length


@dataclass(frozen=True)
class Run:
    """A model and what it is to do.

    limit: bytes; None is 90% of what is free on `device`, "cpu" or "cuda".
    """

    sizes: Sizes
    limit: int | None
    device: str
    offload_dir: Path | None
    tasks: tuple[Task, ...]

    @property
    def name(self) -> str:
        limit = "no limit" if self.limit is None else format_bytes(self.limit)
        return (
            f"{self.device} {self.sizes.quantization}, head {self.sizes.head_quantization}, {limit}"
        )

    def check(self) -> None:
        """Raise BudgetError, with numbers, before anything is made."""
        if self.limit is not None:
            planned(self.sizes, self.limit, self.device)

    def measure(self, settings: Settings) -> list[Result]:
        """A result for each task."""
        return [result for part in self.parts(settings) for result in part]

    def parts(self, settings: Settings) -> Iterator[list[Result]]:
        """The same, task by task as they are measured."""
        for results in model_run.parts(self._loaded(), self._variants, settings):
            for result in results:
                result.details |= _bound(result.details)
            yield results

    def _variants(self, opened: Loaded, facts: Facts) -> Iterator[list[Variant]]:
        for task in self.tasks:
            open = partial(self._open, opened, task, facts)
            yield [Variant(f"{self.name}: {task.name}", open, self.device == "cuda")]

    @contextmanager
    def _loaded(self) -> Iterator[Loaded]:
        backend = backend_for(self.device)
        budget = free_budget(backend.device) if self.limit is None else self.limit
        with loaded(self.sizes, budget, backend, self.offload_dir) as opened:
            yield opened

    @contextmanager
    def _open(self, opened: Loaded, task: Task, facts: Facts) -> Iterator[Work]:
        cache = opened.model.new_cache(task.rows, task.length)
        copies, runs = Copies(opened.scheduler), list[str]()

        def run() -> str:
            cache.reset()
            with torch.inference_mode():
                runs.append(digest(_TASKS[task.kind](opened, task, cache)))
            return runs[-1]

        def details() -> dict[str, Any]:
            return {
                **facts,
                "task": task.kind,
                "length": task.length,
                "rows": task.rows,
                "quantization": self.sizes.quantization,
                "head_quantization": self.sizes.head_quantization,
                "activations": self.sizes.activations,
                "steps": task.num_steps,
                "tokens": task.num_tokens,
                "streamed_bytes_per_step": streamed_bytes(opened.scheduler.plan),
                **copies.details(len(runs) * task.num_steps),
                "bound_s_per_step": None,
                "fraction_of_bound": None,
                "result_sha256": runs[-1],
            }

        yield Work(run, details)


def _encode(opened: Loaded, task: Task, cache: KVCache) -> torch.Tensor:
    ids = torch.full((1, task.length), _ID)
    generator = torch.Generator().manual_seed(0)
    is_hidden = torch.rand(1, task.length, task.length, generator=generator) < 0.5
    positions = _positions(opened, [(number, 0) for number in range(task.length)], 1)
    x = _read(opened, ids, positions, cache, is_hidden)
    return opened.model.head(x[:, -1])


def _decode(opened: Loaded, task: Task, cache: KVCache) -> torch.Tensor:
    """The logits of the last token."""
    token = torch.full((1, 1), _ID)
    logits = torch.empty(0)
    for number in range(task.length):
        positions = _positions(opened, [(number, 0)], 1)
        logits = opened.model.head(_read(opened, token, positions, cache)[:, -1])
        token = logits.argmax(-1, keepdim=True)
    return logits


def _choose(opened: Loaded, task: Task, cache: KVCache) -> torch.Tensor:
    """(rows, 2): the log-probability of each choice, both of which are one token."""
    one = blank([_ID] * (task.length - 1), task.length - 2, _ID, is_continued=False)
    ids, positions, is_hidden, (rows, _) = pack_choices(one, [[0], [_ID]])
    x = _read(
        opened,
        torch.tensor([ids]).expand(task.rows, -1),
        _positions(opened, positions, task.rows),
        cache,
        is_hidden.unsqueeze(0),
    )
    return opened.model.head(x[:, rows[0]]).log_softmax(-1)[:, :2]


_TASKS = {"encode": _encode, "decode": _decode, "cola": _choose}


def _positions(opened: Loaded, positions: list[tuple[int, int]], num_rows: int) -> torch.Tensor:
    return position_tensor([positions] * num_rows, not opened.model.config.is_rotary)


def _read(
    opened: Loaded,
    ids: torch.Tensor,
    positions: torch.Tensor,
    cache: KVCache,
    is_hidden: torch.Tensor | None = None,
) -> torch.Tensor:
    """(B, T, C)"""
    device = cache.keys.device
    hidden = None if is_hidden is None else is_hidden.to(device)
    x: torch.Tensor = opened.model(ids.to(device), positions.to(device), cache, hidden)
    return x


def _bound(details: dict[str, Any]) -> dict[str, float]:
    """What the streamed bytes take at the speed of the link, and that over the time of a step."""
    if not details["link_gbps"]:
        return {}
    bound_s = details["streamed_bytes_per_step"] / details["link_gbps"] / 1e9
    step_s = details["tokens"] / details["tokens_per_s"] / details["steps"]
    return {"bound_s_per_step": bound_s, "fraction_of_bound": bound_s / step_s}
