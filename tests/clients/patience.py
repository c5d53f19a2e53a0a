"""A reply of three minutes, whole and streamed, at clients that wait five seconds for a byte."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path += [str(TESTS / "server"), str(TESTS / "engine")]

from fake_texts import FakeTexts  # noqa: E402
from running_server import Running, running, until  # noqa: E402

SECONDS = 180.0
HEADERS = {"content-type": "application/json"}


def ask(server: Running, stream: bool, received: dict[bool, bytes]) -> None:
    connection = server.connect(timeout_s=5.0)
    body = {"prompt": ">ab", "temperature": 0, "stream": stream}
    connection.request("POST", "/v1/completions", json.dumps(body), HEADERS)
    received[stream] = connection.getresponse().read()
    connection.close()


def main() -> None:
    texts, received = FakeTexts(), dict[bool, bytes]()
    texts.gate.patience_s = 2 * SECONDS
    texts.gate.shut()
    threading.Timer(SECONDS, texts.gate.open).start()
    with running(lambda: texts) as server:
        clients = [
            threading.Thread(target=ask, args=(server, stream, received))
            for stream in (False, True)
        ]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        until(server.is_idle)
        assert texts.engine.stats.num_tokens == 2 * 3, "somebody asked again"
    assert json.loads(received[False])["choices"][0]["text"] == "ab"
    assert received[True].endswith(b"data: [DONE]\n\n")
    blanks = len(received[False]) - len(received[False].lstrip())
    pings = received[True].count(b": ping")
    print(f"patience: {SECONDS:.0f} s, {blanks} blanks and {pings} pings, once each")


if __name__ == "__main__":
    main()
