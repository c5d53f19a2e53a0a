from __future__ import annotations

from typing import Any

import pytest
import torch
from fake_decoder import FakeDecoder, random_logits, scripted

from bminf.engine.loop import decode
from bminf.engine.sampling import Sampler, Sampling
from bminf.errors import ArgumentError

STOP = 9
GREEDY = Sampling(0.0)


def run(
    decoder: FakeDecoder, start: list[list[int]], max_new_tokens: int, sampling: Sampling = GREEDY,
    stop_ids: Any = (STOP,), vocab_size: int = 10,
) -> list[list[int | None]]:  # fmt: skip
    sampler = Sampler(sampling, start, vocab_size, "cpu")
    return list(decode(decoder, torch.tensor(start), sampler, stop_ids, max_new_tokens))


def test_a_row_alone_is_fed_what_it_drew() -> None:
    decoder = FakeDecoder(random_logits(10, seed=0))
    steps = run(decoder, [[4, 2, 7]], 6, stop_ids=())
    history = (4, 2, 7)
    for (token,) in steps:
        logits = decoder.logits_of(history)
        assert token == logits.index(max(logits))
        history = (*history, token)
    assert [ids.tolist() for ids in decoder.fed] == [[[4, 2, 7]], *([step] for step in steps[:-1])]
    assert len(steps) == 6 and decoder.selected == []


def test_rows_end_at_different_times() -> None:
    """Each ends with a stop token; the caches of the others go on alone, in order."""
    scripts = {0: [1, 2, STOP], 1: [8], 2: [3, 4, 5, 6], 3: [7, STOP]}
    decoder = FakeDecoder(scripted(scripts, 10))
    steps = run(decoder, [[0], [1], [2], [3]], 4, stop_ids={8, STOP})
    assert steps == [
        [1, 8, 3, 7],
        [2, None, 4, STOP],
        [STOP, None, 5, None],
        [None, None, 6, None],
    ]
    assert decoder.selected == [[0, 2, 3], [0, 1], [1]]
    assert [len(ids) for ids in decoder.fed] == [4, 3, 2, 1]


def test_it_ends_when_the_last_row_does() -> None:
    decoder = FakeDecoder(scripted({0: [1, STOP], 1: [2, STOP]}, 10))
    assert run(decoder, [[0], [1]], 50) == [[1, 2], [STOP, STOP]]
    assert decoder.selected == [] and len(decoder.fed) == 2


@pytest.mark.parametrize("max_new_tokens", [1, 3])
def test_max_new_tokens_is_a_number_of_passes(max_new_tokens: int) -> None:
    decoder = FakeDecoder(scripted({0: [1] * 5, 1: [2] * 5}, 10))
    assert run(decoder, [[0], [1]], max_new_tokens) == [[1, 2]] * max_new_tokens
    assert len(decoder.fed) == max_new_tokens


@pytest.mark.parametrize(
    ("start", "stop_ids", "message"),
    [
        (torch.zeros(2, 1, dtype=torch.int64), (), "start has 2 rows, the sampler 1"),
        (torch.zeros(1, 1, dtype=torch.int64), (3, 10), "stop_ids holds 10; accepted"),
        (torch.zeros(1, 1, dtype=torch.int64), ("<eod>",), "stop_ids holds '<eod>'"),
    ],
)
def test_arguments_are_refused_before_the_first_pass(
    start: torch.Tensor, stop_ids: Any, message: str
) -> None:
    decoder = FakeDecoder(random_logits(10, 0))
    with pytest.raises(ArgumentError, match=message):
        decode(decoder, start, Sampler(GREEDY, [[]], 10, "cpu"), stop_ids, 5)
    assert decoder.fed == []


@pytest.mark.parametrize("penalty", [0.0, 0.8])
def test_rows_that_end_early_do_not_disturb_the_others(penalty: float) -> None:
    """Every row of a batch says what it says alone, with its own seed."""
    starts, seed = [[5, 1], [0, 3], [2, 2], [8, 8], [1, 4]], 20
    together = run(
        FakeDecoder(random_logits(10, seed=1)), starts, 30,
        Sampling(1.0, 6, None, penalty, seed=seed),
    )  # fmt: skip
    lengths = set()
    for row, start in enumerate(starts):
        sampling = Sampling(1.0, 6, None, penalty, seed=seed + row)
        alone = run(FakeDecoder(random_logits(10, seed=1)), [start], 30, sampling)
        own = [step[row] for step in together if step[row] is not None]
        assert own == [token for (token,) in alone]
        lengths.add(len(own))
    assert len(lengths) > 2  # or the test has tested nothing


def test_a_pass_begins_only_when_a_token_is_asked_for() -> None:
    decoder = FakeDecoder(scripted({0: [1] * 9}, 10))
    sampler = Sampler(GREEDY, [[]], 10, "cpu")
    tokens = decode(decoder, torch.tensor([[0]]), sampler, (), 9)
    assert decoder.fed == []
    for number in (1, 2, 3):
        next(tokens)
        assert len(decoder.fed) == number
    tokens.close()
    assert len(decoder.fed) == 3 and list(tokens) == []


def test_the_caller_keeps_its_own_grad_mode() -> None:
    tokens = decode(
        FakeDecoder(random_logits(10, 0)), torch.tensor([[0]]), Sampler(GREEDY, [[]], 10, "cpu"),
        (), 3,
    )  # fmt: skip
    for _ in tokens:  # FakeDecoder asserts that there are no gradients in a pass
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("inside")])
def test_an_error_in_a_pass_comes_through(error: BaseException) -> None:
    def logits(history: tuple[int, ...]) -> list[float]:
        if len(history) == 3:
            raise error
        return [0.0, 1.0]

    with pytest.raises(type(error)):
        run(FakeDecoder(logits), [[0]], 5, stop_ids=(), vocab_size=2)
    assert torch.is_grad_enabled()
