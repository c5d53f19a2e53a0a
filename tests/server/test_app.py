"""Paths, errors and what stands around a request.

bminf/server/app.py, bminf/server/middleware.py, bminf/server/metrics.py, bminf/server/errors.py,
bminf/server/picture.py.
"""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from typing import Any

import pytest
from fake_texts import END, FakeTexts
from running_server import Running, Serve, running, until

from bminf.server.middleware import OPEN_PATHS

JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def server() -> Any:
    with running(FakeTexts) as one:
        yield one


# ---- what there is -------------------------------------------------------------------------------


def test_the_model_is_listed(server: Running) -> None:
    body = server.get("/v1/models").json
    (entry,) = body["data"]
    assert body["object"] == "list"
    assert (entry["id"], entry["object"], entry["owned_by"]) == ("tiny", "model", "bminf")
    assert entry["capabilities"] == {"chat": True, "fill": True, "echo_logprobs": True}
    assert server.get("/v1/models/tiny").json == entry


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/fill"])
def test_another_model_is_not_found(server: Running, path: str) -> None:
    own = {"prompt": "a"} if path == "/v1/completions" else {"text": "_"}
    own = {"messages": [{"role": "user", "content": "a"}]} if "chat" in path else own
    answer = server.post(path, {**own, "model": "gpt-5"})
    assert (answer.status, answer.error["code"]) == (404, "model_not_found")
    assert "'tiny'" in answer.error["message"]
    assert server.get("/v1/models/gpt-5").status == 404


def test_the_tokenizer_is_told(server: Running) -> None:
    """As lm-eval asks for it."""
    assert server.get("/tokenizer_info").json["eos_token"] == "<end>"
    body = server.post("/tokenize", {"prompt": "é", "add_special_tokens": False}).json
    assert body["tokens"] == [0xC3, 0xA9]
    assert server.post("/tokenize", {"prompt": "<end>"}).json["tokens"] == [END]
    assert server.post("/detokenize", {"tokens": [0xC3, 0xA9]}).json == {"prompt": "é"}
    for tokens in ([-1], [258], [1.0], ["a"]):
        answer = server.post("/detokenize", {"tokens": tokens})
        assert (answer.status, answer.error["param"]) == (400, "tokens")
    assert server.post("/detokenize", {"tokens": []}).json == {"prompt": ""}


def test_the_plan_is_told(server: Running) -> None:
    body = server.get("/plan").json
    places = [block["place"] for block in body["plan"]["blocks"]]
    assert (places.count("resident"), places.count("streamed")) == (3, 5)
    assert body["plan"]["streamed_bytes"] == 500 and body["state"] == "ready"
    assert body["queue"] == {"running": 0, "waiting": 0, "max_waiting": 256}


def test_what_bound_each_phase_is_told(serve: Serve) -> None:
    """Copies that sweeps wait for, where they only decode."""
    server = serve()
    rows, before = server.worker.texts.rows, server.get("/plan").json["stats"]
    assert before["prefill"]["bound"] is before["decode"]["bound"] is None

    def copy(feeds: Any) -> None:
        waited_s = 1000.0 if feeds[0].row.length else 0.0
        rows.stats = replace(rows.stats, waited_s=rows.stats.waited_s + waited_s)

    rows.before = copy
    assert server.complete(">ab").text == "ab"
    told = server.get("/plan").json["stats"]
    assert (told["prefill"]["bound"], told["decode"]["bound"]) == ("computing", "copying")
    assert told["busy_s"] == told["prefill"]["seconds"] + told["decode"]["seconds"]
    metrics = server.get("/metrics").body
    assert b'bminf_phase_waited_seconds_total{phase="decode"} 2000.0\n' in metrics
    assert b'bminf_phase_waited_seconds_total{phase="prefill"} 0.0\n' in metrics
    assert b'bminf_phase_seconds_total{phase="prefill"} ' in metrics


def test_the_page_loads_nothing_from_elsewhere(server: Running) -> None:
    page = server.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert b"http://" not in page.body.replace(b"http://www.w3.org/2000/svg", b"")
    assert b"https://" not in page.body and b"src=" not in page.body
    assert server.get("/favicon.ico").status == 200


