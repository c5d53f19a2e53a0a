"""Words of a text, as jieba 0.42.1 cuts them: accurate mode, its own dictionary, HMM on.

The models were trained on words cut this way, so the dictionary is part of their vocabulary.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from typing import Any


class JiebaWords:
    """Cuts text into words; joined, they are the text.

    The dictionary is read from the package each time, past jieba's cache in the folder for
    temporary files (anybody may write there, and another version may have), and is no part of the
    one that `jieba.add_word` and its like change: what else a program does with jieba changes no
    ids. Nothing is logged, nothing is written.
    """

    def __init__(self) -> None:
        self._dictionary: Any = _import_jieba().Tokenizer()
        file = self._dictionary.get_dict_file()
        self._dictionary.FREQ, self._dictionary.total = self._dictionary.gen_pfdict(file)
        self._dictionary.initialized = True

    def cut(self, text: str) -> Iterator[str]:
        """The words of a text, in order."""
        words: Iterator[str] = self._dictionary.cut(text)
        return words


@functools.cache
def jieba_words() -> JiebaWords:
    """The one JiebaWords of this process: half a million entries, made when first asked for."""
    return JiebaWords()


def _import_jieba() -> Any:
    """jieba, without the warnings that its import gives: it is older than they are.

    Python warns of the escapes in its patterns, setuptools of its use of pkg_resources.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*invalid escape sequence")
        warnings.filterwarnings("ignore", message=".*pkg_resources")
        import jieba

    return jieba
