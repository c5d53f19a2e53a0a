"""What rank 0 says, and what the others make of it: in this process, and in 2 and 4 of their own
against one, every model and every way to end. What these run is in tests/ranks.py, one program that
imports what they need once."""

from __future__ import annotations

import json
import operator
import pickle
import re
from collections import deque
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import is_absent
from programs import said_by
from ranks import (
    ANY_DEGREE,
    CASES,
    MEMORY_LIMIT,
    MOST_S,
    TEXTS,
    killed_far,
    memory,
    write_big,
    write_models,
)

from bminf.engine.engine import Engine
from bminf.errors import ArgumentError, RankError, UnsupportedModelError
from bminf.layers.parallel import Group
from bminf.layers.rendezvous import Place
from bminf.models.leading import Following, Leading, LedCache

PROGRAM = Path(__file__).parents[1] / "ranks.py"
EVERY = [case.__name__ for case in CASES if case not in (memory, killed_far)]
SOME = ["zoo", "raises", "killed", "killed_far", "refused", "plans", "goldens"]
LAUNCHES = {1: ["zoo", "plans", "goldens"], 2: EVERY, 4: SOME}

TOLERANCE = 5e-5
"""Of logits, from those of one rank: sums in another order."""

LAUNCHES_RANKS = pytest.mark.slow
"""The first test that asks for what ranks saw starts them, whichever that is."""

Seen = Callable[[int, str], list[dict[str, Any]]]
Loader = Callable[..., Any]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """seen(2, "zoo"): what each of 2 ranks saw."""
    folder = tmp_path_factory.mktemp("ranks")
    write_models(folder)
    names = [f"{case}.{size}" for size, cases in LAUNCHES.items() for case in cases]

    @cache
    def launch() -> None:
        said_by(PROGRAM, folder, *names, timeout=280)

    def look(size: int, case: str) -> list[dict[str, Any]]:
        launch()
        ended = json.loads((folder / f"{case}.{size}.json").read_text())
        assert len(ended) == size, f"a rank hung, {ended}"
        found = []
        for rank in range(size):
            path = folder / f"{case}.{size}.{rank}"
            log = path.with_name(f"{path.name}.txt")
            assert not log.exists(), log.read_text()
            saved = path.with_name(f"{path.name}.pt")
            own = torch.load(saved, weights_only=False) if saved.exists() else {"calls": []}
            status, seconds = ended[str(rank)]
            found.append({**own, "status": status, "seconds": seconds})
        return found

    return look


class Loop(Group):
    """Two ranks that have all of the weights each, one after the other in this process."""

    def __init__(self, rank: int, messages: deque[Any]) -> None:
        super().__init__(Place(rank, 2))
        self.messages = messages

    def send(self, message: object) -> None:
        self.messages.append(pickle.loads(pickle.dumps(message)))

    def receive(self) -> Any:
        return self.messages.popleft()


def both(load: Loader, name: str) -> tuple[Any, Any]:
    """Rank 0, and one that follows it."""
    messages: deque[Any] = deque()
    first, second = (load(name, max_length=64, max_batch_size=2) for _ in range(2))
    first._leading = Leading(Loop(0, messages))
    first._cache = LedCache(first._cache, first._leading)
    first.row_model = first._new_rows()
    first.row_model.lead(first._leading)
    first._engine = Engine(first.row_model)
    second._following = Following(
        Loop(1, messages), second.model, second._cache, second.row_model, second.device,
        second._kernels,
    )  # fmt: skip
    return first, second


@pytest.mark.parametrize("name", ["cpm1", "cpm2", "glm10b"])
def test_another_rank_does_the_same_to_its_cache(load: Loader, name: str) -> None:
    """Sampled texts of several rows, beams, and a pass over a whole text."""
    first, second = both(load, name)
    text: Any = TEXTS[name]
    calls: list[Callable[[Any], Any]] = [
        lambda model: model.generate(text, max_tokens=5),
        lambda model: model.generate_batch([text, text], max_tokens=4),
        lambda model: model.generate(text, max_tokens=3, num_beams=2),
        lambda model: model.logits(text, text) if name == "cpm2" else model.logits(text),
        lambda model: list(model.generate_iter(text, max_tokens=3)),
    ]
    for call in calls:
        given, followed = call(first), call(second)
        same = torch.equal if isinstance(given, torch.Tensor) else operator.eq
        assert same(given, followed)
        caches = (first._cache.cache, second._cache)
        parts = [[c.own, c.cross] if name == "cpm2" else [c] for c in caches]
        for one, other in zip(*parts, strict=True):
            assert torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)
            assert one.keys.any()


