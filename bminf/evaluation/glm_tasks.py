"""The tasks of GLM-130B's authors, from their own files: a YAML that names a task, and JSONL.

Kinds: "mul", of several choices, of which the most probable is to be the label; "gen", a text that
is to be one of the targets; "lm", the perplexity of a text in words. Keys with - or _ are the same.
Source: THUDM/GLM-130B, evaluation/ and tasks/.
"""

from __future__ import annotations

import json
import re
import statistics
import string
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from bminf.errors import ArgumentError
from bminf.evaluation.scorers import GLMScorer

Item = Mapping[str, Any]

KINDS = ("mul", "gen", "lm")

_LAMBADA_BEAMS, _LAMBADA_TOKENS = 16, 5
_MAX_ANSWER = 128
_GMASK, _MASK = "[gMASK]", "[MASK]"


@dataclass(frozen=True)
class GLMTask:
    """kind: of KINDS.   files: by the name of their group.   has_gmask: whether a text is answered
    at a [gMASK] and not at a [MASK].   is_unidirectional, window, stride: of "lm".
    num_beams, length_penalty, no_repeat_ngram_size, max_tokens: of "gen"; one beam is greedy.
    """

    name: str
    kind: str
    files: Mapping[str, Sequence[Path]]
    has_gmask: bool = False
    is_unidirectional: bool = False
    window: int = 2048
    stride: int = 256
    num_beams: int = 1
    length_penalty: float = 1.0
    no_repeat_ngram_size: int = 3
    max_tokens: int = _MAX_ANSWER


@dataclass(frozen=True)
class FileScore:
    """metrics: by their names, "Accuracy" and "EM" and "F1" in percent."""

    file: str
    num_items: int
    metrics: Mapping[str, float]


def is_glm_task(path: Path) -> bool:
    """Whether a YAML file is a task of this form."""
    return _content(path).get("type") in KINDS


def read_task(path: Path, data_path: Path | None = None) -> GLMTask:
    """A task.   data_path: the folder that its `path` is below; None is that of the file.

    Raises ArgumentError for a file of another form, and where there is no data.
    """
    content = _content(path)
    if content.get("type") not in KINDS:
        raise ArgumentError(
            f"{path} has type={content.get('type')!r}; GLM-130B's tasks have {', '.join(KINDS)}"
        )
    folder = (data_path or path.parent) / str(content.get("path", ""))
    is_greedy = content.get("sampling_strategy", "BaseStrategy") == "BaseStrategy"
    name = str(content.get("name", path.stem))
    is_lambada, number = name.upper() == "LAMBADA", partial(_number, content, path)
    return GLMTask(
        name,
        content["type"],
        _files(folder, content.get("file_pattern", "**/*.json*")),
        bool(content.get("use_task_mask", False)),
        bool(content.get("unidirectional", False)),
        int(number("max_seq_length", 2048)),
        int(number("generation_length", 256)),
        _LAMBADA_BEAMS if is_lambada else 1 if is_greedy else int(number("num_beams", 4)),
        float(number("length_penalty", 1.0)),
        int(number("no_repeat_ngram_size", 3)),
        _LAMBADA_TOKENS if is_lambada else int(number("max_gen_length", _MAX_ANSWER)),
    )


def run_task(model: Any, task: GLMTask, limit: int | None = None) -> dict[str, list[FileScore]]:
    """The scores of each file, by group.   model: a GLM of bminf.models.   limit: items of a file.

    Raises ArgumentError for an item without what its kind needs.
    """
    score = {"mul": _multiple_choice, "gen": _generation, "lm": _language_model}[task.kind]
    return {
        group: [score(model, task, file, limit) for file in files]
        for group, files in task.files.items()
    }


def summary(scores: Sequence[FileScore]) -> dict[str, dict[str, float]]:
    """Of the files of a group: max, median, and average weighted by items, of each metric."""
    found = {}
    total = sum(one.num_items for one in scores)
    for metric in scores[0].metrics:
        values = [one.metrics[metric] for one in scores]
        found[metric] = {
            "max": max(values),
            "median": statistics.median(values),
            "average": sum(one.metrics[metric] * one.num_items for one in scores) / total,
        }
    return found


# ---- files ---------------------------------------------------------------------------------------


