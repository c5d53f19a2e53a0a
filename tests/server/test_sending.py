"""Clients that wait, that leave and that come in crowds; a server that stops.

bminf/server/sending.py, bminf/server/worker.py, bminf/server/running.py.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from crowd import crowd
from fake_texts import FakeTexts
from running_server import Running, Serve, running, until

from bminf.engine.request import Request

LONG = ">" + "a" * 500
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def body(stream: bool, prompt: str = LONG, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "temperature": 0, "max_tokens": 500, "stream": stream, **more}


def held(serve: Serve, **settings: Any) -> tuple[Running, FakeTexts]:
    """A server whose model computes nothing until its gate is opened."""
    server = serve(**settings)
    texts: Any = server.worker.texts
    texts.gate.shut()
    return server, texts


def pending(server: Running) -> list[Any]:
    """Choices that the engine has, and those that its thread has not seen yet."""
    return [*server.worker._choices, *server.worker._inbox]


def read(connection: socket.socket, *expected: bytes) -> bytes:
    """What comes, up to the last of these, which come one after another."""
    received, start = b"", 0
    for one in expected:
        while received.find(one, start) < 0:
            part = connection.recv(65536)
            assert part, received
            received += part
        start = received.find(one, start) + len(one)
    return received


# ---- while nothing comes -------------------------------------------------------------------------


def test_headers_and_pings_come_before_any_text(serve: Serve) -> None:
    server, texts = held(serve, ping_s=0.02)
    connection = server.begin(COMPLETIONS, body(True, ">ab"))
    received = read(connection, *[b": ping\n\n"] * 3)
    assert b"content-type: text/event-stream" in received
    assert b"cache-control: no-cache" in received and b"x-accel-buffering: no" in received
    assert b"data:" not in received
    texts.gate.open()
    assert b'"finish_reason": "stop"' in read(connection, b"[DONE]")
    connection.close()


def test_a_chat_says_its_role_at_once(serve: Serve) -> None:
    server, texts = held(serve)
    messages = [{"role": "user", "content": ">ab"}]
    connection = server.begin(CHAT, {"messages": messages, "stream": True})
    read(connection, b'{"role": "assistant", "content": ""}')
    texts.gate.open()
    connection.close()


def test_a_whole_reply_is_kept_alive_with_blanks_and_comes_once(serve: Serve) -> None:
    """A client that waits two seconds for a byte gets a reply that takes longer."""
    server, texts = held(serve, ping_s=0.02)
    opened = threading.Timer(3.0, texts.gate.open)
    opened.start()
    connection = server.connect(timeout_s=2.0)
    connection.request("POST", COMPLETIONS, json.dumps(body(False, ">ab")),
                       {"content-type": "application/json"})  # fmt: skip
    response = connection.getresponse()
    assert response.headers["x-accel-buffering"] == "no"
    content = response.read()
    assert content[:10] == b" " * 10
    assert json.loads(content)["choices"][0]["text"] == "ab"
    assert len(texts.rows.passes) == 3  # nobody asked again
    opened.join()
    connection.close()


def test_an_error_behind_blanks_is_still_told(serve: Serve) -> None:
    server, texts = held(serve, ping_s=0.02)
    opened = threading.Timer(0.1, texts.gate.open)
    opened.start()
    answer = server.complete("NaN>a")
    assert answer.status == 200 and answer.body.startswith(b" ")
    assert "not finite" in answer.error["message"]
    opened.join()


# ---- clients that leave --------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_rows_within_a_step(serve: Serve, stream: bool) -> None:
    """Whatever stands between it and the handler."""
    key = {"authorization": "Bearer secret", "origin": "https://chat.example"}
    server, texts = held(serve, ping_s=0.02, api_key="secret", cors_origins=(key["origin"],))
    connection = server.begin(COMPLETIONS, body(stream, n=3), **key)
    until(lambda: bool(texts.rows.passes))  # the first pass is held
    connection.close()
    until(lambda: all(one.request.is_done for one in server.worker._choices))
    texts.gate.open()
    until(server.is_idle)
    assert len(texts.rows.passes) <= 2
    assert texts.rows.pool.num_free == texts.rows.pool.num_tokens
    assert b"bminf_requests_running 0.0" in server.get("/metrics", **key).body


@pytest.mark.parametrize("stream", [True, False])
def test_requests_that_are_sent_again_do_not_pile_up(serve: Serve, stream: bool) -> None:
    """By a client that gives up on each while its prompt is read."""
    server, texts = held(serve)
    for number in range(4):  # the first is in a pass, and the others wait
        connection = server.begin(COMPLETIONS, body(stream))
        until(lambda: bool(texts.rows.passes))
        until(lambda so_far=number: server.worker.num_waiting == so_far)
        connection.close()
    until(lambda: all(one.request.is_done for one in pending(server)))
    texts.gate.open()
    until(server.is_idle)
    assert len(texts.rows.passes) == 1 and len(texts.rows.passes[0]) == 1


def test_others_are_answered_while_a_sweep_runs(serve: Serve) -> None:
    server, texts = held(serve)
    connection = server.begin(COMPLETIONS, body(False, ">ab"))
    until(lambda: bool(texts.rows.passes))
    for path in ("/v1/models", "/health", "/plan", "/metrics", "/tokenizer_info", "/"):
        assert server.get(path).status == 200, path
    assert server.post("/tokenize", {"prompt": "a"}).json["count"] == 2
    texts.gate.open()
    read(connection, b'"text": "ab"')


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_while_it_waits_leaves_the_queue(serve: Serve, stream: bool) -> None:
    server, texts = held(serve)
    first = server.begin(COMPLETIONS, body(False, ">ab"))
    until(lambda: bool(texts.rows.passes))
    second = server.begin(COMPLETIONS, body(stream))
    until(lambda: server.worker.num_waiting == 1)
    second.close()
    until(lambda: all(one.request.is_done for one in server.worker._inbox))
    texts.gate.open()
    read(first, b'"text": "ab"')
    until(server.is_idle)
    assert all(len(feeds) == 1 for feeds in texts.rows.passes)
    first.close()


def test_a_client_that_leaves_in_the_middle_of_a_prompt_that_is_scored(serve: Serve) -> None:
    server, texts = held(serve)
    connection = server.begin(COMPLETIONS, body(False, ">ab", echo=True, logprobs=1))
    until(lambda: bool(texts.rows.passes))
    (choice,) = server.worker._choices
    connection.close()
    until(lambda: choice.request.is_done)
    texts.gate.open()
    until(server.is_idle)
    assert server.complete(">a").text == "a"


def test_a_client_that_leaves_between_two_blanks(serve: Serve) -> None:
    server, texts = held(serve)
    connection = server.begin("/v1/fill", {"text": "ab_" * 20, "temperature": 0})
    until(lambda: bool(texts.rows.passes))
    connection.close()
    until(lambda: all(one.request.is_done for one in server.worker._choices))
    texts.gate.open()
    until(server.is_idle)
    assert len(texts.rows.passes) <= 2


def test_a_reader_that_does_not_read_holds_nobody_up(serve: Serve) -> None:
    server = serve(FakeTexts(num_tokens=20_000))
    prompt = ">" + "a" * 250
    slow = server.begin(COMPLETIONS, body(True, prompt, n=8))  # more than sockets hold
    until(server.is_idle)  # all was generated, and waits to be read
    assert server.complete(">ab").text == "ab"
    received = read(slow, b"[DONE]")
    assert len(received) > 2**16 and received.count(b"data: ") < 8 * 250


# ---- crowds --------------------------------------------------------------------------------------


def test_a_full_queue_says_when_to_come_back(serve: Serve) -> None:
    server, texts = held(serve, max_waiting=4)
    first = server.begin(COMPLETIONS, body(False, ">ab"))
    until(lambda: bool(texts.rows.passes))
    others = [server.begin(COMPLETIONS, body(False, ">ab")) for _ in range(4)]
    until(lambda: server.worker.num_waiting == 4)
    server.worker._mean_s = 3.0
    answer = server.complete(">ab")
    assert (answer.status, answer.error["code"]) == (429, "queue_full")
    assert answer.headers["retry-after"] == "12"  # four before it, of three seconds each
    server.worker._mean_s = 1000.0
    assert server.complete(">ab").headers["retry-after"] == "120"
    assert server.get("/v1/models").status == 200
    request = Request([1], 1)
    request.finish("cancelled")
    more: Any = SimpleNamespace(request=request, end=lambda: None)
    server.worker.submit([more], is_continued=True)  # the next blank of a text is not refused
    texts.gate.open()
    for connection in (first, *others):
        read(connection, b'"text": "ab"')
        connection.close()
    until(server.is_idle)
    assert server.complete(">ab").text == "ab"


def test_more_choices_than_ever_wait_are_refused(serve: Serve) -> None:
    server = serve(max_waiting=4)
    answer = server.complete(">a", n=5)
    assert (answer.status, answer.error["param"]) == (400, "n")
    assert server.complete([">a"] * 3, n=2).status == 400
    assert server.complete(">a", n=4).status == 200


def test_a_sweep_that_fails_ends_those_under_way_alone(serve: Serve) -> None:
    server, texts = held(serve)
    connection = server.begin(COMPLETIONS, body(True))
    until(lambda: bool(texts.rows.passes))
    step = texts.engine.step

    def broken() -> bool:
        texts.engine.step = step
        raise RuntimeError("a sweep that failed")

    texts.engine.step = broken
    texts.gate.open()
    read(connection, b"internal_error")
    assert server.complete(">ab").text == "ab"


def test_fifty_clients_of_four_requests_each_get_what_they_get_alone() -> None:
    texts = FakeTexts(num_tokens=20_000, deterministic=True)
    prompts = [f"{client} {number}>{client * 4 + number} bottles" for client in range(50)
               for number in range(4)]  # fmt: skip
    got: dict[str, str] = {}

    def ask(server: Running, own: list[str]) -> None:
        for prompt in own:
            got[prompt] = server.complete(prompt).text

    with running(lambda: texts) as server:
        alone = server.complete(prompts[5]).text
        threads = [
            threading.Thread(target=ask, args=(server, prompts[start : start + 4]))
            for start in range(0, 200, 4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        until(server.is_idle)
    assert got == {prompt: prompt.partition(">")[2] for prompt in prompts}
    assert got[prompts[5]] == alone
    assert max(len(feeds) for feeds in texts.rows.passes) > 1  # they shared passes


def test_a_crowd_of_which_half_are_killed_leaves_nothing() -> None:
    texts = FakeTexts(num_tokens=20_000)
    with running(lambda: texts, max_waiting=10_000) as server:
        found = asyncio.run(crowd(server.port, num_clients=200, num_requests=1))
        until(server.is_idle)
        assert found.keys() == {"killed", "200", "400"} and found.total() == 200
        assert server.complete(">ab").text == "ab"
        with texts.engine.exclusive():  # without the rows that chats may go on from
            assert texts.rows.pool.num_free == texts.rows.pool.num_tokens


# ---- the end -------------------------------------------------------------------------------------


def test_a_server_that_is_told_to_stop_ends_what_is_under_way_in_time(serve: Serve) -> None:
    server, texts = held(serve, grace_s=0.05)
    connection = server.begin(COMPLETIONS, body(True))
    until(lambda: bool(texts.rows.passes))
    server.server.stop()
    assert server.worker.state == "stopping"
    until(lambda: server.worker._is_ending)
    texts.gate.open()
    read(connection, b'{"error": {"message": "the server is stopping"')
    connection.close()


def test_what_can_end_in_time_ends_as_it_should(serve: Serve) -> None:
    server, texts = held(serve)
    connection = server.begin(COMPLETIONS, body(False, ">ab"))
    until(lambda: bool(texts.rows.passes))
    server.server.stop()
    texts.gate.open()
    read(connection, b'"text": "ab"')
    connection.close()


def test_nothing_new_is_taken_once_it_stops(serve: Serve) -> None:
    server = serve()
    server.worker.stop_admission()
    answer = server.complete(">a")
    assert (answer.status, answer.error["code"]) == (503, "unavailable")
    assert server.get("/health").status == 503


def test_a_model_that_does_not_load_ends_the_server() -> None:
    from bminf.server.app import ServerSettings
    from bminf.server.running import Server

    def load() -> Any:
        raise OSError("no such weights")

    server = Server(load, ServerSettings("tiny"), port=0)
    with pytest.raises(OSError, match="no such weights"):
        server.serve_until_told()
