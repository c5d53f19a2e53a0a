"""What torchrun's variables say, and what ranks learn of each other from a store, all of them in
this process; tests/models/test_leading.py has several."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from threading import Event
from typing import Any

import pytest
import torch
import torch.distributed as dist

from bminf.errors import ArgumentError, RankError
from bminf.layers import rendezvous
from bminf.layers.rendezvous import (
    Meeting,
    Place,
    place_in,
    share_threads,
    store_for,
    threads_of,
)

SET = {
    "RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost", "MASTER_PORT": "29500",
}  # fmt: skip


class Gone:
    """A store that its process had, which has ended: each question is a page of its own."""

    def __init__(self, store: Any) -> None:
        self._store, self.is_gone, self.num_asked = store, False, 0

    def check(self, names: list[str]) -> bool:
        self.num_asked += self.is_gone
        if self.is_gone:
            raise RuntimeError("Broken pipe")
        return bool(self._store.check(names))

    def __getattr__(self, name: str) -> Any:
        if self.is_gone:
            raise RuntimeError("Broken pipe")
        return getattr(self._store, name)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever does not come is not waited for; nobody is told when this process ends."""
    monkeypatch.setattr(rendezvous, "JOIN_TIMEOUT", timedelta(seconds=0.05))
    monkeypatch.setattr(rendezvous, "_TOLD_S", 0.05)
    monkeypatch.setattr(rendezvous, "_LINGER_S", 0)


