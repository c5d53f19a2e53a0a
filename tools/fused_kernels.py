"""`python -m tools.fused_kernels`: built-in models with kernels of bminf in place of torch's
operators (norms, positions, attention), and without: the same tokens, and how long each takes.

Weights are random, widths the real ones, layers a few. A text is continued greedily in both ways,
in turns; then both are fed the tokens of torch's operators, so that their logits are of the same
texts: those differ by rounding. The exit status is 1 where they differ by more, or are not finite.
Random weights make near ties: the first token that is another one is only reported.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bminf.arch.glm import GLM
from bminf.arch.t5 import T5
from bminf.cli.tables.tasks import Run, Task, shortened
from bminf.cuda.launcher import fused_kernels
from bminf.models.assemble import dtype_for
from bminf.models.glm_text import position_tensor
from bminf.models.source import find_sizes

MODELS = ("cpm2", "glm130b", "cpm1", "bloom-7b1")
MOST = 0.02  # of the norm of the logits, between two ways to round them


@dataclass(frozen=True)
class Found:
    """What both ways gave for one model.

    first_other: index of the first token that is another one; None is none.   difference: of the
    logits for the same tokens, relative to their norm, the most of all steps.   fused_s, torch_s:
    a token, the median.
    """

    model: str
    num_tokens: int
    first_other: int | None
    difference: float
    fused_s: float
    torch_s: float

    @property
    def is_right(self) -> bool:
        return self.difference <= MOST  # which NaN is not

    def __str__(self) -> str:
        other = "the same tokens" if self.first_other is None else f"other at {self.first_other}"
        verdict = "" if self.is_right else ", WRONG"
        return (
            f"{self.model}: {other}, logits differ by {self.difference:.1e}{verdict}; "
            f"{1e3 * self.fused_s:.2f} ms a token, by torch's operators {1e3 * self.torch_s:.2f}"
        )


def compared(name: str, network: Any, prompt: int, num_tokens: int, repeats: int) -> Found:
    """Both ways of a network on its device, after a first time of each that is not measured."""
    texts: dict[bool, list[int]] = {}
    times: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(repeats + 1):
        for is_fused in (True, False):
            started = time.perf_counter()
            with fused_kernels(is_fused):
                texts[is_fused] = _greedy(network, prompt, num_tokens)
            times[is_fused].append((time.perf_counter() - started) / num_tokens)
    both = (_logits(network, prompt, texts[False], way) for way in (True, False))
    steps = [float((a - b).norm() / b.norm()) for a, b in zip(*both, strict=True)]
    difference = math.nan if any(map(math.isnan, steps)) else max(steps)
    pairs = enumerate(zip(texts[True], texts[False], strict=True))
    first = next((index for index, (a, b) in pairs if a != b), None)
    fused_s, torch_s = (statistics.median(times[way][1:]) for way in (True, False))
    return Found(name, num_tokens, first, difference, fused_s, torch_s)


@torch.inference_mode()
def _greedy(network: Any, prompt: int, num_tokens: int) -> list[int]:
    reader = _Reader(network, prompt, num_tokens)
    token, tokens = reader.start(), []
    for _ in range(num_tokens):
        token = reader.logits(token)[:, -1:].argmax(-1)
        tokens.append(token)
    return torch.cat(tokens, dim=1)[0].tolist()  # which waits for all of them


@torch.inference_mode()
def _logits(network: Any, prompt: int, tokens: Sequence[int], is_fused: bool) -> list[torch.Tensor]:
    """(V,) behind each token but the last, in float64 on the host."""
    reader = _Reader(network, prompt, len(tokens))
    token, found = reader.start(), []
    with fused_kernels(is_fused):
        for following in tokens:
            found.append(reader.logits(token)[0, -1].double().cpu())
            token = torch.tensor([[following]], device=token.device)
    return found


class _Reader:
    """A text of one row: logits() reads some more tokens."""

    def __init__(self, network: Any, prompt: int, num_tokens: int) -> None:
        self._network, self._num_read, self._prompt = network, 0, prompt
        self._is_t5 = isinstance(network, T5)
        size = (prompt, num_tokens + 1) if self._is_t5 else (prompt + num_tokens,)
        self._cache = network.new_cache(1, *size)

    def start(self) -> torch.Tensor:
        """What is read first: the prompt, or behind an encoder that has read it, one token."""
        device = getattr(self._cache, "own", self._cache).keys.device
        ids = torch.arange(1, self._prompt + 1, device=device).unsqueeze(0)
        if not self._is_t5:
            return ids
        self._network.encode(ids, self._cache)
        return ids[:, :1]

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """(1, T) -> (1, T, V)."""
        given: tuple[Any, ...] = (ids, self._cache)
        if isinstance(self._network, GLM):
            places = [(self._num_read + i, 0) for i in range(ids.shape[1])]
            own = position_tensor([places], not self._network.config.is_rotary)
            given = (ids, own.to(ids.device), self._cache)
        self._num_read += ids.shape[1]
        found: torch.Tensor = self._network.head(self._network(*given))
        return found


def measured(arguments: argparse.Namespace) -> Iterator[Found]:
    """One model after the other."""
    dtype = dtype_for(None, arguments.device)
    for name in arguments.models:
        source = shortened(find_sizes(name), arguments.layers)
        task = Task("decode", arguments.prompt + arguments.tokens + 1)
        run = Run(source, dtype, arguments.quantization, "none", (task,), None, arguments.device)
        with run.loaded() as (network, _):
            yield compared(name, network, arguments.prompt, arguments.tokens, arguments.repeats)


def main(argv: Sequence[str] | None = None) -> int:
    """0 if all is right, otherwise 1."""
    arguments, found = _arguments(argv), []
    for one in measured(arguments):
        print(one, flush=True)
        found.append(one)
        if arguments.out is not None:  # after each: a later one may be stopped
            content = {"layers": arguments.layers, "models": [asdict(each) for each in found]}
            arguments.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return int(not all(one.is_right for one in found))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "tools.fused_kernels", description=__doc__, formatter_class=form
    )
    add = parser.add_argument
    add("models", nargs="*", default=MODELS, metavar="MODEL", help=f"default: {' '.join(MODELS)}")
    add("--device", default="cuda", choices=("cuda", "cpu"), help="default: cuda")
    add("--layers", type=int, default=2, metavar="N", help="of each stack; default: 2")
    add("--quantization", default="int8", help="default: int8")
    add("--prompt", type=int, default=24, metavar="N", help="tokens; default: 24")
    add("--tokens", type=int, default=32, metavar="N", help="that are written; default: 32")
    add("--repeats", type=int, default=3, metavar="N", help="default: 3")
    add("--out", type=Path, metavar="FILE", help="JSON of all")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
