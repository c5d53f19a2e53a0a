"""bminf/evaluation/harness.py: lm-evaluation-harness on local tasks, without a network; on a real
model it finds what the plain model of transformers says, item by item.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from local_tasks import CHOICES, GENERATION, ROLLING, answers, next_words, write_task
from tiny_glm import tiny_model, tokenizer_of
from tiny_llama import save_llama

import bminf
from bminf.errors import ArgumentError, BMInfError
from bminf.evaluation.harness import (
    TaskFiles,
    find_tasks,
    harness_model,
    options_of,
    require_harness,
    run_tasks,
)
from bminf.evaluation.scorers import PretrainedScorer, Score, scorer_of

# To import it and what it brings takes seconds.
pytestmark = [pytest.mark.usefixtures("harness"), pytest.mark.slow]

NUM_ITEMS = 500


class Uniform:
    """A model to which all bytes are as likely."""

    max_length, end_id, start_id = 8, 256, 256

    def encode(self, text: str, has_special: bool = True) -> list[int]:
        return list(text.encode())

    def score(self, pairs: Sequence[Any]) -> list[Score]:
        assert all(len(context) + len(ids) <= self.max_length + 1 for context, ids in pairs)
        return [Score(-len(ids) * math.log(256), False) for _, ids in pairs]

    def generate(self, context: str, options: Any) -> str:
        return f"{context} {sorted(options.items())}"


def test_a_uniform_model_has_eight_bits_a_byte(tmp_path: Path) -> None:
    texts = ["a", "eighteen letters..", "Zwölf Boxkämpfer jagen Viktor"]
    task = write_task(tmp_path, "bytes", ROLLING, [{"text": text} for text in texts])
    found: Any = run_tasks(Uniform(), task)["results"]["bytes"]
    assert found["bits_per_byte,none"] == pytest.approx(8)
    assert found["byte_perplexity,none"] == pytest.approx(256)


def test_a_text_of_one_token_follows_the_start() -> None:
    adapter = harness_model(Uniform())
    assert adapter.eot_token_id == adapter.prefix_token_id == 256
    assert adapter._loglikelihood_tokens([(("", "a"), [], [97])]) == [(-math.log(256), False)]


def test_what_a_task_says_of_generating() -> None:
    assert options_of({}) == {"stop": [], "max_tokens": 256, "temperature": 0}
    assert options_of({"until": "\n\n", "max_gen_toks": 3, "temperature": 0.7}) == {
        "stop": ["\n\n"], "max_tokens": 3, "temperature": 0,
    }  # fmt: skip
    sampled = {"until": ["a", ""], "do_sample": True, "temperature": 0.7, "top_p": 0.9}
    assert options_of(sampled) == {
        "stop": ["a"], "max_tokens": 256, "temperature": 0.7, "top_p": 0.9,
    }  # fmt: skip


@pytest.fixture
def llama(tmp_path: Path) -> PretrainedScorer:
    import transformers

    folder = save_llama(tmp_path / "llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return PretrainedScorer(model, tokenizer, 64)


def test_texts_are_generated_until_what_the_task_says(
    llama: PretrainedScorer, tmp_path: Path
) -> None:
    context = "once upon a time"
    whole = llama.generate(context, {"max_tokens": 5})
    items = [{"context": context, "answer": whole}, {"context": context, "answer": "other"}]
    until = "zzz"
    task = write_task(tmp_path, "goes_on", GENERATION.replace("word9", until), items)
    found = run_tasks(llama, task, has_samples=True)
    assert found["results"]["goes_on"]["exact_match,none"] == 0.5
    assert [sample["resps"][0][0] for sample in found["samples"]["goes_on"]] == [whole, whole]


def test_few_items_and_examples_before_them(llama: PretrainedScorer, tmp_path: Path) -> None:
    items = [
        {"context": f"once word{n}", "choices": [" upon", " a"], "label": n % 2} for n in range(6)
    ]
    task = write_task(tmp_path, "few", CHOICES + "fewshot_split: test\n", items)
    found = run_tasks(llama, task, limit=3, num_fewshot=1, has_samples=True)
    asked = answers(found, "few")
    assert len(asked) == 3 * 2
    assert all(context.count("once") == 2 for context, *_ in asked)


def test_a_glm_reads_tasks_as_its_authors_do(tmp_path: Path) -> None:
    """Choices of one context share a pass, and are what score() says."""
    folder = tiny_model("glm130b").write_original(tmp_path / "glm")
    settings = {"device": "cpu", "quantization": None, "tokenizer": tokenizer_of("glm130b")}
    items = [
        {"context": "the blocks wait [MASK]", "choices": ["on", "the host"], "label": 0},
        {"context": "a layer of", "choices": ["blocks", "slots", "on"], "label": 2},
    ]
    with bminf.models.GLM(folder, **settings) as model:
        asked = []
        scores = model._choice_scores
        model._choice_scores = lambda *given: asked.append(given[0]) or scores(*given)
        task = write_task(tmp_path, "blanks", CHOICES, items)
        found = run_tasks(scorer_of(model), task, has_samples=True)
        assert asked == [item["context"] for item in items]
        expected = [score for one in items for score in model.score(one["context"], one["choices"])]
        assert [log for *_, log, _ in answers(found, "blanks")] == pytest.approx(expected)
        text = "the blocks of a layer wait on the host"
        task = write_task(tmp_path, "stream", ROLLING, [{"text": text}])
        bits = run_tasks(scorer_of(model), task)["results"]["stream"]["bits_per_byte,none"]
        assert bits == pytest.approx(-scorer_of(model).whole(text) / len(text) / math.log(2))


# ---- which tasks ---------------------------------------------------------------------------------


def test_tasks_are_names_or_files(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("# mine\ntask: 'my-task'  # so\ndoc_to_text: !function utils.text\n")
    assert find_tasks([str(file), "lambada_openai"]) == TaskFiles(
        ["my-task", "lambada_openai"], [str(tmp_path)], True
    )
    assert find_tasks([str(file)]).has_others is False
    file.write_text("dataset_path: json\n")
    with pytest.raises(ArgumentError, match="names no task"):
        find_tasks([str(file)])
    with pytest.raises(ArgumentError, match="cannot be read"):
        find_tasks([str(tmp_path / "nothing.yaml")])


def test_a_task_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="lm-evaluation-harness knows no 'no_such'; give"):
        run_tasks(Uniform(), TaskFiles(["no_such"], [str(tmp_path)], False))


@pytest.mark.parametrize(
    ("lines", "line", "said"),
    [
        (CHOICES, "{", "DatasetGenerationError: .*JSON"),
        (CHOICES.replace("context", "nothing"), '{"a": 1}', "UndefinedError: 'nothing' is undef"),
        (CHOICES.replace("multiple_choice", "many"), '{"a": 1}', "ValueError: .*'many'"),
    ],
)
def test_tasks_that_are_wrong(lines: str, line: str, said: str, tmp_path: Path) -> None:
    task = write_task(tmp_path, "wrong", lines, [])
    (tmp_path / "wrong.jsonl").write_text(line)
    with pytest.raises(BMInfError, match=f"wrong cannot be evaluated: {said}"):
        run_tasks(Uniform(), task)


def test_the_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    plain: Callable[..., Any] = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "lm_eval" else plain(name)
    )
    with pytest.raises(BMInfError, match=r'pip install "bminf\[eval\]"'):
        require_harness()
    with pytest.raises(BMInfError, match="not installed"):
        harness_model(Uniform())


def test_only_what_runs_tasks_imports_the_package() -> None:
    from programs import said_by

    program = (
        "import sys, bminf.evaluation.harness, bminf.cli.eval; print('lm_eval' in sys.modules)"
    )
    assert said_by(program, cwd=Path(bminf.__file__).parents[1]).strip() == "False"
    assert sys.modules["bminf.evaluation.harness"] is not None


# ---- a real model --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(smollm2_folder: Path) -> Any:
    """(float, wrapped in 8 bits, tokenizer)"""
    import transformers

    load = transformers.AutoModelForCausalLM.from_pretrained
    plain = load(smollm2_folder, dtype=torch.float32).eval()
    packed = bminf.wrapper(load(smollm2_folder, dtype=torch.float32).eval(), "int8", "4GB", "cpu")
    return plain, packed, transformers.AutoTokenizer.from_pretrained(smollm2_folder)


def accuracy(model: Any, tokenizer: Any, task: TaskFiles) -> Any:
    return run_tasks(scorer_of(model, tokenizer, 512), task, has_samples=True)


def test_a_real_model_says_what_plain_transformers_does_and_keeps_its_accuracy_in_8_bits(
    real: Any, tmp_path: Path
) -> None:
    plain, packed, tokenizer = real
    task = write_task(tmp_path, "next", CHOICES, next_words(NUM_ITEMS))
    in_float = accuracy(plain, tokenizer, task)
    asked = answers(in_float, "next")
    assert len(asked) == 2 * NUM_ITEMS
    for context, choice, logprob, is_greedy in asked[::20]:
        ids = tokenizer(context)["input_ids"]
        whole = tokenizer(context + choice, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            logs = plain(whole).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        own = whole[0, len(ids) :]
        assert logprob == pytest.approx(float(logs.gather(1, own[:, None]).sum()), abs=1e-4)
        assert is_greedy == bool((logs.argmax(-1) == own).all())
    in_int8 = accuracy(packed, tokenizer, task)
    right = [found["results"]["next"]["acc,none"] for found in (in_float, in_int8)]
    assert 0.6 < right[0] < 1 and abs(right[0] - right[1]) <= 0.02


def test_a_real_model_has_as_many_bits_a_byte_in_8_bits(real: Any, tmp_path: Path) -> None:
    plain, packed, tokenizer = real
    text = topics["customization"][:6000]
    task = write_task(tmp_path, "stream", ROLLING, [{"text": text}])
    found = [
        run_tasks(scorer_of(model, tokenizer, 512), task)["results"]["stream"]["bits_per_byte,none"]
        for model in (plain, packed)
    ]
    assert 0.3 < found[0] < 2 and found[1] == pytest.approx(found[0], rel=0.005)
