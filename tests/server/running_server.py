"""A server in this process, on a port of its own, and what speaks plain HTTP to it."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from bminf.server.app import ServerSettings
from bminf.server.running import Server

PATIENCE_S = 60.0  # of waiting for what comes at once


@dataclass
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        return self.json["error"]

    @property
    def text(self) -> str:
        return self.json["choices"][0]["text"]

    @property
    def events(self) -> list[Any]:
        """The data of an event stream but for [DONE], which has to end it."""
        parts = [part for part in self.body.decode().split("\n\n") if part.startswith("data: ")]
        assert parts.pop() == "data: [DONE]"
        return [json.loads(part.removeprefix("data: ")) for part in parts]


class Running:
    """A started server."""

    def __init__(self, server: Server) -> None:
        self.server, self.worker, self.url = server, server.worker, server.url
        self.port = server._socket.getsockname()[1]
        self._begun: list[socket.socket] = []

    def connect(self, timeout_s: float = PATIENCE_S) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)

    def ask(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        content = body if isinstance(body, bytes | type(None)) else json.dumps(body).encode()
        own = {} if body is None else {"content-type": "application/json"}
        connection = self.connect()
        try:
            connection.request(method, path, content, {**own, **(headers or {})})
            response = connection.getresponse()
            return Answer(response.status, dict(response.headers), response.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask("GET", path, headers=headers)

    def post(self, path: str, body: Any, **headers: str) -> Answer:
        return self.ask("POST", path, body, headers)

    def complete(self, prompt: Any, **more: Any) -> Answer:
        return self.post("/v1/completions", {"prompt": prompt, "temperature": 0, **more})

    def begin(self, path: str, body: Any, **headers: str) -> socket.socket:
        """A request whose answer is not read; closed at the end, if not before."""
        content = json.dumps(body).encode()
        more = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        head = (
            f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
            f"{more}Content-Length: {len(content)}\r\n\r\n"
        )
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S)
        self._begun.append(connection)
        connection.sendall(head.encode() + content)
        return connection

    def close(self) -> None:
        for connection in self._begun:
            connection.close()

    def is_idle(self) -> bool:
        return self.worker.num_running == self.worker.num_waiting == 0


Serve = Callable[..., Running]
"""The fixture: texts and settings -> a server, stopped at the end of the test."""


@contextmanager
def running(load: Callable[[], Any], waits: bool = True, **settings: Any) -> Iterator[Running]:
    """settings: of ServerSettings, or of Server.   waits: until it is loaded."""
    own = {name: settings.pop(name) for name in ("max_waiting", "grace_s") if name in settings}
    server = Server(load, ServerSettings(**{"name": "tiny", **settings}), port=0, **own)
    thread = threading.Thread(target=server.serve_until_told)
    thread.start()
    try:
        one = Running(server)
        until(lambda: server.started and (not waits or server.worker.state == "ready"))
        yield one
        one.close()
    finally:
        server.worker.end_all()
        server.should_exit = True
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def until(is_so: Callable[[], bool]) -> None:
    """Wait for what another thread does."""
    end_s = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < end_s, "it has not come to that"
        time.sleep(0.002)
