"""One model in all phases: loaded once, each phase checked, warmed up and timed by the harness."""

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
from benchmarks.harness import Result, Settings, Variant, Work
from benchmarks.model_run import Copies, Facts, digest
from benchmarks.zoo_model import Loaded, Sizes, loaded, planned
from benchmarks.zoo_prediction import ANEW, ENCODER, ONCE, Phase
from bminf.offload.backends import backend_for, free_budget
from bminf.units import format_bytes


@dataclass(frozen=True)
class Run:
    """A model and what it is to do.

    limit: bytes; None is 90% of what is free on `device`, "cpu" or "cuda".
    prompt_length: tokens that the encoder reads.   num_steps: of the decoder, a token each.
    """

    sizes: Sizes
    limit: int | None
    device: str
    offload_dir: Path | None
    prompt_length: int
    num_steps: int

    @property
    def name(self) -> str:
        limit = "no limit" if self.limit is None else format_bytes(self.limit)
        return f"{self.device} {self.sizes.quantization} {limit}"

    def check(self) -> None:
        """Raise BudgetError, with numbers, before anything is made."""
        if self.limit is not None:
            planned(self.sizes, self.limit, self.device)

    def parts(self, settings: Settings) -> Iterator[list[Result]]:
        """A result for each phase. Both ways to decode have to give the same."""
        return model_run.parts(self._loaded(), self._variants, settings)

    def _variants(self, opened: Loaded, facts: Facts) -> Iterator[list[Variant]]:
        for phases in ((ENCODER,), (ANEW, ONCE)):
            yield [self._variant(opened, phase, facts) for phase in phases]

    @contextmanager
    def _loaded(self) -> Iterator[Loaded]:
        backend = backend_for(self.device)
        budget = free_budget(backend.device) if self.limit is None else self.limit
        with loaded(self.sizes, budget, backend, self.offload_dir) as opened:
            yield opened

    def _variant(self, opened: Loaded, phase: Phase, facts: Facts) -> Variant:
        open = partial(self._open, opened, phase, facts)
        return Variant(f"{self.name}: {phase.name}", open, self.device == "cuda")

    @contextmanager
    def _open(self, opened: Loaded, phase: Phase, facts: Facts) -> Iterator[Work]:
        num_steps = 1 if phase is ENCODER else self.num_steps
        copies, runs = Copies(opened.scheduler), list[str]()

        def run() -> str:
            runs.append(self._run(opened, phase))
            return runs[-1]

        def details() -> dict[str, Any]:
            return (
                facts
                | copies.details(len(runs) * num_steps)
                | {
                    "phase": phase.name,
                    "quantization": self.sizes.quantization,
                    "activations": self.sizes.activations,
                    "steps": num_steps,
                    "tokens": self.prompt_length if phase is ENCODER else num_steps,
                    "streamed_bytes_per_step": streamed_bytes(opened.scheduler.plan, phase.lists),
                    "result_sha256": runs[-1],
                }
            )

        yield Work(run, details)

    def _run(self, opened: Loaded, phase: Phase) -> str:
        with torch.inference_mode():
            if phase is ENCODER:
                return digest(opened.model.encoder(self._hidden(opened, self.prompt_length))[0, -1])
            return digest(self._decode(opened, phase)[0, -1])

    def _decode(self, opened: Loaded, phase: Phase) -> torch.Tensor:
        """The same hidden state goes in at each step: nothing is embedded, scored or drawn."""
        model, cache = opened.model, opened.cache
        encoded, x = self._hidden(opened, self.prompt_length), self._hidden(opened, 1)
        cache.reset()
        y = x
        for step in range(self.num_steps):
            if step == 0 or phase is ANEW:
                cache.cross.reset()
                model.cross_projections(encoded, cache.cross)
            y = model.decoder(x, cache)
        return y

    def _hidden(self, opened: Loaded, num_tokens: int) -> torch.Tensor:
        """(1, num_tokens, C), the same each time."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, num_tokens, self.sizes.config.hidden_size, generator=generator)
        weight = opened.model.embed_tokens.weight
        return x.to(weight.device, weight.dtype)
