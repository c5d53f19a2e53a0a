"""Logits of all tokens of a prompt, a few at a time: a vocabulary is wide.

The network below the output head runs once for all tokens of a pass, and then the head, as the
model itself has it, which may scale and bound what it gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from bminf.engine.rows import Feed

SCORED_AT_ONCE = 8
"""Tokens whose logits are in memory together."""


def give_scores(feeds: Sequence[Feed], head: Any, is_fixed: bool) -> None:
    """Call Feed.score of those feeds that have it.

    head: from where tokens are among those of the pass, (n,) int64 on the CPU, to their logits
    (n, V).   is_fixed: whether it is always given as many, so that no row depends on others.
    """
    start = 0
    for feed in feeds:
        end = start + len(feed.ids)
        if feed.score is not None:
            for where in torch.arange(start, end, device="cpu").split(SCORED_AT_ONCE):
                missing = SCORED_AT_ONCE - len(where) if is_fixed else 0
                logits = head(torch.nn.functional.pad(where, (0, missing)))
                feed.score(int(where[0]) - start, logits[: len(where)])
        start = end


class Scoring:
    """Of one pass of a causal model of transformers, which is called within it as a context.

    takes_rows: whether its forward() has logits_to_keep, and so does not give the logits of all.
    """

    def __init__(self, model: Any, feeds: Sequence[Feed], takes_rows: bool, is_fixed: bool) -> None:
        self._model, self._feeds, self._is_fixed = model, feeds, is_fixed
        is_asked = any(feed.score is not None for feed in feeds)
        self._trunk = getattr(model, model.base_model_prefix) if takes_rows and is_asked else None
        self._output: Any = None
        self._hook: Any = None

    def __enter__(self) -> Scoring:
        if self._trunk is not None:
            self._hook = self._trunk.register_forward_hook(self._keep)
        return self

    def __exit__(self, *_: object) -> None:
        if self._hook is not None:
            self._hook.remove()

    def _keep(self, module: Any, given: Any, output: Any) -> None:
        self._output = output

    def give(self, ids: torch.Tensor, logits: torch.Tensor) -> None:
        """ids: (1, T), that the model was given.   logits: (R, V), that it gave."""

        def head(where: torch.Tensor) -> torch.Tensor:
            where = where.to(ids.device)
            return logits[where] if self._trunk is None else self._head(ids[:, where], where)

        give_scores(self._feeds, head, self._is_fixed)

    def _head(self, ids: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        """(n, V) behind these tokens: the model as it is, but for the network below."""
        part = type(self._output)(last_hidden_state=self._output[0][:, where])
        with _answering(self._trunk, part):
            logits: torch.Tensor = self._model(input_ids=ids, use_cache=False).logits[0]
        return logits


@contextmanager
def _answering(trunk: Any, output: Any) -> Iterator[None]:
    """Within it `trunk` is not run, and gives `output`."""
    before = trunk.__dict__.get("forward")
    trunk.forward = lambda *_, **__: output
    try:
        yield
    finally:
        del trunk.forward
        if before is not None:
            trunk.forward = before
