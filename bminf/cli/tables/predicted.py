"""What a table predicts of a whole model on a card that need not be here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from bminf.arch.sizes import Pass
from bminf.cli.gpus import Card
from bminf.cli.tables.tasks import ANEW, ENCODER, LISTS, Run, Task
from bminf.models.assemble import Assembly, plan_within
from bminf.offload.plan import Plan
from bminf.offload.predict import Prediction, Rows, predict

USABLE = 0.9  # of a card's memory


def weights_of(network: torch.nn.Module, plan: Plan) -> dict[str, int]:
    """Name of a block -> weights of its linears."""
    found = {}
    for block in plan.blocks:
        linears = [
            module
            for module in network.get_submodule(block.name).modules()
            if isinstance(module, torch.nn.Linear)
        ]
        found[block.name] = sum(one.in_features * one.out_features for one in linears)
    return found


def assembled_for_a_card(run: Run) -> Assembly:
    """The model of `run` in half precision but for what is packed."""
    return replace(run, dtype=torch.float16, device="cuda").assembled()


@dataclass(frozen=True)
class OnCard:
    """A model within 90% of a card's memory."""

    assembly: Assembly
    card: Card

    def plan(self, length: int, rows: int) -> Plan:
        """With room for so many texts of `length` tokens.   Raises BudgetError."""
        return plan_within(
            self.assembly, int(USABLE * self.card.memory_bytes), length, rows, "cuda"
        )

    def cache_bytes(self, length: int, rows: int) -> int:
        """Of the keys and values of so many texts."""
        source, packing = self.assembly.source, self.assembly.packing
        given = Pass(rows, length, torch.float16, packing.of_layers, False)
        return source.architecture.sizes(source.config, given).cache

    def one_pass(
        self, plan: Plan, number: int, cache_bytes: int, lists: Sequence[str] | None = None,
        times: dict[str, int] | None = None,
    ) -> Prediction:  # fmt: skip
        """number: of tokens in it.   times: name of a list -> of how many tokens more each of these
        is, as in projections of a whole prompt."""
        weights, more = weights_of(self.assembly.network, plan), times or {}
        for block in plan.blocks:
            weights[block.name] *= more.get(block.list_name, 1)
        rows = Rows(number, weights, self.card.flops or float("inf"), cache_bytes)
        speeds = self.card.speeds
        return predict(plan, speeds.link, speeds.memory, lists, rows=rows)

    def task(self, plan: Plan, task: Task) -> Prediction:
        """One step of a task, halfway through its steps."""
        is_whole = task.num_steps == 1
        length = task.length if is_whole else -(-task.length // 2)
        number = task.rows * (task.length if is_whole else 1)
        times = {LISTS[ANEW][0]: task.prompt} if task.kind == ANEW else {}
        cache_bytes = 0 if task.kind == ENCODER else self.cache_bytes(length, task.rows)
        return self.one_pass(plan, number, cache_bytes, LISTS.get(task.kind), times)

    def facts(self) -> dict[str, Any]:
        """Of the card, for a JSON file."""
        speeds = self.card.speeds._asdict()
        return {**self.card._asdict(), "speeds": speeds, "usable": USABLE}
