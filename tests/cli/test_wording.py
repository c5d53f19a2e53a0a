"""Messages name what the user typed: bminf/cli/wording.py."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
from tiny_glm import tiny_model
from tiny_llama import save_llama

import bminf
from bminf import cli
from bminf.cli import VERBS, main
from bminf.cli.wording import Flags, flags_of, in_flags
from bminf.errors import ArgumentError, BMInfError, BudgetError


def flags(verb: str) -> Flags:
    parser = argparse.ArgumentParser()
    import_module(f"bminf.cli.{verb}").add_arguments(parser)
    return flags_of(parser)


def arguments_of(*functions: Callable[..., object]) -> set[str]:
    return {name for one in functions for name in inspect.signature(one).parameters}


CASES = [
    (
        "generate",
        "raise memory_limit, or lower max_length",
        "raise --memory-limit, or lower --max-length",
    ),
    (
        "generate",
        "max_tokens=300 is more than max_length=64;",
        "--max-new-tokens 300 is more than --max-length 64;",
    ),
    ("generate", "lower max_length or max_batch_size", "lower --max-length"),
    ("plan", "lower max_length or max_batch_size", "lower --max-length or --max-batch-size"),
    ("generate", 'say model="cpm2" or model="eva"', "say --model cpm2 or --model eva"),
    ("generate", "give trust_remote_code=True to run it", "give --trust-remote-code to run it"),
    ("generate", "device='cuda:7', but", "--device cuda:7, but"),
    ("generate", "top_k (or top_n)=70 is more", "--top-k 70 is more"),
    ("generate", "top_k (or top_n) is more", "--top-k is more"),
    ("generate", "quantization=None unpacks it", "--quantization none unpacks it"),
    ("generate", "leave quantization out", "leave --quantization out"),
    ("plan", "with blocks=[...], or", "with --blocks NAME, or"),
    ("generate", "with blocks=[...], or", "with blocks=[...] in Python, or"),
    ("plan", "cut finer blocks with blocks=", "cut finer blocks with --blocks"),
    ("convert", "which model= it is", "which --model it is"),
    ("convert", "give config=..., a path", "give --config FILE, a path"),
    ("convert", "tokenizer='/a b': none", "--tokenizer '/a b': none"),
    ("convert", "degree=3 does not divide", "--tp 3 does not divide"),
    # What is a path, a word, an example in Python, or said already stays as it is.
    ("convert", "/max_length/model=x/quantization-1", "/max_length/model=x/quantization-1"),
    ("generate", "the model of this device", "the model of this device"),
    ("generate", "quantization_config is left out", "quantization_config is left out"),
    ("generate", "bminf.load(folder, memory_limit=...)", "bminf.load(folder, memory_limit=...)"),
    ("generate", "change --max-length", "change --max-length"),
    ("demo", 'with quantization="int4"', 'with quantization="int4" in Python'),
]


@pytest.mark.parametrize(("verb", "text", "expected"), CASES)
def test_arguments_of_functions_become_options(verb: str, text: str, expected: str) -> None:
    assert in_flags(text, flags(verb)) == expected


@pytest.mark.parametrize("verb", VERBS)
def test_no_argument_that_a_verb_has_an_option_for_is_left(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In an error of either kind, in a warning, or beside another option."""
    options = flags(verb)
    taken = arguments_of(bminf.load, bminf.wrapper, bminf.plan_for, bminf.models.convert)
    names = sorted(taken & options.keys())
    assert "memory_limit" in names or verb == "convert"
    text = "; ".join(f"{name}=7 is not, so change {name}=" for name in names)
    argv = {"convert": [verb, "a", "b"], "generate": [verb, "a", "b"], "fill": [verb, "a", "b"]}
    for error in (ArgumentError(text), BudgetError(text)):

        def run(_: argparse.Namespace, raised: BMInfError = error) -> int:
            raise raised

        monkeypatch.setattr(import_module(f"bminf.cli.{verb}"), "run", run)
        assert main(argv.get(verb, [verb, "a"])) in (1, 2)
        err = capsys.readouterr().err
        assert "=" not in err and "_" not in err
        assert set(re.findall(r"--[a-z-]+", err)) == {options[name].name for name in names}


# ---- as a user would -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    save_llama(root / "llama")
    for name in ("cpm2", "glm10b"):
        tiny_model(name).write_original(root / name)
    return root


OF_GLM = "--quantization int4-row is for a GLM; accepted here: int8, int4, none"

WRONG = [
    ("generate cpm2 今天", "say --model cpm2 or --model eva"),
    (
        "generate cpm2 今天 --model cpm2 --memory-limit 10KB",
        "for --max-length 512; raise --memory-limit",
    ),
    (
        "generate cpm2 今天 --model cpm2 --max-new-tokens 5000",
        "--max-new-tokens 5000 are more than --max-length 512",
    ),
    ("generate cpm2 今天 --model cpm2 --quantization int4-row", OF_GLM),
    ("generate llama once --quantization int4-row", OF_GLM),
    ("generate llama once --memory-limit ten", "argument --memory-limit: 'ten' is not a size"),
    ("generate llama once --device tpu", "--device tpu; accepted:"),
    ("generate llama once upon", "put a text of several words in quotes"),
    ("chat llama once", "unrecognized arguments: once; see"),
    (
        "fill glm10b [MASK] --max-new-tokens 900",
        "--max-new-tokens 900 are more than --max-length 160",
    ),
    ("bench glm10b --prompt-tokens 500 --runs 1", "--prompt-tokens says how long the text is"),
    ("plan llama --max-length 0 --memory-limit 1MB", "--max-length 0; give"),
    (
        "plan llama --max-batch-size 2",
        "--max-batch-size 2 sets nothing aside by itself; give --max-length",
    ),
    ("convert cpm2 new", "say --model cpm2 or --model eva"),
    ("convert llama new --quantization int4-row", OF_GLM),
    ("convert glm10b new --tp 3", "--tp 3 does not divide"),
    ("demo llama --memory-limit 1KB", "raise --memory-limit"),
]


@pytest.mark.parametrize(("command", "expected"), WRONG)
def test_wrong_use_is_told_in_the_words_of_the_user(
    command: str,
    expected: str,
    folders: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folders)
    try:
        code = cli.main([*command.split()])
    except SystemExit as ended:
        code = int(str(ended.code))
    err = capsys.readouterr().err.splitlines()[-1]
    assert code in (1, 2) and expected in err
    assert err.startswith("bminf: error: ") and not re.search(r"[a-z]+_[a-z]+=", err)
