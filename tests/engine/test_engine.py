"""bminf/engine/engine.py, bminf/engine/request.py, bminf/engine/rows.py and
bminf/offload/phase.py."""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from fake_decoder import random_logits, scripted
from fake_rows import FakeRows

from bminf.engine import engine as engine_module
from bminf.engine.engine import Engine
from bminf.engine.request import Request
from bminf.engine.rows import Feed
from bminf.engine.sampling import Sampling
from bminf.errors import ArgumentError, UnsupportedModelError

STOP = 9
GREEDY = Sampling(0.0)


def ask(ids: Sequence[int], max_new_tokens: int = 4, **more: Any) -> Request:
    settings = {"sampling": GREEDY, "stop_ids": {STOP}, **more}
    return Request(ids, max_new_tokens, **settings)


def run_all(engine: Engine) -> None:
    while engine.step():
        pass


# ---- rows ----------------------------------------------------------------------------------------


def test_a_row_alone_is_fed_what_it_drew() -> None:
    rows = FakeRows(random_logits(10, seed=0))
    engine = Engine(rows)
    request = engine.add(ask([4, 2, 7], 6, stop_ids=()))
    assert list(engine.tokens(request)) == request.tokens
    history = (4, 2, 7)
    for token in request.tokens:
        logits = rows.logits_of(history)
        assert token == logits.index(max(logits))
        history = (*history, token)
    assert rows.passes == [[[4, 2, 7]], *([[token]] for token in request.tokens[:-1])]
    assert request.finish_reason == "length" and len(request.tokens) == 6


def test_rows_end_at_different_times_and_are_gone_in_the_next_pass() -> None:
    scripts = {0: [1, 2, STOP], 1: [8], 2: [3, 4, 5, 6], 3: [7, STOP]}
    rows = FakeRows(scripted(scripts, 10))
    engine = Engine(rows)
    requests = [engine.add(ask([i], stop_ids={8, STOP})) for i in range(4)]
    engine.run(requests)
    assert [request.tokens for request in requests] == list(scripts.values())
    assert [request.finish_reason for request in requests] == ["stop", "stop", "length", "stop"]
    assert [len(feeds) for feeds in rows.passes] == [4, 3, 2, 1]
    stats = engine.stats
    assert (stats.num_sweeps, stats.num_rows, stats.num_tokens) == (4, 10, 10)
    assert rows.pool.num_free == rows.pool.num_tokens


def test_a_newcomer_takes_part_in_the_next_pass() -> None:
    rows = FakeRows(scripted({0: [1] * 9, 2: [3] * 9}, 10))
    engine = Engine(rows)
    first = engine.add(ask([0], 6))
    engine.step()
    second = engine.add(ask([2, 2, 2], 3))
    engine.step()
    assert rows.passes[-1] == [[1], [2, 2, 2]] and len(second.tokens) == 1
    run_all(engine)
    assert (len(first.tokens), len(second.tokens)) == (6, 3)
    assert len(rows.passes) == 6


def test_long_prompts_are_read_in_parts_while_others_decode() -> None:
    logits_of = random_logits(10, seed=3)
    rows = FakeRows(logits_of)
    engine = Engine(rows, chunk=16)
    short = engine.add(ask([1], 30, stop_ids=()))
    engine.step()
    long = engine.add(ask([2] * 50, 4, stop_ids=()))
    later = engine.add(ask([3] * 20, 4, stop_ids=()))
    passes = len(rows.passes)
    run_all(engine)
    sizes = [[len(ids) for ids in feeds] for feeds in rows.passes[passes:]]
    assert sizes[:5] == [[1, 16], [1, 16], [1, 16], [1, 2, 14], [1, 1, 6]]
    for request in (short, long, later):
        assert request.tokens == alone(logits_of, request)
    assert engine.stats.num_tokens == 30 + 4 + 4  # parts of prompts have none


