"""`bminf chat`: a conversation on a terminal, and with lines from a pipe.

bminf/cli/chat.py.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import select
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import transformers
from terminal import Command, Interrupted, Output, hear_ctrl_c, started
from tiny_glm import tiny_model
from tiny_llama import TEMPLATE, WORDS, save_llama, save_tokenizer
from tiny_models import make
from tokenizers.processors import TemplateProcessing

from bminf.cli import chat
from bminf.engine.request import Request
from bminf.models import EVA, TextIterator

GREEDY = ("--temperature", "0", "--max-new-tokens", "6", "--quantization", "none")
TIMEOUT_S, SILENCE_S = 90, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("tiny"), chat_template=TEMPLATE)


@pytest.fixture
def talk(command: Command) -> Command:
    """talk("lines of a pipe", folder, "--json", code=0)"""

    def run(lines: str, *argv: object, code: int = 0) -> Output:
        return command("chat", *argv, "--device", "cpu", stdin=lines, code=code)

    return run


def answers(model: Any, tokenizer: Any, *texts: str, system: str | None = None) -> list[str]:
    """What transformers itself answers to these texts, one after the other."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for text in texts:
        messages.append({"role": "user", "content": text})
        given = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = model.generate(**given, max_new_tokens=6, do_sample=False)
        said = tokenizer.decode(ids[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": said})
    return [message["content"] for message in messages if message["role"] == "assistant"]


@pytest.fixture(scope="module")
def plain(folder: Path) -> tuple[Any, Any]:
    """The model and its tokenizer, as transformers loads them."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return model, transformers.AutoTokenizer.from_pretrained(folder)


# ---- from a pipe ---------------------------------------------------------------------------------


def test_each_line_is_answered_with_those_before_it(
    folder: Path, plain: tuple[Any, Any], talk: Command
) -> None:
    expected = answers(*plain, "once", "upon a", "time")
    output = talk("once\n\nupon a\ntime", folder, *GREEDY)
    assert output == ("".join(f"{said}\n" for said in expected), "")


GOING_ON = (
    "{% for message in messages %}{{ message.role }} {{ message.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)
"""Which says of an answer what it said in front of it when that was generated, as those of most
models do; each word is a token."""


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each pass reads."""
    sizes: list[int] = []

    def count(kind: Any) -> None:
        original = kind.forward

        def forward(self: Any, input_ids: Any = None, *arguments: Any, **more: Any) -> Any:
            sizes.append(input_ids.shape[1])
            return original(self, input_ids, *arguments, **more)

        monkeypatch.setattr(kind, "forward", forward)

    count(transformers.LlamaForCausalLM)
    count(transformers.Gemma3ForCausalLM)
    return sizes


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_what_was_said_is_not_read_again(
    name: str, tmp_path: Path, read: list[int], talk: Command
) -> None:
    """Also by layers that see the last 8 tokens only, those of gemma3_text."""
    if name == "llama":
        save_llama(tmp_path, chat_template=GOING_ON)
    else:
        make(name, vocab_size=len(WORDS), eos_token_id=None).save_pretrained(tmp_path)
        save_tokenizer(tmp_path, chat_template=GOING_ON)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = answers(model, tokenizer, "once", "upon a", "time")
    read.clear()
    assert talk("once\nupon a\ntime", tmp_path, *GREEDY).out.splitlines() == expected
    # "user once assistant"; the end of the answer, "user upon a assistant"; and so on.
    assert read == [3, *[1] * 5, 1 + 4, *[1] * 5, 1 + 3, *[1] * 5]


def test_a_conversation_that_changed_is_read_from_there(
    tmp_path: Path, read: list[int], talk: Command
) -> None:
    """After /reset, and where a stop string cut an answer."""
    save_llama(tmp_path, chat_template=GOING_ON)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    once, time = (answers(model, tokenizer, text)[0] for text in ("once", "time"))
    read.clear()
    assert talk("once\n/reset\ntime\n", tmp_path, *GREEDY).out.splitlines() == [once, time]
    assert read == [3, *[1] * 5, 2, *[1] * 5], '"user" is what both begin with'
    read.clear()
    stop = " " + " ".join(once.split()[2:4])
    output = talk("once\nupon\n", tmp_path, *GREEDY, "--stop", stop)
    assert output.out.splitlines()[0] == once[: once.index(stop)]
    assert read[:5] == [3, 1, 1, 1, 3], '"user upon assistant" behind two words of an answer'


def test_the_system_message_and_reset(folder: Path, plain: tuple[Any, Any], talk: Command) -> None:
    lines = "once\nupon\n/reset\nonce\n"
    said = answers(*plain, "once", "upon", system="a time")
    output = talk(lines, folder, *GREEDY, "--system", "a time")
    assert output.out.splitlines() == [*said, said[0]]
    assert said[:1] != answers(*plain, "once")


def test_a_stop_string_ends_each_answer(
    folder: Path, plain: tuple[Any, Any], talk: Command
) -> None:
    """And the conversation goes on with what was shown of it."""
    (said,) = answers(*plain, "once")
    stop = said.split()[3]
    first, second = talk("once\nupon\n", folder, *GREEDY, "--stop", f"{stop} ").out.splitlines()
    assert first == said[: said.index(f"{stop} ")]
    model, tokenizer = plain
    messages = [("user", "once"), ("assistant", first), ("user", "upon")]
    given = tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in messages],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )  # fmt: skip
    ids = model.generate(**given, max_new_tokens=6, do_sample=False)[0]
    whole = tokenizer.decode(ids[given["input_ids"].shape[1] :], skip_special_tokens=True)
    assert second == whole.split(f"{stop} ")[0]


