"""The tokenizer of a model's folder, by the files that are there."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from bminf.errors import ArgumentError, CheckpointError
from bminf.tokenizers.base import GLMTokenizer, SentinelTokenizer, Tokenizer
from bminf.tokenizers.cog_pretrain import CogPretrainTokenizer
from bminf.tokenizers.cpm1 import CPM1Tokenizer, CPM1WordTokenizer
from bminf.tokenizers.cpm2 import CPM2BilingualTokenizer, CPM2Tokenizer
from bminf.tokenizers.eva import EVATokenizer
from bminf.tokenizers.gpt2 import GPT2Tokenizer, gpt2_files
from bminf.tokenizers.icetk import IcetkPackageTokenizer, IceTokenizer
from bminf.tokenizers.vocabulary import Vocabulary

_PIECE_MODELS = ("spiece.model", "chinese_vocab.model")
_VOCABULARY = "vocab.txt"
_ICE_MODEL = "ice_text.model"
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
    cog-pretrain.model, or the only *.model, the Chinese one).
    settings: that a converted folder carries, see VocabularyTokenizer.
    Raises CheckpointError where no file is found, or one is not what it should be, and for settings
    that the tokenizer does not have.
    """
    _check_model(model)
    folder = Path(folder).absolute()
    folders = list(dict.fromkeys([folder, folder.parent]))
    if model == "cpm1":
        return _find_cpm1(folders)
    if model in _GLM_FINDERS:
        return _find_glm(model, folders, settings or {})
    if settings:
        raise CheckpointError(
            f"a tokenizer of {model} has no settings, but {folder} says {settings}"
        )
    vocab_file = _first(folders, _VOCABULARY)
    if vocab_file is None:
        raise CheckpointError(_not_found(model, _VOCABULARY, folders))
    return _READERS[model](vocab_file)


def tokenizer_from(model: str, path_or_object: object) -> Tokenizer:
    """The tokenizer that is given: a file of it, a folder with one, or the tokenizer itself.

    For "glm130b" the word "icetk" is the package of that name; a file called so is "./icetk".
    Raises ArgumentError for what is neither a path nor an object with all of Tokenizer (of
    SentinelTokenizer, for "cpm2" and "eva", of GLMTokenizer, for "glm130b" and "glm10b"), and where
    the package is missing; CheckpointError for files, as find_tokenizer.
    """
    _check_model(model)
    if not isinstance(path_or_object, str | os.PathLike):
        return _checked(model, path_or_object)
    if model == "glm130b" and path_or_object == ICETK:
        return IcetkPackageTokenizer()
    path = Path(path_or_object)
    if path.is_dir():
        return find_tokenizer(model, path)
    if not path.exists():
        raise CheckpointError(f"tokenizer={str(path)!r}: there is no such file or folder")
    return _READERS[model](path)


def _cpm1(path: Path) -> Tokenizer:
    return CPM1WordTokenizer(path) if path.suffix == ".txt" else CPM1Tokenizer(path)


def _cpm2(path: Path) -> Tokenizer:
    is_bilingual = "<go>" in Vocabulary.read(path).ids
    return CPM2BilingualTokenizer(path) if is_bilingual else CPM2Tokenizer(path)


def _glm10b(path: Path, **settings: Any) -> GLMTokenizer:
    if path.suffix == ".model":
        return CogPretrainTokenizer(path, **settings)
    return GPT2Tokenizer(path, **settings)


_READERS: dict[str, Callable[..., Tokenizer]] = {
    "cpm1": _cpm1,
    "cpm2": _cpm2,
    "eva": EVATokenizer,
    "glm130b": IceTokenizer,
    "glm10b": _glm10b,
}
_KINDS: dict[str, type] = {
    "cpm1": Tokenizer,
    "cpm2": SentinelTokenizer,
    "eva": SentinelTokenizer,
    "glm130b": GLMTokenizer,
    "glm10b": GLMTokenizer,
}