@pytest.mark.parametrize("chunk", [8, 512])
def test_the_first_token_comes_with_the_third_pass_at_the_latest(chunk: int) -> None:
    """Counted from the first pass that begins after add(), and one more a chunk of the prompt."""
    for seed in range(20):
        chance, rows = random.Random(seed), FakeRows(scripted({0: [1] * 99}, 10))
        engine = Engine(rows, chunk=chunk)
        for _ in range(5):
            engine.add(ask([0], 90))
        for _ in range(10):
            for _ in range(chance.randint(0, 3)):
                engine.step()
            length = chance.randint(1, 40)
            newcomer, before = engine.add(ask([0] * length, 5)), len(rows.passes)
            while not newcomer.tokens:
                engine.step()
            assert len(rows.passes) - before <= 2 + -(-length // chunk)


def test_a_prompt_alone_is_read_at_once() -> None:
    rows = FakeRows(random_logits(10, seed=3))
    engine = Engine(rows, chunk=16)
    engine.run([engine.add(ask([2] * 50, 1))])
    assert rows.passes == [[[2] * 50]]


def test_what_cannot_be_read_in_parts_is_read_at_once() -> None:
    rows = FakeRows(random_logits(10, seed=3))
    rows.can_chunk = False
    engine = Engine(rows, chunk=16)
    engine.add(ask([1], 9, stop_ids=()))
    engine.step()
    engine.add(ask([2] * 50, 1))
    engine.add(ask([3] * 50, 1))
    engine.step()
    engine.step()
    assert [[len(ids) for ids in feeds] for feeds in rows.passes] == [[1], [1, 50], [1, 50]]


def alone(logits_of: Any, request: Request) -> list[int]:
    """What the request gets with no other one beside it."""
    engine = Engine(FakeRows(logits_of, vocab_size=len(logits_of((0,)))))
    own = Request(request.input_ids, request.max_new_tokens, request.sampling, request.stop_ids)
    engine.run([engine.add(own)])
    return own.tokens


def test_each_row_has_its_own_options_and_says_what_it_says_alone() -> None:
    """In 30 companies: who joins when, with which options, seeds, penalties and stop tokens."""
    logits_of = random_logits(12, seed=1)
    options = [
        GREEDY,
        Sampling(1.0),
        Sampling(2.0, top_k=4),
        Sampling(1.0, top_p=0.7, frequency_penalty=0.8),
        Sampling(0.0, presence_penalty=1.5, unpenalized_ids=(3,)),
        Sampling(1.5, banned_ids=(1, 2)),
    ]
    for seed in range(30):
        chance = random.Random(seed)
        rows = FakeRows(logits_of, num_tokens=chance.choice([120, 400]), vocab_size=12)
        engine = Engine(rows, chunk=chance.choice([4, 512]))
        waiting = [company_of(chance, options) for _ in range(8)]
        requests = list(waiting)
        while waiting or engine.num_running or engine.num_waiting:
            while waiting and chance.random() < 0.5:
                engine.add(waiting.pop())
            engine.step()
        for request in requests:
            assert request.tokens == alone(logits_of, request)
            assert request.finish_reason in ("stop", "length")
        assert rows.pool.num_free == rows.pool.num_tokens


def company_of(chance: random.Random, options: list[Sampling]) -> Request:
    ids = [chance.randrange(12) for _ in range(chance.randint(1, 30))]
    sampling = replace(chance.choice(options), seed=chance.randrange(1000))
    return Request(ids, chance.randint(1, 20), sampling, {chance.randrange(12)})


def test_a_row_keeps_its_cells_when_they_are_moved() -> None:
    """Three rows fill the pool, the one in the middle ends, and a larger one needs both gaps."""
    logits_of = random_logits(10, seed=5)
    rows = FakeRows(logits_of, num_tokens=40)
    engine = Engine(rows)
    first, second, third = (
        engine.add(ask([i], n, stop_ids=())) for i, n in ((1, 4), (2, 12), (3, 16))
    )
    engine.step()
    last = engine.add(ask([4] * 3, 10, stop_ids=()))  # 12 cells: 8 are free at the end
    run_all(engine)
    for request in (first, second, third, last):
        assert request.tokens == alone(logits_of, request)


def test_who_waits_for_room_gets_it_first_come_first_served() -> None:
    rows = FakeRows(scripted({i: [5] * 20 for i in range(10)}, 10), num_tokens=20)
    engine = Engine(rows)
    first = engine.add(ask([0], 11))  # 11 cells
    second = engine.add(ask([1], 15))  # 15: has to wait
    third = engine.add(ask([2], 2))  # 2: would have room, but is not before the second
    engine.step()
    assert engine.num_running == 1 and engine.num_waiting == 2
    engine.run([first])
    assert not second.tokens and not third.tokens
    engine.run([second, third])
    assert (len(second.tokens), len(third.tokens)) == (15, 2)


def test_no_more_rows_than_the_model_takes_at_once() -> None:
    rows = FakeRows(scripted({0: [5] * 20}, 10), max_rows=3)
    engine = Engine(rows)
    engine.run([engine.add(ask([0], 2)) for _ in range(1000)])
    assert max(len(feeds) for feeds in rows.passes) == 3


# ---- what goes wrong -----------------------------------------------------------------------------


def test_a_row_without_finite_logits_ends_alone() -> None:
    def logits_of(history: tuple[int, ...]) -> list[float]:
        return [math.nan if history[0] == 7 and len(history) == 3 else 0.0] + [1.0] * 9

    engine = Engine(FakeRows(logits_of))
    requests = [engine.add(ask([i], 5, sampling=Sampling(seed=1))) for i in (1, 7, 2)]
    run_all(engine)
    assert [request.finish_reason for request in requests] == ["length", "error", "length"]
    assert len(requests[1].tokens) == 2
    with pytest.raises(UnsupportedModelError, match="not finite"):
        raise requests[1].error  # type: ignore[misc]


def test_a_callback_ends_its_own_row() -> None:
    def bad(token: int) -> None:
        raise ValueError("of a user")

    engine = Engine(FakeRows(scripted({i: [1, 2, 3, 4] for i in range(3)}, 10)))
    seen: list[int] = []
    requests = [
        engine.add(ask([0], on_token=bad)),
        engine.add(ask([1], on_token=lambda token: seen.append(token) or token == 3)),
        engine.add(ask([2])),
    ]
    run_all(engine)
    assert [request.finish_reason for request in requests] == ["error", "stop", "length"]
    assert str(requests[0].error) == "of a user" and seen == requests[1].tokens == [1, 2, 3]


def test_a_pass_that_fails_for_one_row_ends_that_one() -> None:
    logits_of = random_logits(10, seed=2)
    rows = FakeRows(logits_of)

    def before(feeds: Any) -> None:
        if any(rows.cells[feed.row.cells.start] == 7 for feed in feeds):
            raise RuntimeError("of the model")

    engine = Engine(rows)
    requests = [
        engine.add(ask([i, i], 6, sampling=Sampling(seed=3), stop_ids=())) for i in (1, 7, 2)
    ]
    engine.step()
    rows.before = before
    run_all(engine)
    assert [request.finish_reason for request in requests] == ["length", "error", "length"]
    for request in (requests[0], requests[2]):
        assert request.tokens == alone(logits_of, request)
    with pytest.raises(RuntimeError, match="of the model"):
        engine.run([requests[1]])


def test_an_interrupt_within_a_sweep_leaves_all_rows_as_they_were() -> None:
    logits_of = random_logits(10, seed=4)
    rows = FakeRows(logits_of)
    engine = Engine(rows)
    requests = [engine.add(ask([i], 9, sampling=Sampling(seed=i), stop_ids=())) for i in (1, 2)]
    engine.step()

    def interrupt(feeds: Any) -> None:
        rows.before = lambda feeds: None
        raise KeyboardInterrupt

    rows.before = interrupt
    with pytest.raises(KeyboardInterrupt):
        engine.run([requests[0]])
    assert requests[0].finish_reason == "cancelled"  # whose wait it was
    run_all(engine)
    assert requests[1].tokens == alone(logits_of, requests[1])


def test_an_interrupt_within_on_token_does_not_keep_a_request_from_its_end() -> None:
    interrupts = [KeyboardInterrupt(), KeyboardInterrupt()]

    def interrupt(token: int) -> None:
        if interrupts:
            raise interrupts.pop()

    logits_of = random_logits(10, seed=4)
    engine = Engine(FakeRows(logits_of))
    last = engine.add(ask([1], 1, stop_ids=(), on_token=interrupt))
    stopped = engine.add(ask([1], 9, stop_ids=set(range(10)), on_token=interrupt))
    other = engine.add(ask([2], 9, stop_ids=()))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    run_all(engine)
    assert (last.finish_reason, stopped.finish_reason) == ("length", "stop")
    assert len(last.tokens) == len(stopped.tokens) == 1
    assert other.tokens == alone(logits_of, other)


def test_cancelling() -> None:
    rows = FakeRows(scripted({i: [1] * 9 for i in range(3)}, 10))
    engine = Engine(rows)
    first, second, waiting = (engine.add(ask([i], 5)) for i in range(3))
    engine.step()
    for _ in range(2):
        engine.cancel(first)
    engine.step()
    assert len(rows.passes[-1]) == 2 and first.finish_reason == "cancelled"
    assert len(first.tokens) == 1
    run_all(engine)
    engine.cancel(second)
    assert second.finish_reason == "length" and waiting.finish_reason == "length"
    assert list(engine.tokens(first)) == first.tokens


def test_a_request_that_waits_can_be_cancelled() -> None:
    engine = Engine(FakeRows(scripted({0: [1] * 9}, 10), num_tokens=5))
    engine.add(ask([0], 5))
    waiting = engine.add(ask([0], 5))
    engine.step()
    engine.cancel(waiting)
    run_all(engine)
    assert waiting.tokens == [] and engine.num_waiting == 0


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (lambda: ask([1], 10_001), "could never fit"),
        (lambda: ask([1, -2]), r"input_ids=\[1, -2\]"),
        (lambda: ask([]), r"input_ids=\[\]"),
        (lambda: ask([True]), "input_ids"),
        (lambda: ask([10]), "input_ids holds 10"),
        (lambda: ask([1], stop_ids={10}), "stop_ids holds 10"),
        (lambda: ask([1], start_ids=[10]), "start_ids holds 10"),
        (lambda: ask(5), "input_ids is a int"),  # type: ignore[arg-type]
        (lambda: ask([1], stop_ids=None), "stop_ids is a NoneType"),
        (lambda: ask([1], stop_ids=[[1]]), r"stop_ids=\[\[1\]\]"),
        (lambda: ask([1], sampling=0.5), "sampling is a float"),
        (lambda: ask([1], 0), "max_new_tokens=0"),
        (lambda: ask([1], num_logprobs=21), "num_logprobs=21"),
        (lambda: ask([1], num_logprobs=-1), "num_logprobs=-1"),
        (lambda: ask([1], num_prompt_logprobs=21), "num_prompt_logprobs=21"),
        (lambda: ask([1], -1, num_prompt_logprobs=0), "max_new_tokens=-1"),
        (lambda: ask([1], sampling=Sampling(top_k=11)), "top_k"),
    ],
)
def test_what_cannot_run_is_refused(request_: Any, message: str) -> None:
    engine = Engine(FakeRows(random_logits(10, 0)))
    with pytest.raises(ArgumentError, match=message):
        engine.add(request_())
    assert engine.num_waiting == 0


