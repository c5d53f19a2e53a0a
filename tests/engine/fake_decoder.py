"""Decoders with no model behind: their logits are a function of everything a row has been fed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch

History = tuple[int, ...]


def random_logits(vocab_size: int, seed: int, scale: float = 2.0) -> Callable[[History], list]:
    """Logits that differ for every history, and are the same for equal ones."""
    known: dict[History, list[float]] = {}

    def logits(history: History) -> list[float]:
        if history not in known:
            generator = torch.Generator().manual_seed(hash((seed, history)) % 2**31)
            known[history] = (scale * torch.randn(vocab_size, generator=generator)).tolist()
        return known[history]

    return logits


class FakeDecoder:
    """A decoder whose cache is the list of ids that each row has been fed.

    It refuses what a real one would choke on, and keeps `fed` and `selected` for the tests.
    """

    def __init__(self, logits_of: Callable[[History], Sequence[float]]) -> None:
        self.logits_of = logits_of
        self.histories: list[History] | None = None
        self.fed: list[torch.Tensor] = []
        self.selected: list[list[int]] = []

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        assert input_ids.dtype == torch.int64 and input_ids.dim() == 2
        if self.histories is None:
            self.histories = [()] * len(input_ids)
        else:
            assert input_ids.shape[1] == 1
        assert len(input_ids) == len(self.histories)
        self.fed.append(input_ids.clone())
        self.histories = [
            (*history, *ids)
            for history, ids in zip(self.histories, input_ids.tolist(), strict=True)
        ]
        return torch.tensor([self.logits_of(history) for history in self.histories])

    def select(self, rows: torch.Tensor) -> None:
        assert self.histories is not None, "nothing to select from before the first call"
        assert rows.dtype == torch.int64 and rows.dim() == 1 and len(rows) > 0
        assert 0 <= int(rows.min()) and int(rows.max()) < len(self.histories)
        self.selected.append(rows.tolist())
        self.histories = [self.histories[row] for row in rows.tolist()]


def scripted(scripts: dict[int, Sequence[int]], vocab_size: int) -> Callable[[History], list]:
    """Logits that make a row, known by its one prompt id, say its script."""

    def logits(history: History) -> list[float]:
        return [10.0 * (i == scripts[history[0]][len(history) - 1]) for i in range(vocab_size)]

    return logits


def all_sequences(
    logits_of: Callable[[History], Sequence[float]],
    prompt: History,
    vocab_size: int,
    steps: int,
    stop_ids: Sequence[int] = (),
) -> dict[History, float]:
    """Every sequence of `steps` tokens, or up to its stop token: its log-probability."""
    found = {}
    for ids in itertools.product(range(vocab_size), repeat=steps):
        end = next((i + 1 for i, token in enumerate(ids) if token in stop_ids), steps)
        found[ids[:end]] = log_probability(logits_of, prompt, ids[:end])
    return found


def log_probability(
    logits_of: Callable[[History], Sequence[float]], prompt: History, ids: History
) -> float:
    """Of `ids` behind `prompt`."""
    total = 0.0
    for i, token in enumerate(ids):
        logits = torch.tensor(logits_of((*prompt, *ids[:i])), dtype=torch.float64)
        total += float(logits.log_softmax(0)[token])
    return total
