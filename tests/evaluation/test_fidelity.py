"""bminf/evaluation/fidelity.py: a table of formats; tools/test_perplexity.py has more of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_glm import tiny_model, tokenizer_of
from tiny_models import make

import bminf
from bminf.errors import ArgumentError, UnsupportedModelError
from bminf.evaluation import fidelity
from bminf.evaluation.fidelity import Reader, fidelities, reader_of, repacked
from bminf.quantization.packed import INT4, INT8

Load = Callable[..., Any]
TEXT = "the blocks of a layer wait on the host for the bus and the copy of a slot " * 6


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def loader(kind: Any, name: str, **arguments: Any) -> Any:
        folder = tiny_model(name).write_original(tmp_path / name)
        settings = {"device": "cpu", "quantization": None, "tokenizer": tokenizer_of(name)}
        return kind(folder, **settings, **arguments)

    return loader


def test_a_table_has_the_plain_weights_and_each_format() -> None:
    model = make("llama").eval()
    for weight in model.parameters():
        weight.data *= 8 if weight.dim() == 2 else 1  # its predictions are hardly any as they are
    reader = Reader(model, torch.randint(3, 60, (64,)), None, 32)
    plain, int8, int4 = fidelities(reader, [INT8, INT4])
    with torch.no_grad():
        windows = reader.ids.view(2, 32)
        losses = [model(own[None], labels=own[None]).loss.item() for own in windows]
    assert plain.perplexity == pytest.approx(math.exp(sum(losses) / 2), rel=1e-5)
    assert (plain.name, plain.bits_per_weight, plain.ratio, plain.kl) == ("fp32", 32, 1, 0)
    assert (int8.name, int4.name) == (
        "int8 row symmetric", "int4 g16 symmetric, 8-bit scales",
    )  # fmt: skip
    assert 0 < int8.kl < int4.kl and int4.bits_per_weight < int8.bits_per_weight
    assert int4.ratio == int4.perplexity / plain.perplexity


@pytest.mark.parametrize(("kind", "name"), [(bminf.models.GLM, "glm130b"),
    (bminf.models.GLM, "glm10b"), (bminf.models.BLOOM, "bloom")])  # fmt: skip
def test_models_of_the_zoo_are_read(kind: Any, name: str, load: Load) -> None:
    with load(kind, name, max_length=34) as model:
        reader = reader_of(model, TEXT, most=64, window=32)
        ids = list(model.tokenizer.encode(TEXT))[:64]
        assert reader.ids.tolist() == ids and len(reader.linears) > 4
        losses = [window_loss(model, ids[start : start + 32]) for start in (0, 32)]
        assert reader.plain["nll"] == pytest.approx(losses, abs=2e-6)
        packed = reader.read(None, partial(repacked, form=INT4))
        assert packed["kl"][0] > 0.0 == reader.plain["kl"][0]
        assert reader.read(None, torch.clone)["nll"] == pytest.approx(losses, abs=2e-6)


def window_loss(model: Any, ids: list[int]) -> float:
    """Of all tokens but the first, as the model's own methods tell it."""
    if isinstance(model, bminf.models.GLM):
        steps = model._answer_logits(ids)[:-1].log_softmax(-1)
        whole = model._window_loss(ids, 0)  # of the first, too
        logs = steps.gather(1, torch.tensor(ids[1:])[:, None])
        first = model.model.head(model._answer_states([], [])).log_softmax(-1)[0, ids[0]]
        assert whole == pytest.approx(-float(logs.sum() + first), rel=1e-5)
        return -float(logs.mean())
    return -sum(model._scored([ids])[0]) / (len(ids) - 1)


def test_windows_are_as_long_as_the_model_has_room_for(load: Load) -> None:
    with load(bminf.models.GLM, "glm130b", max_length=20) as model:
        assert len(reader_of(model, TEXT).plain["nll"]) == len(model.tokenizer.encode(TEXT)) // 18


def test_what_cannot_be_read_is_told(load: Load) -> None:
    with load(bminf.models.CPM2, "cpm2") as model:
        with pytest.raises(UnsupportedModelError, match="has an encoder"):
            reader_of(model, "今天")
    with pytest.raises(ArgumentError, match="5 tokens do not fill a window of 512"):
        Reader(make("llama"), torch.arange(5))


def test_weights_that_are_not_packed_are_told() -> None:
    """Experts in stacks; and GPT-2 has its weights in modules of transformers."""
    ids = torch.randint(3, 60, (32,))
    with pytest.warns(UserWarning, match=r"\d+% of the weights, such as .*experts.*, are in no"):
        Reader(make("mixtral"), ids, None, 32)
    with pytest.raises(UnsupportedModelError, match="GPT2LMHeadModel has no torch"):
        Reader(make("gpt2"), ids, None, 32)


def test_names_are_those_of_the_documentation() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "quantization.md").read_text()
    assert all(f"| {fidelity.name_of(form)} |" in page for form in fidelity.FORMATS)
