"""Several ranks, one program: rank 0 runs it, and the others do what it does to network and cache.

What rank 0 is about to compute it says in one message, of token ids and flags for a pass of an
engine, and then all compute. What a method gives on rank 0 is the last message of its call: the
same call on another rank follows until then, and gives the same. So nothing has to be decided alike
on all ranks: not what is sampled, not how requests share passes, not when a text ends.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from bminf.engine.rows import Feed
from bminf.errors import ArgumentError, RankError
from bminf.layers.packed_cache import Span
from bminf.layers.parallel import Group
from bminf.models.text import TextIterator


class Rows(Protocol):
    """What the rows of a model say of a pass, and make of what was said."""

    def told_of(self, feed: Feed) -> Any:
        """What of its row a pass needs beside its place in the cache."""
        ...

    def row_told(self, span: Span, told: Any) -> Any:
        """A row of which that was told."""
        ...

    def compute(
        self, feeds: Sequence[Feed], spans: Sequence[Span], num_tokens: int | None
    ) -> torch.Tensor:
        """The logits of a pass."""
        ...


@dataclass(frozen=True)
class _Cache:
    """In a message, in the place of a cache, or of a part of one: "own", "cross"."""

    part: str = ""

    def of(self, cache: Any) -> Any:
        return getattr(cache, self.part) if self.part else cache


@dataclass(frozen=True)
class _Iterator:
    """In a message, as what a call gives: its pieces follow, as they are asked for."""


class Leading:
    """Rank 0: says what it does."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._sending = threading.Lock()  # of results, which are of no pass
        self._calls = threading.local()
        self._told: Exception | None = None  # to the others, last

    def compute(self, message: tuple[Any, ...], run: Callable[[], Any]) -> Any:
        """Say what all ranks do now, and do it."""
        with self._group.together():
            self._send(message)
            return run()

    def pass_of(
        self,
        rows: Rows,
        compute: Callable[..., torch.Tensor],
        feeds: Sequence[Feed],
        spans: Sequence[Span],
        num_tokens: int | None,
    ) -> torch.Tensor:
        """A pass of an engine.   compute: that of `rows`, which tells nobody."""
        told = [(list(f.ids), f.has_logits, f.score is not None, rows.told_of(f)) for f in feeds]
        message = ("rows", told, [tuple(span) for span in spans], num_tokens)
        logits: torch.Tensor = self.compute(message, partial(compute, feeds, spans, num_tokens))
        return logits

    def call(self, name: str, run: Callable[[], Any]) -> Any:
        """What a method of this name gives, and what the same call gives on other ranks."""
        if getattr(self._calls, "is_within", False):  # one of another method's
            return run()
        self._calls.is_within = True
        try:
            value = run()
        except RankError:
            raise
        except Exception as error:
            self._told = error
            self._send(("result", name, None, _picklable(error)))
            raise
        except BaseException as interrupt:
            self._group.leave(interrupt)
            raise
        finally:
            self._calls.is_within = False
        if isinstance(value, TextIterator):
            self._send(("result", name, _Iterator(), None))
            return TextIterator(value, self._pieces(name, value))
        self._send(("result", name, value, None))
        return value

    def _pieces(self, name: str, pieces: TextIterator) -> Generator[str, None, None]:
        try:
            while True:
                piece, _ = self.call(name, lambda: (next(pieces, None), pieces.finish_reason))
                if piece is None:
                    return
                yield piece
        finally:
            pieces.close()

    def close(self) -> None:
        """Tell the others that there is nothing more to come."""
        self._send(("end",))

    def leave(self, error: BaseException) -> None:
        """End all ranks for an error in the script of this one; not where all have raised it."""
        if error is not self._told:
            self._group.leave(error)

    def _send(self, message: tuple[Any, ...]) -> None:
        with self._sending:
            self._group.send(message)


