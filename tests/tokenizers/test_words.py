"""Words are those of jieba 0.42.1, whatever else is done with jieba."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bminf.tokenizers.words import JiebaWords, jieba_words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("他来到了网易杭研大厦", ["他", "来到", "了", "网易", "杭研", "大厦"]),  # one is not listed
        ("今天 3.14%\n\r\n", ["今天", " ", "3.14%", "\n", "\r\n"]),
        ("", []),
    ],
)
def test_words_join_to_the_text(text: str, words: list[str]) -> None:
    assert list(jieba_words().cut(text)) == words


def test_what_a_program_does_with_jieba_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import jieba

    text = "他来到了网易杭研大厦"
    expected = list(jieba_words().cut(text))
    changed = jieba.Tokenizer()
    changed.FREQ, changed.total, changed.initialized = {}, 1, True
    monkeypatch.setattr(jieba, "dt", changed)
    changed.add_word("来到了网易", 10**9)
    assert list(JiebaWords().cut(text)) == list(jieba_words().cut(text)) == expected


def test_cutting_writes_no_file_logs_nothing_and_warns_of_nothing(tmp_path: Path) -> None:
    program = "from bminf.tokenizers.words import jieba_words; list(jieba_words().cut('北京大学'))"
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_the_warnings_of_jieba_s_import_are_silenced_and_no_others(tmp_path: Path) -> None:
    """A jieba that warns as it does elsewhere: of escapes, and of pkg_resources."""
    package = tmp_path / "jieba"
    package.mkdir()
    warning = "import warnings; warnings.warn({!r}, {})"
    lines = [
        warning.format("invalid escape sequence '\\.'", "DeprecationWarning"),
        warning.format('"\\." is an invalid escape sequence', "SyntaxWarning"),
        warning.format("pkg_resources is deprecated as an API", "UserWarning"),
        warning.format(
            "Deprecated call to `pkg_resources.declare_namespace`", "DeprecationWarning"
        ),
    ]
    program = "import bminf.tokenizers.words as words; words._import_jieba()"
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *sys.path])
    for extra, code in (([], 0), ([warning.format("something new", "UserWarning")], 1)):
        (package / "__init__.py").write_text("\n".join(lines + extra))
        command = [sys.executable, "-W", "error", "-c", program]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
        assert done.returncode == code, done.stderr
        assert ("something new" in done.stderr) == bool(extra)