def test_prometheus_is_told(serve: Serve) -> None:
    server = serve()
    server.complete(">abc", max_tokens=9)
    server.complete("NaN>a")  # of which nothing came
    answer = server.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=1")
    values = dict(
        line.rsplit(" ", 1) for line in answer.body.decode().splitlines() if line[0] != "#"
    )
    expected = {
        'bminf_requests_total{status="200"}': 1, 'bminf_requests_total{status="400"}': 1,
        "bminf_prompt_tokens_total": 5, "bminf_generated_tokens_total": 4,
        "bminf_time_to_first_token_seconds_count": 1, "bminf_requests_running": 0,
        "bminf_requests_waiting": 0, "bminf_sweeps_total": 5, "bminf_rows_per_sweep": 1,
        'bminf_memory_bytes{kind="slots"}': 200,
    }  # fmt: skip
    assert {name: float(values[name]) for name in expected} == expected


# ---- what there is not ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/completions", 405),
        ("POST", "/v1/embeddings", 404),
        ("POST", "/v1/responses", 404),
        ("POST", "/chat/completions", 404),
        ("DELETE", "/v1/models", 405),
    ],
)
def test_other_paths_are_refused_as_openai_does(
    server: Running, method: str, path: str, status: int
) -> None:
    answer = server.ask(method, path, b"{}" if method == "POST" else None, JSON)
    assert answer.status == status
    assert answer.error.keys() == {"message", "type", "param", "code"}
    if status == 404:
        assert "base_url ends in /v1" in answer.error["message"]


@pytest.mark.parametrize("content_type", ["", "text/plain", "multipart/form-data"])
def test_only_json_is_read(server: Running, content_type: str) -> None:
    """A page may post anything else to a server of this machine, unasked."""
    answer = server.ask("POST", "/v1/completions", b'{"prompt": "a"}',
                        {"content-type": content_type})  # fmt: skip
    assert answer.status == 415 and "application/json" in answer.error["message"]


def test_bad_bodies_are_refused_in_openais_shape(server: Running) -> None:
    for body in (b"{", b'{"prompt": "\\ud83d"}', b'{"prompt": "\xff"}', b"[]", b"\xff\xfe"):
        answer = server.ask("POST", "/v1/completions", body, JSON)
        assert answer.status == 400 and answer.error["type"] == "invalid_request_error"


def test_an_error_that_nobody_thought_of_is_told_without_its_text(serve: Serve) -> None:
    texts: Any = FakeTexts()
    texts.prompt = lambda *_: 1 / 0
    server = serve(texts)
    answer = server.complete("a")
    assert answer.status == 500 and answer.headers["x-should-retry"] == "false"
    assert "ZeroDivisionError" in answer.error["message"]
    assert "division by" not in answer.error["message"]
    assert server.get("/health").status == 200


# ---- loading -------------------------------------------------------------------------------------


def test_it_listens_while_the_model_is_loaded() -> None:
    loaded = threading.Event()

    def load() -> FakeTexts:
        assert loaded.wait(60)
        return FakeTexts()

    with running(load, waits=False) as server:
        for path in ("/health", "/v1/models", "/tokenizer_info"):
            answer = server.get(path)
            assert (answer.status, answer.error["code"]) == (503, "unavailable")
            assert int(answer.headers["retry-after"]) > 0
        assert server.complete(">a").status == 503
        assert server.get("/plan").json["state"] == "loading"
        assert server.get("/").status == server.get("/metrics").status == 200
        loaded.set()
        until(lambda: server.get("/health").status == 200)
        assert server.get("/health").json == {"status": "ok"}
        assert server.complete(">a").text == "a"


# ---- key, pages of other sites, sizes ------------------------------------------------------------


