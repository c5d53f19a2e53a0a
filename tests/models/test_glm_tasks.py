"""bminf/evaluation/glm_tasks.py: task files in the form of GLM-130B's authors, their metrics, and
on the golden set the scores of the authors' own code."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from golden import for_each, golden
from golden_glm import GLMSet

from bminf.errors import ArgumentError
from bminf.evaluation import glm_tasks
from bminf.evaluation.glm_tasks import FileScore, is_glm_task, read_task, run_task, summary

Loader = Callable[..., Any]
TEXT = "the blocks of a layer wait"


def write(folder: Path, items: list[dict[str, Any]], name: str = "validation.jsonl") -> Path:
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data" / name).write_text("\n".join(map(json.dumps, items)) + "\n")
    return folder


def task_in(folder: Path, **keys: Any) -> Path:
    """keys: with _ for -."""
    path = folder / "task.yaml"
    given = {"name": "tiny", "type": "mul", "path": "data", **keys}
    path.write_text("\n".join(f"{key}: {json.dumps(value)}" for key, value in given.items()))
    return path


def scores_of(model: Any, path: Path, limit: int | None = None) -> list[FileScore]:
    (scores,) = run_task(model, read_task(path), limit).values()
    return scores


# ---- the authors' scores -------------------------------------------------------------------------


def tasks(given: GLMSet) -> Iterator[str]:
    yield from given.json("eval.json")


def loaded(given: GLMSet, **arguments: Any) -> Any:
    return given.load(given.folders(packed=False)[0], **arguments)


@for_each(("glm130b",), tasks)
def test_golden_glm130b_task_files(name: str, case: str, tmp_path: Path) -> None:
    given = golden(name)
    expected = given.json("eval.json")[case]
    if case.startswith("lm"):
        write(tmp_path, []).joinpath("data", "stream.txt").write_text(expected["text"])
        path = task_in(
            tmp_path, type="lm", file_pattern="*.txt", use_task_mask=True,
            max_seq_length=expected["max_seq_length"], unidirectional=expected["unidirectional"],
            **{"generation-length": expected["generation_length"]},
        )  # fmt: skip
        model = loaded(given, max_length=expected["max_seq_length"], max_batch_size=1)
        (score,) = scores_of(model, path)
        assert score.metrics["PPL"] == pytest.approx(expected["perplexity"], rel=1e-5)
        return
    write(tmp_path, expected["items"])
    path = task_in(tmp_path, **{"use-task-mask": "gmask" in case, "micro-batch-size": 30})
    (score,) = scores_of(loaded(given), path)
    labels = [item["label"] for item in expected["items"]]
    right = [a == b for a, b in zip(expected["prediction"], labels, strict=True)]
    assert score.num_items == len(labels)
    assert score.metrics == {"Accuracy": 100 * sum(right) / len(right)}


# ---- files ---------------------------------------------------------------------------------------


def test_keys_with_either_sign_and_groups_of_files(tmp_path: Path) -> None:
    item = {"inputs_pretokenized": TEXT, "choices_pretokenized": ["on", "the host"], "label": 0}
    for name in ("a_validation.jsonl", "b_validation.jsonl", "c_test.jsonl"):
        write(tmp_path, [item], name)
    pattern = {"validation": "**/*validation.jsonl", "test": "**/*test.jsonl"}
    for key in ("file-pattern", "file_pattern"):
        task = read_task(task_in(tmp_path, **{key: pattern}))
        names = {group: [file.name for file in files] for group, files in task.files.items()}
        assert names == {
            "validation": ["a_validation.jsonl", "b_validation.jsonl"], "test": ["c_test.jsonl"],
        }  # fmt: skip
    elsewhere = tmp_path / "tasks"
    elsewhere.mkdir()
    assert read_task(task_in(elsewhere), tmp_path).files["all"][0].parent == tmp_path / "data"
    with pytest.raises(ArgumentError, match="has no files"):
        read_task(elsewhere / "task.yaml")


def test_files_of_another_form(tmp_path: Path) -> None:
    path = tmp_path / "task.yaml"
    path.write_text("task: capitals\ndoc_to_text: !function utils.text\n")
    assert not is_glm_task(path)
    path.write_text("task: capitals\n")
    assert not is_glm_task(path)
    with pytest.raises(ArgumentError, match="type=None; GLM-130B's tasks have mul, gen, lm"):
        read_task(path)
    with pytest.raises(ArgumentError, match="cannot be read"):
        read_task(tmp_path / "nothing.yaml")
    write(tmp_path, [])
    assert is_glm_task(task_in(tmp_path))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("type: [mul\n", "is no YAML: .* line 2"),
        ("type: gen\nmax_gen_length: many\n", "has max_gen_length: 'many'; give a number"),
    ],
)
def test_task_files_that_are_wrong(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "task.yaml"
    path.write_text(f"file_pattern: '*.yaml'\n{text}")
    with pytest.raises(ArgumentError, match=f"(?s)task.yaml {said}"):
        read_task(path)


CHOICES = '{"inputs": [60], "choices": [[61], [62]], "label": 0}'


@pytest.mark.parametrize(
    ("kind", "line", "said"),
    [
        ("mul", "{60", "line 3 of .*validation.jsonl is no JSON: Expecting"),
        ("mul", "[60]", "line 3 of .*validation.jsonl is no object of JSON"),
        ("mul", CHOICES.replace("[61]", "[]"), "a choice without tokens"),
        ("mul", CHOICES.replace("[[61], [62]]", "[]"), r"choices=\[\]; give a list"),
        ("mul", CHOICES.replace("0}", "2}"), "the label 2 for 2 choices"),
        ("mul", CHOICES.replace("0}", '"0"}'), "the label '0' for 2 choices"),
        ("gen", '{"inputs": [60], "targets": []}', r"targets=\[\]; give a list"),
    ],
)
def test_items_that_are_wrong(
    kind: str, line: str, said: str, load: Loader, tmp_path: Path
) -> None:
    """None of them counts as a wrong answer."""
    path = task_in(write(tmp_path, []), type=kind, max_gen_length=1)
    right = [CHOICES, ""] if kind == "mul" else []
    (tmp_path / "data" / "validation.jsonl").write_text("\n".join([*right, line]))
    with pytest.raises(ArgumentError, match=said):
        scores_of(load("glm130b"), path)


def test_groups_are_summed_up_by_items() -> None:
    scores = [FileScore(str(n), n, {"Accuracy": 10.0 * n}) for n in (1, 2, 7)]
    assert summary(scores) == {
        "Accuracy": {"max": 70.0, "median": 20.0, "average": (10 + 40 + 490) / 10}
    }


# ---- kinds ---------------------------------------------------------------------------------------


def test_choices_as_texts_and_as_ids(load: Loader, tmp_path: Path) -> None:
    model = load("glm130b")
    encode, choices = model.tokenizer.encode, ["the host", "on", "a layer of blocks"]
    scores = model.score(TEXT, choices)
    best = scores.index(max(scores))
    texts = {"inputs_pretokenized": TEXT, "choices_pretokenized": choices, "label": best}
    ids = {"inputs": encode(TEXT), "choices": [encode(one) for one in choices], "label": best}
    wrong = {**texts, "label": (best + 1) % 3}
    path = task_in(write(tmp_path, [texts, ids, wrong, texts]))
    (found,) = scores_of(model, path)
    assert found == FileScore("validation.jsonl", 4, {"Accuracy": 75.0})
    assert scores_of(model, path, limit=2)[0].metrics == {"Accuracy": 100.0}
    write(tmp_path, [{"inputs_pretokenized": TEXT}])
    with pytest.raises(ArgumentError, match="without choices or choices_pretokenized"):
        scores_of(model, path)
    write(tmp_path, [])
    with pytest.raises(ArgumentError, match="has no items"):
        scores_of(model, path)


@pytest.mark.parametrize("strategy", ["BaseStrategy", "BeamSearchStrategy"])
def test_answers_are_compared_with_the_best_target(
    strategy: str, load: Loader, tmp_path: Path
) -> None:
    model = load("glm130b", max_batch_size=2)
    beams = {"num_beams": 2, "no_repeat_ngram_size": 0}
    options = {"temperature": 0} if strategy == "BaseStrategy" else beams
    answer = model.generate(TEXT + "[gMASK]", max_tokens=4, **options)[0]
    items = [
        {"inputs_pretokenized": TEXT, "targets_pretokenized": ["nothing of it", answer]},
        {"inputs_pretokenized": TEXT, "targets_pretokenized": ["nothing of it"]},
    ]
    path = task_in(
        write(tmp_path, items), type="gen", use_task_mask=True, sampling_strategy=strategy,
        max_gen_length=4, **beams,
    )  # fmt: skip
    (found,) = scores_of(model, path)
    assert found.metrics == {"EM": 50.0, "F1": 50.0}


def test_a_language_model_task_needs_its_window(load: Loader, tmp_path: Path) -> None:
    write(tmp_path, []).joinpath("data", "text.txt").write_text(TEXT)
    keys = {"type": "lm", "file_pattern": "*.txt", "max_seq_length": 24, "generation_length": 8}
    path = task_in(tmp_path, **keys)
    model = load("glm130b", max_length=24)
    assert scores_of(model, path)[0].metrics["PPL"] == model.perplexity(TEXT, 8)
    with pytest.raises(ArgumentError, match="load the model with max_length=24"):
        scores_of(load("glm130b", max_length=40), path)


class Beams:
    """A model that says these texts, best first."""

    def __init__(self, *texts: str) -> None:
        self.given: dict[str, Any] = {}
        self._texts = texts

    def generate(self, text: str, **options: Any) -> Any:
        from bminf.models import Answer

        self.given = {"text": text, **options}
        return [Answer(one, False, 0.0) for one in self._texts]


@pytest.mark.parametrize(
    ("beams", "word"),
    [
        (["moon is", "sun, and", "star."], "sun"),  # the first with punctuation behind its word
        (["moon is", "sun and"], "moon"),
        ([", moon.", "sun and"], "sun"),  # which may not begin with punctuation
        (["don't."], "don't"),
        (["..."], ""),
    ],
)
def test_lambada_takes_the_word_of_a_beam(beams: list[str], word: str, tmp_path: Path) -> None:
    item = {"inputs_pretokenized": TEXT, "targets_pretokenized": [word or "nothing"]}
    path = task_in(write(tmp_path, [item]), type="gen", name="LAMBADA", use_task_mask=True)
    model: Any = Beams(*beams)
    assert scores_of(model, path)[0].metrics["EM"] == (100 if word else 0)
    assert model.given["text"] == TEXT + "[gMASK]"
    assert (model.given["num_beams"], model.given["num_return_sequences"]) == (16, 16)
    assert model.given["max_tokens"] == 5


def test_texts_are_compared_without_case_punctuation_and_articles() -> None:
    assert glm_tasks._plain("The  quick, (brown) Fox and an owl.") == "quick brown fox and owl"
    assert glm_tasks._f1("the quick fox", "A quick owl!") == pytest.approx(0.5)
    assert glm_tasks._f1("fox", "owl") == 0
    assert not re.search("a ", glm_tasks._plain("a a"))