def test_a_request_is_added_once_and_before_it_is_waited_for() -> None:
    engine = Engine(FakeRows(random_logits(10, 0)))
    request = ask([1])
    with pytest.raises(ArgumentError, match="call add"):
        engine.run([request])
    with pytest.raises(ArgumentError, match="call add"):
        next(engine.tokens(request))
    engine.add(request)
    with pytest.raises(ArgumentError, match="added before"):
        engine.add(request)


def test_closing_ends_all() -> None:
    rows = FakeRows(random_logits(10, 0), num_tokens=5)
    engine = Engine(rows)
    running, waiting = engine.add(ask([1], 5, stop_ids=())), engine.add(ask([1], 5))
    pieces = engine.tokens(running)
    next(pieces)
    for _ in range(2):
        engine.close()
    assert running.finish_reason == waiting.finish_reason == "error"
    with pytest.raises(UnsupportedModelError, match="was closed"):
        next(pieces)
    with pytest.raises(UnsupportedModelError, match="was closed"):
        engine.add(ask([1]))
    assert rows.pool.num_free == 5


def test_closing_does_not_wait_for_the_texts_of_another_thread() -> None:
    rows = FakeRows(random_logits(10, 0), num_tokens=1000)
    engine = Engine(rows)
    request = engine.add(ask([1], 900, stop_ids=()))
    closing = threading.Thread(target=engine.close)

    def close_meanwhile(feeds: Any) -> None:
        rows.before = lambda feeds: None
        closing.start()
        end_s = time.monotonic() + 60  # where close() waits for the text, the test fails
        while not request.is_done and time.monotonic() < end_s:
            time.sleep(0.001)

    rows.before = close_meanwhile
    with pytest.raises(UnsupportedModelError, match="was closed"):
        engine.run([request])
    closing.join()
    assert len(rows.passes) == 1 and rows.pool.num_free == 1000


