"""Many clients at once, of which half are killed in the middle of what they asked for.

python crowd.py PORT CLIENTS SECONDS PID: against a server process, whose memory is looked at.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import sys
import time
from collections import Counter
from pathlib import Path

KINDS = ("stream", "whole", "chat", "bad")
GROWTH = 1.05  # of memory, after it all


def request(kind: str, num_tokens: int) -> bytes:
    bodies = {
        "stream": {"prompt": "once upon>a time", "max_tokens": num_tokens, "stream": True, "n": 2},
        "whole": {"prompt": "once upon>a time", "max_tokens": num_tokens},
        "chat": {"messages": [{"role": "user", "content": "once"}], "max_tokens": num_tokens},
        "bad": {"prompt": "once", "n": 1000},
    }
    path = "/v1/chat/completions" if kind == "chat" else "/v1/completions"
    content = json.dumps({**bodies[kind], "temperature": 0}).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


async def ask(port: int, chance: random.Random, num_tokens: int) -> str:
    """What came of one request: "killed", or its status."""
    kind, is_killed = chance.choice(KINDS), chance.random() < 0.5
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request(kind, num_tokens))
        await writer.drain()
        if is_killed:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(reader.read(1), chance.random() * 0.2)
            return "killed"
        content = await reader.read()
        if kind == "stream" and content.startswith(b"HTTP/1.1 200"):
            assert content.rstrip(b"\r\n0").endswith(b"data: [DONE]"), content[-200:]
        return content[9:12].decode()
    finally:
        writer.transport.abort()


async def client(port: int, number: int, num_requests: int, end_s: float, found: Counter) -> None:
    chance = random.Random(number)
    for _ in range(num_requests):
        if time.monotonic() > end_s:
            return
        found[await ask(port, chance, 24)] += 1


async def crowd(
    port: int, num_clients: int, num_requests: int = 10**9, seconds: float = 3600
) -> Counter[str]:
    """How often each status came."""
    found: Counter[str] = Counter()
    end_s = time.monotonic() + seconds
    await asyncio.gather(
        *(client(port, number, num_requests, end_s, found) for number in range(num_clients))
    )
    return found


# ---- against a process ---------------------------------------------------------------------------


def anonymous_bytes(pid: int) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    (kilobytes,) = re.findall(r"RssAnon:\s+(\d+) kB", text)
    return int(kilobytes) * 1024


async def get(port: int, path: str) -> str:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
    content = await reader.read()
    writer.close()
    return content.decode()


async def main(port: int, num_clients: int, seconds: float, pid: int) -> None:
    await crowd(port, num_clients, 3)  # what a first crowd takes once
    before = anonymous_bytes(pid)
    found = await crowd(port, num_clients, seconds=seconds)
    for _ in range(600):
        if "bminf_requests_running 0.0" in await get(port, "/metrics"):
            break
        await asyncio.sleep(0.1)
    after = anonymous_bytes(pid)
    assert "200 OK" in await get(port, "/health")
    assert found.keys() <= {"killed", "200", "400", "429"}, found
    assert "bminf_requests_running 0.0" in await get(port, "/metrics")
    assert after <= before * GROWTH, (before, after)
    print(
        f"crowd: {dict(found)}; memory {before / 2**20:.0f} MiB before, {after / 2**20:.0f} after"
    )


if __name__ == "__main__":
    own_port, clients, duration, process = sys.argv[1:]
    asyncio.run(main(int(own_port), int(clients), float(duration), int(process)))
