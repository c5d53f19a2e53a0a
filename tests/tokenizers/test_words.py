"""Words are those of jieba 0.42.1, whatever else is done with jieba."""

from __future__ import annotations

import importlib
import json
import marshal
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


def run(program: str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, and what it says."""
    return subprocess.run(
        [sys.executable, *options, "-c", program],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONIOENCODING": "utf-8", **environment},
        timeout=300,
    )


TEXT = "他来到了网易杭研大厦，我们在野生动物园玩，今天天气不错"
WORDS = "他 来到 了 网易 杭研 大厦 ， 我们 在 野生 动物园 玩 ， 今天天气 不错".split()
MISUSES = {
    "del_word": "[jieba.del_word(w) for w in ('来到', '杭研', '动物园', '今天天气')]",
    "add_word": "jieba.add_word('了网易杭研', 10**9); jieba.dt.add_word('们在野', 10**9)",
    "suggest_freq": "jieba.suggest_freq(('动物', '园'), True); jieba.suggest_freq('了网易', True)",
    "load_userdict": "jieba.load_userdict(io.StringIO('了网易 1000000000\\n'))",
    "set_dictionary": "jieba.set_dictionary(PATH); jieba.initialize()",
    "DEFAULT_DICT": "jieba.DEFAULT_DICT = PATH; jieba.Tokenizer.__init__.__defaults__ = (PATH,)",
    "dt": "jieba.dt = jieba.Tokenizer(PATH); jieba.initialize()",
    "force_split": "jieba.finalseg.add_force_split('杭研')",
    "Force_Split_Words": "jieba.finalseg.Force_Split_Words |= {'杭研', '今天天气'}",
    "emission": "[table.clear() for table in jieba.finalseg.emit_P.values()]",
    "transition": "[table.clear() for table in jieba.finalseg.trans_P.values()]",
    "finalseg": "jieba.finalseg.cut = list",
    "pattern": "import re; jieba.re_han_default = re.compile('(x)')",
    "cut": "jieba.Tokenizer.cut = lambda self, *_, **__: ['nonsense']",
    "gen_pfdict": "jieba.Tokenizer.gen_pfdict = staticmethod(lambda f: ({}, 1))",
    "enable_parallel": "jieba.enable_parallel(2); jieba.disable_parallel()",
}


@pytest.mark.parametrize("when", ["before", "after"])
def test_no_use_of_jieba_changes_an_id(when: str, tmp_path: Path) -> None:
    """One after the other in one process, that has cut a text already, or not yet."""
    (tmp_path / "words.txt").write_text("了网易杭研大厦 1000000000 n\n", encoding="utf-8")
    (tmp_path / "misuses.json").write_text(json.dumps(MISUSES))
    program = f"""
import io, json, warnings
warnings.simplefilter("ignore")
import jieba
from bminf.tokenizers.words import jieba_words
PATH = {str(tmp_path / "words.txt")!r}
jieba.setLogLevel(60)
if {when == "after"}:
    list(jieba_words().cut("今天"))
for name, misuse in json.load(open({str(tmp_path / "misuses.json")!r})).items():
    exec(misuse)
    if {when == "after"}:
        print(name, json.dumps(list(jieba_words().cut({TEXT!r}))))
print("all", json.dumps(list(jieba_words().cut({TEXT!r}))))
"""
    done = run(program, TMPDIR=str(tmp_path))
    found = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert found.keys() == ({"all"} if when == "before" else {*MISUSES, "all"}), done.stderr
    wrong = {name: words for name, words in found.items() if json.loads(words) != WORDS}
    assert not wrong


def test_a_cache_of_another_dictionary_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "jieba.cache").write_bytes(marshal.dumps(({"了网易": 10**9}, 10**9)))
    program = f"from bminf.tokenizers.words import jieba_words; print(*jieba_words().cut({TEXT!r}))"
    done = run(program, TMPDIR=str(tmp_path))
    assert done.stdout.split() == WORDS, done.stderr


def test_the_program_has_a_jieba_of_its_own() -> None:
    import jieba

    jieba_words()
    private = importlib.import_module("_jieba_of_bminf")
    assert sys.modules["jieba"] is jieba is not private
    assert private.finalseg is not jieba.finalseg
    assert private.finalseg.emit_P["S"] is not jieba.finalseg.emit_P["S"]


def test_cutting_writes_no_file_logs_nothing_and_warns_of_nothing(tmp_path: Path) -> None:
    program = "from bminf.tokenizers.words import jieba_words; list(jieba_words().cut('北京大学'))"
    done = run(program, "-W", "error", TMPDIR=str(tmp_path), PYTHONDONTWRITEBYTECODE="1")
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
    environment = {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    for extra, code in (([], 0), ([warning.format("something new", "UserWarning")], 1)):
        (package / "__init__.py").write_text("\n".join(lines + extra))
        done = run(program, "-W", "error", PYTHONDONTWRITEBYTECODE="1", **environment)
        assert done.returncode == code, done.stderr
        assert ("something new" in done.stderr) == bool(extra)