def test_commands_answer_on_stderr(folder: Path, talk: Command) -> None:
    lines = "/stats\n/help\n/fly away\n/exit\nonce\n"
    out, err = talk(lines, folder, *GREEDY)
    assert out == "", "nothing after /exit is answered"
    assert "no answer yet" in err and "fits entirely" in err
    assert all(f"{name} " in err for name in chat.COMMANDS)
    assert "no command /fly" in err


def test_what_only_looks_like_a_command_is_answered(folder: Path, talk: Command) -> None:
    out, err = talk("/once/upon a time\n /exit\n", folder, *GREEDY)
    assert len(out.splitlines()) == 2 and err == ""


def test_json_and_verbose(folder: Path, talk: Command) -> None:
    lines, more = "once\nupon\n/stats\n", ("--memory-limit", "2GB", "--json", "--verbose")
    out, err = talk(lines, folder, *GREEDY, *more)
    first, second = map(json.loads, out.splitlines())
    assert first["finish_reason"] == "length"
    assert second["stats"]["prompt_tokens"] > first["stats"]["prompt_tokens"]
    assert talk("once\nupon\n", folder, *GREEDY).out.splitlines() == [first["text"], second["text"]]
    assert len(re.findall(r"tokens read and 6 generated", err)) == 3
    assert "one text of 2,048 tokens" in err


def test_a_template_has_its_own_first_token(tmp_path: Path, talk: Command) -> None:
    """The tokenizer would put another one before it."""
    folder = save_llama(tmp_path, chat_template="once upon {{ messages[-1].content }}")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    first = TemplateProcessing(single="once $A", special_tokens=[("once", 1)])
    tokenizer.backend_tokenizer.post_processor = first
    tokenizer.save_pretrained(folder)
    assert len(tokenizer("a time")["input_ids"]) == 3
    assert (
        json.loads(talk("a time\n", folder, *GREEDY, "--json").out)["stats"]["prompt_tokens"] == 4
    )


def test_an_empty_answer_is_one(
    folder: Path, plain: tuple[Any, Any], tmp_path: Path, talk: Command
) -> None:
    shutil.copytree(folder, tmp_path / "tiny")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = answers(*plain, "once")[0].split()[0]
    tokenizer.save_pretrained(tmp_path / "tiny")
    lines = "once\nupon\n"
    first, second = map(
        json.loads, talk(lines, tmp_path / "tiny", *GREEDY, "--json").out.splitlines()
    )
    assert (first["text"], first["finish_reason"]) == ("", "stop")
    assert second["stats"]["prompt_tokens"] == len("user once assistant user upon".split())


def test_eva_reads_an_empty_answer_as_a_full_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, talk: Command
) -> None:
    asked: list[list[str]] = []

    def generate_iter(self: EVA, context: list[str], **options: Any) -> TextIterator:
        asked.append(context)
        return TextIterator(Request([1]), (piece for piece in ()))

    monkeypatch.setattr(EVA, "generate_iter", generate_iter)
    folder = tiny_model("eva").write_original(tmp_path)
    talk("你\n我\n", folder, "--model", "eva")
    assert asked == [["你"], ["你", "。", "我"]]


def test_no_lines_are_no_error(folder: Path, talk: Command) -> None:
    assert talk("", folder) == ("", "")