def _glm130b_file(folder: Path) -> Path | None:
    return _piece_model(folder, (_ICE_MODEL,))


def _glm10b_file(folder: Path) -> Path | None:
    """A file of the English or of the Chinese tokenizer."""
    pair = gpt2_files(folder)
    if pair is None:
        return _piece_model(folder, (_COG_MODEL,))
    if (folder / _COG_MODEL).is_file():
        raise CheckpointError(
            f"{folder} has the English tokenizer of GLM-10B ({pair[0].name}) and the Chinese one "
            f"({_COG_MODEL}); say which with tokenizer=PATH"
        )
    return pair[0]


_GLM_FINDERS: dict[str, tuple[Callable[[Path], Path | None], str]] = {
    "glm130b": (_glm130b_file, f"{_ICE_MODEL}, *.model"),
    "glm10b": (_glm10b_file, f"{_GPT2_PAIRS}, {_COG_MODEL}, *.model"),
}


def _find_glm(model: str, folders: list[Path], settings: Mapping[str, Any]) -> Tokenizer:
    find, names = _GLM_FINDERS[model]
    path = next(filter(None, map(find, folders)), None)
    if path is None:
        raise CheckpointError(_not_found(model, names, folders))
    try:
        return _READERS[model](path, **settings)
    except (TypeError, ArgumentError) as error:
        raise CheckpointError(
            f"{path} is to be read with the settings {settings!r}: {error}"
        ) from error


def _find_cpm1(folders: list[Path]) -> Tokenizer:
    for folder in folders:
        piece_model = _piece_model(folder, _PIECE_MODELS)
        if piece_model is not None:
            return CPM1Tokenizer(piece_model)
    vocab_file = _first(folders, _VOCABULARY)
    if vocab_file is None:
        names = ", ".join([*_PIECE_MODELS, "*.model", _VOCABULARY])
        raise CheckpointError(_not_found("cpm1", names, folders))
    warnings.warn(
        f"found no sentencepiece model ({', '.join(_PIECE_MODELS)}) in {_listed(folders)}, so "
        f"text is cut by {vocab_file} as in BMInf 1.x: about a third of texts get other ids than "
        "CPM-1 was trained with. Put CPM-1's chinese_vocab.model there",
        stacklevel=3,
    )
    return CPM1WordTokenizer(vocab_file)


def _piece_model(folder: Path, known: tuple[str, ...]) -> Path | None:
    """The sentencepiece model of a folder: one of the known names, or the only one there is."""
    for name in known:
        if (folder / name).is_file():
            return folder / name
    models = sorted(path for path in folder.glob("*.model") if path.is_file())
    if len(models) > 1:
        raise CheckpointError(
            f"{folder} has {len(models)} files *.model ({', '.join(m.name for m in models)}) and "
            f"none named {' or '.join(known)}; say which one with tokenizer=PATH"
        )
    return models[0] if models else None


def _first(folders: list[Path], name: str) -> Path | None:
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def _check_model(model: str) -> None:
    if model not in _READERS:
        raise ArgumentError(f"model={model!r}; accepted: {', '.join(map(repr, _READERS))}")


def _checked(model: str, given: object) -> Tokenizer:
    kind = _KINDS[model]
    names = sorted(name for base in kind.__mro__ for name in vars(base) if name[0] != "_")
    missing = [name for name in names if not hasattr(given, name)]
    if missing:
        raise ArgumentError(
            f"tokenizer={given!r} is a {type(given).__name__} without {', '.join(missing)}; give "
            "a path, or an object that has all of bminf.tokenizers."
            f"{kind.__name__}: {', '.join(names)}"
        )
    return cast(Tokenizer, given)


def _not_found(model: str, names: str, folders: list[Path]) -> str:
    return (
        f"no tokenizer for {model}: looked for {names} in {_listed(folders)}; put the file there, "
        "or give tokenizer=..., a path of a file or folder, or a tokenizer object"
    )


def _listed(folders: list[Path]) -> str:
    return " and ".join(map(str, folders))
