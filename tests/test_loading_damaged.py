"""Folders with damaged files: bminf.load() gives one clear error, or the right model.

`BMINF_DAMAGED_CASES=5000 pytest tests/test_loading_damaged.py -s` tries as many of each kind, and
prints what became of them.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from test_saving import tokenizer_of_words
from tiny_models import LLAMA, TINY
from tiny_zoo import tiny

import bminf
from bminf.errors import BMInfError
from bminf.layout import tensors_of
from bminf.models import convert

NUM_CASES = int(os.environ.get("BMINF_DAMAGED_CASES", "20"))
IDS = torch.tensor([[1, 2, 3]])


def llama() -> Any:
    torch.manual_seed(0)
    kind, config = TINY["llama"].model, TINY["llama"].config
    return kind(config(**{**LLAMA, "num_hidden_layers": 2})).eval()


def packed(folder: Path) -> None:
    model = bminf.wrapper(llama(), "int4", device="cpu")
    bminf.save(model, folder, tokenizer_of_words())


def pickled(folder: Path) -> None:
    llama().save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(llama().state_dict(), folder / "pytorch_model.bin")


OURS: dict[str, Callable[[Path], object]] = {
    "packed": packed,
    "saved": lambda folder: bminf.save(llama(), folder),
    "saved shards": lambda folder: bminf.save(llama(), folder, max_shard_size=20_000),
    "built-in": lambda folder: convert(
        tiny("cpm1").write_original(folder.with_name("original")), folder, "int8", "cpm1"
    ),
}
OTHERS: dict[str, Callable[[Path], object]] = {
    "transformers": lambda folder: llama().save_pretrained(folder),
    "transformers shards": lambda folder: llama().save_pretrained(folder, max_shard_size="20KB"),
    "pickled": pickled,
}


pytestmark = pytest.mark.filterwarnings("ignore")  # of configurations that are odd now


def made(make: Callable[[Path], object], root: Path) -> Path:
    folder = root / "folder"
    make(folder)
    (folder / "code.py").write_text("from pathlib import Path\nPath('was_run').touch()\n")
    return folder


def damaged(folder: Path, random: Random) -> Iterator[str]:
    """What has happened to a file of the folder, which is then as before."""
    for number in range(NUM_CASES):
        path = random.choice(sorted(one for one in folder.iterdir() if one.name != "code.py"))
        content = path.read_bytes()
        way = random.choice(WAYS)
        path.write_bytes(way(bytearray(content), random))
        yield f"case {number}: {way.__name__} of {path.name}"
        path.write_bytes(content)


def place(data: bytearray, random: Random) -> int:
    """Somewhere, in most cases where it says what is where."""
    return random.randrange(min(len(data), random.choice([16, 600, 4000, len(data)])))


def flip(data: bytearray, random: Random) -> bytearray:
    data[place(data, random)] ^= 1 << random.randrange(8)
    return data


def flip_many(data: bytearray, random: Random) -> bytearray:
    for _ in range(random.randrange(2, 9)):
        flip(data, random)
    return data


def change_digit(data: bytearray, random: Random) -> bytearray:
    """A number that is another one: what still can be read."""
    digits = [at for at, byte in enumerate(data[:6000]) if chr(byte).isdigit()]
    if digits:
        data[random.choice(digits)] = ord(random.choice("0123456789"))
    return data


def cut(data: bytearray, random: Random) -> bytearray:
    return data[: random.randrange(len(data))]


def swap(data: bytearray, random: Random) -> bytearray:
    length = random.choice([1, 2, 4, 8, 8, 64, 512, 4096, random.randrange(1, len(data))])
    length = min(length, len(data) // 2)
    first = place(data, random) % (len(data) - 2 * length + 1)
    second = random.randrange(first + length, len(data) - length + 1)
    one, other = data[first : first + length], data[second : second + length]
    data[first : first + length], data[second : second + length] = other, one
    return data


def zero(data: bytearray, random: Random) -> bytearray:
    """A page that was never written."""
    start, end = place(data, random), random.choice([1, 64, 512, 4096])
    data[start : start + end] = bytes(len(data[start : start + end]))
    return data


WAYS = [flip, flip_many, change_digit, cut, swap, zero]


def contents(model: Any) -> dict[str, Any]:
    """All that makes a model what it is."""
    if isinstance(model, bminf.models.LanguageModel):
        ids = model.tokenizer.encode("a b") if model.tokenizer else []
        return {"logits": model.logits([3, 4, 5]).tolist(), "ids": ids, "config": model.config}
    tokenizer = model.tokenizer
    return {
        "tensors": {n: (t.dtype, t.tolist()) for n, _, t in tensors_of(model)},
        "config": {**model.config.to_dict(), "_name_or_path": None},
        "generation": model.generation_config.to_dict(),
        "tokenizer": tokenizer and (tokenizer("b a c").input_ids, tokenizer.special_tokens_map),
    }


@pytest.mark.parametrize("kind", OURS)
def test_our_own_folders_give_an_error_or_the_right_model(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder, outcomes = made(OURS[kind], tmp_path), Counter[str]()
    expected = contents(bminf.load(folder, device="cpu"))
    for case in damaged(folder, Random(kind)):
        try:
            model = bminf.load(folder, device="cpu")
        except BMInfError as error:
            outcomes[type(error).__name__] += 1
            continue
        assert contents(model) == expected, case
        outcomes["the right model"] += 1
    assert contents(bminf.load(folder, device="cpu")) == expected  # the folder is whole again
    report(kind, outcomes, tmp_path)


@pytest.mark.parametrize("kind", OTHERS)
def test_folders_of_others_give_an_error_or_a_model(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing there says what the bytes should be. What loads, runs."""
    monkeypatch.chdir(tmp_path)
    folder, outcomes = made(OTHERS[kind], tmp_path), Counter[str]()
    for case in damaged(folder, Random(kind)):
        try:
            model = bminf.load(folder, device="cpu")
        except BMInfError as error:
            outcomes[type(error).__name__] += 1
            continue
        assert model(IDS).logits.shape[:2] == (1, 3), case
        outcomes["a model"] += 1
    report(kind, outcomes, tmp_path)


def report(kind: str, outcomes: Counter[str], root: Path) -> None:
    print(f"\n{kind}: {dict(outcomes)}")
    assert outcomes["CheckpointError"] and outcomes.total() == NUM_CASES
    assert not list(root.rglob("was_run")), "code of the folder was run"