def test_an_engine_is_not_stepped_from_within() -> None:
    engine = Engine(FakeRows(scripted({0: [1] * 9}, 10)))
    request = engine.add(ask([0], on_token=lambda token: engine.step()))
    run_all(engine)
    assert isinstance(request.error, ArgumentError)


# ---- iterators -----------------------------------------------------------------------------------


def test_an_iterator_that_is_not_asked_is_one_token_ahead_and_holds_up_nobody() -> None:
    rows = FakeRows(scripted({0: [1] * 9, 1: [2] * 9}, 10))
    engine = Engine(rows)
    idle, other = engine.add(ask([0], 9)), engine.add(ask([1], 9))
    pieces = engine.tokens(idle)
    next(pieces)
    engine.run([other])
    assert len(idle.tokens) == 2 and len(other.tokens) == 9
    assert len(list(pieces)) == 8 and idle.finish_reason == "length"


def test_the_caller_keeps_its_own_grad_mode() -> None:
    engine = Engine(FakeRows(scripted({0: [1] * 9}, 10)))  # which asserts inference mode in a pass
    for _ in engine.tokens(engine.add(ask([0], 3))):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_iterators_asked_in_turn_share_their_sweeps() -> None:
    rows = FakeRows(scripted({i: [1] * 9 for i in range(5)}, 10))
    engine = Engine(rows)
    pieces = [engine.tokens(engine.add(ask([i], 9))) for i in range(5)]
    for _ in range(9):
        assert [next(one) for one in pieces] == [1] * 5
    assert len(rows.passes) <= 9 + 1