@pytest.fixture
def other() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def test_the_place_is_what_torchrun_says() -> None:
    assert place_in(SET) == Place(1, 4, 1, 2)
    assert place_in({}) == place_in({"MASTER_ADDR": "localhost"}) == Place()
    without = {name: value for name, value in SET.items() if name != "LOCAL_WORLD_SIZE"}
    assert place_in(without) == Place(1, 4, 1, 4)


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"])
def test_variables_that_are_half_set_are_named(missing: str) -> None:
    given = {name: value for name, value in SET.items() if name != missing}
    with pytest.raises(ArgumentError, match=rf"{missing} is not set, but .*torchrun"):
        place_in(given)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"RANK": "one"}, "RANK='one'; a number"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE='-2'"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT='http'"),
        ({"RANK": "4"}, "RANK=4, WORLD_SIZE=4"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2 and LOCAL_WORLD_SIZE=2"),
    ],
)
def test_numbers_that_cannot_be_are_refused(changed: dict[str, str], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        place_in({**SET, **changed})


@pytest.mark.parametrize(
    ("variables", "before", "after"),
    [
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "any"}, 1, 4),
        ({"OMP_NUM_THREADS": "3", "TORCHELASTIC_RUN_ID": "any"}, 3, 3),
        ({"OMP_NUM_THREADS": "1"}, 1, 1),
        ({}, 8, 4),
        ({}, 2, 2),
    ],
)
def test_ranks_of_a_machine_share_its_processors(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], before: int, after: int
) -> None:
    """In place of the one thread that torchrun gives each; not of what somebody has said."""
    for name in ("OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    threads = [before]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    share_threads(Place(0, 4, 0, 2))
    assert threads[-1] == after
    assert (threads_of(3), threads_of(16)) == (2, 1)


def test_all_have_come_who_say_so() -> None:
    store = dist.HashStore()
    first, second = (Meeting(Place(rank, 2), store) for rank in range(2))
    with pytest.raises(RankError, match=r"^rank 1 did not come within 0\.05 seconds$"):
        first.come()
    with pytest.raises(RankError, match=r"^rank 1 did not come"):
        second.come()  # too late: the first has gone
    store = dist.HashStore()
    store.set("bminf/process/1", f"elsewhere {os.getpid()} 2")
    Meeting(Place(0, 2), store).come()


def test_who_is_waited_for_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """While it is busy: that may take as long as it likes."""
    store = dist.HashStore()
    first = Meeting(Place(0, 3), store)
    monkeypatch.setattr(rendezvous, "_QUIET_S", 0)
    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            for rank in (1, 2):
                store.set(f"bminf/comes/7/{rank}", "")

    monkeypatch.setattr(rendezvous.time, "sleep", nap)
    first.meet(7)
    assert caplog.messages == ["waiting for ranks 1, 2 to load this model as well"]


def test_ranks_that_differ_about_their_number_are_told_alike() -> None:
    store = dist.HashStore()
    store.set("bminf/process/1", f"elsewhere {os.getpid()} 3")
    said = r"^WORLD_SIZE is 2 on rank 0 and 3 on rank 1; give all the same$"
    with pytest.raises(ArgumentError, match=said):
        Meeting(Place(0, 2), store).come()
    store = dist.HashStore()
    store.set("bminf/process/0", f"elsewhere {os.getpid()} 2")
    with pytest.raises(ArgumentError, match=said):
        Meeting(Place(1, 3), store).come()


def test_two_processes_cannot_be_one_rank(other: subprocess.Popen[bytes]) -> None:
    store = dist.HashStore()
    store.set("bminf/process/1", f"elsewhere {other.pid} 2")
    with pytest.raises(RankError, match=rf"^process {other.pid} is rank 1 .* this MASTER_PORT, or"):
        Meeting(Place(1, 2), store).come()


def test_what_the_first_has_said_holds_for_all() -> None:
    store = dist.HashStore()
    first, second = (Meeting(Place(rank, 2), store) for rank in range(2))
    assert first.fail("rank 0 failed: of its own") == "rank 0 failed: of its own"
    assert second.fail("rank 1 failed: so rank 0 is gone") == "rank 0 failed: of its own"
    assert second.reason(RuntimeError("Connection closed")) == "rank 0 failed: of its own"
    with pytest.raises(RankError, match=r"^rank 0 failed: of its own$"):
        second.meet(1)


def test_a_store_that_is_gone_with_its_rank_is_asked_once(other: subprocess.Popen[bytes]) -> None:
    """It prints a page each time. Without torchrun, the first rank has it."""
    store = Gone(dist.HashStore())
    machine = rendezvous._machine()
    for rank, process in enumerate((other.pid, os.getpid())):
        store.set(f"bminf/process/{rank}", f"{machine} {process} 2")
    second = Meeting(Place(1, 2), store)
    store.set("bminf/comes/1/0", "")
    second.come()
    other.communicate(b"\n")
    store.is_gone = True
    said = second.reason(RuntimeError("Connection closed by peer"))
    assert said.startswith(f"rank 0 failed: its process {other.pid} ended")
    assert store.num_asked == 1
    assert second.fail("rank 1 failed: for that") == "rank 1 failed: for that"
    with pytest.raises(RankError, match=r"the store of torch\.distributed is gone"):
        Meeting(Place(1, 2), store).meet(2)


def test_of_other_machines_those_that_say_nothing_are_named() -> None:
    store = dist.HashStore()
    for rank in range(3):
        store.set(f"bminf/process/{rank}", f"machine{rank} {os.getpid()} 3")
    ranks = [Meeting(Place(rank, 3), store) for rank in range(3)]
    store.set("bminf/heard/2", "")
    said = ranks[0].reason(RuntimeError("Connection closed by peer"))
    assert said.startswith("rank 1 failed: nothing is heard from there any more")
    assert ranks[2].reason(RuntimeError("Connection closed by peer")) == said
    store = dist.HashStore()
    for rank in range(3):
        store.set(f"bminf/heard/{rank}", "")
    said = Meeting(Place(0, 3), store).reason(RuntimeError("timed out"))
    assert said == "another rank has left without a word: timed out"
    gone = Gone(store)
    gone.is_gone = True
    said = Meeting(Place(1, 3), gone).reason(RuntimeError("Connection closed by peer"))
    assert said == "rank 0 failed: the store, which it has, is gone"


def test_another_program_at_the_port_is_an_error_of_each_rank(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where it answers nothing: torch would wait for it as long as it lives."""
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr(rendezvous, "_ANSWER_S", 0.05)
    is_over = Event()
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("MASTER_ADDR", "localhost")
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(RankError, match=f"rank 0 of 2 .*:{port}: .*EADDRINUSE"):
            store_for(Place(0, 2))
        monkeypatch.setattr(dist, "TCPStore", lambda *_, **__: is_over.wait(5))
        with pytest.raises(RankError, match=f"rank 1 of 2 .*:{port}: another program has that"):
            store_for(Place(1, 2))
        is_over.set()
    with pytest.raises(RankError, match=f"rank 1 of 2 .*:{port}: .*refused"):
        store_for(Place(1, 2))


def test_the_first_rank_has_the_store_unless_torchrun_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr(rendezvous, "JOIN_TIMEOUT", timedelta(seconds=20))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("MASTER_PORT", str(server.getsockname()[1]))
    first, second = store_for(Place(0, 2)), store_for(Place(1, 2))
    first.set("a", "b")
    assert second.get("a") == b"b"
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    third = store_for(Place(0, 2))
    assert third.get("a") == b"b"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="there is no /proc")
def test_a_process_has_ended_though_nobody_has_waited_for_it() -> None:
    """As those of torchrun's ranks have, until it looks after them."""
    command = [sys.executable, "-c", "input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as program:
        process = rendezvous._Process(rendezvous._machine(), str(program.pid), "2")
        elsewhere = rendezvous._Process("elsewhere", str(program.pid), "2")
        assert not process.has_ended
        assert program.stdin is not None
        program.stdin.close()
        os.waitid(os.P_PID, program.pid, os.WEXITED | os.WNOWAIT)  # it stays as it is
        assert process.has_ended and not elsewhere.has_ended
