"""Words of a text, as jieba 0.42.1 cuts them: accurate mode, its own dictionary, HMM on.

The models were trained on words cut this way, so the dictionary is part of their vocabulary.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import threading
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

_PRIVATE_NAME = "_jieba_of_bminf"
_LOCK = threading.Lock()


class JiebaWords:
    """Cuts text into words; joined, they are the text.

    The dictionary is read from the package each time, past jieba's cache in the folder for
    temporary files (anybody may write there, and another version may have). Module and dictionary
    are our own, so what else a program does with jieba changes no ids. Nothing is logged, nothing
    is written.
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


def _import_jieba() -> ModuleType:
    """A second copy of the module jieba, under another name, made when first asked for.

    `jieba.del_word` adds to a set in jieba.finalseg that all of jieba's segmenters in a process
    look at, as they do at the tables beside it and at jieba's own functions. Whatever is done to
    those under the name "jieba" does not reach this copy.
    """
    with _LOCK:
        if _PRIVATE_NAME not in sys.modules:
            found = importlib.util.find_spec("jieba")
            if found is None or found.origin is None:
                raise ModuleNotFoundError("No module named 'jieba'", name="jieba")
            _load(found.origin, found.submodule_search_locations)
        return sys.modules[_PRIVATE_NAME]


def _load(origin: str, search_locations: list[str] | None) -> None:
    """Import the package in the file `origin` under the private name.

    The warnings of its import are not given: jieba is older than they are. Python warns of the
    escapes in its patterns, setuptools of its use of pkg_resources.
    """
    spec = importlib.util.spec_from_file_location(
        _PRIVATE_NAME, origin, submodule_search_locations=search_locations
    )
    assert spec is not None and spec.loader is not None
    module = sys.modules[_PRIVATE_NAME] = importlib.util.module_from_spec(spec)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*invalid escape sequence")
            warnings.filterwarnings("ignore", message=".*pkg_resources")
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[_PRIVATE_NAME]
        raise
