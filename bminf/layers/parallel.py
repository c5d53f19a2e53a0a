"""Tensor parallel: the ranks that compute one model together, and linears that they share.

A rank has some heads and some columns of each feed-forward. What is cut by rows needs nothing of
the others; a linear that is cut by columns gives a part of a sum, and the output head some of the
logits. Only all_reduce, broadcast and all_gather are used: gloo and NCCL both have them for all
dtypes of activations.

Whatever can fail is checked before the ranks compute, and raised alike on all of them, see
Group.agreement(). A rank that fails later says so in the store and takes the process group down,
which ends the waiting of all others, see Group.together().

Source: Shoeybi et al. 2019, arXiv:1909.08053, section 3.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import pickle
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from bminf import errors
from bminf.errors import ArgumentError, BMInfError, RankError
from bminf.layers.saving import PART, check_not_saved

logger = logging.getLogger("bminf")

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""That torchrun sets for each rank."""

_TIMEOUT = timedelta(minutes=10)
"""Of a collective within a pass. Between passes a rank may wait as long as rank 0 has no work."""
_PATIENCE = timedelta(days=30)
_JOIN_TIMEOUT = timedelta(minutes=2)

_FAILED = "bminf/failed"  # in the store: what the first rank that failed said
_PROCESS = "bminf/process"  # in the store: the machine and process of each rank
_COMES = "bminf/comes"  # in the store: which ranks have come to load which model
_TOLD_S = 3.0  # after an error of the transport, for the rank that caused it to say why

_REPORT_BYTES = 2**14  # of what each rank says before the ranks compute
_MESSAGE_BYTES = 1024  # of the first broadcast of a message; what is longer follows in a second
_LENGTH_BYTES = 8
_MAX_TEXT = 1500

_AGREED = "_bminf_is_of_all_ranks"  # an attribute of an error that all ranks raise


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
    rank, size, local_rank = (_number(name, environment[name]) for name in names)
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


