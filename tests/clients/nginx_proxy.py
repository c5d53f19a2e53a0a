"""nginx, as docs/serving.md has it, in front of a server: events come as they are written, and it
passes on that a client has left.

python nginx_proxy.py FOLDER: where nginx, which is on the PATH, writes.
"""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
sys.path += [str(TESTS / "server"), str(TESTS / "engine")]

from fake_texts import FakeTexts  # noqa: E402
from running_server import PATIENCE_S, Running, running, until  # noqa: E402

COMPLETIONS = "/v1/completions"
SAID = "once upon a time"
PATHS = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


def configuration(folder: Path, own_port: int, port: int) -> str:
    """The page's location, of a server at `port`."""
    page = (TESTS.parent / "docs" / "serving.md").read_text(encoding="utf-8")
    (location,) = re.findall(r"```text\n(location .*?)```", page, re.DOTALL)
    assert location.count(":8000") == 1
    paths = "".join(f"{name}_temp_path {folder / name};\n" for name in PATHS)
    return (
        f"daemon off; pid {folder}/pid; events {{}}\nhttp {{\naccess_log off;\n{paths}"
        f"server {{\nlisten 127.0.0.1:{own_port};\n{location.replace('8000', str(port))}}}\n}}\n"
    )


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return int(one.getsockname()[1])


def is_listening(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def behind_nginx(server: Running, folder: Path) -> Iterator[None]:
    """Within it the server is asked through nginx."""
    own_port, log = free_port(), folder / "error.log"
    (folder / "nginx.conf").write_text(configuration(folder, own_port, server.port))
    proxy = subprocess.Popen(["nginx", "-c", folder / "nginx.conf", "-e", log])
    try:
        until(lambda: is_listening(own_port) or proxy.poll() is not None)
        assert proxy.poll() is None, log.read_text()
        server.port = own_port
        yield
    finally:
        proxy.terminate()
        proxy.wait()


class Passes:
    """Those of a model, which are computed one by one when they are asked for."""

    def __init__(self, texts: FakeTexts) -> None:
        self._free = threading.Semaphore(0)
        texts.rows.before = self._wait

    def _wait(self, feeds: Any) -> None:
        assert self._free.acquire(timeout=PATIENCE_S), "no pass was asked for"

    def compute(self, number: int = 1) -> None:
        self._free.release(number)


def read_until(connection: socket.socket, end: bytes) -> bytes:
    received = b""
    while end not in received:
        part = connection.recv(65536)
        assert part, received
        received += part
    return received


def check_events(server: Running, passes: Passes) -> str:
    """Each is read before the next one is computed."""
    body = {"prompt": f">{SAID}", "max_tokens": 40, "temperature": 0, "stream": True}
    connection = server.begin(COMPLETIONS, body)
    for letter in SAID:
        passes.compute()
        read_until(connection, f'"text": "{letter}"'.encode())
    passes.compute()
    read_until(connection, b"[DONE]")
    return f"each of {len(SAID)} events came before the next was computed"


def check_blanks(server: Running, passes: Passes) -> str:
    connection = server.begin(COMPLETIONS, {"prompt": ">ab", "temperature": 0})
    _, _, content = read_until(connection, b"\r\n\r\n").partition(b"\r\n\r\n")
    if b" " not in content:
        read_until(connection, b" ")
    passes.compute(3)
    read_until(connection, b'"text": "ab"')
    return "a whole reply was kept alive"


def check_leaving(server: Running, passes: Passes, texts: FakeTexts, stream: bool) -> str:
    until(server.is_idle)
    texts.rows.passes.clear()
    body = {"prompt": ">" + "a" * 500, "max_tokens": 500, "temperature": 0, "stream": stream}
    connection = server.begin(COMPLETIONS, body)
    until(lambda: bool(texts.rows.passes))
    connection.close()
    until(lambda: all(one.request.is_done for one in server.worker._choices))
    passes.compute()
    until(server.is_idle)
    assert len(texts.rows.passes) == 1
    return f"a client of a {'stream' if stream else 'whole reply'} left, and its row with it"


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    texts = FakeTexts()
    passes = Passes(texts)
    with running(lambda: texts, ping_s=0.1) as server, behind_nginx(server, folder):
        print("nginx:", check_events(server, passes))
        print("nginx:", check_blanks(server, passes))
        print("nginx:", check_leaving(server, passes, texts, stream=True))
        print("nginx:", check_leaving(server, passes, texts, stream=False))
        assert server.complete("a" * 5_000_000).status == 413
        print("nginx: a body that is too large was refused")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
