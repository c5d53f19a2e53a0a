"""Tensor parallel: the ranks that compute one model together, and linears that they share.

A rank has some heads and some columns of each feed-forward. What is cut by rows needs nothing of
the others; a linear that is cut by columns gives a part of a sum, and the output head some of the
logits. Only all_reduce, broadcast and all_gather are used: gloo and NCCL both have them for all
dtypes of activations.

Whatever can fail is checked before the ranks compute, and raised alike on all of them, see
Group.agreement(). A rank that fails later says so in the store, see rendezvous.py, and takes the
process group down, which ends the waiting of all others, see Group.together().

Source: Shoeybi et al. 2019, arXiv:1909.08053, section 3.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import pickle
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from traceback import clear_frames
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from bminf import errors
from bminf.errors import ArgumentError, BMInfError, RankError
from bminf.layers.rendezvous import Meeting, Place, place_in, share_threads, store_for
from bminf.layers.saving import PART, check_not_saved

logger = logging.getLogger("bminf")

_TIMEOUT = timedelta(minutes=10)
"""Of a collective within a pass. Between passes a rank may wait as long as rank 0 has no work."""
_PATIENCE = timedelta(days=30)
_REPORT_BYTES = 2**14  # of what each rank says before the ranks compute
_MESSAGE_BYTES = 1024  # of the first broadcast of a message; what is longer follows in a second
_LENGTH_BYTES = 8
_MAX_TEXT = 1500

_SINGLE = Place()
_AGREED = "_bminf_is_of_all_ranks"  # an attribute of an error that all ranks raise


class Group:
    """Ranks that compute one model together. A group of one makes no collectives.

    rank, size: of this process, and how many there are.   local_size: of this machine.
    control: a process group of gloo for what is no part of a pass; None where size is 1.
    num_sums: that were begun.
    """

    def __init__(
        self, place: Place = _SINGLE, meeting: Meeting | None = None, control: Any = None
    ) -> None:
        self.rank, self.size = place.rank, place.size
        self.local_rank, self.local_size = place.local_rank, place.local_size
        self._meeting, self.control = meeting or Meeting(place), control
        self._failed: RankError | None = None
        self.num_sums = 0

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

    def connect(self) -> None:
        """Make its process group for what is no part of a pass."""

        def make() -> None:
            self.control = dist.new_group(backend="gloo", timeout=_PATIENCE)

        self._collective(make)

    # ---- what a pass does ------------------------------------------------------------------------

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' `x`, which is overwritten: the same bits on all ranks."""
        if self.size == 1:
            return x
        x, self.num_sums = x.contiguous(), self.num_sums + 1
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
        self._failed = self._failed or RankError(self._meeting.fail(text))
        _take_down()

    def _collective(self, run: Callable[[], object]) -> None:
        if self._failed is not None:
            raise self._failed
        try:
            run()
        except (RuntimeError, ValueError) as error:
            clear_frames(error.__traceback__)  # torch's have the process group, and keep it open
            if not dist.is_initialized():  # by a model of this process that failed, or by the user
                self.leave(RankError("its process group was destroyed"))
            _take_down()  # so that nobody waits for this one either
            self._failed = self._failed or RankError(self._meeting.reason(error))
            raise self._failed from error
        except BaseException as interrupt:
            self.leave(interrupt)
            raise


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
    if _Joined.meeting is None:
        _Joined.meeting = _met(place, "nccl" if _is_gpu(device) else "gloo")
    if not dist.is_initialized():
        raise RankError("the ranks of this program have failed before; start it again")
    group = Group(place, _Joined.meeting)
    _Joined.number += 1
    _Joined.meeting.meet(_Joined.number)  # what follows would wait for who is gone
    group.connect()
    _Joined.groups.add(group)
    return group


@contextmanager
def before_joining(device: Any) -> Iterator[None]:
    """For what may fail on one of several ranks before it calls join(), which the others do: an
    error is raised on all of them.   device: as for join()."""
    number = _Joined.number
    try:
        yield
    except RankError:
        raise
    except Exception:
        if _Joined.number == number:
            with join(device).agreement():
                raise
        raise


class _Joined:
    """Where this process met the others.   number, groups: of models, and those of them that are
    there."""

    meeting: Meeting | None = None
    number: ClassVar[int] = 0
    groups: ClassVar[weakref.WeakSet[Group]] = weakref.WeakSet()


def _met(place: Place, backend: str) -> Meeting:
    """Once all ranks are there, in a process group: the user's own, or one of this backend."""
    is_users = dist.is_initialized()
    if is_users and dist.get_world_size() != place.size:
        raise ArgumentError(
            f"WORLD_SIZE={place.size}, but torch.distributed was initialised with "
            f"{dist.get_world_size()} ranks; leave that to this library, or to torchrun"
        )
    store = dist.distributed_c10d._get_default_store() if is_users else store_for(place)
    meeting = Meeting(place, store)
    meeting.come()
    if not is_users:
        _initialise(place, backend, store)
    _tell_what_ends(Group(place, meeting))
    share_threads(place)
    if place.rank > 0 and logger.level == logging.NOTSET:
        logger.setLevel(logging.ERROR)  # rank 0 tells the same
    return meeting


def _tell_what_ends(group: Group) -> None:
    """Tell all other ranks of an error that nobody has caught, before it is shown."""
    show = sys.excepthook

    def tell(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        group.leave(error)
        show(kind, error, trace)

    sys.excepthook = tell


def _initialise(place: Place, backend: str, store: Any) -> None:
    try:
        dist.init_process_group(
            backend, store=store, rank=place.rank, world_size=place.size, timeout=_TIMEOUT
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise RankError(
            f"rank {place.rank} of {place.size} could not connect to the others: {error}"
        ) from error
    # Threads of gloo that outlive the interpreter end the process with "terminate called".
    atexit.register(_take_down)


def _take_down() -> None:
    """Close this rank's connections, whoever waits at the other end."""
    for group in [*_Joined.groups]:
        group.control = None  # whatever holds it keeps its connections open
    with suppress(RuntimeError, ValueError, AssertionError):
        dist.destroy_process_group()


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
    takes_all: whether it is given all K columns, of which it takes its own.
    """

    def __init__(self, linear: torch.nn.Module, group: Group, takes_all: bool = False) -> None:
        super().__init__()
        self.linear, self.group, self.takes_all = linear, group, takes_all

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., K / ranks), or (..., K), -> (..., N)."""
        own = self.group.share(x, -1) if self.takes_all else x
        return self.group.sum(self.linear(own))

    def _save_to_state_dict(self, *arguments: Any, **more: Any) -> None:
        check_not_saved(PART)
        super()._save_to_state_dict(*arguments, **more)
