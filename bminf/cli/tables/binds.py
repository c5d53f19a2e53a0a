"""What binds a pass of BLOOM-176B and GLM-130B: the link, device memory, or arithmetic.

Streamed weights are shared by all texts of a batch, so a pass takes as long for many as for one
until their arithmetic, or their keys and values, take longer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict

import torch

from bminf.cli.gpus import card_of
from bminf.cli.tables.cells import DOES_NOT_FIT, PREDICTED, Cell, not_run
from bminf.cli.tables.document import plan_entries
from bminf.cli.tables.predicted import OnCard, assembled_for_a_card
from bminf.cli.tables.tasks import Run, Task
from bminf.errors import BudgetError
from bminf.models.source import find_sizes
from bminf.offload.predict import rows_until_arithmetic

MODELS = {"BLOOM-176B": "bigscience/bloom", "GLM-130B": "GLM-130B"}
CARDS = ("RTX 3090", "RTX A6000", "A100 80GB")
"""Of 24, 48 and 80 GB."""
LENGTH = 128
"""Tokens of each text, prompt and answer, that room is made for."""
PASS, UNTIL = "pass_s", "rows_until_arithmetic"


FORMATS = ("int8", "int4")


def cells(
    batch_sizes: Sequence[int],
    cards: Sequence[str] = CARDS,
    formats: Sequence[str] = FORMATS,
) -> Iterator[Cell]:
    """A decode step for each model, format, card and batch size."""
    for title, name in MODELS.items():
        source = find_sizes(name)
        for quantization in formats:
            run = Run(source, torch.float16, quantization, "int8", (Task("decode", LENGTH),))
            assembly = assembled_for_a_card(run)
            for card in cards:
                row = f"{title}, {quantization}, {card}"
                yield from _row(row, OnCard(assembly, card_of(card)), batch_sizes)


def _row(row: str, on_card: OnCard, batch_sizes: Sequence[int]) -> Iterator[Cell]:
    last = None
    for number in batch_sizes:
        try:
            plan = on_card.plan(LENGTH, number)
        except BudgetError as error:
            yield from not_run(PASS, row, [str(number)], f"{DOES_NOT_FIT}: {error}")
            continue
        found = on_card.one_pass(plan, number, on_card.cache_bytes(LENGTH // 2, number))
        details = {"binds": found.binds, "pass": asdict(found), **plan_entries(plan)}
        yield Cell(PASS, row, str(number), PREDICTED, found.pass_s, details=details)
        last = rows_until_arithmetic(found, number)
    if last is None:
        yield from not_run(UNTIL, row, ["arithmetic from"], DOES_NOT_FIT)
    else:
        yield Cell(UNTIL, row, "arithmetic from", PREDICTED, last)
