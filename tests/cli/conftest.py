"""`bminf` in the process of the tests, and what `bminf plan` says."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from terminal import Command, Output
from tiny_llama import save_llama

from bminf.cli import main


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, which no test changes."""
    return save_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """command("plan", folder, "--json", code=0, stdin="lines of a pipe")

    code: what it exits with, None for any but 0.
    """

    def run(*argv: object, code: int | None = 0, stdin: str | None = None) -> Output:
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        try:
            given: Any = main([str(argument) for argument in argv])
        except SystemExit as exit:
            given = exit.code
        output = Output(*capsys.readouterr())
        assert given == code or (code is None and given in (1, 2)), output
        return output

    return run


@pytest.fixture
def report(command: Command) -> Callable[..., dict[str, Any]]:
    """The JSON that `bminf plan` prints: report(folder, "--quantization", "none")."""
    return lambda *argv: json.loads(command("plan", *argv, "--json").out)


@pytest.fixture
def refused(command: Command) -> Callable[..., str]:
    """The one line that `bminf plan` fails with: refused(folder, "--gpu", "Voodoo 2")."""
    return lambda *argv: command("plan", *argv, code=None).error