def test_a_key_is_needed_where_there_is_one(serve: Serve) -> None:
    server = serve(api_key="secret")
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"},
                    {"authorization": "Bearer \xe9\xff"}):  # fmt: skip
        answer = server.ask("GET", "/v1/models", headers=headers)
        assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
        assert server.ask("POST", "/v1/completions", {"prompt": ">a"}, headers).status == 401
    right = {"authorization": "Bearer secret"}
    assert server.ask("GET", "/v1/models", headers=right).status == 200
    assert server.ask("POST", "/v1/completions", {"prompt": ">a"}, right).text == "a"
    assert [path for path in sorted(OPEN_PATHS) if server.get(path).status != 200] == []


def test_a_key_is_ignored_where_there_is_none(server: Running) -> None:
    assert server.get("/v1/models", authorization="Bearer undefined").status == 200


PREFLIGHT = {
    "origin": "https://chat.example",
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type",
}


def test_browsers_are_let_in_from_named_sites_alone(serve: Serve, server: Running) -> None:
    open_server = serve(api_key="secret", cors_origins=("https://chat.example",))
    allowed = "access-control-allow-origin"
    preflight = open_server.ask("OPTIONS", "/v1/chat/completions", headers=PREFLIGHT)
    assert preflight.status == 200 and preflight.headers[allowed] == "https://chat.example"
    refused = open_server.ask("GET", "/v1/models", headers={"origin": PREFLIGHT["origin"]})
    assert refused.status == 401 and allowed in refused.headers  # so that a page sees why
    other = {**PREFLIGHT, "origin": "https://other.example"}
    assert open_server.ask("OPTIONS", "/v1/chat/completions", headers=other).status == 400
    assert allowed not in server.ask("OPTIONS", "/v1/models", headers=PREFLIGHT).headers


def test_large_bodies_are_refused_unread(server: Running) -> None:
    answer = server.ask("POST", "/v1/completions", b"x" * 10_000_000, JSON)
    assert (answer.status, answer.error["code"]) == (413, "body_too_large")


def test_large_bodies_in_chunks_are_refused(server: Running) -> None:
    connection = server.connect()
    parts = (b"x" * 100_000 for _ in range(60))
    connection.request("POST", "/v1/completions", parts, JSON, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


def test_a_body_that_never_ends_is_not_waited_for(serve: Serve) -> None:
    server = serve(body_timeout_s=0.05)
    connection = server.connect()
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("content-type", "application/json")
    connection.putheader("content-length", "100")
    connection.endheaders(b'{"prompt"')
    response = connection.getresponse()
    assert response.status == 408
    assert json.loads(response.read())["error"]["code"] == "body_too_slow"
    connection.close()


def test_a_head_that_never_ends_is_not_waited_for(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered = server.connect()
    answered.connect()
    own = answered.sock
    for _ in range(2):
        answered.request("GET", "/health")
        assert answered.getresponse().read() == b'{"status":"ok"}'
        assert answered.sock is own
    connections: Any = server.server.server_state.connections
    assert {one._deadline for one in connections} == {None}  # an idle one is kept
    monkeypatch.setattr("bminf.server.running.Connection.headers_s", 0.05)
    answered.sock.sendall(b"GET /health HT")
    assert answered.sock.recv(1000) == b""  # it was closed
    answered.close()
    for head in (b"", b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nX-A: "):
        connection = server.connect()
        connection.connect()
        connection.sock.sendall(head)
        assert connection.sock.recv(1000) == b""
        connection.close()


def test_the_document_names_the_model_and_every_body(server: Running) -> None:
    """Tests that are made from it get past the model's name."""
    document = server.get("/openapi.json").json
    (parameter,) = document["paths"]["/v1/models/{name}"]["get"]["parameters"]
    assert parameter["schema"]["enum"] == ["tiny"]
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/fill", "/tokenize"):
        content = document["paths"][path]["post"]["requestBody"]["content"]
        schema = content["application/json"]["schema"]
        assert schema["properties"]["model"]["enum"] == ["tiny"]
        for reference in references(schema):
            assert (
                reference.removeprefix("#/components/schemas/")
                in (document["components"]["schemas"])
            )


def references(schema: Any) -> list[str]:
    if isinstance(schema, list):
        return [found for item in schema for found in references(item)]
    if not isinstance(schema, dict):
        return []
    own = [schema["$ref"]] if "$ref" in schema else []
    return own + references(list(schema.values()))