class Group:
    """Ranks that compute one model together. A group of one makes no collectives.

    rank, size: of this process, and how many there are.   local_size: of this machine.
    control: a process group of gloo for what is no part of a pass; None where size is 1.
    """

    def __init__(self, place: Place = Place(), store: Any = None, control: Any = None) -> None:
        self.rank, self.size = place.rank, place.size
        self.local_rank, self.local_size = place.local_rank, place.local_size
        self._store, self.control = store, control
        self._failed: RankError | None = None
        self._processes: dict[int, str] = {}  # which are needed where the store is gone

    def device(self, given: Any) -> Any:
        """`given`, of a model of this group: on GPUs each rank has the one of its number.

        Raises ArgumentError for one GPU by its number, which would be that of all ranks.
        """
        if self.size == 1 or not _is_gpu(given):
            return given
        if given is not None and torch.device(given).index is not None:
            raise ArgumentError(
                f"device={given!r}, but there are {self.size} ranks, each on the GPU of its number "
                'on its machine; give device="cuda"'
            )
        return f"cuda:{self.local_rank}"

    # ---- what a pass does ------------------------------------------------------------------------

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' `x`, which is overwritten: the same bits on all ranks."""
        if self.size == 1:
            return x
        x = x.contiguous()
        self._collective(lambda: dist.all_reduce(x))
        return x

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """The ranks' `x`, (..., n) each, side by side: (..., size * n)."""
        if self.size == 1:
            return x
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)]
        self._collective(lambda: dist.all_gather(parts, x))
        return torch.cat(parts, dim=-1)

    def share(self, x: torch.Tensor, axis: int = 0) -> torch.Tensor:
        """This rank's part of what all ranks have: a view."""
        size = x.shape[axis] // self.size
        return x.narrow(axis, self.rank * size, size)

    # ---- what lies between passes ----------------------------------------------------------------

    def send(self, message: object) -> None:
        """From rank 0 to all others, which call receive(). Small messages are one broadcast."""
        data = pickle.dumps(message)
        framed = len(data).to_bytes(_LENGTH_BYTES, "little") + data
        self._broadcast(_as_tensor(framed[:_MESSAGE_BYTES], _MESSAGE_BYTES))
        if rest := framed[_MESSAGE_BYTES:]:
            self._broadcast(_as_tensor(rest, len(rest)))

    def receive(self) -> Any:
        """What rank 0 sends next.

        It is unpickled, as torch.distributed's own messages are: ranks of one job trust each other.
        """
        head = bytes(self._broadcast(_as_tensor(b"", _MESSAGE_BYTES)).tolist())
        length = int.from_bytes(head[:_LENGTH_BYTES], "little")
        data = head[_LENGTH_BYTES : _LENGTH_BYTES + length]
        if rest := length - len(data):
            data += bytes(self._broadcast(_as_tensor(b"", rest)).tolist())
        return pickle.loads(data)

    def _broadcast(self, x: torch.Tensor) -> torch.Tensor:
        self._collective(lambda: dist.broadcast(x, 0, group=self.control))
        return x

    @contextmanager
    def agreement(self) -> Iterator[Terms]:
        """What is done within may fail on any rank, and must not compute: an error of one is raised
        on all, and so is one where what the ranks put into `alike` differs. One may be within
        another."""
        terms = Terms()
        if self.size == 1:
            yield terms
            terms.of_all = [terms.own]
            return
        error: Exception | None = None
        try:
            with warnings.catch_warnings():
                if self.rank > 0:  # rank 0 gives the same
                    warnings.simplefilter("ignore")
                yield terms
        except Exception as raised:
            if hasattr(raised, _AGREED):  # within, and on all ranks
                raise
            error = raised
        except BaseException as interrupt:
            self.leave(interrupt)
            raise
        reports = self._reports(terms, error)
        terms.of_all = [report["own"] for report in reports]
        for rank, report in enumerate(reports):
            if report["error"] is not None:
                found = _raised(rank, report["error"], error)
                setattr(found, _AGREED, True)
                raise found
        _check_alike([report["alike"] for report in reports])

    def _reports(self, terms: Terms, error: Exception | None) -> list[dict[str, Any]]:
        said = None if error is None else (type(error).__name__, str(error)[:_MAX_TEXT])
        own = {"error": said, "alike": terms.alike, "own": terms.own}
        # What no text can hold, of a path that is none, is escaped as JSON has it.
        text = json.dumps(own, ensure_ascii=False).encode(errors="backslashreplace")
        x = _as_tensor(text, _REPORT_BYTES)
        parts = [torch.empty_like(x) for _ in range(self.size)]
        self._collective(lambda: dist.all_gather(parts, x, group=self.control))
        return [json.loads(bytes(part.tolist()).rstrip(b"\0")) for part in parts]

    # ---- failures --------------------------------------------------------------------------------

    def meet(self, number: int) -> None:
        """Return when all ranks have come to load the model of this number: until then one may be
        busy for as long as it likes.   Raises RankError, where one never will come."""
        if (store := self._store) is None:
            return
        comes = [f"{_COMES}/{number}/{rank}" for rank in range(self.size)]
        try:
            store.set(comes[self.rank], "")
            while not store.check(comes):
                if said := self._failure():
                    raise RankError(said)
                time.sleep(0.01)
            for rank in range(self.size):
                self._process_of(rank)
        except RuntimeError as error:
            raise RankError(f"the store of torch.distributed is gone: {error}") from error

    @contextmanager
    def together(self) -> Iterator[None]:
        """For a pass: where this rank fails in it, the others, which wait for it, are told.

        Raises RankError, with the number of the rank that failed.
        """
        if self._failed is not None:
            raise self._failed
        try:
            yield
        except RankError:
            raise
        except BaseException as error:
            if self.size == 1:
                raise
            self.leave(error)
            if not isinstance(error, Exception):
                raise
            assert self._failed is not None
            raise self._failed from error

    def leave(self, error: BaseException) -> None:
        """Tell the others why this rank computes no more, and end their waiting."""
        kind = "" if isinstance(error, RankError) else f"{type(error).__name__}: "
        said = f"rank {self.rank} failed: {kind}{error}"[:_MAX_TEXT]
        text = said.encode(errors="backslashreplace").decode()
        self._failed = self._failed or RankError(text)
        if self._store is not None:
            with suppress(RuntimeError):  # the store is gone with rank 0
                self._store.compare_set(_FAILED, "", text)
        _take_down()

    def _collective(self, run: Callable[[], object]) -> None:
        if self._failed is not None:
            raise self._failed
        try:
            run()
        except (RuntimeError, ValueError) as error:
            if not dist.is_initialized():  # by a model of this process that failed, or by the user
                self.leave(RankError("its process group was destroyed"))
            self._failed = RankError(self._reason(error))
            _take_down()  # so that nobody waits for this one either
            raise self._failed from error

    def _reason(self, error: Exception) -> str:
        """Who failed, and how, as far as that can be known."""
        end_s = time.monotonic() + _TOLD_S
        while time.monotonic() < end_s:
            if said := self._failure():
                return said
            time.sleep(0.05)
        return f"another rank has left without a word: {error}"

    def _failure(self) -> str:
        """What is known of a rank that has failed; nothing where none has."""
        try:
            if self._store is not None and self._store.check([_FAILED]):
                return str(self._store.get(_FAILED).decode())
            gone = self._ended()
            if gone and self._store is not None:
                # What the first has said that saw one: by now it may have ended itself.
                return str(self._store.compare_set(_FAILED, "", gone).decode())
            return gone
        except RuntimeError:  # it is gone with its process, and says so at length each time
            self._store = None
            return ""

    def _ended(self) -> str:
        """Of a rank of this machine whose process has ended."""
        for rank in range(self.size):
            if rank != self.rank and (process := self._process_of(rank)):
                host, number = process.split()
                if host == _host() and _has_ended(int(number)):
                    return (
                        f"rank {rank} failed: its process {number} ended without a word: it was "
                        "killed, or left the script early; see what torchrun says of it"
                    )
        return ""

    def _process_of(self, rank: int) -> str:
        """Its machine and number; nothing where it has not said so yet."""
        name, store = f"{_PROCESS}/{rank}", self._store
        if rank not in self._processes and store is not None and store.check([name]):
            self._processes[rank] = store.get(name).decode()
        return self._processes.get(rank, "")


