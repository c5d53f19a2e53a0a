"""`bminf eval`: what it prints, and what it refuses. bminf/cli/eval.py."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest
from terminal import Command
from tiny_glm import tiny_model

from bminf.cli import eval as eval_verb
from bminf.cli.session_pretrained import PretrainedSession
from bminf.evaluation import fidelity

WORDS = "once upon a time word7 word8 word9 " * 200


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of two items, one of which any model of a hundred words gets wrong."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "prepared")
    choices = ["word3", "upon word4 word5 word6 word7 word8"]
    items = [{"context": "once", "choices": choices, "label": label} for label in (0, 1)]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, items)))
    file = tmp_path / "words.yaml"
    file.write_text(
        f"task: words\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        'test_split: test\noutput_type: multiple_choice\ndoc_to_text: "{{context}}"\n'
        'doc_to_choice: "{{choices}}"\ndoc_to_target: label\nmetric_list: [{metric: acc}]\n'
    )
    return file


def test_a_task_of_the_harness(folder: Path, task: Path, command: Command, tmp_path: Path) -> None:
    file = tmp_path / "samples.json"
    options = ("--tasks", task, "--device", "cpu", "--samples", file)
    found = json.loads(command("eval", folder, *options, "--json").out)
    assert found["results"]["words"]["acc,none"] == 0.5
    assert found["num_fewshot"] == {"words": 0} and found["versions"]["lm-eval"]
    assert len(json.loads(file.read_text())["words"]) == 2
    out = command("eval", folder, "--tasks", task, "--limit", "1", "--device", "cpu").out
    assert out.startswith("words  acc: 1.0000") and len(out.splitlines()) == 1


def test_a_task_of_glm130b_needs_no_harness(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    model = tiny_model("glm10b").write_original(tmp_path / "glm")
    data = tmp_path / "data"
    data.mkdir()
    item = {"inputs": [60, 61], "choices": [[62], [63]], "label": 0}
    (data / "a.jsonl").write_text(f"{json.dumps(item)}\n{json.dumps({**item, 'label': 1})}\n")
    file = tmp_path / "tiny.yaml"
    file.write_text('name: tiny\ntype: mul\npath: data\nfile-pattern: "*.jsonl"\n')
    out = command("eval", model, "--tasks", file, "--device", "cpu").out
    assert out == "tiny  all  Accuracy: max 50, median 50, average 50\n"
    given = ("--data-path", tmp_path / "elsewhere", "--device", "cpu")
    assert "--data-path" in command("eval", model, "--tasks", file, *given, code=2).error
    found = json.loads(command("eval", model, "--tasks", file, "--device", "cpu", "--json").out)
    (of_file,) = found["glm_tasks"]["tiny"]["all"]["files"]
    assert of_file == {"file": "a.jsonl", "num_items": 2, "metrics": {"Accuracy": 50.0}}


def test_a_task_of_glm130b_is_for_a_glm(folder: Path, tmp_path: Path, command: Command) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text("name: tiny\ntype: mul\n")
    (tmp_path / "data.jsonl").touch()
    refused = command("eval", folder, "--tasks", file, "--device", "cpu", code=2).error
    assert "is no GLM" in refused


def test_tasks_that_are_not_there_are_told_before_the_model_is_read(
    folder: Path, task: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object) -> None:
        raise AssertionError("it was read")

    monkeypatch.setattr(PretrainedSession, "load", read)
    other = tmp_path / "x y.yaml"
    other.write_text("task:\n  - group\n# task: a\n")
    for tasks, said in (
        ((task.with_name("no.yaml"),), "cannot be read"),
        ((other,), "names no task"),
        ((task, "--samples", tmp_path / "nowhere" / "a.json"), "there is no such folder"),
    ):
        assert said in command("eval", folder, "--tasks", *tasks, code=2).error
    task.write_text("task: words\n  wrong: [\n")  # lm-eval passes over what is no YAML
    assert "is no YAML" in command("eval", folder, "--tasks", task, code=2).error


def test_tasks_of_one_name_are_told_apart(tmp_path: Path, command: Command) -> None:
    model = tiny_model("glm10b").write_original(tmp_path / "glm")
    files = [tmp_path / name / "CoLA.yaml" for name in ("a", "b")]
    for label, file in enumerate(files):
        file.parent.mkdir()
        file.write_text("type: mul\n")
        item = {"inputs": [60, 61], "choices": [[62], [63]], "label": label}
        (file.parent / "a.jsonl").write_text(json.dumps(item))
    out = command("eval", model, "--tasks", *files, "--device", "cpu").out
    assert [line.split("  ")[0] for line in out.splitlines()] == [*map(str, files)]
    refused = command("eval", model, "--tasks", *files, "--samples", "a.json", code=2).error
    assert "--samples is for tasks of lm-evaluation-harness" in refused


def test_fidelity_of_a_folder(folder: Path, tmp_path: Path, command: Command) -> None:
    text = tmp_path / "text"
    text.write_text(WORDS)
    options = ("--fidelity", "--text", text, "--tokens", "600", "--formats", "int8 *", "int4 g16*")
    head, names, *rows = command("eval", folder, *options).out.splitlines()
    assert head.endswith("512 tokens of text") and "perplexity" in names and len(rows) == 5
    assert rows[0].startswith("fp32  ") and rows[-1].startswith("int4 g16 symmetric, 8-bit scales ")
    found = json.loads(command("eval", folder, *options, "--json").out)
    assert [one["name"] for one in found["formats"]] == [row[:38].strip() for row in rows]
    assert found["formats"][0]["ratio"] == 1 < found["formats"][-1]["bits_per_weight"]


def test_fidelity_of_a_built_in_model(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fidelity, "WINDOW", 32)
    monkeypatch.setattr(fidelity.reader_of, "__defaults__", (None, None, 32))
    model = tiny_model("glm10b").write_original(tmp_path / "glm")
    text = tmp_path / "text"
    text.write_text("the blocks of a layer wait on the host " * 9)
    options = ("--fidelity", "--text", text, "--formats", "int8 row*", "--max-length", "34")
    found = json.loads(command("eval", model, *options, "--json").out)
    assert [one["name"] for one in found["formats"]] == ["fp32", "int8 row symmetric"]


def test_the_text_of_python_is_taken_where_none_is_given() -> None:
    assert len(eval_verb._text_of(None)) > 10**5
    assert len(eval_verb.chosen_formats(None)) == len(fidelity.FORMATS)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "give --tasks or --fidelity"),
        (("--tasks", "a", "--fidelity"), "give --tasks or --fidelity"),
        (("--tasks", "a", "--formats", "int8*"), "--formats is for --fidelity"),
        (("--fidelity", "--formats", "int9"), "--formats='int9' is none of: int8 row"),
        (("--fidelity", "--text", "/no/such/file"), "--text='/no/such/file' cannot be read"),
        (("--fidelity", "--limit", "1"), "--limit is for --tasks; leave it out"),
        (("--fidelity", "--device", "cuda"), "--device is for --tasks; leave it out"),
        (("--tasks", "a", "--num-fewshot", "-1"), "accepted: a whole number from 0"),
        (("--tasks", "a", "--data-path", "."), "--data-path is for tasks of GLM-130B's authors"),
        (("--fidelity", "--memory-limit", "1GB"), "leave out --quantization and --memory-limit"),
    ],
)
def test_wrong_use(options: tuple[str, ...], said: str, folder: Path, command: Command) -> None:
    assert said in command("eval", folder, *options, code=2).error


def test_the_harness_that_is_missing_is_named(
    folder: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused = command("eval", folder, "--tasks", "lambada", code=1).error
    assert 'pip install "bminf[eval]"' in refused


def test_nothing_is_looked_up_for_files(
    folder: Path, task: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    command("eval", folder, "--tasks", task, "--device", "cpu")
    assert os.environ["HF_HUB_OFFLINE"] == "1"