def test_an_idle_iterator_ends_where_its_room_is_needed() -> None:
    rows = FakeRows(scripted({0: [1] * 9, 1: [2] * 9}, 10), num_tokens=12)
    engine = Engine(rows)
    pieces = engine.tokens(engine.add(ask([0], 9)))
    next(pieces)
    small = engine.add(ask([1], 3))
    engine.run([small])
    assert next(pieces) == 1  # there was room for both
    large = engine.add(ask([1], 9))
    num_passes = len(rows.passes)
    engine.run([large])
    with pytest.raises(UnsupportedModelError, match="another text was begun"):
        next(pieces)
    assert len(rows.passes) - num_passes == 9  # none for the idle one


def test_leaving_an_iterator_cancels_its_request() -> None:
    engine = Engine(FakeRows(scripted({0: [1] * 9}, 10)))
    request = engine.add(ask([0], 9))
    for _ in engine.tokens(request):
        break
    assert request.finish_reason == "cancelled" and not engine.step()


def test_an_iterator_of_another_thread_is_given_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on, and the newcomer waits for its end."""
    monkeypatch.setattr(engine_module, "_PATIENCE_S", 60.0)
    engine = Engine(FakeRows(scripted({0: [1] * 9, 1: [2] * 9}, 10), num_tokens=9))
    pieces = engine.tokens(engine.add(ask([0], 9)))
    got = [next(pieces)]
    newcomer = engine.add(ask([1], 9))
    thread = threading.Thread(target=engine.run, args=([newcomer],))
    thread.start()
    got += list(pieces)
    thread.join()
    assert got == [1] * 9 and newcomer.tokens == [2] * 9


def test_an_iterator_of_another_thread_ends_when_its_time_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_module, "_PATIENCE_S", 0.01)
    engine = Engine(FakeRows(scripted({0: [1] * 9, 1: [2] * 9}, 10), num_tokens=9))
    pieces = engine.tokens(engine.add(ask([0], 9)))
    next(pieces)
    newcomer = engine.add(ask([1], 9))
    thread = threading.Thread(target=engine.run, args=([newcomer],))
    thread.start()
    thread.join()
    assert newcomer.tokens == [2] * 9
    with pytest.raises(UnsupportedModelError, match="another text was begun"):
        next(pieces)


# ---- threads -------------------------------------------------------------------------------------


def test_threads_share_their_sweeps() -> None:
    """Both have added before the first pass ends; from then on each pass has both rows."""
    rows = FakeRows(scripted({i: [1] * 20 for i in range(4)}, 10))
    engine = Engine(rows)
    all_added = threading.Barrier(4)
    requests = [ask([i], 20) for i in range(4)]

    def wait_for(request: Request) -> None:
        engine.add(request)
        all_added.wait()
        engine.run([request])

    threads = [threading.Thread(target=wait_for, args=(one,)) for one in requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(request.tokens == [1] * 20 for request in requests)
    assert [len(feeds) for feeds in rows.passes] == [4] * 20


def test_others_can_add_and_cancel_while_a_sweep_runs() -> None:
    rows = FakeRows(scripted({i: [1] * 20 for i in range(4)}, 10))
    engine = Engine(rows)
    first = engine.add(ask([0], 3))
    added: list[Request] = []

    def before(feeds: Any) -> None:
        rows.before = lambda feeds: None
        thread = threading.Thread(target=lambda: added.append(engine.add(ask([1], 3))))
        thread.start()
        thread.join(60)
        assert added, "add() waited for the sweep"
        engine.cancel(first)

    rows.before = before
    run_all(engine)
    assert first.tokens == [] and added[0].tokens == [1] * 3


def test_the_whole_cache_is_had_when_no_request_is_under_way() -> None:
    rows = FakeRows(scripted({i: [1] * 20 for i in range(4)}, 10))
    engine = Engine(rows)
    busy, idle = engine.add(ask([0], 5)), engine.add(ask([1], 9))
    pieces = engine.tokens(idle)
    next(pieces)
    with engine.exclusive():
        assert rows.pool.num_free == rows.pool.num_tokens
    assert busy.finish_reason == "length" and idle.finish_reason == "error"
    engine.run([engine.add(ask([2], 2))])


# ---- what is told --------------------------------------------------------------------------------


def test_usage_logprobs_and_stats() -> None:
    logits_of = random_logits(10, seed=6)
    engine = Engine(FakeRows(logits_of))
    request = engine.add(
        ask([1, 2, 3], 5, num_logprobs=3, stop_ids=(), sampling=Sampling(5.0, seed=2))
    )
    assert request.stats.first_token_s is None and request.stats.num_tokens == 0
    engine.run([request])
    assert (request.usage.prompt_tokens, request.usage.completion_tokens) == (3, 5)
    history = (1, 2, 3)
    for token, told in zip(request.tokens, request.logprobs, strict=True):
        expected = torch.tensor(logits_of(history)).log_softmax(-1)
        assert told.token == token and told.logprob == pytest.approx(float(expected[token]))
        assert [i for i, _ in told.top] == expected.argsort(descending=True)[:3].tolist()
        assert dict(told.top).get(token, told.logprob) == told.logprob
        history = (*history, token)
    stats = request.stats
    assert stats.num_tokens == stats.num_sweeps == 5 and stats.tokens_per_s > 0
    assert 0 <= stats.queued_s <= stats.first_token_s <= stats.total_s  # type: ignore[operator]
    assert engine.stats.num_sweeps == engine.stats.num_tokens == engine.stats.num_rows == 5
    assert engine.stats.rows_per_sweep == 1 and engine.stats.tokens_per_s > 0


def scores_of(logits_of: Any, ids: Sequence[int]) -> list[float]:
    """Of all tokens but the first."""
    logs = [torch.tensor(logits_of(tuple(ids[:n]))).log_softmax(-1) for n in range(1, len(ids))]
    return [float(log[token]) for log, token in zip(logs, ids[1:], strict=True)]


@pytest.mark.parametrize("deterministic", [False, True])
def test_prompts_are_scored_as_they_are_read(deterministic: bool) -> None:
    """In parts, beside a row that decodes; and once, though tokens follow."""
    logits_of = random_logits(10, seed=8)
    rows = FakeRows(logits_of)
    engine = Engine(rows, chunk=3, deterministic=deterministic)
    busy = engine.add(ask([5], 40, stop_ids=()))
    engine.step()
    ids = [n * n % 10 for n in range(1, 21)]
    scored = engine.add(ask(ids, 2, num_prompt_logprobs=2, stop_ids=()))
    plain = engine.add(ask(ids[:2], 2, stop_ids=()))
    engine.run([scored, plain, busy])
    assert [one.logprob for one in scored.prompt_logprobs] == pytest.approx(
        scores_of(logits_of, ids)
    )
    assert [one.token for one in scored.prompt_logprobs] == ids[1:]
    assert all(len(one.top) == 2 for one in scored.prompt_logprobs)
    assert plain.prompt_logprobs == busy.prompt_logprobs == [] and len(scored.tokens) == 2
    fed = [feed for feeds in rows.passes for feed in feeds]
    assert sum(map(len, fed)) == (1 + 39) + (20 + 1) + (2 + 1)
    assert max(map(len, rows.passes)) == 3


def test_a_prompt_may_be_scored_alone() -> None:
    logits_of = random_logits(10, seed=8)
    rows = FakeRows(logits_of, num_tokens=4)
    engine = Engine(rows)
    request = engine.add(ask([1, 2, 3, 4], 0, num_prompt_logprobs=0))
    engine.run([request])
    assert (request.tokens, request.finish_reason) == ([], "length")
    scores = [one.logprob for one in request.prompt_logprobs]
    assert scores == pytest.approx(scores_of(logits_of, [1, 2, 3, 4]))
    assert rows.passes == [[[1, 2, 3, 4]]] and rows.pool.num_free == 4


def test_a_pass_that_is_tried_again_scores_no_token_twice() -> None:
    logits_of = random_logits(10, seed=8)
    rows = FakeRows(logits_of)

    def failing(history: Sequence[int]) -> Any:
        if 7 in history:
            raise RuntimeError("a row that fails")
        return logits_of(tuple(history))

    rows.logits_of = failing
    engine = Engine(rows)
    good = engine.add(ask([1, 2, 3], 1, num_prompt_logprobs=0, stop_ids=()))
    bad = engine.add(ask([7], 1))
    run_all(engine)
    assert isinstance(bad.error, RuntimeError) and len(rows.passes) == 3
    scores = [one.logprob for one in good.prompt_logprobs]
    assert scores == pytest.approx(scores_of(logits_of, [1, 2, 3]))


def test_a_prompt_whose_scores_are_no_numbers_is_an_error() -> None:
    """Also where the logits behind its last token are."""
    logits_of = random_logits(10, seed=8)
    rows = FakeRows(lambda history: [math.nan] * 10 if history[-1] == 7 else logits_of(history))
    engine = Engine(rows)
    plain = engine.add(ask([1, 7, 3], 1, stop_ids=()))
    scored = engine.add(ask([1, 7, 3], 1, num_prompt_logprobs=0))
    run_all(engine)
    assert plain.error is None and len(plain.tokens) == 1
    assert scored.finish_reason == "error" and "not finite" in str(scored.error)


def test_a_prompt_that_is_scored_is_read_from_its_first_token() -> None:
    """Also where a row is kept that it could go on from, which stays for others."""
    rows = FakeRows(random_logits(10, seed=8))
    engine = Engine(rows)
    engine.run([engine.add(ask([1, 2, 3], 1, keep=True, stop_ids=()))])
    scored = engine.add(ask([1, 2, 3, 4], 1, num_prompt_logprobs=0, stop_ids=()))
    engine.run([scored, engine.add(ask([1, 2, 3, 5], 1, stop_ids=()))])
    assert len(scored.prompt_logprobs) == 3
    assert rows.passes[1] == [[1, 2, 3, 4], [5]]


def test_a_model_that_cannot_score_says_so() -> None:
    rows = FakeRows(random_logits(10, seed=8))
    rows.can_score = False
    with pytest.raises(UnsupportedModelError, match="from its first token to its last"):
        Engine(rows).add(ask([1], num_prompt_logprobs=0))


def test_phases_tell_what_was_copied_and_waited_for() -> None:
    rows = FakeRows(scripted({0: [1] * 9, 2: [3] * 9}, 10))

    def copy(feeds: Sequence[Feed]) -> None:
        """100 bytes a pass; for those that read a prompt nothing waits."""
        is_prompt = any(len(feed.ids) > 1 for feed in feeds)
        old = rows.stats
        waited_s = old.waited_s + (0.0 if is_prompt else 1000.0)
        rows.stats = replace(old, bytes_copied=old.bytes_copied + 100, waited_s=waited_s)

    rows.before = copy
    engine = Engine(rows)
    first = engine.add(ask([0, 0], 4))
    engine.step()
    engine.step()
    second = engine.add(ask([2, 2], 2))
    run_all(engine)
    assert [len(feeds) for feeds in rows.passes] == [1, 1, 2, 2]
    told = first.stats
    assert (told.num_sweeps, told.num_rows, told.rows_per_sweep) == (4, 6, 1.5)
    assert (told.prefill.bytes_copied, told.decode.bytes_copied) == (100, 300)
    assert (told.prefill.waited_s, told.decode.waited_s) == (0.0, 2000.0)
    assert (told.prefill.bound, told.decode.bound) == ("computing", "copying")
    assert told.bytes_copied == 400 and second.stats.bytes_copied == 200
    assert second.stats.rows_per_sweep == 2 and second.stats.prefill.bound == "computing"
    stats = engine.stats
    assert (stats.prefill.bytes_copied, stats.decode.bytes_copied) == (200, 200)
    assert (stats.prefill.bound, stats.decode.bound) == ("computing", "copying")
    assert stats.prefill.seconds + stats.decode.seconds == pytest.approx(stats.busy_s)
    assert stats.num_requests == 2
    waited = [one.stats.first_token_s or 0.0 for one in (first, second)]
    assert stats.first_token_s == pytest.approx(sum(waited) / 2) and stats.first_token_s > 0


def test_a_phase_that_was_not_has_no_bound() -> None:
    stats = Engine(FakeRows(random_logits(10, seed=0))).stats
    assert stats.prefill.bound is stats.decode.bound is None and stats.first_token_s == 0.0


# ---- going on ------------------------------------------------------------------------------------


def test_a_request_goes_on_from_the_row_that_another_has_kept() -> None:
    logits_of = random_logits(10, seed=7)
    rows = FakeRows(logits_of)
    engine = Engine(rows)
    first = engine.add(ask([1, 2, 3], 4, stop_ids=(), keep=True))
    engine.run([first])
    ids = [*first.input_ids, *first.tokens, 5, 6]
    second = engine.add(ask(ids, 4, stop_ids=(), keep=True))
    engine.run([second])
    assert second.tokens == alone(logits_of, second)
    assert rows.passes[4] == [[first.tokens[-1], 5, 6]]  # the last one drawn was not fed
    other = engine.add(ask([1, 2, 4, 5], 2, stop_ids=()))
    engine.run([other])
    assert other.tokens == alone(logits_of, other)


def kept(engine: Engine, ids: Sequence[int], max_new_tokens: int = 4) -> Request:
    request = engine.add(ask(ids, max_new_tokens, stop_ids=(), keep=True))
    engine.run([request])
    return request


def test_a_kept_row_is_cut_back_to_what_a_request_begins_with() -> None:
    """As where an answer was stopped, or is other tokens in the text of the conversation."""
    logits_of = random_logits(10, seed=7)
    rows = FakeRows(logits_of)
    engine = Engine(rows)
    first = kept(engine, [1, 2, 3], 5)
    assert rows.pool.num_tokens - rows.pool.num_free == 7, "no more room than what it holds"
    changed = (first.tokens[1] + 1) % 10
    second = kept(engine, [1, 2, 3, first.tokens[0], changed, 5])
    assert rows.passes[5] == [[changed, 5]] and second.tokens == alone(logits_of, second)
    again = kept(engine, second.input_ids)
    assert rows.passes[9] == [[5]], "the last of a prompt is read for its logits"
    assert again.tokens == second.tokens


def test_less_than_half_of_a_row_is_left_to_others() -> None:
    logits_of = random_logits(10, seed=7)
    rows = FakeRows(logits_of)
    engine = Engine(rows)
    first = kept(engine, [1, 2, 3, 4, 5, 6], 3)
    other = kept(engine, [1, 2, 3, 5, 5])
    assert rows.passes[3] == [[1, 2, 3, 5, 5]] and other.tokens == alone(logits_of, other)
    passes = len(rows.passes)
    kept(engine, [*first.input_ids, *first.tokens, 7])
    assert rows.passes[passes] == [[first.tokens[-1], 7]], "and it is still there"


def test_a_conversation_goes_on_in_its_row_until_the_pool_is_full() -> None:
    logits_of = random_logits(10, seed=8)
    rows = FakeRows(logits_of, num_tokens=24)
    engine = Engine(rows)
    ids = [1, 2, 3]
    for turn in range(4):
        passes = len(rows.passes)
        said = kept(engine, ids, 3)
        assert said.tokens == alone(logits_of, said)
        assert sum(map(len, rows.passes[passes])) == (3 if turn == 0 else 4)
        ids = [*ids, *said.tokens, turn, 5, 6]
    assert len(said.input_ids) + 3 - 1 == 23


def test_a_row_that_goes_on_takes_the_room_of_other_kept_rows() -> None:
    logits_of = random_logits(10, seed=8)
    rows = FakeRows(logits_of, num_tokens=24)
    engine = Engine(rows)
    first = kept(engine, [1, 2, 3], 3)
    kept(engine, [7, 8, 9], 6)
    second = kept(engine, [*first.input_ids, *first.tokens, 5], 14)
    assert rows.passes[9] == [[first.tokens[-1], 5]] and second.tokens == alone(logits_of, second)


def test_a_request_waits_for_the_room_to_go_on() -> None:
    logits_of = random_logits(10, seed=8)
    rows = FakeRows(logits_of, num_tokens=24)
    engine = Engine(rows)
    first = kept(engine, [1, 2, 3], 3)
    running = engine.add(ask([7], 12, stop_ids=()))
    engine.step()
    waiting = engine.add(ask([*first.input_ids, *first.tokens, 5], 10, stop_ids=()))
    engine.step()
    assert engine.num_waiting == 1
    engine.run([running, waiting])
    assert rows.passes[-10] == [[first.tokens[-1], 5]]
    assert waiting.tokens == alone(logits_of, waiting)


def test_nothing_is_kept_of_rows_that_cannot_go_on() -> None:
    rows = FakeRows(random_logits(10, seed=8))
    rows.can_resume = False
    engine = Engine(rows)
    first = kept(engine, [1, 2, 3])
    assert rows.pool.num_free == rows.pool.num_tokens
    kept(engine, [*first.input_ids, *first.tokens, 5])
    assert rows.passes[4] == [[1, 2, 3, *first.tokens, 5]]


def test_a_deterministic_row_goes_on_from_whole_pieces_of_its_prompt() -> None:
    logits_of = random_logits(10, seed=8)
    rows = FakeRows(logits_of)
    engine = Engine(rows, deterministic=True)
    first = kept(engine, [n % 9 for n in range(40)], 30)
    passes = len(rows.passes)
    second = kept(engine, [*first.input_ids, *first.tokens, 5, 6])
    read = [ids for feeds in rows.passes[passes:] for ids in feeds]
    assert [len(ids) for ids in read] == [16, 16, 8, 1, 1, 1]
    assert [token for ids in read[:3] for token in ids] == second.input_ids[32:]
    assert second.tokens == alone(logits_of, second)


def test_a_kept_row_is_given_up_where_others_need_its_room() -> None:
    rows = FakeRows(scripted({0: [1] * 9, 1: [2] * 9}, 10), num_tokens=10)
    engine = Engine(rows)
    engine.run([engine.add(ask([0], 8, keep=True))])
    assert rows.pool.num_free == 2
    engine.run([engine.add(ask([1], 9))])
    assert rows.pool.num_free == 10


@pytest.mark.slow
def test_nothing_is_left_of_ten_thousand_requests() -> None:
    rows = FakeRows(scripted({0: [1, STOP]}, 10), max_rows=50)
    engine = Engine(rows)
    for n in range(200):
        requests = [engine.add(ask([0], keep=i % 7 == 0)) for i in range(50)]
        engine.cancel(requests[n % 50])
        for _ in engine.tokens(requests[(n + 1) % 50]):
            pass
        engine.run(requests)
        rows.passes.clear()
    engine.close()
    held = [value for value in vars(engine).values() if isinstance(value, list | dict)]
    assert len(held) == 3 and not any(held) and not engine.num_waiting
    assert rows.pool.num_free == rows.pool.num_tokens
