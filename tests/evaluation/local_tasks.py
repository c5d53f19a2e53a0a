"""Tasks of lm-evaluation-harness in local files, and what a scorer is asked to make of them."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from bminf.evaluation.harness import TaskFiles, find_tasks

CONTEXT_WORDS = 6

CHOICES = """
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""

ROLLING = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: bits_per_byte
  - metric: byte_perplexity
"""

GENERATION = """
output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["word9", "never"], max_gen_toks: 5}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


def write_task(folder: Path, name: str, kind: str, items: Sequence[dict[str, Any]]) -> TaskFiles:
    """A task of that name, and the JSONL that it reads."""
    data = folder / f"{name}.jsonl"
    data.write_text("\n".join(map(json.dumps, items)))
    lines = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
    file = folder / f"{name}.yaml"
    file.write_text(f"{lines}test_split: test\n{kind.lstrip()}")
    return find_tasks([str(file)])


def next_words(number: int, seed: int = 0) -> list[dict[str, Any]]:
    """Which of two words goes on with a text: its own, or one from elsewhere in it."""
    random_of = random.Random(seed)
    words = re.findall(r"[A-Za-z]+", "\n".join(topics[name] for name in sorted(topics)))
    items = []
    for _ in range(number):
        at = random_of.randrange(len(words) - CONTEXT_WORDS - 1)
        context, right = " ".join(words[at : at + CONTEXT_WORDS]), words[at + CONTEXT_WORDS]
        wrong = random_of.choice([w for w in random_of.sample(words, 9) if w != right])
        label = random_of.randrange(2)
        choices = [f" {wrong}", f" {wrong}"]
        choices[label] = f" {right}"
        items.append({"context": context, "choices": choices, "label": label})
    return items


def answers(found: dict[str, Any], name: str) -> list[tuple[str, str, float, bool]]:
    """(context, continuation, log-probability, whether greedy) of all that was asked."""
    return [
        (*arguments[:2], *answer[0])
        for sample in found["samples"][name]
        for arguments, answer in zip(sample["arguments"], sample["resps"], strict=True)
    ]
