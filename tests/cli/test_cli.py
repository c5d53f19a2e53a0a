"""The command line itself, bminf/cli/__init__.py: help, version, exit codes, one-line errors."""

import argparse
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

import bminf.cli
import bminf.cli.plan
from bminf.cli import VERBS, main
from bminf.errors import ArgumentError, BMInfError, BudgetError


def run_python(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Python in a process of its own, with the bminf that this test imported."""
    source = str(Path(bminf.cli.__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": source}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment
    )


def test_module_and_command_are_the_same() -> None:
    done = run_python("-m", "bminf", "--help")
    assert done.returncode == 0
    assert all(verb in done.stdout for verb in VERBS)


def test_help_imports_few_modules_and_no_package() -> None:
    """What an interpreter without them takes to start is all that a user waits for."""
    code = (
        "import sys; before = set(sys.modules)\n"
        "import bminf.cli\n"
        "try: bminf.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "new = set(sys.modules) - before\n"
        "print(len(new), sorted({m.split('.')[0] for m in new} - set(sys.stdlib_module_names)))"
    )
    number, packages = run_python("-c", code).stdout.splitlines()[-1].split(maxsplit=1)
    assert packages == "['bminf']"
    assert int(number) < 100


def test_help_of_no_verb_imports_torch_or_transformers() -> None:
    code = (
        "import contextlib, sys, bminf.cli\n"
        "for verb in bminf.cli.VERBS:\n"
        "    with contextlib.suppress(SystemExit): bminf.cli.main([verb, '--help'])\n"
        "print(*bminf.cli.VERBS, *sys.modules)"
    )
    loaded = run_python("-c", code).stdout.splitlines()[-1].split()
    assert set(VERBS) < set(loaded) and "bminf.cli.chat" in loaded
    assert not {"torch", "transformers", "numpy", "huggingface_hub"} & set(loaded)


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main([verb, "--help"])
    assert exit.value.code == 0
    option = "--quantization" if verb == "convert" else "--memory-limit"
    assert option in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out.startswith("bminf")


@pytest.mark.parametrize("argv", [[], ["fly"], ["plan"], ["plan", "x", "--wings"]])
def test_wrong_usage_is_one_line_and_exits_with_2(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        main(argv)
    assert exit.value.code == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == "" and line.startswith("bminf: error: ") and line.endswith(" --help")


def test_a_text_without_quotes_is_told_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["generate", "model", "Once", "upon", "a", "time"])
    assert (
        "upon a time; put a text of several words in quotes; see bminf generate --help\n"
        in capsys.readouterr().err
    )
    with pytest.raises(SystemExit):
        main(["generate", "model", "--wings"])
    assert "quotes" not in capsys.readouterr().err


def raiser(error: BaseException) -> Callable[[argparse.Namespace], int]:
    def run(arguments: argparse.Namespace) -> int:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ArgumentError("a\n b"), 2),
        (BudgetError("a b"), 1),
        (BMInfError("a b"), 1),
    ],
)
def test_error_is_one_line(
    error: BMInfError,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(bminf.cli.plan, "run", raiser(error))
    assert main(["plan", "x"]) == code
    assert capsys.readouterr() == ("", "bminf: error: a b\n")


def test_a_warning_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(_: argparse.Namespace) -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            shown = warnings.formatwarning("two\nlines", UserWarning, "file.py", 1)
        print(shown, end="", file=sys.stderr)
        return 0

    before = warnings.formatwarning
    monkeypatch.setattr(bminf.cli.plan, "run", run)
    assert main(["plan", "model"]) == 0
    assert capsys.readouterr().err == "bminf: two lines\n"
    assert warnings.formatwarning is before


def test_interrupt_leaves_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bminf.cli.plan, "run", raiser(KeyboardInterrupt()))
    assert main(["plan", "x"]) == 130
    assert capsys.readouterr().err == "bminf: interrupted\n"


PRINTING = """
import sys, types
verb = sys.modules["bminf.cli.plan"] = types.ModuleType("bminf.cli.plan")
verb.add_arguments = lambda parser: None
verb.run = lambda arguments: print("text") or 0
from bminf.cli import main
sys.exit(main(["plan"]))
"""
"""In place of `bminf plan`, a verb that imports nothing."""


def test_a_reader_that_has_enough_is_no_error() -> None:
    """Nor is it one where the interpreter ends, and flushes once more."""
    buffered = {name: text for name, text in os.environ.items() if name != "PYTHONUNBUFFERED"}
    run = partial(subprocess.run, env=buffered, stderr=subprocess.PIPE, text=True)
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = run([sys.executable, "-c", PRINTING], stdout=write_end)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "options", [["-c", PRINTING], ["-u", "-c", PRINTING], ["-m", "bminf", "--version"]]
)
def test_a_full_disk_is_one_line_and_a_failure(options: list[str]) -> None:
    """Also where nothing was written before the end of the process, which tries once more."""
    buffered = {name: text for name, text in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, *options], env=buffered, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1
    assert done.stderr == "bminf: error: [Errno 28] No space left on device\n"


def test_a_closed_stdout_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)  # what Python makes of `>&-`
    assert main(["plan", "GLM-130B", "--memory-limit", "24GB"]) == 0


@pytest.mark.parametrize("name", ["/no/such/folder", "../no-such-folder", "./none.gguf"])
def test_a_model_that_does_not_exist_is_named(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", name, "--device", "cpu"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("bminf: error: ") and str(Path(name)) in line


def test_a_damaged_gguf_file_is_an_error_of_ours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF\x03\0\0\0\1")
    assert main(["demo", str(tmp_path / "bad.gguf"), "--device", "cpu"]) == 1
    assert "bminf: error:" in capsys.readouterr().err
