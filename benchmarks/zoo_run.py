"""One model in all phases: loaded once, each phase checked, warmed up and timed by the harness."""

from __future__ import annotations

import gc
import hashlib
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.harness import Result, Settings, Variant, Work
from benchmarks.zoo_model import Loaded, Sizes, loaded, planned
from benchmarks.zoo_prediction import ANEW, ENCODER, ONCE, Phase, plan_entries, streamed_bytes
from bminf.cli.measure import PeakMemory, rss_anon_bytes
from bminf.scheduler.device import backend_for, free_budget
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

    def measure(self, settings: Settings) -> list[Result]:
        """A result for each phase. Both ways to decode have to give the same."""
        gc.collect()
        before, began = rss_anon_bytes(), time.perf_counter()
        with ExitStack() as stack:
            with PeakMemory(is_cuda=False, baseline_bytes=before) as peak:
                opened = stack.enter_context(self._loaded())
            facts = {
                "load_s": time.perf_counter() - began,
                "loading_peak_rss_anon_bytes": peak.peak_bytes,
            } | plan_entries(opened.scheduler.plan)
            held = rss_anon_bytes()
            results = []
            for phases in ((ENCODER,), (ANEW, ONCE)):
                variants = [self._variant(opened, phase, facts) for phase in phases]
                results += harness.measure(variants, settings)
        for result in results:
            wall_s = statistics.fmean(sample.wall_s for sample in result.samples)
            result.details["tokens_per_s"] = result.details["tokens"] / wall_s
            # The harness sees what a run adds to the weights, which were there before it.
            if result.peak_rss_anon_bytes is not None and held is not None and before is not None:
                result.peak_rss_anon_bytes += held - before
        return results

    @contextmanager
    def _loaded(self) -> Iterator[Loaded]:
        backend = backend_for(self.device, self.offload_dir, stacklevel=1)
        budget = free_budget(backend.device) if self.limit is None else self.limit
        with loaded(self.sizes, budget, backend, self.offload_dir) as opened:
            yield opened

    def _variant(self, opened: Loaded, phase: Phase, facts: dict[str, Any]) -> Variant:
        open = partial(self._open, opened, phase, facts)
        return Variant(f"{self.name}: {phase.name}", open, self.device == "cuda")

    @contextmanager
    def _open(self, opened: Loaded, phase: Phase, facts: dict[str, Any]) -> Iterator[Work]:
        num_steps = 1 if phase is ENCODER else self.num_steps
        before, runs = opened.scheduler.stats(), list[str]()

        def run() -> str:
            runs.append(self._run(opened, phase))
            return runs[-1]

        def details() -> dict[str, Any]:
            after = opened.scheduler.stats()
            nbytes, seconds = (
                getattr(after, name) - getattr(before, name)
                for name in ("bytes_copied", "copied_s")
            )
            return facts | {
                "phase": phase.name,
                "quantization": self.sizes.quantization,
                "activations": self.sizes.activations,
                "steps": num_steps,
                "tokens": self.prompt_length if phase is ENCODER else num_steps,
                "streamed_bytes_per_step": streamed_bytes(opened.scheduler.plan, phase.lists),
                "copied_bytes_per_step": nbytes / (len(runs) * num_steps),
                "link_gbps": nbytes / seconds / 1e9 if nbytes and seconds else None,
                "result_sha256": runs[-1],
            }

        yield Work(run, details)

    def _run(self, opened: Loaded, phase: Phase) -> str:
        with torch.inference_mode():
            if phase is ENCODER:
                return _digest(opened.model.encoder(self._hidden(opened, self.prompt_length)))
            return _digest(self._decode(opened, phase))

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


def _digest(x: torch.Tensor) -> str:
    """Of the last token, all of which is computed when this returns."""
    last = x[0, -1].float().cpu()
    if not last.isfinite().all():
        raise ArithmeticError(
            "the random model gives NaN or infinity; its times would mean nothing"
        )
    return hashlib.sha256(last.numpy().tobytes()).hexdigest()