def test_errors_and_ends_are_told(load: Loader) -> None:
    first, second = both(load, "cpm1")
    calls: list[Callable[[Any], Any]] = [
        lambda model: model.generate("天气", max_tokens=0),
        lambda model: model.logits([]),
        lambda model: next(model.generate_iter("天气", no_such_option=1)),
    ]
    for call in calls:
        errors = []
        for model in (first, second):
            with pytest.raises(ArgumentError) as caught:
                call(model)
            errors.append(str(caught.value))
        assert errors[0] == errors[1]
    first.close()
    with pytest.raises(RankError, match=r"rank 0 has closed the model, and rank 1 calls logits"):
        second.logits("天气")
    second.close()
    with pytest.raises(UnsupportedModelError, match="was closed"):
        second.logits("天气")


def test_a_text_is_told_as_a_text_whatever_it_says(load: Loader) -> None:
    first, second = both(load, "cpm1")
    text = "an iterator"
    assert first._called("generate", lambda: text) == second.generate("天气") == text


def test_an_error_that_cannot_be_sent_is_told_by_its_words(load: Loader) -> None:
    class Odd(Exception):
        """Which pickle cannot find."""

    def odd() -> None:
        raise Odd("from a stop string")

    first, second = both(load, "cpm1")
    with pytest.raises(Odd):
        first._called("generate", odd)
    with pytest.raises(RankError, match="rank 0: Odd: from a stop string"):
        second.generate("天气")


@LAUNCHES_RANKS
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", ANY_DEGREE)
def test_ranks_give_what_one_gives(seen: Seen, name: str, size: int) -> None:
    """Texts of every method, resident and streamed, in every format; logits to their rounding."""
    (one,), ranks = seen(1, "zoo"), seen(size, "zoo")
    kinds = [kind for kind in one if kind.startswith(f"{name} ")]
    assert len(kinds) == 7
    for kind in kinds:
        expected = one[kind]
        for rank in ranks:
            found = rank[kind]
            assert (
                (found["streamed"] > 0) == kind.endswith("streamed") == (expected["streamed"] > 0)
            )
            assert found["mapped"], "all ranks look rows up in one embedding"
            texts = expected["texts"][: None if size == 2 else 1]
            assert found["texts"] == texts, kind
            assert torch.equal(found["logits"], ranks[0][kind]["logits"]), "the same bits"
            torch.testing.assert_close(
                found["logits"], expected["logits"], rtol=0, atol=TOLERANCE, msg=kind
            )
            if "scores" in expected and size == 2:
                assert found["scores"] == ranks[0][kind]["scores"]
                assert found["scores"] == pytest.approx(expected["scores"], rel=1e-5, abs=1e-4)


@LAUNCHES_RANKS
@pytest.mark.parametrize("size", [2, 4])
def test_reference_checkpoints_of_other_numbers_of_ranks_give_the_same(
    seen: Seen, size: int
) -> None:
    """In every layout; what one rank gives is held against the authors' code elsewhere."""
    (one,), ranks = seen(1, "goldens"), seen(size, "goldens")
    if is_absent("cpm1"):
        pytest.skip("there is no golden folder 'cpm1'; BMINF_GOLDEN names where it is")
    found = [name for name in ranks[0] if isinstance(ranks[0][name], list) and name != "calls"]
    assert len(found) > 10
    for name in found:
        assert ranks[0][name] == pytest.approx(one[name], rel=1e-5, abs=TOLERANCE)
        assert all(rank[name] == ranks[0][name] for rank in ranks)


@LAUNCHES_RANKS
@pytest.mark.parametrize("size", [2, 4])
def test_models_of_transformers_give_what_one_rank_gives(seen: Seen, size: int) -> None:
    """By their plans; what is drawn is the same on all ranks."""
    (one,), ranks = seen(1, "plans"), seen(size, "plans")
    kinds = [kind for kind in one if isinstance(one[kind], dict)]
    assert len(kinds) == 3 * 5 + 2 * 2
    for kind in kinds:
        first = ranks[0][kind]
        torch.testing.assert_close(
            first["logits"], one[kind]["logits"], rtol=0, atol=TOLERANCE, msg=kind
        )
        assert (first["streamed"] > 0) == kind.endswith("streamed")
        for rank in ranks:
            assert torch.equal(rank[kind]["logits"], first["logits"])
            assert rank[kind].get("greedy") == one[kind].get("greedy")
            assert rank[kind].get("drawn") == first.get("drawn")


