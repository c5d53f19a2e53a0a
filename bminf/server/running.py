"""A server of one model, from its first connection to its last."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from bminf.server.app import ServerSettings, create_app
from bminf.server.metrics import Metrics
from bminf.server.texts import Texts
from bminf.server.worker import MAX_WAITING, Worker

HEADERS_S = 20.0
"""For the head of a request to arrive."""

GRACE_S = 30.0
"""For answers that are under way when the server is told to stop."""

_KEEP_ALIVE_S = 75  # beyond what the pools of clients keep, so that these close connections first


class Connection(H11Protocol):  # type: ignore[misc]
    """Closed when the head of a request does not arrive in time: uvicorn would wait for ever."""

    headers_s = HEADERS_S

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._deadline: Any = None
        self._expect()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._expect()
        else:
            self._forget()

    def connection_lost(self, error: Any) -> None:
        super().connection_lost(error)
        self._forget()

    def _expect(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(self.headers_s, self.transport.close)

    def _forget(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class Server(uvicorn.Server):  # type: ignore[misc]
    """Serves what `load` returns; it listens first.

    Told to stop, it takes nothing new, gives what is under way `grace_s`, and ends the rest with an
    error. A second signal ends it at once.   stop_signal: which one it was told by.
    Raises OSError where it cannot listen.
    """

    def __init__(
        self,
        load: Callable[[], Texts],
        settings: ServerSettings,
        host: str = "127.0.0.1",
        port: int = 8000,
        max_waiting: int = MAX_WAITING,
        grace_s: float = GRACE_S,
    ) -> None:
        metrics = Metrics()
        self.worker = Worker(load, max_waiting, metrics.count)
        self.worker.on_failure = self._stop
        self._timer = threading.Timer(grace_s, self.worker.end_all)
        self._timer.daemon = True
        self.stop_signal: int | None = None
        self._socket = _listening(host, port)
        super().__init__(
            uvicorn.Config(
                create_app(self.worker, settings, metrics), http=Connection, ws="none",
                lifespan="off", log_level="warning", access_log=False, server_header=False,
                timeout_keep_alive=_KEEP_ALIVE_S, timeout_graceful_shutdown=int(grace_s) + 5,
            )
        )  # fmt: skip

    @property
    def url(self) -> str:
        host, port = self._socket.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def serve_until_told(self) -> None:
        """Returns when it was told to stop.   Raises what `load` raised."""
        self.worker.start()
        try:
            self.run(sockets=[self._socket])
        finally:
            self._socket.close()
            self._timer.cancel()
            self.worker.close()
        if self.worker.error is not None:
            raise self.worker.error

    def stop(self) -> None:
        """From any thread."""
        self.worker.stop_admission()
        if not self.should_exit:
            self._timer.start()
        self._stop()

    def handle_exit(self, sig: int, frame: Any) -> None:
        # uvicorn's own would raise the signal anew once all is done, and leave nobody to clean up.
        self.force_exit = self.should_exit
        self.stop_signal = sig
        self.stop()

    def _stop(self) -> None:
        self.should_exit = True


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=2048)
