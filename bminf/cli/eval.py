"""`bminf eval`: tasks of lm-evaluation-harness or of GLM-130B's authors; with --fidelity, what each
way to pack weights costs in predictions."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bminf.cli import flags
from bminf.errors import ArgumentError
from bminf.progress import progress_bar, spinner

if TYPE_CHECKING:
    from bminf.cli.session import Session
    from bminf.evaluation.glm_tasks import GLMTask
    from bminf.evaluation.harness import TaskFiles

_LENGTH, _TOKENS = 2048, 8192
_FIDELITY = ("text", "formats", "tokens")
_TASKS = ("limit", "num_fewshot", "data_path", "samples", "device")
_HARNESS = ("num_fewshot", "samples")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of this verb."""
    flags.add_model(parser)
    add = parser.add_argument
    add("--tasks", nargs="+", metavar="TASK",
        help="names of tasks of lm-evaluation-harness, or YAML files: its own, or those of "
        "GLM-130B's authors, for a GLM")  # fmt: skip
    add("--limit", type=flags.positive, metavar="N", help="items of each task, at most")
    add("--num-fewshot", type=flags.whole, metavar="N",
        help="examples before each item; default: as the task says")  # fmt: skip
    add("--data-path", metavar="DIR",
        help="where the data of GLM-130B's tasks is; default: beside their files")  # fmt: skip
    add("--samples", metavar="FILE", help="keep what was asked and answered, as JSON")
    add("--json", action="store_true", help="print one JSON object")
    _add_fidelity(parser)
    parser.set_defaults(verbose=False)


