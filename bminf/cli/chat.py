"""`bminf chat`: a conversation, on a terminal or with lines from a pipe."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from typing import Any

from bminf.cli import flags
from bminf.cli.session import Answer, Message, Options, Session, find
from bminf.cli.wording import one_line
from bminf.errors import ArgumentError, BMInfError

LENGTH = 2048
"""Tokens of a conversation, unless --max-length says it."""

COMMANDS = {
    "/reset": "forget the conversation and begin another",
    "/stats": "the speed of the last answer, and what is resident and streamed",
    "/help": "these commands",
    "/exit": "end; so does Ctrl-D",
}

_COMMAND = re.compile(r"/[a-z]*")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of this verb."""
    flags.add_model(parser)
    parser.add_argument("--system", metavar="TEXT", help="the system message of the conversation")
    flags.add_template(parser)
    flags.add_sampling(parser)
    flags.add_stop(parser)
    flags.add_output(parser, "a line of JSON for each answer")


def run(arguments: argparse.Namespace) -> int:
    """Answer each line of stdin; returns 0."""
    is_typed = flags.is_terminal(sys.stdin) and flags.is_terminal(sys.stdout)
    template = flags.template_of(arguments)
    with find(arguments) as session:
        chat = _Chat(session, arguments, template, is_typed)
        chat.check()
        session.load(LENGTH)
        if arguments.verbose:
            print(session.plan_text, session.room_line, sep="\n", file=sys.stderr, flush=True)
        if flags.is_terminal(sys.stdin):
            if not arguments.verbose:
                _tell(session.room_line)
            _tell("/help lists the commands; Ctrl-C stops an answer, and Ctrl-D ends")
        for line in _typed() if is_typed else _piped():
            if not chat.take(line):
                break
    return 0


class _Chat:
    """A conversation with a loaded model."""

    def __init__(
        self, session: Session, arguments: argparse.Namespace, template: str | None, is_typed: bool
    ) -> None:
        self._session, self._arguments = session, arguments
        self._template, self._is_typed = template, is_typed
        system = arguments.system
        self._opening = [] if system is None else [{"role": "system", "content": system}]
        self._options = flags.sampling_of(arguments)
        self._messages: list[Message] = [*self._opening]
        self._last: Answer | None = None

    def check(self) -> None:
        """Raise the error of a model that cannot answer, before its weights are read."""
        self._session.dialogue([*self._opening, _user("Hello")], self._template)

    def take(self, line: str) -> bool:
        """Carry out a command, or answer; returns whether to go on."""
        words = line.split()
        if not words:
            return True
        if line.startswith("/") and _COMMAND.fullmatch(words[0]):
            return self._carry_out(words[0])
        try:
            self._reply(line.strip())
        except BMInfError as error:
            if not self._is_typed:
                raise
            told = one_line(error, self._arguments.flags)
            _tell(f"bminf: error: {told}; /reset forgets the conversation")
        return True

    def _carry_out(self, command: str) -> bool:
        if command == "/reset":
            self._messages = [*self._opening]
        elif command == "/stats":
            _tell("no answer yet" if self._last is None else str(self._last.stats))
            _tell(self._session.plan_text)
        elif command == "/help":
            _tell("\n".join(f"{name:<8}{what}" for name, what in COMMANDS.items()))
        elif command != "/exit":
            _tell(f"bminf: there is no command {command}; /help lists those there are")
        return command != "/exit"

    def _reply(self, text: str) -> None:
        messages = [*self._messages, _user(text)]
        prompt = self._session.dialogue(messages, self._template)
        said: list[str] = []

        def write(piece: str) -> None:
            said.append(piece)
            if not self._arguments.json:
                flags.show(piece)

        try:
            options = self._options_for(prompt)
            self._last = self._session.answer(prompt, options, write, goes_on=True)
            self._report(self._last)
        except KeyboardInterrupt:
            print()
            if not self._is_typed:
                raise
            if not said:
                return  # as if it had not been asked
        self._messages = [*messages, {"role": "assistant", "content": "".join(said)}]

    def _options_for(self, prompt: Any) -> Options:
        """As given; near the end of the conversation's length an answer may be shorter."""
        asked, room = self._options.get("max_new_tokens"), self._session.room(prompt)
        if asked is None or not room:
            return self._options
        return {**self._options, "max_new_tokens": min(asked, room)}

    def _report(self, answer: Answer) -> None:
        print(json.dumps(answer.as_json()) if self._arguments.json else "", flush=True)
        if self._arguments.verbose:
            _tell(str(answer.stats))


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _tell(text: str) -> None:
    """Print what is no answer."""
    print(text, file=sys.stderr, flush=True)


def _typed() -> Iterator[str]:
    """Lines from a terminal, edited and with history, until Ctrl-D."""
    try:
        import readline  # noqa: F401  # input() uses it
    except ImportError:
        pass  # Windows: the console has its own
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt) as end:
            print()
            if isinstance(end, EOFError):
                return
            raise


def _piped() -> Iterator[str]:
    """Lines from anything else."""
    try:
        yield from sys.stdin or ()
    except UnicodeDecodeError as error:
        raise ArgumentError("stdin is not UTF-8; give a text in UTF-8") from error
