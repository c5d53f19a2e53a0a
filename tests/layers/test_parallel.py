"""A group without other processes; tests/models/test_leading.py has several."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from bminf.errors import ArgumentError, CheckpointError, RankError
from bminf.layers.parallel import ALONE, Group, RowParallel, join
from bminf.layers.quantized_linear import QuantizedLinear
from bminf.layers.rendezvous import VARIABLES, Place


class Alike:
    """Stands for the transport: all ranks hold and say the same."""

    def __init__(self, size: int) -> None:
        self.size, self.calls = size, list[tuple[str, tuple[int, ...], torch.dtype]]()

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(dist, "all_reduce", self.all_reduce)
        monkeypatch.setattr(dist, "all_gather", self.all_gather)
        monkeypatch.setattr(dist, "broadcast", self.broadcast)

    def _note(self, kind: str, x: torch.Tensor) -> None:
        self.calls.append((kind, tuple(x.shape), x.dtype))

    def all_reduce(self, x: torch.Tensor, group: Any = None) -> None:
        self._note("all_reduce", x)
        x.mul_(self.size)

    def all_gather(self, parts: list[torch.Tensor], x: torch.Tensor, group: Any = None) -> None:
        self._note("all_gather", x)
        for part in parts:
            part.copy_(x)

    def broadcast(self, x: torch.Tensor, source: int, group: Any = None) -> None:
        self._note("broadcast", x)


@pytest.fixture
def alike(monkeypatch: pytest.MonkeyPatch) -> Alike:
    found = Alike(2)
    found.install(monkeypatch)
    return found


def test_without_others_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    x = torch.randn(2, 4)
    assert join("cpu") is ALONE
    assert ALONE.sum(x) is x and ALONE.gather(x) is x and torch.equal(ALONE.share(x), x)
    one = {**dict.fromkeys(VARIABLES, "0"), "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    for name, value in one.items():
        monkeypatch.setenv(name, value)
    assert join("cpu") is ALONE
    with pytest.raises(ZeroDivisionError), ALONE.together():
        _ = 1 // 0
    with pytest.raises(CheckpointError, match=r"^gone$"), ALONE.agreement():
        raise CheckpointError("gone")


@pytest.mark.parametrize("kind", ["float", "int8", "int4"])
def test_a_linear_by_columns_is_the_sum_of_its_ranks(kind: str, alike: Alike) -> None:
    linear: torch.nn.Module = torch.nn.Linear(32, 8)
    if kind != "float":
        linear = QuantizedLinear(linear, quantization=kind)
    x = torch.randn(3, 32)
    with torch.inference_mode():
        y = RowParallel(linear, Group(Place(0, 2)))(x)
        assert torch.equal(y, 2 * linear(x))
        second = RowParallel(linear, Group(Place(1, 2)), takes_all=True)
        assert torch.equal(second(torch.cat([torch.randn(3, 32), x], -1)), y)
    assert alike.calls == 2 * [("all_reduce", (3, 8), torch.float32)]


def test_parts_lie_side_by_side(alike: Alike) -> None:
    second = Group(Place(1, 2))
    x = torch.arange(8).view(2, 4)
    assert torch.equal(second.share(x), x[1:]) and torch.equal(second.share(x, 1), x[:, 2:])
    assert torch.equal(second.gather(x.t()), torch.cat([x.t(), x.t()], dim=1))
    assert alike.calls == [("all_gather", (4, 2), torch.int64)]


def test_a_message_is_one_broadcast_and_a_long_one_two(
    monkeypatch: pytest.MonkeyPatch, alike: Alike
) -> None:
    sent: list[torch.Tensor] = []
    group = Group(Place(0, 2))
    monkeypatch.setattr(dist, "broadcast", lambda x, *_, **__: sent.append(x.clone()))
    messages = [("rows", [1, 2]), list(range(5000)), None]
    for message in messages:
        group.send(message)
    assert [len(x) for x in sent[:1]] == [1024] and len(sent) == 4
    monkeypatch.setattr(dist, "broadcast", lambda x, *_, **__: x.copy_(sent.pop(0)))
    assert [group.receive() for _ in messages] == messages


def test_gpus_go_by_the_number_of_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    third = Group(Place(3, 4, 1, 2))
    assert (third.device("cpu"), third.device("cuda")) == ("cpu", "cuda:1")
    assert ALONE.device("cuda:1") == "cuda:1"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert third.device(None) == "cuda:1"
    with pytest.raises(ArgumentError, match=r'"cuda:0".*4 ranks|cuda:0.* 4 ranks'):
        third.device("cuda:0")


def test_what_ranks_agree_on_is_there_afterwards(alike: Alike) -> None:
    group = Group(Place(0, 2))
    with group.agreement() as terms:
        terms.alike["limit"] = 5
        terms.own["free"] = 7
    assert terms.of_all == [{"free": 7}, {"free": 7}]
    assert [kind for kind, *_ in alike.calls] == ["all_gather"]


def test_the_error_of_another_rank_is_raised_by_its_number(
    monkeypatch: pytest.MonkeyPatch, alike: Alike
) -> None:
    """Of its class, where that is one of this library's."""
    group = Group(Place(0, 2))
    told: list[torch.Tensor] = []

    def all_gather(parts: list[torch.Tensor], x: torch.Tensor, group: Any = None) -> None:
        parts[0].copy_(x)
        parts[1].copy_(told[0])

    def nobody(parts: list[torch.Tensor], x: torch.Tensor, group: Any = None) -> None:
        told[:] = [x.clone()]
        raise LookupError("nobody answers")

    def report(error: Exception | None, **alike: Any) -> None:
        monkeypatch.setattr(dist, "all_gather", nobody)
        with pytest.raises(LookupError), Group(Place(1, 2)).agreement() as terms:
            terms.alike.update(alike)
            if error is not None:
                raise error
        monkeypatch.setattr(dist, "all_gather", all_gather)

    report(CheckpointError("no embedding"))
    with pytest.raises(CheckpointError, match=r"^rank 1: no embedding$"), group.agreement():
        pass
    report(ZeroDivisionError("by zero"))
    with pytest.raises(RankError, match=r"^rank 1: ZeroDivisionError: by zero$"), group.agreement():
        pass
    report(None, limit=6)
    with pytest.raises(ArgumentError, match="limit is 5 on rank 0 and 6 on rank 1"):
        with group.agreement() as terms:
            terms.alike["limit"] = 5
