"""`bminf serve`: from a folder to answers over HTTP, and to a signal that ends it.

bminf/cli/serve.py.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from tiny_glm import tiny_model
from tiny_llama import TEMPLATE, save_llama

import bminf
from bminf.cli import main, serve
from bminf.cli.chat import LENGTH

Ask = Callable[[str], Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("served") / "my-llama", TEMPLATE)


OWN_TEMPLATE = (
    "{% for message in messages %}{{ message.role }} {{ message.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


class Told:
    """What the verb says, and when."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.is_ready = threading.Event()

    def __call__(self, text: str) -> None:
        self.lines += text.splitlines()
        if "ready" in text:
            self.is_ready.set()

    @property
    def url(self) -> str:
        (found,) = re.findall(r"listening on (http://\S+)", "\n".join(self.lines))
        return str(found)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[Told]:
    one = Told()
    monkeypatch.setattr(serve, "_tell", one)
    yield one


def served(told: Told, sent: int, asks: Callable[[str], Any], *argv: str) -> tuple[int, Any]:
    """The exit code where `asks(url)` is called and then the signal is sent; and what it returned.

    The server runs in this thread, which is the one that signals come to.
    """
    found: list[Any] = []

    def ask() -> None:
        assert told.is_ready.wait(60)
        try:
            found.append(asks(told.url))
        finally:
            os.kill(os.getpid(), sent)

    thread = threading.Thread(target=ask)
    thread.start()
    code = main(["serve", *argv, "--device", "cpu", "--port", "0"])
    thread.join()
    return code, found[0]


def get(url: str, **headers: str) -> Any:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as reply:
        return json.load(reply)


def post(url: str, body: Any, **headers: str) -> Any:
    content = {"content-type": "application/json", **headers}
    with urllib.request.urlopen(
        urllib.request.Request(url, json.dumps(body).encode(), content)
    ) as reply:
        return json.load(reply)


def test_a_folder_is_served_until_a_signal(folder: Path, told: Told) -> None:
    def asks(url: str) -> Any:
        messages = [{"role": "user", "content": "once"}]
        (model,) = get(f"{url}/v1/models")["data"]
        body = {"model": model["id"], "messages": messages, "max_tokens": 3, "temperature": 0}
        return model, post(f"{url}/v1/chat/completions", body)

    argv = (str(folder), "--quantization", "none", "--max-length", "64", "--max-batch-size", "3")
    code, (model, reply) = served(told, signal.SIGTERM, asks, *argv)
    assert code == 0
    assert (model["id"], model["max_model_len"]) == ("my-llama", 64)
    assert reply["choices"][0]["message"]["content"].startswith("word")
    assert told.lines[-1] == "bminf: ready; a text has at most 64 tokens"
    assert "3 texts of 64 tokens" in "\n".join(told.lines)


def test_ctrl_c_ends_it_and_is_told_apart(folder: Path, told: Told, tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text(OWN_TEMPLATE)
    said = [{"role": "user", "content": "once"}, {"role": "assistant", "content": "upon"}]

    def asks(url: str) -> Any:
        key = {"authorization": "Bearer secret"}
        bodies = [{"messages": said[:n], "max_tokens": 3, "model": "mine"} for n in (1, 2)]
        with pytest.raises(urllib.error.HTTPError, match="401"):
            get(f"{url}/v1/models")
        info = get(f"{url}/tokenizer_info", **key)
        return info, [post(f"{url}/v1/chat/completions", body, **key) for body in bodies]

    argv = (str(folder), "--api-key", "secret", "--served-name", "mine", "--deterministic")
    code, (info, replies) = served(
        told, signal.SIGINT, asks, *argv, "--chat-template", str(tmp_path / "own.jinja")
    )
    assert code == 130
    assert info["chat_template"] == OWN_TEMPLATE
    # "user once assistant"; and "user once assistant upon", which is continued.
    assert [reply["usage"]["prompt_tokens"] for reply in replies] == [3, 4]


def test_a_limit_that_streams_has_room_for_texts_of_its_own(folder: Path, told: Told) -> None:
    """Without --max-length, as bminf chat has."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    least = bminf.plan_for(model, False, device="cpu", max_length=LENGTH).least_limit
    asks: Ask = lambda url: post(f"{url}/v1/completions", {"prompt": "once", "max_tokens": 3})  # noqa: E731
    argv = (str(folder), "--quantization", "none", "--memory-limit", f"{least}B")
    code, reply = served(told, signal.SIGTERM, asks, *argv)
    assert code == 0 and reply["usage"]["completion_tokens"] == 3
    assert re.search("[1-9] stream", "\n".join(told.lines))


@pytest.mark.filterwarnings("ignore:found no sentencepiece model")
def test_a_built_in_model_is_served(told: Told, tmp_path: Path) -> None:
    folder = tiny_model("glm10b").write_original(tmp_path)

    def asks(url: str) -> Any:
        (model,) = get(f"{url}/v1/models")["data"]
        body = {"text": "now [MASK] is", "max_tokens": 4}
        return model["capabilities"], post(f"{url}/v1/fill", body)

    code, (can, reply) = served(told, signal.SIGTERM, asks, str(folder))
    assert code == 0 and len(reply["blanks"]) == 1
    assert can == {"chat": False, "fill": True, "echo_logprobs": False}


def test_the_key_may_come_from_the_environment(
    folder: Path, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BMINF_API_KEY", "secret")
    asks: Ask = lambda url: get(f"{url}/v1/models", authorization="Bearer secret")  # noqa: E731
    assert served(told, signal.SIGTERM, asks, str(folder))[0] == 0


def failed(capsys: pytest.CaptureFixture[str], code: int, *argv: str) -> str:
    capsys.readouterr()
    try:
        assert main(["serve", *argv, "--device", "cpu"]) == code
    except SystemExit as exit:
        assert exit.code == code
    lines = [line for line in capsys.readouterr().err.splitlines() if "listening" not in line]
    (line,) = lines
    assert line.startswith("bminf: error: ")
    return line


def test_wrong_use_is_told_in_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(folder)
    assert "65535" in failed(capsys, 2, model, "--port", "65536")
    assert "ASCII" in failed(capsys, 2, model, "--api-key", "schlüssel")
    assert "--chat-template" in failed(capsys, 2, model, "--chat-template", "no-such-file")
    assert "there is no" in failed(capsys, 1, "./no-such-model")


def test_a_port_that_is_taken_is_an_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert "in use" in failed(capsys, 1, str(folder), "--port", str(port))


def test_weights_that_do_not_load_end_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_llama(tmp_path / "broken")
    (folder / "model.safetensors").write_bytes(b"")
    assert "model.safetensors" in failed(capsys, 1, str(folder), "--port", "0")


def test_missing_packages_are_named(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "PACKAGES", ("no_such_package",))
    assert "pip install" in failed(capsys, 1, str(folder))
