#!/usr/bin/env bash
# jieba: a word deleted from one Tokenizer is split by all of them, also by those made later.
#
# Tokenizer.del_word() adds the word to a set of the module jieba.finalseg, which belongs to no
# Tokenizer. Who keeps a Tokenizer of its own, so that its cut depends on nothing else, is not safe.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "setuptools<81" jieba==0.42.1

TMPDIR="$work" "$work/venv/bin/python" -W ignore - <<'PYTHON'
import logging
from importlib.metadata import version

import jieba

jieba.setLogLevel(logging.ERROR)
text = "他来到了网易杭研大厦"
mine, other = jieba.Tokenizer(), jieba.Tokenizer()
before = mine.lcut(text)
other.del_word("杭研")
after, fresh = mine.lcut(text), jieba.Tokenizer().lcut(text)
print("jieba", version("jieba"))
print("guess: what another tokenizer deletes changes nothing here")
print("before", before, "after", after, "a new tokenizer", fresh)
assert "杭研" in before, before
assert after == fresh and "杭研" not in after, after
PYTHON
