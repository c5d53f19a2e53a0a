"""Models in lm-evaluation-harness: `pip install "bminf[eval]"`.

An adapter is handed to lm_eval.simple_evaluate() as an object; it cannot be named to its command
line, which finds none but its own classes.
Source: EleutherAI/lm-evaluation-harness, lm_eval/api/model.py.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from bminf.errors import ArgumentError, BMInfError
from bminf.evaluation.scorers import Options, Pair, TextScorer, TokenScorer

MAX_TOKENS = 256
"""Of an answer, where the task does not say."""

_NAME = re.compile(r"""^(?:task|group):\s*["']?([\w.-]+)["']?\s*(?:#.*)?$""", re.MULTILINE)
_RESAMPLED = 1000  # for standard errors of metrics without a formula


def require_harness() -> None:
    """Raise BMInfError where lm-evaluation-harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise BMInfError(
            "lm-evaluation-harness is not installed, which runs these tasks; "
            'install it with: pip install "bminf[eval]"'
        )


def harness_model(scorer: TokenScorer | TextScorer) -> Any:
    """An lm_eval.api.model.LM for what scorer_of() returns.   Raises BMInfError."""
    require_harness()
    return _of_tokens(scorer) if hasattr(scorer, "encode") else _of_texts(scorer)


@dataclass(frozen=True)
class TaskFiles:
    """Tasks of lm-eval, by their names.   folders: where the files of some are; empty where all are
    its own, whose data it downloads."""

    names: Sequence[str]
    folders: Sequence[str]
    has_others: bool


def run_tasks(
    scorer: TokenScorer | TextScorer,
    tasks: TaskFiles,
    limit: int | None = None,
    num_fewshot: int | None = None,
    has_samples: bool = False,
    manager: Any = None,
) -> dict[str, Any]:
    """What lm_eval.simple_evaluate() finds: "results" by task, "samples" if asked for.

    limit: items of each task, from the first.   num_fewshot: examples before each; None is the
    task's own.   manager: what task_manager() returns, if that was asked before.
    Raises BMInfError where a task is not known, or cannot be run.
    """
    model = harness_model(scorer)
    from lm_eval import simple_evaluate

    manager = manager or task_manager(tasks)
    with _as_our_error(tasks.names):
        found = simple_evaluate(
            model, tasks=list(tasks.names), task_manager=manager, limit=limit,
            num_fewshot=num_fewshot, log_samples=has_samples, bootstrap_iters=_RESAMPLED,
        )  # fmt: skip
    return dict(found)


def task_manager(tasks: TaskFiles) -> Any:
    """An lm_eval.tasks.TaskManager that knows them all.   Raises ArgumentError for those that it
    does not know."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=list(tasks.folders), include_defaults=tasks.has_others)
    missing = [name for name in tasks.names if name not in manager.all_tasks]
    if missing:
        raise ArgumentError(
            f"lm-evaluation-harness knows no {', '.join(map(repr, missing))}; give names of its "
            "tasks, or the YAML files of your own"
        )
    return manager


@contextmanager
def _as_our_error(names: Sequence[str]) -> Iterator[None]:
    """Errors of a task's file, its data and its templates, for which lm-eval has no one class."""
    try:
        yield
    except (BMInfError, OSError):
        raise
    except Exception as error:
        cause = error.__cause__ or error
        raise BMInfError(
            f"{', '.join(names)} cannot be evaluated: {type(error).__name__}: {cause}; see whether "
            "the file of the task and its data are as lm-evaluation-harness wants them"
        ) from error


def find_tasks(given: Sequence[str]) -> TaskFiles:
    """Each a name, or a YAML file.   Raises ArgumentError for a file that is not one of lm-eval."""
    names, folders, has_others = list[str](), list[str](), False
    for one in given:
        path = Path(one).expanduser()
        if not is_file(one):
            names.append(one)
            has_others = True
            continue
        names.append(_name_in(path))
        folders.append(str(path.parent.resolve()))
    return TaskFiles(names, list(dict.fromkeys(folders)), has_others)


def is_file(task: str) -> bool:
    """Whether what was given for a task is a file and not a name."""
    return Path(task).suffix in (".yaml", ".yml")


def _name_in(path: Path) -> str:
    """By its line alone: other lines may have tags that lm-eval's own reader knows."""
    try:
        found = _NAME.search(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(f"{path} cannot be read: {error}") from error
    if found is None:
        raise ArgumentError(f"{path} names no task; a task of lm-eval has a line `task: NAME`")
    return found[1]


# ---- the adapters --------------------------------------------------------------------------------


def _of_tokens(scorer: Any) -> Any:
    from lm_eval.api.model import TemplateLM

    class TokenModel(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
        """Contexts and continuations are encoded together, by lm-eval's own rules."""

        tokenizer_name = "bminf"

        @property
        def eot_token_id(self) -> int:
            return int(scorer.end_id)

        @property
        def prefix_token_id(self) -> int:
            return int(scorer.start_id)

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **_: Any
        ) -> list[int]:
            ids: list[int] = scorer.encode(string, add_special_tokens is not False)
            return ids

        def _loglikelihood_tokens(
            self, requests: Sequence[Any], **_: Any
        ) -> list[tuple[float, bool]]:
            pairs = [(context or [scorer.start_id], ids) for _, context, ids in requests]
            return [(one.logprob, one.is_greedy) for one in scorer.score(pairs)]

        def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
            windows = [list(_windows(scorer, *request.args)) for request in requests]
            scores = iter(scorer.score([pair for own in windows for pair in own]))
            return [sum(next(scores).logprob for _ in own) for own in windows]

        def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
            return [_answer(scorer, *request.args) for request in requests]

    return TokenModel()


def _windows(scorer: TokenScorer, text: str) -> Iterator[Pair]:
    """Pairs that together score each token of a text once, with as much before it as fits."""
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    ids = scorer.encode(text, False)
    found = get_rolling_token_windows(ids, scorer.start_id, scorer.max_length, 1)
    yield from map(make_disjoint_window, found)


def _of_texts(scorer: Any) -> Any:
    from lm_eval.api.model import LM

    class TextModel(LM):  # type: ignore[misc]  # lm-eval has no types
        """Contexts and continuations are encoded apart; those of one context share a pass."""

        tokenizer_name = "bminf"

        def loglikelihood(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
            found = []
            for context, own in groupby((request.args for request in requests), lambda a: a[0]):
                scores = scorer.score_texts(context, [text for _, text in own])
                found += [(one.logprob, one.is_greedy) for one in scores]
            return found

        def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
            return [scorer.whole(*request.args) for request in requests]

        def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
            return [_answer(scorer, *request.args) for request in requests]

    return TextModel()


def _answer(scorer: Any, context: str, asked: Mapping[str, Any]) -> str:
    """asked: generation_kwargs of a task."""
    text: str = scorer.generate(context, options_of(asked))
    return text


def options_of(asked: Mapping[str, Any]) -> Options:
    """Options of a scorer for the generation_kwargs of a task; what samples is heeded only where
    do_sample says so, as in lm-eval itself."""
    stop = asked.get("until") or []
    options = {
        "stop": [stop] if isinstance(stop, str) else [text for text in stop if text],
        "max_tokens": int(asked.get("max_gen_toks", MAX_TOKENS)),
        "temperature": 0,
    }
    if asked.get("do_sample"):
        options["temperature"] = asked.get("temperature") or 1.0
        options |= {name: asked[name] for name in ("top_p",) if name in asked}
    return options
