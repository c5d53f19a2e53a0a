"""The tokenizer of a model's folder, by the files that are there."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from bminf.errors import ArgumentError, CheckpointError
from bminf.tokenizers.base import GLMTokenizer, SentinelTokenizer, Tokenizer
from bminf.tokenizers.bloom import TOKENIZER, BloomTokenizer
from bminf.tokenizers.cog_pretrain import CogPretrainTokenizer
from bminf.tokenizers.cpm1 import CPM1Tokenizer, CPM1WordTokenizer
from bminf.tokenizers.cpm2 import CPM2BilingualTokenizer, CPM2Tokenizer
from bminf.tokenizers.eva import EVATokenizer
from bminf.tokenizers.gpt2 import GPT2Tokenizer, gpt2_files
from bminf.tokenizers.icetk import IcetkPackageTokenizer, IceTokenizer
from bminf.tokenizers.vocabulary import Vocabulary

_PIECE_MODELS = ("spiece.model", "chinese_vocab.model")
_COG_MODEL = "cog-pretrain.model"
_GPT2_PAIRS = "vocab.json and merges.txt, gpt2-vocab.json and gpt2-merges.txt"
ICETK = "icetk"
"""What asks for the installed package in the place of a path."""


def find_tokenizer(
    model: str, folder: str | Path, settings: Mapping[str, Any] | None = None
) -> Tokenizer:
    """The tokenizer whose files lie in a folder or, where they do not, in its parent.

    model: "cpm1" (spiece.model, chinese_vocab.model or the only *.model; with none in either
    folder, vocab.txt and a warning), "cpm2" (vocab.txt; whether it is the Chinese or the bilingual
    one is seen from its tokens), "eva" (vocab.txt), "glm130b" (ice_text.model or the only *.model)
    or "glm10b" (vocab.json and merges.txt, or both with gpt2- before them, is the English one;
    cog-pretrain.model, or the only *.model, the Chinese one), "bloom" (tokenizer.json).
    settings: that a converted folder carries, see VocabularyTokenizer.
    Raises CheckpointError where no file is found, or one is not what it should be, and for settings
    that the tokenizer does not have.
    """
    found = _model(model)
    folder = Path(folder).absolute()
    folders = list(dict.fromkeys([folder, folder.parent]))
    path, where = _first(found.find, folders), " and ".join(map(str, folders))
    if path is None and model == "cpm1" and (path := _first(_vocabulary_file, folders)) is not None:
        warnings.warn(
            f"found no sentencepiece model ({', '.join(_PIECE_MODELS)}) in {where}, so "
            f"text is cut by {path} as in BMInf 1.x: about a third of texts get other ids than "
            "CPM-1 was trained with. Put CPM-1's chinese_vocab.model there",
            stacklevel=2,
        )
    if path is None:
        raise CheckpointError(
            f"no tokenizer for {model}: looked for {found.names} in {where}; put the "
            "file there, or give tokenizer=..., a path of a file or folder, or a tokenizer object"
        )
    try:
        return found.read(path, **(settings or {}))
    except (TypeError, ArgumentError) as error:
        raise CheckpointError(
            f"{path} is to be read with the settings {settings!r}: {error}"
        ) from error


def tokenizer_from(model: str, path_or_object: object) -> Tokenizer:
    """The tokenizer that is given: a file of it, a folder with one, or the tokenizer itself.

    For "glm130b" the word "icetk" is the package of that name; write "./icetk" for the file.
    Raises ArgumentError for what is neither a path nor an object with all of Tokenizer (of
    SentinelTokenizer, for "cpm2" and "eva", of GLMTokenizer, for "glm130b" and "glm10b"), and where
    the package is missing; CheckpointError for files, as find_tokenizer.
    """
    found = _model(model)
    if not isinstance(path_or_object, str | os.PathLike):
        return _checked(found.kind, path_or_object)
    if model == "glm130b" and path_or_object == ICETK:
        return IcetkPackageTokenizer()
    path = Path(path_or_object)
    if path.is_dir():
        return find_tokenizer(model, path)
    if not path.exists():
        raise CheckpointError(f"tokenizer={str(path)!r}: there is no such file or folder")
    return found.read(path)


# ---- what is read --------------------------------------------------------------------------------


def _cpm1(path: Path) -> Tokenizer:
    return CPM1WordTokenizer(path) if path.suffix == ".txt" else CPM1Tokenizer(path)


def _cpm2(path: Path) -> Tokenizer:
    is_bilingual = "<go>" in Vocabulary.read(path).ids
    return CPM2BilingualTokenizer(path) if is_bilingual else CPM2Tokenizer(path)


def _glm10b(path: Path, **settings: Any) -> GLMTokenizer:
    if path.suffix == ".model":
        return CogPretrainTokenizer(path, **settings)
    return GPT2Tokenizer(path, **settings)


# ---- where it is found ---------------------------------------------------------------------------


def _vocabulary_file(folder: Path) -> Path | None:
    path = folder / "vocab.txt"
    return path if path.is_file() else None


def _bloom_file(folder: Path) -> Path | None:
    path = folder / TOKENIZER
    return path if path.is_file() else None


def _glm10b_file(folder: Path) -> Path | None:
    """A file of the English or of the Chinese tokenizer."""
    pair = gpt2_files(folder)
    if pair is None:
        return _piece_model(_COG_MODEL)(folder)
    if (folder / _COG_MODEL).is_file():
        raise CheckpointError(
            f"{folder} has the English tokenizer of GLM-10B ({pair[0].name}) and the Chinese one "
            f"({_COG_MODEL}); say which with tokenizer=PATH"
        )
    return pair[0]


def _piece_model(*known: str) -> Callable[[Path], Path | None]:
    """What finds the sentencepiece model of a folder: one of these names, or the only one."""

    def find(folder: Path) -> Path | None:
        for name in known:
            if (folder / name).is_file():
                return folder / name
        models = sorted(path for path in folder.glob("*.model") if path.is_file())
        if len(models) > 1:
            raise CheckpointError(
                f"{folder} has {len(models)} files *.model ({', '.join(m.name for m in models)}) "
                f"and none named {' or '.join(known)}; say which one with tokenizer=PATH"
            )
        return models[0] if models else None

    return find


def _first(find: Callable[[Path], Path | None], folders: list[Path]) -> Path | None:
    return next(filter(None, map(find, folders)), None)


# ---- the models ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Model:
    """kind: what an object has to be that is given in its place.   read: its tokenizer of a file.
    find: the file in a folder.   names: of the files that are looked for."""

    kind: type
    read: Callable[..., Tokenizer]
    find: Callable[[Path], Path | None]
    names: str


_MODELS = {
    "cpm1": _Model(
        Tokenizer,
        _cpm1,
        _piece_model(*_PIECE_MODELS),
        f"{', '.join(_PIECE_MODELS)}, *.model, vocab.txt",
    ),
    "cpm2": _Model(SentinelTokenizer, _cpm2, _vocabulary_file, "vocab.txt"),
    "eva": _Model(SentinelTokenizer, EVATokenizer, _vocabulary_file, "vocab.txt"),
    "glm130b": _Model(
        GLMTokenizer, IceTokenizer, _piece_model("ice_text.model"), "ice_text.model, *.model"
    ),
    "glm10b": _Model(GLMTokenizer, _glm10b, _glm10b_file, f"{_GPT2_PAIRS}, {_COG_MODEL}, *.model"),
    "bloom": _Model(Tokenizer, BloomTokenizer, _bloom_file, TOKENIZER),
}


def _model(name: str) -> _Model:
    if name not in _MODELS:
        raise ArgumentError(f"model={name!r}; accepted: {', '.join(map(repr, _MODELS))}")
    return _MODELS[name]


def _checked(kind: type, given: object) -> Tokenizer:
    names = sorted(name for base in kind.__mro__ for name in vars(base) if name[0] != "_")
    missing = [name for name in names if not hasattr(given, name)]
    if missing:
        raise ArgumentError(
            f"tokenizer={given!r} is a {type(given).__name__} without {', '.join(missing)}; give "
            "a path, or an object that has all of bminf.tokenizers."
            f"{kind.__name__}: {', '.join(names)}"
        )
    return cast(Tokenizer, given)
