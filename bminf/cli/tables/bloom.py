"""BLOOM's table: milliseconds a token, and start to ready, by the number of texts at once.

As transformers-bloom-inference has it: so many short openings, 100 greedy tokens of each, and the
wall time of it all over the tokens of all texts. Of random weights nobody wants to read a text, so
a word becomes an id by a rule, and no tokenizer is timed.
"""

from __future__ import annotations

import gc
import math
import shutil
import statistics
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bminf.cli.measure import PeakMemory, rss_anon_bytes
from bminf.cli.tables.asked import Asked, num_layers_of
from bminf.cli.tables.cells import (
    DOES_NOT_FIT,
    MEASURED,
    PREDICTED,
    Cell,
    not_run,
    published_row,
)
from bminf.cli.tables.document import plan_entries
from bminf.cli.tables.peers import peer_rows
from bminf.cli.tables.published import published
from bminf.cli.tables.tasks import Run, Task
from bminf.engine.engine import Engine
from bminf.engine.request import Request
from bminf.engine.sampling import Sampling
from bminf.errors import BudgetError
from bminf.models.convert import write_assembly
from bminf.models.random_weights import random_weights
from bminf.models.rows import DecoderRows
from bminf.models.source import Source, find_sizes
from bminf.offload.hooks import Scheduler
from bminf.progress import progress_bar

BATCH_SIZES = (1, 8, 16, 32, 64, 128)
OPENINGS = (
    "The bridge over the river",
    "My sister and I wanted",
    "In the year of the flood",
    "A good cook never",
    "When the lights went out we",
    "Nobody in the village knew why",
    "To build a small boat, first",
    "She opened the letter and",
)
"""Of 4 to 6 words."""
SPEED, START = "ms_per_token", "start_to_ready_s"
NOT_ASKED = "not among --batch-sizes"
PREDICT_ONLY = "--predict-only"

_MOST_FOLDER_BYTES = 20 * 10**9
_WARM_UP_TOKENS = 2


def prompts(batch_size: int, vocab_size: int) -> list[list[int]]:
    """Ids of the first openings, of all of them again and again for larger batches."""
    rows = [[zlib.crc32(word.encode()) % vocab_size for word in one.split()] for one in OPENINGS]
    return [rows[i % len(rows)] for i in range(batch_size)]


def cells(asked: Asked) -> Iterator[Cell]:
    """The rows of both tables, all of one before those of the other."""
    columns = [str(n) for n in sorted({*BATCH_SIZES, *asked.numbers})]
    measured = list(_measured(asked, columns))
    yield from (cell for cell in measured if cell.quantity == SPEED)
    yield from _scaled(asked, measured)
    yield from _predicted(asked, columns)
    yield from peer_rows(_with_one_limit(asked), columns, prompts)
    yield from _published(SPEED, columns)
    yield from (cell for cell in measured if cell.quantity == START)
    yield from _published(START, columns)


def _with_one_limit(asked: Asked) -> Asked:
    """That of the largest batch, where each has its own: other libraries load once for all."""
    if not (asked.streams_all and asked.is_measured):
        return asked
    return replace(asked, limit=_run(asked, max(asked.numbers)).limit)


# ---- measured ------------------------------------------------------------------------------------


def _measured(asked: Asked, columns: list[str]) -> Iterator[Cell]:
    with _weights(asked) as where:
        for column in progress_bar(columns, desc="measuring", leave=False):
            reason = _reason(asked, int(column))
            if reason is None:
                try:
                    yield from _measure(asked, int(column), where)
                    continue
                except BudgetError as error:
                    reason = f"{DOES_NOT_FIT}: {error}"
            for quantity in (SPEED, START):
                yield from not_run(quantity, asked.row, [column], reason)


def _reason(asked: Asked, batch_size: int) -> str | None:
    """Why it is not measured, if it is not."""
    if not asked.is_measured:
        return PREDICT_ONLY
    return None if batch_size in asked.numbers else NOT_ASKED


def _measure(asked: Asked, batch_size: int, where: Source | Path) -> Iterator[Cell]:
    run = _run(asked, batch_size)
    gc.collect()
    is_cuda, before_bytes = run.device == "cuda", rss_anon_bytes()
    start_s = time.perf_counter()
    source = where if isinstance(where, Source) else find_sizes(where)
    run = replace(run, source=source)
    with run.loaded() as (network, scheduler):
        engine = _engine(network, run)
        ready_s = time.perf_counter() - start_s
        with PeakMemory(is_cuda, before_bytes) as peak:
            _generate(engine, batch_size, _WARM_UP_TOKENS, network.config.vocab_size)
        details = _times(asked, engine, scheduler, batch_size)
        details |= {"peak_bytes": peak.peak_bytes, **plan_entries(scheduler.plan)}
    ms = details["step_ms"] / batch_size
    yield Cell(SPEED, asked.row, str(batch_size), MEASURED, ms, details=details)
    origin = {"weights": "drawn in memory" if isinstance(where, Source) else "read from a folder"}
    yield Cell(START, asked.row, str(batch_size), MEASURED, ready_s, details=origin)


