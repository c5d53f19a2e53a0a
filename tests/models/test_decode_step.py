"""Passes of one token a row in memory that stays (bminf/models/decode_step.py) give the ids of all
other passes: of every golden set, resident and streamed, with keys and rows rounded up.

The memory itself is tested in tests/layers/test_step_cache.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from golden import CLASSES, GoldenSet, for_each, is_int8

from bminf.arch.gpt import GPTConfig
from bminf.arch.t5 import T5Config
from bminf.engine.request import Request
from bminf.engine.sampling import Sampling
from bminf.errors import ArgumentError, UnsupportedModelError
from bminf.models import CPM1, decode_step, plan_model
from bminf.models.decode_step import (
    Capture,
    DecodeSteps,
    check_graphs,
    num_sizes,
    power_of_two,
    rounded_up,
)
from bminf.models.glm_text import blank

Loader = Callable[..., Any]
CLASSES["bloom"] = "BLOOM"
NAMES = ("bloom", "cpm1", "cpm2", "eva", "glm130b", "glm10b")
LENGTHS = (9, 2, 14)  # of prompts: three rows, of which there is memory for four
NUM_TOKENS = 12
KEYS = 8  # that lengths are rounded up to: answers go from one size to the next


def layouts(given: Any) -> list[str]:
    """One of float weights."""
    found = given.folders(packed=False) if hasattr(given, "folders") else [
        layout for layout in given.layouts() if not is_int8(given, layout)
    ]  # fmt: skip
    return found[:1]


class Counted(DecodeSteps):
    """How many passes there were."""

    num_passes = 0

    def _run(self, size: tuple[int, int], step: Any) -> torch.Tensor:
        self.num_passes += 1
        return super()._run(size, step)


@pytest.fixture(autouse=True)
def _keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_step, "LEAST_KEYS", KEYS)


@for_each(NAMES, layouts)
@pytest.mark.parametrize("streams", [False, True], ids=["resident", "streamed"])
def test_golden_ids_are_those_of_other_passes(name: str, case: str, streams: bool) -> None:
    from golden import golden

    given: GoldenSet = golden(name)
    settings: dict[str, Any] = {"max_batch_size": len(LENGTHS), "max_length": 48}
    with closing(given.load(case, **settings)) as model:
        plan, expected = model.plan, answers(model)
        if not streams:
            stepped(model, expected)
            return
    with closing(given.load_streaming(case, plan, **settings)) as model:
        assert model.plan.streamed
        stepped(model, expected)


def stepped(model: Any, expected: list[list[int]]) -> None:
    """Each sweep but those that read prompts was one of them."""
    rows = model.row_model
    rows.steps = Counted(rows, len(LENGTHS))
    assert answers(model) == expected
    assert rows.steps.num_passes == NUM_TOKENS - 1
    assert len({size[1] for size in rows.steps._steps}) > 1  # sizes of keys


def answers(model: Any) -> list[list[int]]:
    """The likeliest tokens behind three texts, in the same passes."""
    requests = [request for request in requests_of(model)]
    model.engine.run([model.engine.add(request) for request in requests])
    assert all(len(request.tokens) == NUM_TOKENS for request in requests)
    return [request.tokens for request in requests]


def requests_of(model: Any) -> Iterator[Request]:
    generator = torch.Generator().manual_seed(0)
    for length in LENGTHS:
        size = (length,)
        ids = torch.randint(0, model.config.vocab_size, size, generator=generator).tolist()
        yield Request(ids, NUM_TOKENS, Sampling(0.0), **more(model, ids))


def more(model: Any, ids: Sequence[int]) -> dict[str, Any]:
    """What a request to this model has beside its prompt."""
    kind = type(model).__name__
    if kind in ("CPM2", "EVA"):
        return {"start_ids": model._start_ids()}
    if kind == "GLM":
        prompt = blank(ids, len(ids) - 1, ids[0], is_continued=False)
        return {"start_ids": prompt.start_ids, "prompt": prompt}
    return {}


# ---- graphs --------------------------------------------------------------------------------------


def test_a_pass_that_has_run_once_is_captured_and_run_again(load: Loader) -> None:
    """As on a GPU, by a stand-in for a graph that runs what was captured."""
    model = load("cpm1", max_batch_size=2, max_length=64)
    captured: list[Callable[[], torch.Tensor]] = []

    def capture(run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        captured.append(run)
        return run

    def texts() -> list[Any]:
        return model.generate_batch(["今天天气很好", "我们"], max_tokens=20, temperature=0)

    expected, rows = texts(), model.row_model
    rows.steps = DecodeSteps(rows, 2, capture)  # type: ignore[arg-type]
    assert texts() == expected
    assert len(captured) == len(rows.steps._steps) > 1
    before = len(captured)
    assert texts() == expected and len(captured) == before


def test_a_capture_that_fails_is_said_once_and_ends_no_text(
    load: Loader, caplog: pytest.LogCaptureFixture
) -> None:
    model = load("cpm1", max_batch_size=2, max_length=64)
    num_tried = 0

    def capture(run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        nonlocal num_tried
        num_tried += 1
        if num_tried == 1:
            return run
        raise RuntimeError("operation not permitted when stream is capturing")

    def texts() -> list[Any]:
        return model.generate_batch(["今天天气很好", "我们"], max_tokens=20, temperature=0)

    expected, rows = texts(), model.row_model
    rows.steps = DecodeSteps(rows, 2, capture)  # type: ignore[arg-type]
    assert texts() == expected and texts() == expected
    assert num_tried == 2 and len(rows.steps._graphs) == 1
    (message,) = [one.getMessage() for one in caplog.records if "CUDA graph" in one.getMessage()]
    assert message.endswith("longer: operation not permitted when stream is capturing")


class Graph:
    """Of torch.cuda, as far as it is asked."""

    def __init__(self) -> None:
        self.num_replays = 0

    def replay(self) -> None:
        self.num_replays += 1

    def pool(self) -> str:
        return "a pool"


def test_graphs_share_their_memory_on_their_device(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[tuple[Graph, Any]] = []
    second = torch.device("cuda", 1)

    @contextmanager
    def capturing(graph: Graph, pool: Any = None, stream: Any = None) -> Iterator[None]:
        assert stream == ("a stream", second)
        begun.append((graph, pool))
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: ("a stream", device))
    capture, results = Capture(second), [torch.zeros(1), torch.ones(1)]
    replays = [capture(partial(torch.clone, y)) for y in results]
    assert [pool for _, pool in begun] == [None, "a pool"]
    assert [float(replay()) for replay in [*replays, replays[1]]] == [0, 1, 1]
    assert [graph.num_replays for graph, _ in begun] == [1, 2]


GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (True, torch.device("cpu")),
            "needs a GPU, and the model is for cpu; leave cuda_graph out",
        ),
        ((True, GPU, True), "does not go with deterministic=True"),
        ((True, GPU, False, False), "does not go with fused_kernels=False"),
        ((1, GPU), "cuda_graph=1; accepted: True, False"),
    ],
)
def test_graphs_that_cannot_be_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        check_graphs(*arguments)
    check_graphs(True, GPU)
    check_graphs(False, *arguments[1:])


def test_a_model_refuses_graphs_on_a_cpu_before_it_reads_a_file() -> None:
    with pytest.raises(ArgumentError, match="cuda_graph=True needs a GPU"):
        CPM1("no/such/folder", device="cpu", cuda_graph=True)


def test_a_plan_has_room_for_graphs_and_refuses_to_stream() -> None:
    name, settings = "CPM-2 (Chinese), CPM-2.1", {"max_length": 300, "max_batch_size": 4}
    plain, graphs = (plan_model(name, **settings, cuda_graph=on) for on in (False, True))
    more = graphs.reserved_bytes - plain.reserved_bytes
    logits = 4 * 4 * 26240  # of four rows, for each of three numbers of rows and two of keys
    assert more > 6 * logits and graphs.total_bytes - plain.total_bytes == more
    with pytest.raises(UnsupportedModelError, match=r"nothing streams, and .* raise memory_limit"):
        plan_model(name, graphs.total_bytes - 1, **settings, cuda_graph=True)
    assert not plan_model(name, graphs.total_bytes, **settings, cuda_graph=True).streamed


def test_graphs_of_heads_that_no_kernel_takes_are_refused_before_a_file_is_read() -> None:
    config = GPTConfig(64, 48, 2, 4, 64, 96)  # heads of 12 columns
    assert plan_model(config).total_bytes > 0
    with pytest.raises(ArgumentError, match=r"of 8 columns up to 256, and those .* 12;"):
        plan_model(config, cuda_graph=True)


@pytest.mark.parametrize("num_extra", [0, 1])
def test_graphs_are_counted_for_all_that_a_decoder_is_fed(num_extra: int) -> None:
    """One of an encoder-decoder is fed a token more than max_length."""
    decoder_only = GPTConfig(64, 48, 2, 3, 256, 96)
    config = T5Config(64, 48, 96, 3, 16, 2, 2) if num_extra else decoder_only
    below, at, above = (
        plan_model(config, max_length=length, cuda_graph=True).reserved_bytes
        - plan_model(config, max_length=length).reserved_bytes
        for length in (63 - num_extra, 64 - num_extra, 65 - num_extra)
    )
    assert below == at < above


def test_rows_and_keys_are_rounded_up() -> None:
    assert [power_of_two(count) for count in (1, 2, 3, 4, 5, 8, 9)] == [1, 2, 4, 4, 8, 8, 16]
    assert [rounded_up(count) for count in (1, 7, 8, 9, 16, 17)] == [8, 8, 8, 16, 16, 32]
    for max_rows, max_keys in ((1, 1), (1, 8), (3, 9), (4, 64), (5, 65)):
        sizes = {
            (power_of_two(rows), rounded_up(keys))
            for rows in range(1, max_rows + 1)
            for keys in range(1, max_keys + 1)
        }
        assert num_sizes(max_rows, max_keys) == len(sizes)