def test_eva_answers_in_a_dialogue(tmp_path: Path, talk: Command) -> None:
    folder = tiny_model("eva").write_original(tmp_path)
    options = (folder, "--model", "eva", "--seed", "1", "--max-new-tokens", "6")
    with EVA(folder, device="cpu") as model:
        first, _ = model.dialogue(["你是谁"], 6, seed=1)
        second, _ = model.dialogue(["你是谁", first, "我们"], 6, seed=1)
    assert talk("你是谁\n我们\n", *options).out == f"{first}\n{second}\n"
    assert "without roles" in talk("你是谁\n", *options, "--system", "很好", code=2).error


# ---- errors --------------------------------------------------------------------------------------


def test_a_base_model_is_told_before_its_weights_are_read(tmp_path: Path, talk: Command) -> None:
    save_llama(tmp_path / "llama")
    (tmp_path / "llama" / "model.safetensors").write_bytes(b"")
    line = talk("once\n", tmp_path / "llama", code=1).error
    assert "bminf generate" in line and "--chat-template FILE" in line
    folder = tiny_model("cpm2").write_original(tmp_path / "cpm2")
    assert "bminf fill" in talk("once\n", folder, "--model", "cpm2", code=1).error


def test_a_template_from_a_file(
    folder: Path, plain: tuple[Any, Any], tmp_path: Path, talk: Command
) -> None:
    base = save_llama(tmp_path / "base")
    file = tmp_path / "template.jinja"
    file.write_text(TEMPLATE, encoding="utf-8")
    options = (*GREEDY, "--chat-template", str(file))
    assert talk("once\n", base, *options).out.splitlines() == answers(*plain, "once")
    assert "/no/such/file" in talk("once\n", base, "--chat-template", "/no/such/file", code=2).error


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('roles') }}", "{{ ''.__class__ }}{{ x.y }}", "{% for", "{{ 1 / 0 }}"],
)
def test_a_template_that_raises_is_told_before_weights_are_read(
    template: str, tmp_path: Path, talk: Command
) -> None:
    save_llama(tmp_path, chat_template=template)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "chat template" in talk("once\n", tmp_path, code=2).error


def test_a_message_that_the_template_refuses_ends_a_pipe(folder: Path, talk: Command) -> None:
    assert "not this" in talk("refuse\nonce\n", folder, *GREEDY, code=2).error


def test_a_conversation_that_is_too_long(folder: Path, talk: Command) -> None:
    """The last answer takes what room there is; then there is none."""
    options = ("--temperature", "0", "--max-length", "12", "--max-new-tokens", "9", "--json")
    out, err = talk("once upon a time\nonce\n", folder, *options, code=2)
    stats = json.loads(out)["stats"]
    assert stats["prompt_tokens"] + stats["new_tokens"] == 12
    assert "no room for 9 new ones in 12" in err