def _times(asked: Asked, engine: Engine, scheduler: Scheduler, batch_size: int) -> dict[str, Any]:
    """Of all runs, and what was copied in them."""
    copied, before = scheduler.stats().bytes_copied, engine.stats
    vocab_size = asked.whole.config.vocab_size
    seconds = [
        _generate(engine, batch_size, asked.new_tokens, vocab_size) for _ in range(asked.runs)
    ]
    copied, after = scheduler.stats().bytes_copied - copied, engine.stats
    num_tokens = after.num_tokens - before.num_tokens
    return {
        "seconds": seconds,
        "step_ms": statistics.fmean(seconds) / asked.new_tokens * 1e3,
        "tokens": num_tokens // asked.runs,
        "passes": (after.num_sweeps - before.num_sweeps) / asked.runs,
        "copied_bytes_per_token": copied / num_tokens,
    }


def _run(asked: Asked, batch_size: int) -> Run:
    return asked.run(asked.cut, Task("decode", length_of(asked), batch_size))


def length_of(asked: Asked) -> int:
    """Tokens of the longest opening and of its answer."""
    return max(len(row) for row in prompts(len(OPENINGS), 2)) + asked.new_tokens


def _engine(network: Any, run: Run) -> Engine:
    (task,) = run.tasks
    rows = DecoderRows(network, network.new_cache(task.rows, task.length), task.length)
    rows.max_rows = task.rows
    return Engine(rows)


def _generate(engine: Engine, batch_size: int, num_tokens: int, vocab_size: int) -> float:
    """Seconds that so many greedy tokens of each text take; none ends sooner."""
    rows = prompts(batch_size, vocab_size)
    requests = [Request(row, num_tokens, Sampling(0.0)) for row in rows]
    start_s = time.perf_counter()
    engine.run([engine.add(request) for request in requests])
    return time.perf_counter() - start_s


@contextmanager
def _weights(asked: Asked) -> Iterator[Source | Path]:
    """A folder with the packed model; where that is large, the model, whose weights are drawn."""
    if not asked.is_measured:
        yield asked.cut
        return
    made = asked.run(asked.cut).assembled()
    source = replace(made.source, weights=random_weights(made.network))
    with tempfile.TemporaryDirectory(prefix="bminf-table-") as parent:
        # The folder, and on a CPU what is streamed once more.
        most = min(_MOST_FOLDER_BYTES, shutil.disk_usage(parent).free // 3)
        if made.blobs.nbytes + _table_bytes(source) > most:
            yield asked.cut
            return
        folder = Path(parent) / "model"
        write_assembly(replace(made, source=source), folder, {}, _MOST_FOLDER_BYTES)
        yield folder


def _table_bytes(source: Source) -> int:
    table = source.weights.table
    return 0 if table is None else math.prod(table.shape) * table.dtype.itemsize


# ---- scaled, predicted, published ----------------------------------------------------------------


def _scaled(asked: Asked, measured: list[Cell]) -> Iterator[Cell]:
    """What was measured, as many times as the whole model has bytes; which is no measurement."""
    number, scale = num_layers_of(asked.whole), asked.scale()
    if num_layers_of(asked.cut) == number or not asked.is_measured:
        return
    row = f"{asked.row}, scaled to {number} layers"
    for cell in measured:
        if cell.quantity != SPEED:
            continue
        if cell.value is None:
            yield replace(cell, row=row)
            continue
        details = {"scale": scale, "step_ms": cell.details["step_ms"] * scale}
        yield Cell(SPEED, row, cell.column, PREDICTED, cell.value * scale, details=details)


def _predicted(asked: Asked, columns: list[str]) -> Iterator[Cell]:
    row = f"{asked.row}, all layers on one {asked.on_card.card.name}"
    for column in columns:
        try:
            yield _prediction(asked, row, int(column))
        except BudgetError as error:
            yield from not_run(SPEED, row, [column], f"{DOES_NOT_FIT}: {error}")


def _prediction(asked: Asked, row: str, batch_size: int) -> Cell:
    """A pass that reads the prompts, and one for each token but the first."""
    card, length = asked.on_card, length_of(asked)
    plan = card.plan(length, batch_size)
    num_read = sum(map(len, prompts(batch_size, 2)))
    first = card.one_pass(plan, num_read, 0)
    step = card.one_pass(
        plan, batch_size, card.cache_bytes(length - asked.new_tokens // 2, batch_size)
    )
    seconds = first.pass_s + (asked.new_tokens - 1) * step.pass_s
    ms = seconds / (batch_size * asked.new_tokens) * 1e3
    details = {
        "step_ms": ms * batch_size,
        "binds": step.binds,
        "pass": asdict(step),
        **plan_entries(plan),
    }
    return Cell(SPEED, row, str(batch_size), PREDICTED, ms, details=details)


def _published(quantity: str, columns: list[str]) -> Iterator[Cell]:
    content = published()["bloom"]
    for row, figures in content[quantity].items():
        yield from _published_row(quantity, f"BLOOM-176B, {row}", columns, figures, 1)
        streams = content["streams"].get(row)
        if streams and quantity == SPEED:
            name = f"BLOOM-176B, {row.rpartition(',')[0]}, one of these streams"
            yield from _published_row(quantity, name, columns, figures, streams)


def _published_row(
    quantity: str, row: str, columns: list[str], figures: dict[str, float | None], times: int
) -> Iterator[Cell]:
    def known(column: str) -> tuple[bool, float | None]:
        value = figures.get(column)
        return column in figures, None if value is None else value * times

    yield from published_row(quantity, row, columns, known)
