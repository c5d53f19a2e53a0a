"""Where ranks meet: in the store of torch.distributed each says which process it is, that it has
come to load a model, and why it has failed.

Collectives only wait, and say nothing of who is missing. What is here asks again and again, and so
can name a rank that does not come, or has ended.
"""

from __future__ import annotations

import atexit
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist

from bminf.errors import ArgumentError, RankError

logger = logging.getLogger("bminf")

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""That torchrun sets for each rank."""

JOIN_TIMEOUT = timedelta(minutes=2)
"""For all ranks to come, once."""

_ANSWER_S = 5.0  # for what listens at the port of the store to answer as one
_QUIET_S = 30.0  # of waiting for a rank that may be busy, or never come
_POLL_S = 0.005  # short: torchrun ends the others within a tenth of a second
_TOLD_S = 4.0  # after an error of the transport, for all others to say why, or that they see it
_LINGER_S = 1.0  # of a process that has the store and has failed, for others to read why

# In the store.
_FAILED = "bminf/failed"  # what the first rank that failed said
_PROCESS = "bminf/process"  # of each rank: machine, process, and the number of ranks that it knows
_COMES = "bminf/comes"  # which ranks have come to load which model
_HEARD = "bminf/heard"  # which ranks have seen that another one has gone


@dataclass(frozen=True)
class Place:
    """Of this process among the ranks, as torchrun says.   local_size: ranks of this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def place_in(environment: Mapping[str, str]) -> Place:
    """The place that torchrun's variables give; without any of them, that of a process alone.

    Raises ArgumentError where some of them are missing, or are no numbers.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if not any(name in environment for name in names):
        return Place()
    missing = [name for name in VARIABLES if not environment.get(name)]
    if missing:
        raise ArgumentError(
            f"of torchrun's variables {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} "
            f"not set, but {', '.join(name for name in names if name in environment)}: start the "
            "script with torchrun, or set none of them"
        )
    rank, size, local_rank, _ = (
        _number(name, environment[name]) for name in (*names, "MASTER_PORT")
    )
    local_size = _number("LOCAL_WORLD_SIZE", environment.get("LOCAL_WORLD_SIZE", str(size)))
    if not 0 <= rank < size or not 0 <= local_rank < max(local_size, 1):
        raise ArgumentError(
            f"RANK={rank}, WORLD_SIZE={size}, LOCAL_RANK={local_rank} and LOCAL_WORLD_SIZE="
            f"{local_size}; ranks count from 0 to below these sizes"
        )
    return Place(rank, size, local_rank, local_size)


def _number(name: str, text: str) -> int:
    if not text.isdecimal():
        raise ArgumentError(f"{name}={text!r}; a number is needed, as torchrun sets it")
    return int(text)


def threads_of(num_ranks: int) -> int:
    """Of a machine's processors, how many each of so many ranks has."""
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return max(1, cores // num_ranks)


def share_threads(place: Place) -> None:
    """Give torch this rank's part of the processors, where nobody has said how many.

    torchrun gives each rank one, and without it each takes all.
    """
    said, threads = os.environ.get("OMP_NUM_THREADS"), torch.get_num_threads()
    share = threads_of(place.local_size)
    is_torchruns = said == "1" and threads == 1 and "TORCHELASTIC_RUN_ID" in os.environ
    if is_torchruns or (said is None and threads > share):
        torch.set_num_threads(share)


# ---- the store -----------------------------------------------------------------------------------


def store_for(place: Place) -> Any:
    """The store that torchrun's variables name; the first rank has it, where torchrun has not.

    Raises RankError where there is none, or another program has its port.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_host = place.rank == 0 and not _is_torchruns()
    make = partial(
        dist.TCPStore, host, port, None, is_host, JOIN_TIMEOUT, wait_for_workers=False,
        multi_tenant=True,
    )  # fmt: skip
    try:
        store = make() if is_host else _answering(host, port, make)
    except (RuntimeError, ValueError, OSError) as error:
        raise RankError(
            f"rank {place.rank} of {place.size} could not meet the others at {host}:{port}: {error}"
        ) from error
    return dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)


def _is_torchruns() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _answering(host: str, port: int, make: Callable[[], Any]) -> Any:
    """What make() gives, once something listens there: it waits for ever for an answer.

    Raises OSError where nothing listens, ConnectionError where what does is no store.
    """
    _wait_for_listener(host, port)
    made: SimpleQueue[Any] = SimpleQueue()

    def connect() -> None:
        try:
            made.put(make())
        except Exception as error:
            made.put(error)

    Thread(target=connect, name="bminf-store", daemon=True).start()
    try:
        found = made.get(timeout=_ANSWER_S)
    except Empty:
        raise ConnectionError("another program has that port; take a free one") from None
    if isinstance(found, Exception):
        raise found
    return found


def _wait_for_listener(host: str, port: int) -> None:
    end_s = time.monotonic() + JOIN_TIMEOUT.total_seconds()
    while True:
        try:
            socket.create_connection((host, port), timeout=_ANSWER_S).close()
            return
        except OSError:
            if time.monotonic() > end_s:
                raise
        time.sleep(0.05)


class Meeting:
    """What a rank and the others tell each other in a store; of a rank alone there is none."""

    def __init__(self, place: Place = Place(), store: Any = None) -> None:
        self._rank, self._size, self._store = place.rank, place.size, store
        self._has_store = place.rank == 0 and not _is_torchruns()
        self._processes: dict[int, _Process] = {}  # which are needed where the store is gone

    def come(self) -> None:
        """Return when all ranks have come, each with its process.

        Raises RankError where one does not, within two minutes; ArgumentError where ranks differ
        about how many they are.
        """
        own = f"{_machine()} {os.getpid()} {self._size}"
        with _reached():
            there = self._store.compare_set(f"{_PROCESS}/{self._rank}", "", own).decode()
            if there != own:
                raise RankError(
                    f"process {_Process(*there.split()).number} is rank {self._rank} of these "
                    "already: another program has this MASTER_PORT, or two processes the same RANK"
                )
            self._wait_for(_PROCESS, JOIN_TIMEOUT)

    def meet(self, number: int) -> None:
        """Return when all ranks have come to load the model of this number: until then one may be
        busy for as long as it likes.   Raises RankError, where one never will come."""
        with _reached():
            self._store.set(f"{_COMES}/{number}/{self._rank}", "")
            self._wait_for(f"{_COMES}/{number}")

    def fail(self, said: str) -> str:
        """Tell all others why this rank computes no more; what the first has said that failed."""
        if self._store is None:
            return said
        if self._has_store:
            atexit.register(time.sleep, _LINGER_S)
        try:
            return str(self._store.compare_set(_FAILED, "", said).decode())
        except RuntimeError:  # the store is gone with rank 0
            return said

    def reason(self, error: Exception) -> str:
        """Who failed, and how, as far as that can be known, after this error of the transport."""
        with suppress(RuntimeError):
            if self._store is not None:
                self._store.set(f"{_HEARD}/{self._rank}", "")
        end_s = time.monotonic() + _TOLD_S
        while time.monotonic() < end_s:
            if said := self._failure():
                return said
            if self._store is not None and not self._silent():
                break
            time.sleep(_POLL_S)
        return self._silence() or f"another rank has left without a word: {error}"

    # ---- who is there ----------------------------------------------------------------------------

    def _wait_for(self, name: str, patience: timedelta | None = None) -> None:
        """Until all ranks have said this."""
        start_s, is_said = time.monotonic(), False
        while True:
            missing = [r for r in range(self._size) if not self._store.check([f"{name}/{r}"])]
            self._check_sizes()
            if said := self._failure():
                raise RankError(said)
            if not missing:
                return
            waited_s = time.monotonic() - start_s
            if patience is not None and waited_s > patience.total_seconds():
                within = f"within {patience.total_seconds():g} seconds"
                raise RankError(self.fail(f"{_ranks(missing)} did not come {within}"))
            if waited_s > _QUIET_S and not is_said:
                is_said = True
                logger.warning("waiting for %s to load this model as well", _ranks(missing))
            time.sleep(_POLL_S)

    def _check_sizes(self) -> None:
        """Raise ArgumentError where the ranks that have come do not agree about their number."""
        for rank in range(self._size):
            process = self._process_of(rank)
            if process is not None and int(process.size) != self._size:
                sizes = sorted([(rank, int(process.size)), (self._rank, self._size)])
                said = " and ".join(f"{size} on rank {rank}" for rank, size in sizes)
                raise ArgumentError(self.fail(f"WORLD_SIZE is {said}; give all the same"))

    def _failure(self) -> str:
        """What is known of a rank that has failed; nothing where none has."""
        try:
            if self._store is not None and self._store.check([_FAILED]):
                return str(self._store.get(_FAILED).decode())
            # The first that saw one may have ended itself by now, and what it said holds for all.
            return self.fail(gone) if (gone := self._ended()) else ""
        except RuntimeError:  # it is gone with its process, and says so at length each time
            self._store = None
            return ""

    def _ended(self) -> str:
        """Of a rank of this machine whose process has ended."""
        for rank in range(self._size):
            process = None if rank == self._rank else self._process_of(rank)
            if process is not None and process.has_ended:
                return (
                    f"rank {rank} failed: its process {process.number} ended without a word: it "
                    "was killed, or left the script early; see what torchrun says of it"
                )
        return ""

    def _silence(self) -> str:
        """Of ranks that have not even seen that one has gone."""
        if self._store is None:
            return "" if _is_torchruns() else "rank 0 failed: the store, which it has, is gone"
        if not (silent := self._silent()):
            return ""
        return self.fail(
            f"{_ranks(silent)} failed: nothing is heard from there any more; see what torchrun "
            "says of it, on its machine where there are several"
        )

    def _silent(self) -> list[int]:
        """Ranks on other machines, or ending."""
        heard = (f"{_HEARD}/{rank}" for rank in range(self._size))
        with suppress(RuntimeError):
            return [rank for rank, name in enumerate(heard) if not self._store.check([name])]
        return []

    def _process_of(self, rank: int) -> _Process | None:
        """None where it has not said so yet."""
        name, store = f"{_PROCESS}/{rank}", self._store
        if rank not in self._processes and store is not None and store.check([name]):
            self._processes[rank] = _Process(*store.get(name).decode().split())
        return self._processes.get(rank)


@contextmanager
def _reached() -> Iterator[None]:
    """For what needs the store.   Raises RankError where that is gone."""
    try:
        yield
    except RuntimeError as error:
        raise RankError(f"the store of torch.distributed is gone: {error}") from error


@dataclass(frozen=True)
class _Process:
    """Of a rank.   machine: of which it has a number.   size: of how many ranks it knows."""

    machine: str
    number: str
    size: str

    @property
    def has_ended(self) -> bool:
        """Whether it is gone from this machine, or is dead and not yet waited for."""
        if self.machine != _machine() or not sys.platform.startswith("linux"):
            return False
        try:
            state = Path(f"/proc/{self.number}/stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, IndexError):
            return True
        return state in "ZX"


@cache
def _machine() -> str:
    """The same for processes that see each other by their numbers: those of one container, where
    there are containers, of which some have the name of their machine."""
    parts = [os.uname().nodename if hasattr(os, "uname") else "here"]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return "/".join(parts).replace(" ", "")


def _ranks(numbers: Iterable[int]) -> str:
    found = [str(number) for number in numbers]
    return f"rank {found[0]}" if len(found) == 1 else f"ranks {', '.join(found)}"