@dataclass
class Terms:
    """alike: what has to be the same on all ranks.   own: what each says.   of_all: that of each
    rank, once all have agreed."""

    alike: dict[str, Any] = field(default_factory=dict)
    own: dict[str, Any] = field(default_factory=dict)
    of_all: Sequence[dict[str, Any]] = ()


ALONE = Group()


def _is_gpu(device: Any) -> bool:
    """Whether a model that is given this device, or None, is for a GPU."""
    if device is None:
        return torch.cuda.is_available()
    return isinstance(device, int) or str(device).startswith("cuda")


def join(device: Any) -> Group:
    """The group of this process: that of torchrun's variables, or ALONE.

    device: as given for the model; GPUs compute with NCCL, CPUs with gloo. A process group that is
    there already is used. Each call makes a group for one model, on all ranks alike.
    Raises ArgumentError for variables that are half set, RankError where ranks do not come.
    """
    place = place_in(os.environ)
    if place.size == 1:
        return ALONE
    if not dist.is_available():
        raise ArgumentError("this torch was built without torch.distributed; start one process")
    if not dist.is_initialized():
        if _Joined.store is not None:
            raise RankError("the ranks of this program have failed before; start it again")
        _Joined.store = _rendezvous(place, "nccl" if _is_gpu(device) else "gloo")
    if dist.get_world_size() != place.size:
        raise ArgumentError(
            f"WORLD_SIZE={place.size}, but torch.distributed was initialised with "
            f"{dist.get_world_size()} ranks; leave that to this library, or to torchrun"
        )
    group = Group(place, _Joined.store)
    _Joined.number += 1
    group.meet(_Joined.number)  # what follows would wait for who is gone
    group.control = dist.new_group(backend="gloo", timeout=_PATIENCE)
    _Joined.groups.add(group)
    return group


