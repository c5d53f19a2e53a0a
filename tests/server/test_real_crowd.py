"""Crowds of clients of a real network, half of which is streamed: none is lost, and none changes
what another gets.

bminf/server/worker.py, bminf/server/pretrained.py.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from fake_texts import Gate
from running_server import Running, running, until
from tiny_llama import TEMPLATE, save_llama
from tiny_served import texts_of

import bminf

NUM_CLIENTS, NUM_REQUESTS = 50, 4
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


class Passes:
    """Those of an engine, which may be held up.   sizes: how many rows each of them had.
    held_size: of the first one that shuts the gate before itself."""

    def __init__(self, engine: bminf.Engine) -> None:
        self.sizes: list[int] = []
        self.held_size: int | None = None
        self.gate = Gate()
        rows: Any = engine._rows
        self._forward, rows.forward = rows.forward, self._counted

    def _counted(self, feeds: Any, num_tokens: int | None = None) -> Any:
        self.sizes.append(len(feeds))
        if len(feeds) == self.held_size:
            self.held_size = None
            self.gate.shut()
        self.gate.wait(feeds)
        return self._forward(feeds, num_tokens)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, Passes]]:
    folder = save_llama(tmp_path_factory.mktemp("crowd"), TEMPLATE)
    room = {"max_length": 64, "max_batch_size": 4}
    whole = bminf.load(folder, quantization=None, device="cpu", **room)
    plan = bminf.plan_of(whole)
    assert plan is not None
    limit = plan.total_bytes - 3 * plan.blocks[0].nbytes
    model = bminf.load(folder, limit, quantization=None, device="cpu", **room)
    own = bminf.plan_of(model)
    assert own is not None and own.streamed and own.resident
    texts = texts_of(model, deterministic=True)
    passes = Passes(texts.engine)
    with running(lambda: texts) as server:
        yield server, passes


def body_of(client: int, number: int) -> tuple[str, dict[str, Any]]:
    """A request; no two are alike, and each client asks in all ways."""
    text = f"once word{client} upon word{90 - client} word{number}"
    kind = (client + number) % 4
    body: dict[str, Any] = {"max_tokens": 1 + (client + number) % 3, "stream": kind in (1, 3)}
    body |= {"seed": client, "temperature": 1.0} if client % 2 else {"temperature": 0}
    if kind < 2:
        return COMPLETIONS, {**body, "prompt": text, "logprobs": 1}
    content = [{"role": "user", "content": text}]
    return CHAT, {**body, "messages": content, "logprobs": True, "top_logprobs": 1}


def said(server: Running, client: int, number: int) -> list[Any]:
    """Text, logprobs to the last bit, and why it ended; of pieces one after another."""
    path, body = body_of(client, number)
    answer = server.post(path, body)
    assert answer.status == 200, answer.body
    choices = [c for part in answer.events for c in part["choices"]] if body["stream"] else (
        answer.json["choices"]
    )  # fmt: skip
    scores, text = [], ""
    for choice in choices:
        found = choice["logprobs"] or {}
        scores += found.get("token_logprobs", [one["logprob"] for one in found.get("content", [])])
        said = choice.get("message") or choice.get("delta") or {"content": choice.get("text", "")}
        text += said.get("content", "")
    return [text, scores, choices[-1]["finish_reason"]]


def test_fifty_clients_of_a_real_network_each_get_what_they_get_alone(
    served: tuple[Running, Passes],
) -> None:
    server, passes = served
    got: dict[tuple[int, int], list[Any]] = {}

    def ask(client: int) -> None:
        for number in range(NUM_REQUESTS):
            got[client, number] = said(server, client, number)

    threads = [threading.Thread(target=ask, args=(client,)) for client in range(NUM_CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    until(server.is_idle)
    assert len(got) == NUM_CLIENTS * NUM_REQUESTS and max(passes.sizes) > 4
    del passes.sizes[:]
    alone = {(client, number): said(server, client, number) for client, number in got}
    assert set(passes.sizes) == {1}
    assert got == alone


def test_killed_clients_of_a_real_network_are_gone_within_a_pass(
    served: tuple[Running, Passes],
) -> None:
    """In the middle of streams, and of whole replies."""
    server, passes = served
    expected = said(server, 7, 2)
    long = {"prompt": "once upon", "max_tokens": 30, "temperature": 0}
    passes.gate.shut()
    del passes.sizes[:]
    doomed = [server.begin(COMPLETIONS, {**long, "stream": at % 2 == 0}) for at in range(6)]
    until(lambda: server.worker.num_running + server.worker.num_waiting == 6)
    found: list[Any] = []
    kept = threading.Thread(target=lambda: found.append(said(server, 7, 2)))
    kept.start()
    until(lambda: server.worker.num_running + server.worker.num_waiting == 7)
    passes.held_size = 7  # in which all of them have a part
    passes.gate.open()
    until(lambda: 7 in passes.sizes)
    num_held = len(passes.sizes)
    for connection in doomed:
        connection.close()
    worker = server.worker
    until(lambda: sum(not one.request.is_done for one in worker._choices) <= 1)
    passes.gate.open()
    kept.join()
    until(server.is_idle)
    assert found == [expected]
    assert set(passes.sizes[num_held:]) <= {1}
    assert b"bminf_requests_running 0.0" in server.get("/metrics").body
    engine: Any = server.worker.texts.engine
    with engine.exclusive():  # without the rows that chats may go on from
        assert engine._rows._pool.num_free == engine._rows._pool.num_tokens
