"""The tables of GLM-130B and CPM-2: whole passes, as their authors timed them.

GLM-130B reads and writes texts of some lengths. CPM-2's encoder reads, and its decoder takes steps,
with the keys and values of the prompt projected anew in each of them, as BMInf's authors timed it,
or once, as text is generated; nothing is embedded, scored or drawn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

import torch

from bminf.arch.t5 import T5
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
from bminf.cli.tables.published import published
from bminf.cli.tables.tasks import ANEW, ENCODER, ONCE, Task, decoder_pass, t5_pass
from bminf.errors import BudgetError
from bminf.progress import progress_bar

LENGTHS = {"glm130b": (512, 1024, 2048), "cpm2": (256,)}
QUANTITY = {"glm130b": "seconds", "cpm2": "tokens_per_s"}
NOT_ASKED, PREDICT_ONLY = "not among --lengths", "--predict-only"

_WARM_UP_TOKENS = 2


def tasks_of(table: str, length: int) -> list[Task]:
    if table == "glm130b":
        return [Task("encode", length), Task("decode", length)]
    steps = max(1, length - 1)
    return [
        Task(ENCODER, length),
        Task(ANEW, steps, prompt=length),
        Task(ONCE, steps, prompt=length),
    ]


def cells(table: str, asked: Asked) -> Iterator[Cell]:
    """The rows of the table."""
    lengths = sorted({*LENGTHS[table], *asked.numbers})
    tasks = [task for length in lengths for task in tasks_of(table, length)]
    if table == "glm130b":  # reading first
        tasks.sort(key=lambda task: task.kind == "decode")
    wanted = [task for length in asked.numbers for task in tasks_of(table, length)]
    measured = list(_measured(table, asked, tasks, wanted))
    yield from measured
    yield from _scaled(asked, measured)
    yield from _predicted(table, asked, tasks)
    yield from _PUBLISHED[table](tasks)


# ---- measured ------------------------------------------------------------------------------------


def _measured(table: str, asked: Asked, tasks: list[Task], wanted: list[Task]) -> Iterator[Cell]:
    quantity, reasons = QUANTITY[table], dict[str, str]()
    found: dict[str, Cell] = {}
    try:
        if asked.is_measured:
            found = _timed(table, asked, wanted)
    except BudgetError as error:
        reasons = {task.name: f"{DOES_NOT_FIT}: {error}" for task in wanted}
    for task in tasks:
        if task.name in found:
            yield found[task.name]
        else:
            other = NOT_ASKED if asked.is_measured else PREDICT_ONLY
            yield from not_run(quantity, asked.row, [task.name], reasons.get(task.name, other))


def _timed(table: str, asked: Asked, tasks: list[Task]) -> dict[str, Cell]:
    """By name. Loaded once, with room for the longest."""
    found = {}
    with asked.run(asked.cut, *tasks).loaded() as (network, scheduler):
        for task in progress_bar(tasks, desc="measuring", leave=False):
            make = t5_pass if isinstance(network, T5) else decoder_pass
            _seconds(*make(network, replace(task, length=min(task.length, _WARM_UP_TOKENS))))
            before, timed = scheduler.stats(), make(network, task)
            seconds = [_seconds(*timed) for _ in range(asked.runs)]
            copied = scheduler.stats().bytes_copied - before.bytes_copied
            details = {
                "seconds": seconds,
                "step_ms": sum(seconds) / len(seconds) / task.num_steps * 1e3,
                "copied_bytes_per_step": copied / task.num_steps / asked.runs,
                **plan_entries(scheduler.plan),
            }
            value = _value(table, task, sum(seconds) / len(seconds))
            found[task.name] = Cell(
                QUANTITY[table], asked.row, task.name, MEASURED, value, details=details
            )
    return found


def _seconds(one_pass: Callable[[], torch.Tensor], cache: Any) -> float:
    cache.reset()
    with torch.inference_mode():
        start_s = time.perf_counter()
        one_pass().float().cpu()  # all is computed when this is here
        return time.perf_counter() - start_s


def _value(table: str, task: Task, seconds: float) -> float:
    return seconds if table == "glm130b" else task.rows * task.length / seconds


# ---- scaled, predicted, published ----------------------------------------------------------------


def _scaled(asked: Asked, measured: list[Cell]) -> Iterator[Cell]:
    """What was measured, for as many layers as the whole model has; which is no measurement."""
    number, scale = num_layers_of(asked.whole), asked.scale()
    if num_layers_of(asked.cut) == number or not asked.is_measured:
        return
    row = f"{asked.row}, scaled to {number} layers"
    for cell in measured:
        if cell.value is None:
            yield replace(cell, row=row)
            continue
        value = cell.value * scale if cell.quantity == "seconds" else cell.value / scale
        yield Cell(cell.quantity, row, cell.column, PREDICTED, value, details={"scale": scale})


def _predicted(table: str, asked: Asked, tasks: list[Task]) -> Iterator[Cell]:
    row = f"{asked.row}, all layers on one {asked.on_card.card.name}"
    for task in tasks:
        try:
            plan = asked.on_card.plan(max(task.length, task.prompt), task.rows)
        except BudgetError as error:
            yield from not_run(QUANTITY[table], row, [task.name], f"{DOES_NOT_FIT}: {error}")
            continue
        step = asked.on_card.task(plan, task)
        value = _value(table, task, step.pass_s * task.num_steps)
        details = {"binds": step.binds, "step": asdict(step), **plan_entries(plan)}
        yield Cell(QUANTITY[table], row, task.name, PREDICTED, value, details=details)


def _published_glm(tasks: list[Task]) -> Iterator[Cell]:
    by_kind, names = published()["seconds"], [task.name for task in tasks]
    for machine in by_kind["encode"]:

        def known(column: str, machine: str = machine) -> tuple[bool, float | None]:
            kind, _, length = column.partition(" ")
            figures = by_kind[kind][machine]
            return length in figures, figures.get(length)

        yield from published_row(QUANTITY["glm130b"], machine, names, known)


def _published_cpm2(tasks: list[Task]) -> Iterator[Cell]:
    """BMInf projects anew in each step."""
    content, names = published()["tokens_per_s_by_card"], [task.name for task in tasks]
    kinds = {Task(ENCODER, 256).name: "encoder", Task(ANEW, 255).name: "decoder"}
    for card in content["encoder"]:

        def known(column: str, card: str = card) -> tuple[bool, float | None]:
            kind = kinds.get(column)
            return kind is not None, None if kind is None else content[kind][card]

        yield from published_row(QUANTITY["cpm2"], f"BMInf 2.0, int8, {card}", names, known)


_PUBLISHED = {"glm130b": _published_glm, "cpm2": _published_cpm2}