def _add_fidelity(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("fidelity", "in place of tasks, in float32 on the CPU")
    add = group.add_argument
    add("--fidelity", action="store_true",
        help="perplexity of a text in each format, and how far its predictions are from those of "
        "the weights as they are")  # fmt: skip
    add("--text", metavar="FILE", help="default: the help topics of Python")
    add("--tokens", type=flags.positive, metavar="N", help="of the text, at most; default: 8192")
    add("--formats", nargs="+", metavar="NAME",
        help='such as "int8 row symmetric" or "int4 g32*"; default: all')  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, and print; returns 0."""
    if bool(arguments.tasks) == arguments.fidelity:
        raise ArgumentError("give --tasks or --fidelity, one of the two")
    if arguments.fidelity:
        _refuse(_TASKS, arguments, "--tasks")
        report = _fidelity(arguments)
        lines = _fidelity_lines(report)
    else:
        _refuse(_FIDELITY, arguments, "--fidelity")
        report = _tasks(arguments)
        lines = _task_lines(report)
    print(json.dumps(report, indent=2) if arguments.json else "\n".join(lines))
    return 0


def _refuse(names: Sequence[str], arguments: argparse.Namespace, what: str) -> None:
    """Options that would be passed over in silence.   what: that they are for."""
    for name in names:
        if getattr(arguments, name) is not None:
            raise ArgumentError(f"--{name.replace('_', '-')} is for {what}; leave it out")


# ---- tasks ---------------------------------------------------------------------------------------


def _tasks(arguments: argparse.Namespace) -> dict[str, Any]:
    """Whether the tasks are there is known before the model is read."""
    from bminf.evaluation.glm_tasks import is_glm_task
    from bminf.evaluation.harness import find_tasks, is_file

    of_glm = [
        one for one in arguments.tasks if is_file(one) and is_glm_task(Path(one).expanduser())
    ]
    others = [one for one in arguments.tasks if one not in of_glm]
    _refuse(() if others else _HARNESS, arguments, "tasks of lm-evaluation-harness")
    _refuse(() if of_glm else ("data_path",), arguments, "tasks of GLM-130B's authors")
    read = _read_glm_tasks(of_glm, arguments)
    asked = find_tasks(others)
    manager = _manager(asked, arguments) if others else None
    from bminf.cli.session import find

    with find(arguments) as session:
        session.load(_LENGTH)
        found = {name: _glm_task(session, task, arguments) for name, task in read.items()}
        report = {"model": arguments.model, "device": session.device, "glm_tasks": found}
        return report | _harness(session, asked, manager, arguments)


def _manager(asked: TaskFiles, arguments: argparse.Namespace) -> Any:
    from bminf.evaluation.harness import require_harness, task_manager

    require_harness()
    file = arguments.samples
    if file is not None and not Path(file).expanduser().parent.is_dir():
        raise ArgumentError(f"--samples {file}: there is no such folder")
    if Path(arguments.model).exists() and not asked.has_others:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is to be looked up
    with spinner("importing lm-evaluation-harness"):
        return task_manager(asked)


def _read_glm_tasks(files: Sequence[str], arguments: argparse.Namespace) -> dict[str, GLMTask]:
    """By the names of the files; by all of them, where two would have one name."""
    from bminf.evaluation.glm_tasks import read_task

    folder = arguments.data_path and Path(arguments.data_path).expanduser()
    stems = [Path(file).stem for file in files]
    is_short = len(set(stems)) == len(stems)
    return {
        stem if is_short else file: read_task(Path(file).expanduser(), folder)
        for stem, file in zip(stems, files, strict=True)
    }


def _harness(
    session: Session, asked: TaskFiles, manager: Any, arguments: argparse.Namespace
) -> dict[str, Any]:
    """What lm-eval says of each task; the items that it asked go to a file."""
    if not asked.names:
        return {"results": {}, "versions": {}, "num_fewshot": {}}
    import lm_eval

    from bminf.evaluation.harness import run_tasks

    file = arguments.samples
    found = run_tasks(
        session.scorer(), asked, arguments.limit, arguments.num_fewshot, file is not None, manager
    )
    if file is not None:
        text = json.dumps(found["samples"], indent=1, default=str)
        Path(file).expanduser().write_text(text, encoding="utf-8")
    return {
        "results": found["results"],
        "versions": {"lm-eval": lm_eval.__version__, **found["versions"]},
        "num_fewshot": found["n-shot"],
    }


def _glm_task(session: Session, task: GLMTask, arguments: argparse.Namespace) -> dict[str, Any]:
    from bminf.evaluation.glm_tasks import run_task, summary

    return {
        group: summary(scores) | {"files": [asdict(one) for one in scores]}
        for group, scores in run_task(session.glm(), task, arguments.limit).items()
    }


def _task_lines(report: Mapping[str, Any]) -> Iterator[str]:
    for name, groups in report["glm_tasks"].items():
        for group, metrics in groups.items():
            for metric, found in metrics.items():
                if metric != "files":
                    values = ", ".join(f"{kind} {value:.4g}" for kind, value in found.items())
                    yield f"{name}  {group}  {metric}: {values}"
    for name, metrics in report["results"].items():
        for metric, value in metrics.items():
            label, _, kind = metric.partition(",")
            if kind and not label.endswith("_stderr") and isinstance(value, float):
                yield f"{name}  {label}: {value:.4f}{_error(metrics, metric)}"


def _error(metrics: Mapping[str, Any], metric: str) -> str:
    """The standard error of a metric "acc,none", where there is one."""
    label, _, kind = metric.partition(",")
    error = metrics.get(f"{label}_stderr,{kind}")
    return f" ± {error:.4f}" if isinstance(error, float) else ""


# ---- fidelity ------------------------------------------------------------------------------------


def _fidelity(arguments: argparse.Namespace) -> dict[str, Any]:
    from bminf.cli.session import find
    from bminf.evaluation.fidelity import fidelities, reader_of

    if arguments.quantization is not None or arguments.memory_limit is not None:
        raise ArgumentError(
            "--fidelity reads the weights as they are, all of them at once; leave out "
            "--quantization and --memory-limit"
        )
    forms = chosen_formats(arguments.formats)
    text = _text_of(arguments.text)
    arguments.quantization, arguments.device = "none", "cpu"
    with find(arguments) as session:
        model, tokenizer = session.plain()
        reader = reader_of(model, text, tokenizer, arguments.tokens or _TOKENS)
        found = fidelities(reader, forms)
        shown = progress_bar(found, desc="reading", total=1 + len(forms), leave=False)
        formats = [asdict(one) for one in shown]
    return {"model": arguments.model, "tokens": len(reader.ids), "formats": formats}


def chosen_formats(patterns: Sequence[str] | None) -> list[Any]:
    """Formats whose names match one of the patterns.   Raises ArgumentError for one without any."""
    from bminf.evaluation.fidelity import FORMATS, name_of

    names = {name_of(form): form for form in FORMATS}
    for pattern in patterns or ():
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ArgumentError(f"--formats={pattern!r} is none of: {', '.join(names)}")
    wanted = patterns or ["*"]
    return [form for name, form in names.items() if any(fnmatchcase(name, p) for p in wanted)]


def _text_of(file: str | None) -> str:
    if file is None:
        from pydoc_data.topics import topics

        return "\n".join(topics.values())  # which every Python carries
    try:
        return Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(f"--text={file!r} cannot be read: {error}") from error


def _fidelity_lines(report: Mapping[str, Any]) -> Iterator[str]:
    yield f"{report['model']}, {report['tokens']} tokens of text"
    yield f"{'':<38}{'bits / weight':>14}{'perplexity':>12}{'/ fp32':>9}{'KL':>9}"
    for one in report["formats"]:
        yield (
            f"{one['name']:<38}{one['bits_per_weight']:>14.3f}{one['perplexity']:>12.3f}"
            f"{one['ratio']:>9.4f}{one['kl']:>9.4f}"
        )