class _Joined:
    """The store that this process met the others in; None where others initialised the group.

    number, groups: of models, and those of them that are there.
    """

    store: Any = None
    number: ClassVar[int] = 0
    groups: ClassVar[weakref.WeakSet[Group]] = weakref.WeakSet()


def _rendezvous(place: Place, backend: str) -> Any:
    try:
        store, rank, size = next(iter(dist.rendezvous("env://", timeout=_JOIN_TIMEOUT)))
        store.set_timeout(_JOIN_TIMEOUT)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_TIMEOUT)
    except (RuntimeError, ValueError, OSError) as error:
        raise RankError(
            f"rank {place.rank} of {place.size} could not meet the others at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}: {error}"
        ) from error
    # Threads of gloo that outlive the interpreter end the process with "terminate called".
    atexit.register(_take_down)
    store.set(f"{_PROCESS}/{place.rank}", f"{_host()} {os.getpid()}")
    if place.rank > 0 and logger.level == logging.NOTSET:
        logger.setLevel(logging.ERROR)  # rank 0 tells the same
    return store


def _take_down() -> None:
    """Close this rank's connections, whoever waits at the other end."""
    for group in [*_Joined.groups]:
        group.control = None  # whatever holds it keeps its connections open
    with suppress(RuntimeError, ValueError, AssertionError):
        dist.destroy_process_group()


def _host() -> str:
    return os.uname().nodename if hasattr(os, "uname") else "here"


def _has_ended(number: int) -> bool:
    """Whether a process of this machine is gone, or is dead and not yet waited for."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return True
    return state in "ZX"


def _as_tensor(data: bytes, size: int) -> torch.Tensor:
    """(size,) uint8, zeros behind the data.   Raises ArgumentError where there is no room."""
    if len(data) > size:
        raise ArgumentError(f"{len(data)} bytes are more than ranks tell each other, {size}")
    with torch.device("cpu"), torch.inference_mode(False):
        x = torch.zeros(size, dtype=torch.uint8)
        if data:
            x[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return x


def _raised(rank: int, said: Sequence[str], own: Exception | None) -> Exception:
    """The error of a rank: this rank's own, where it says the same."""
    name, text = said
    if own is not None and (type(own).__name__, str(own)[:_MAX_TEXT]) == (name, text):
        return own
    found = getattr(errors, name, None)
    kind = found if isinstance(found, type) and issubclass(found, BMInfError) else RankError
    return kind(f"rank {rank}: {text}" if kind is not RankError else f"rank {rank}: {name}: {text}")


def _check_alike(alike: Sequence[Mapping[str, Any]]) -> None:
    for rank, other in enumerate(alike):
        for name, value in alike[0].items():
            if other.get(name) != value:
                raise ArgumentError(
                    f"{name} is {value!r} on rank 0 and {other.get(name)!r} on rank {rank}; ranks "
                    "of one model are given the same"
                )


class RowParallel(torch.nn.Module):
    """A linear of which each rank has some columns: the sum over the ranks is its result.

    linear: nn.Linear or QuantizedLinear (N, K / ranks); of all ranks, the first has the bias.
    """

    def __init__(self, linear: torch.nn.Module, group: Group) -> None:
        super().__init__()
        self.linear, self.group = linear, group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., K / ranks) -> (..., N)."""
        return self.group.sum(self.linear(x))

    def _save_to_state_dict(self, *arguments: Any, **more: Any) -> None:
        check_not_saved(PART)
        super()._save_to_state_dict(*arguments, **more)