@LAUNCHES_RANKS
def test_models_of_transformers_are_wrapped_on_all_ranks_or_on_none(seen: Seen) -> None:
    first, second = seen(2, "plans_differ")
    assert first["weights"] == second["weights"]
    assert "the checksum of the weights is " in first["weights"]
    assert first["room"] == "RankError: rank 1: MemoryError: no room on this rank"
    assert second["room"] == "MemoryError: no room on this rank"
    assert not first["is_wrapped"] and not second["is_wrapped"]


@LAUNCHES_RANKS
def test_a_pass_of_transformers_that_fails_ends_all(seen: Seen) -> None:
    first, second = seen(2, "plan_fails")
    assert first["error"] == "RankError: rank 1 failed: ZeroDivisionError: of this rank alone"
    assert second["error"] == "ZeroDivisionError: of this rank alone"
    first, second = seen(2, "plan_interrupted")
    assert first["alike"] == second["alike"] and "no_such" in first["alike"]
    assert first["error"] == "RankError: rank 1 failed: ZeroDivisionError: of this rank alone"
    assert second["error"] == "ZeroDivisionError: of this rank alone"


@LAUNCHES_RANKS
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("case", ["zoo", "plans"])
def test_all_ranks_make_one_list_of_collectives(seen: Seen, case: str, size: int) -> None:
    """Of one kind, shape and dtype each: of another one a rank would die, or wait for ever."""
    first, *others = (rank["calls"] for rank in seen(size, case))
    assert len(first) > 500
    assert {kind for kind, _, _ in first} <= {"all_reduce", "all_gather", "broadcast"}
    assert all(other == first for other in others)


@LAUNCHES_RANKS
@pytest.mark.parametrize(
    ("size", "case"), [(size, case) for size in (2, 4) for case in LAUNCHES[size][1:]]
)
def test_failing_ranks_have_made_the_same_list_until_then(seen: Seen, size: int, case: str) -> None:
    lists = [rank["calls"] for rank in seen(size, case) if rank["calls"]]
    shortest = min(len(calls) for calls in lists)
    assert shortest > 2
    assert all(calls[:shortest] == lists[0][:shortest] for calls in lists)
    # The others wait in the one that it did not come to, or for its next message.
    assert max(len(calls) for calls in lists) <= shortest + 1


@LAUNCHES_RANKS
@pytest.mark.parametrize("size", [2, 4])
def test_a_pass_that_fails_ends_all_ranks_with_its_number(seen: Seen, size: int) -> None:
    for rank in seen(size, "raises"):
        assert rank["error"] == "RankError: rank 1 failed: ZeroDivisionError: of this rank alone"
        assert rank["seconds"] < MOST_S


@LAUNCHES_RANKS
def test_so_does_one_of_rank_0_and_one_whose_process_lives_on(seen: Seen) -> None:
    for rank in seen(2, "first_raises"):
        assert rank["error"] == "RankError: rank 0 failed: ZeroDivisionError: of this rank alone"
    for case in ("lives_on", "users_group"):
        first, second = seen(2, case)
        assert first["error"] == second["error"]
        assert first["error"].startswith("RankError: rank 1 failed: ZeroDivisionError")
        assert first["seconds"] < MOST_S


@LAUNCHES_RANKS
def test_an_error_of_one_script_within_a_model_ends_all(seen: Seen) -> None:
    """Not one that all scripts get: other models can be loaded after it."""
    first, second = seen(2, "script_raises")
    assert first["error"] == "RankError: rank 1 failed: ZeroDivisionError: of this rank alone"
    assert second["error"] == "ZeroDivisionError: of this rank alone"
    assert first["alike"] == second["alike"] and "no_such_option" in first["alike"]
    first, second = seen(2, "first_script_raises")
    assert first["error"] == "ZeroDivisionError: of this rank alone"
    assert second["error"] == "RankError: rank 0 failed: ZeroDivisionError: of this rank alone"


@LAUNCHES_RANKS
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("raises_oddly", r"OSError: no file \udcff"),
        ("interrupted", "KeyboardInterrupt: "),
        ("ends", "ZeroDivisionError: of this rank alone"),
    ],
)
def test_whatever_ends_a_rank_is_told_by_it(seen: Seen, case: str, message: str) -> None:
    """Though its process lives on: nobody waits for that to end."""
    first, _ = seen(2, case)
    assert first["error"] == f"RankError: rank 1 failed: {message}"
    for rank in seen(2, "first_interrupted"):
        assert rank["error"] == "RankError: rank 0 failed: KeyboardInterrupt: "