def test_stdin_that_is_no_text(
    folder: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\n"), "utf-8"))
    assert "not UTF-8" in command("chat", folder, "--device", "cpu", code=2).error


# ---- on a terminal -------------------------------------------------------------------------------


class Terminal:
    """A process whose stdin, stdout and stderr are a terminal, as `bminf chat` sees a person."""

    def __init__(self, *argv: str) -> None:
        import pty

        self._ours, theirs = pty.openpty()
        self.process = started(
            "chat", *argv, "--device", "cpu", stdin=theirs, stdout=theirs, stderr=theirs,
            start_new_session=True, preexec_fn=_take_terminal,
        )  # fmt: skip
        os.close(theirs)
        self.shown = ""

    def wait_for(self, text: str) -> str:
        """What was shown since the last wait, up to `text`."""
        self._read_until(lambda: text in self.shown)
        before, _, self.shown = self.shown.partition(text)
        return before + text

    def type(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def type_until(self, key: str, text: str) -> None:
        """Type `key` again where nothing comes of it, as a person would: CPython hears no Ctrl-C
        that comes after readline has shown its prompt and before it waits for keys."""
        for _ in range(10):
            self.type(key)
            while self._read(SILENCE_S):
                if text in self.shown:
                    return
        raise AssertionError(self.shown)

    def ended(self) -> int:
        """The exit code; all that was shown until then is in `shown`."""
        self._read_until(lambda: self.process.poll() is not None)
        while self._read(0):
            pass
        return self.process.wait()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)

    def _read_until(self, is_over: Callable[[], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not is_over():
            assert time.monotonic() < deadline, self.shown
            self._read(0.1)

    def _read(self, timeout_s: float) -> bool:
        """Whether something came."""
        if not select.select([self._ours], [], [], timeout_s)[0]:
            return False
        try:
            read = os.read(self._ours, 2**16)
        except OSError:  # Linux: the process has closed the terminal
            return False
        self.shown += read.decode(errors="replace").replace("\r\n", "\n")
        return bool(read)


def _take_terminal() -> None:
    """So that Ctrl-C and Ctrl-D typed there reach the process."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    hear_ctrl_c()


@pytest.fixture
def terminals() -> Iterator[list[Terminal]]:
    opened: list[Terminal] = []
    yield opened
    for terminal in opened:
        terminal.close()


needs_pty = pytest.mark.skipif(os.name != "posix", reason="there are no ptys here")


@needs_pty
def test_a_conversation_on_a_terminal(
    folder: Path, plain: tuple[Any, Any], terminals: list[Terminal]
) -> None:
    first, second = answers(*plain, "once", "upon")
    terminals.append(terminal := Terminal(folder, *GREEDY))
    start = terminal.wait_for("> ")
    assert "/help" in start
    assert "room for 2,048 tokens of prompt and answer together" in start
    terminal.type("once\n")
    assert first in terminal.wait_for("> ")
    terminal.type("upno\x02\x02\x04\x05n\n")  # two to the left, delete there, to the end
    assert second in terminal.wait_for("> ")
    terminal.type("/stats\n")
    assert "generated" in terminal.wait_for("> ")
    terminal.type("/reset\n")
    terminal.wait_for("> ")
    terminal.type("\x1b[A\x1b[A\x1b[A\x1b[A\n")  # four lines up in the history
    assert first in terminal.wait_for("> ")
    terminal.type("refuse\n")
    assert "not this" in terminal.wait_for("> "), "an error does not end it"
    terminal.type("\x04")  # Ctrl-D
    assert terminal.ended() == 0
    assert "Traceback" not in terminal.shown


@pytest.fixture(scope="module")
def talkative(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A model that says more than any test waits for."""
    folder = tmp_path_factory.mktemp("talkative")
    save_llama(folder, chat_template=TEMPLATE, max_position_embeddings=10**6)
    return [folder, "--max-length", "10000", "--max-new-tokens", "9900"]


@needs_pty
def test_ctrl_c_stops_an_answer_and_then_ends(
    talkative: list[str], terminals: list[Terminal]
) -> None:
    terminals.append(terminal := Terminal(*talkative))
    terminal.wait_for("> ")
    terminal.type("once\n")
    terminal.wait_for("word")
    terminal.type("\x03")  # Ctrl-C
    terminal.wait_for("> ")
    terminal.type("upon\n")
    terminal.wait_for("word")
    terminal.type("\x03")
    terminal.wait_for("> ")
    terminal.type_until("\x03", "interrupted\n")
    assert terminal.ended() == 130
    assert terminal.shown.endswith("bminf: interrupted\n")


def test_ctrl_c_ends_a_pipe(
    talkative: list[str], monkeypatch: pytest.MonkeyPatch, talk: Command
) -> None:
    monkeypatch.setattr(sys, "stdout", out := Interrupted())
    assert talk("once\nupon\n", *talkative, code=130).err == "bminf: interrupted\n"
    assert out.getvalue().strip() in WORDS


def test_what_was_said_before_ctrl_c_stays(capsys: pytest.CaptureFixture[str]) -> None:
    class Interrupted:
        """A session whose answers are interrupted, all but the first before a text came."""

        asked: ClassVar[list[Any]] = []
        pieces: ClassVar[list[str]] = ["half a", " word"]

        def dialogue(self, messages: Any, template: Any) -> Any:
            self.asked.append([message["content"] for message in messages])

        def room(self, prompt: Any) -> None:
            return None

        def answer(self, prompt: Any, options: Any, write: Any, goes_on: bool) -> Any:
            for piece in self.pieces:
                write(piece)
            self.pieces.clear()
            raise KeyboardInterrupt

    parser = argparse.ArgumentParser()
    chat.add_arguments(parser)
    session: Any = Interrupted()
    talking = chat._Chat(session, parser.parse_args(["model"]), None, is_typed=True)
    for line in ("once", "upon", "time"):
        assert talking.take(line)
    assert session.asked == [
        ["once"], ["once", "half a word", "upon"], ["once", "half a word", "time"]
    ]  # fmt: skip
    assert capsys.readouterr().out == "half a word\n\n\n"


# ---- the real model ------------------------------------------------------------------------------


def test_a_real_model_knows_a_capital_and_what_was_said(
    smollm2_folder: Path, talk: Command
) -> None:
    lines = "What is the capital of France?\nAnd of Italy?\n"
    options = ("--temperature", "0", "--max-new-tokens", "24", "--memory-limit", "450MB")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first, second = talk(lines, str(smollm2_folder), *options).out.splitlines()
    assert "Paris" in first and "Rome" in second