class Following:
    """Any other rank: does what rank 0 says.

    network, cache, rows: those of this rank.   device: of the network.   kernels: a context for
    passes.
    """

    def __init__(
        self, group: Group, network: Any, cache: Any, rows: Rows, device: torch.device, kernels: Any
    ) -> None:
        self._group, self._network, self._cache = group, network, cache
        self._rows, self._device, self._kernels = rows, device, kernels
        self.is_over = False
        self._told: Exception | None = None  # by rank 0, last

    def call(self, name: str) -> Any:
        """Compute with rank 0 until the method of this name is at its end there; what it gave."""
        while (message := self._next()) is not None:
            if message[0] == "result":
                return self._result(name, *message[1:])
        raise RankError(f"rank 0 has closed the model, and rank {self._group.rank} calls {name}()")

    def until_end(self) -> None:
        """Compute with rank 0 until it closes the model."""
        while not self.is_over and self._next() is not None:
            pass

    def leave(self, error: BaseException) -> None:
        """End all ranks for an error in the script of this one; not where rank 0 has raised it."""
        if not self.is_over and error is not self._told:
            self._group.leave(error)

    def _result(self, name: str, called: str, value: Any, error: Exception | None) -> Any:
        if called != name:
            wrong = ArgumentError(f"rank 0 has called {called}(), this rank {name}()")
            with self._group.together():
                raise wrong
        if error is not None:
            self._told = error
            raise error
        if isinstance(value, _Iterator):
            told = _Told()
            return TextIterator(told, self._pieces(name, told))
        return value

    def _pieces(self, name: str, told: _Told) -> Generator[str, None, None]:
        while True:
            piece, told.finish_reason = self.call(name)
            if piece is None:
                return
            yield piece

    def _next(self) -> tuple[Any, ...] | None:
        """The next message, once what it asks for is done; None is the end."""
        if self.is_over:
            return None
        message: tuple[Any, ...] = self._group.receive()
        kind, *given = message
        if kind == "end":
            self.is_over = True
            return None
        if kind != "result":
            kinds: dict[str, Callable[..., None]] = {
                "rows": self._pass, "network": self._on_network, "cache": self._on_cache,
            }  # fmt: skip
            does = kinds[kind]
            with self._group.together(), torch.inference_mode(), self._kernels():
                does(*given)
        return message

    def _pass(self, told: Any, places: Any, num_tokens: int | None) -> None:
        spans = [Span(*place) for place in places]
        feeds = [
            Feed(self._rows.row_told(span, of_row), ids, has_logits, _ignore if scores else None)
            for span, (ids, has_logits, scores, of_row) in zip(spans, told, strict=True)
        ]
        self._rows.compute(feeds, spans, num_tokens)

    def _on_network(self, method: str, arguments: Sequence[Any]) -> None:
        given = [self._own(argument) for argument in arguments]
        getattr(self._network, method)(*given)

    def _on_cache(self, part: _Cache, method: str, arguments: Sequence[Any]) -> None:
        given = [self._own(argument) for argument in arguments]
        getattr(part.of(self._cache), method)(*given)

    def _own(self, argument: Any) -> Any:
        if isinstance(argument, torch.Tensor):
            return argument.to(self._device)
        return argument.of(self._cache) if isinstance(argument, _Cache) else argument


@dataclass
class _Told:
    """In place of a request, on a rank that has none."""

    finish_reason: Any = None


class LedNetwork:
    """The network of rank 0, for passes that fill the whole cache: each call is one of all ranks.

    What else is asked of it is answered by the network.
    """

    def __init__(self, network: Any, leading: Leading) -> None:
        self._network, self._leading = network, leading

    def __call__(self, *arguments: Any) -> Any:
        return self._call("__call__", arguments)

    def head(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._call("head", (x,))
        return logits

    def encode(self, *arguments: Any) -> Any:
        return self._call("encode", arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)

    def _call(self, method: str, arguments: Sequence[Any]) -> Any:
        own = [a.cache if isinstance(a, LedCache) else a for a in arguments]
        message = ("network", method, [_told(argument) for argument in arguments])
        return self._leading.compute(message, partial(getattr(self._network, method), *own))


class LedCache:
    """The cache of rank 0: what is changed here is changed on all ranks."""

    def __init__(self, cache: Any, leading: Leading, part: str = "") -> None:
        self.cache, self.part, self._leading = cache, part, leading

    def reset(self) -> None:
        self._call("reset")

    def select(self, rows: torch.Tensor) -> None:
        self._call("select", rows)

    def move_tokens(self, start: int, target: int, count: int) -> None:
        self._call("move_tokens", start, target, count)

    @property
    def own(self) -> LedCache:
        """Of a T5: of the tokens written so far."""
        return LedCache(self.cache.own, self._leading, "own")

    @property
    def cross(self) -> LedCache:
        """Of a T5: of prompts."""
        return LedCache(self.cache.cross, self._leading, "cross")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)

    def _call(self, method: str, *arguments: Any) -> None:
        told = [_told(argument) for argument in arguments]
        message = ("cache", _Cache(self.part), method, told)
        self._leading.compute(message, partial(getattr(self.cache, method), *arguments))


def _told(argument: Any) -> Any:
    """An argument as it goes into a message."""
    if isinstance(argument, LedCache):
        return _Cache(argument.part)
    if isinstance(argument, torch.Tensor):
        with torch.inference_mode(False):
            return argument.detach().cpu().clone()
    return argument


def _ignore(first: int, logits: torch.Tensor) -> None:
    """In place of Feed.score, on a rank that nobody asks."""


def _picklable(error: Exception) -> Exception:
    """`error`, or one that says the same, where it cannot be sent."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever its class does
        return RankError(f"rank 0: {type(error).__name__}: {error}")
    return error