@LAUNCHES_RANKS
@pytest.mark.parametrize(
    ("size", "case"), [(2, "killed"), (2, "killed_between"), (2, "leaves"), (4, "killed")]
)
def test_a_rank_that_is_gone_is_named(seen: Seen, size: int, case: str) -> None:
    ranks = seen(size, case)
    assert ranks[1]["status"] == (0 if case == "leaves" else -9)
    for rank in ranks[:1] + ranks[2:]:
        assert rank["error"].startswith("RankError: rank 1 failed: its process ")
        assert rank["error"].endswith("see what torchrun says of it")
        assert rank["seconds"] < MOST_S


@LAUNCHES_RANKS
def test_a_rank_that_is_gone_from_another_machine_is_named(seen: Seen) -> None:
    """And no other: its connections are closed by the first that sees it, which all see then."""
    ranks = seen(4, "killed_far")
    for rank in ranks[:1] + ranks[2:]:
        assert rank["error"].startswith("RankError: rank 1 failed: nothing is heard from there")
        assert rank["seconds"] < MOST_S


@LAUNCHES_RANKS
def test_a_process_group_that_was_destroyed_is_told(seen: Seen) -> None:
    for rank in seen(2, "destroyed"):
        assert rank["error"] == "RankError: rank 1 failed: its process group was destroyed"
        assert rank["again"] == "none", "closing is no error"
        assert rank["seconds"] < MOST_S


@LAUNCHES_RANKS
@pytest.mark.parametrize("size", [2, 4])
def test_what_cannot_be_loaded_is_one_error_on_all_ranks(seen: Seen, size: int) -> None:
    """Before any rank computes; a model that can be is loaded afterwards."""
    last = size - 1
    expected = {
        "limits": f"memory_limit is 2000000000 on rank 0 and 1000000000 on rank {last}",
        "folders": "checkpoint is ",
        "gone": "there is no ",
        "heads": f"{size} ranks cannot share this CPM-1: it has 3 attention heads; numbers",
        "low": "is below the least that would do",
        "argument": "max_length=-1; accepted",
        "keyword": "CPM1() has no keyword 'no_such'",
        "room": "MemoryError: no room on this rank",
        "disk": "of streamed blocks cannot be kept in",
    }
    ranks = seen(size, "refused")
    for case, message in expected.items():
        for number, rank in enumerate(ranks):
            assert message in rank[case], rank[case]
            if case in ("gone", "argument", "keyword", "room", "disk"):
                told = [] if number == last else [f"rank {last}: "]
                assert re.findall(r"rank \d: ", rank[case]) == told, rank[case]
    assert not any(rank["reads"] for rank in ranks), "all know of it before any reads"
    assert len({rank["text"] for rank in ranks}) == 1


@LAUNCHES_RANKS
def test_rank_0_may_be_the_only_one_with_something_to_do(seen: Seen) -> None:
    """As where it serves: in any number of threads, while the others follow."""
    first, second = seen(2, "server")
    assert len(first["texts"]) == 2 and first["texts"][0] == first["texts"][1]
    assert first["tokens"] == 12 and second["tokens"] == 0
    assert (
        first["refused"] == "UnsupportedModelError: follow() is for ranks other than 0 of several"
    )
    assert "only rank 0 has an engine; call follow()" in second["refused"]


@LAUNCHES_RANKS
def test_a_call_that_rank_0_does_not_make_ends_all(seen: Seen) -> None:
    for rank in seen(2, "other_call"):
        assert "rank 1 failed: ArgumentError: rank 0 has called generate(), this" in rank["error"]


def test_each_rank_keeps_its_limit_and_all_share_the_embedding(tmp_path: Path) -> None:
    """A GLM of 320 MB on 4 ranks, on a CPU, where the limit is memory of the process."""
    write_big(tmp_path)
    said_by(PROGRAM, tmp_path, "memory.4", timeout=280)
    ranks = [torch.load(tmp_path / f"memory.4.{rank}.pt", weights_only=False) for rank in range(4)]
    assert all(rank["streamed"] and rank["total"] <= MEMORY_LIMIT for rank in ranks)
    assert max(rank["grown"] for rank in ranks) < 1.05 * MEMORY_LIMIT
    together, table = sum(rank["pss"] for rank in ranks), ranks[0]["table"]
    # Some may have been taken back by a system that is short of memory.
    assert 0.9 * table < together < 1.1 * table, "its pages are in memory once"