def _content(path: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(_read(path))
    except yaml.constructor.ConstructorError:  # of tags, as files of lm-eval may have
        return {}
    except yaml.YAMLError as error:
        raise ArgumentError(f"{path} is no YAML: {error}") from error
    pairs = content.items() if isinstance(content, dict) else ()
    return {str(key).replace("-", "_"): value for key, value in pairs}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(f"{path} cannot be read: {error}") from error


def _number(content: Mapping[str, Any], path: Path, key: str, default: float) -> float:
    found = content.get(key, default)
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise ArgumentError(f"{path} has {key}: {found!r}; give a number")
    return found


def _files(folder: Path, pattern: Any) -> dict[str, list[Path]]:
    """pattern: a glob, or one by the name of each group."""
    patterns = pattern if isinstance(pattern, Mapping) else {"all": pattern}
    found = {str(group): sorted(folder.glob(str(one))) for group, one in patterns.items()}
    for group, files in found.items():
        if not files:
            raise ArgumentError(
                f"{folder} has no files {patterns[group]!r}; --data-path is the folder that the "
                "task's path is below"
            )
    return found


def _items(file: Path, limit: int | None) -> Iterator[Item]:
    lines = enumerate(_read(file).split("\n"), 1)
    for number, line in islice(((at, line) for at, line in lines if line.strip()), limit):
        try:
            item = json.loads(line)
        except ValueError as error:
            raise ArgumentError(f"line {number} of {file} is no JSON: {error}") from error
        if not isinstance(item, dict):
            raise ArgumentError(f"line {number} of {file} is no object of JSON")
        yield item


def _given(item: Item, key: str, file: Path) -> Any:
    """The text, or the ids, of `key`."""
    found = item.get(f"{key}_pretokenized", item.get(key))
    if found is None:
        raise ArgumentError(f"{file} has an item without {key} or {key}_pretokenized")
    return found


def _several(item: Item, key: str, file: Path) -> Any:
    """Of which a text, or the ids, may be empty."""
    found = _given(item, key, file)
    if not isinstance(found, list) or not found:
        raise ArgumentError(f"{file} has an item with {key}={found!r}; give a list of some")
    return found


# ---- kinds ---------------------------------------------------------------------------------------


def _multiple_choice(model: Any, task: GLMTask, file: Path, limit: int | None) -> FileScore:
    scorer = GLMScorer(model, _GMASK if task.has_gmask else _MASK)
    are_right = [_is_right(scorer, item, file) for item in _items(file, limit)]
    return _percent(file, {"Accuracy": [float(right) for right in are_right]})


def _is_right(scorer: GLMScorer, item: Item, file: Path) -> bool:
    encode = scorer.model.tokenizer.encode
    choices = [
        list(encode(choice) if isinstance(choice, str) else choice)
        for choice in _several(item, "choices", file)
    ]
    if not all(choices):
        raise ArgumentError(f"{file} has an item with a choice without tokens")
    label = _given(item, "label", file)
    if label not in range(len(choices)):
        raise ArgumentError(f"{file} has the label {label!r} for {len(choices)} choices")
    scores = scorer.score_ids(_given(item, "inputs", file), choices)
    best = max(range(len(scores)), key=lambda at: scores[at].logprob)
    return bool(best == label)


def _generation(model: Any, task: GLMTask, file: Path, limit: int | None) -> FileScore:
    metrics: dict[str, list[float]] = {"EM": [], "F1": []}
    answer_of = _lambada_word if task.name.upper() == "LAMBADA" else _answer
    for item in _items(file, limit):
        answer = answer_of(model, task, _text(model, _given(item, "inputs", file)))
        targets = [_text(model, one) for one in _several(item, "targets", file)]
        metrics["EM"].append(max(float(_plain(answer) == _plain(one)) for one in targets))
        metrics["F1"].append(max(_f1(answer, one) for one in targets))
    return _percent(file, metrics)


def _text(model: Any, given: Any) -> str:
    return given if isinstance(given, str) else str(model.tokenizer.decode(list(given)))


def _answer(model: Any, task: GLMTask, text: str) -> str:
    return _answers(model, task, text, {"temperature": 0} if task.num_beams == 1 else {})[0]


def _lambada_word(model: Any, task: GLMTask, text: str) -> str:
    """The first word of the best beam that has punctuation behind it, else of the best one."""
    found = _answers(model, task, text, {"num_return_sequences": task.num_beams})
    beams = [re.findall(r"\w+(?:['-]\w+)*|[^\w\s]", one) for one in found]
    spoken = [words for words in beams if words and words[0] not in string.punctuation]
    ended = [words for words in spoken if len(words) > 1 and words[1] in string.punctuation]
    return next(iter([*ended, *spoken]), [""])[0]


def _answers(model: Any, task: GLMTask, text: str, options: Mapping[str, Any]) -> list[str]:
    masked = text if _GMASK in text or _MASK in text else text + _mask(task)
    if task.num_beams > 1:
        options = {
            "num_beams": task.num_beams, "length_penalty": task.length_penalty,
            "no_repeat_ngram_size": task.no_repeat_ngram_size, **options,
        }  # fmt: skip
    found = model.generate(masked, max_tokens=task.max_tokens, **options)
    return [one.text for one in found] if isinstance(found, list) else [found[0]]


def _mask(task: GLMTask) -> str:
    return _GMASK if task.has_gmask else _MASK


def _language_model(model: Any, task: GLMTask, file: Path, limit: int | None) -> FileScore:
    if model.max_length != task.window:
        raise ArgumentError(
            f"max_length={model.max_length}, and {task.name} reads windows of {task.window} "
            f"tokens; load the model with max_length={task.window}"
        )
    found = model.perplexity(_read(file), task.stride, task.is_unidirectional)
    return FileScore(file.name, 1, {"PPL": found})


def _percent(file: Path, values: Mapping[str, Sequence[float]]) -> FileScore:
    number = len(next(iter(values.values())))
    if number == 0:
        raise ArgumentError(f"{file} has no items")
    metrics = {name: 100 * sum(own) / number for name, own in values.items()}
    return FileScore(file.name, number, metrics)


# ---- texts that are compared ---------------------------------------------------------------------


def _plain(text: str) -> str:
    """In lower case, without punctuation, articles and double blanks."""
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def _f1(answer: str, target: str) -> float:
    """Of the words that both have."""
    own, other = _plain(answer).split(), _plain(target).split()
    common = sum((Counter(own) & Counter(other)).values())
    return 2 * common / (len(own) + len(other)) if common else 0.0
