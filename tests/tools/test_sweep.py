"""The sweep over architectures sees what is wrong, and its parts do what they say."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from streaming import make_stack
from tiny_models import make

from tools.sweep import __main__ as command
from tools.sweep.candidates import Candidate, candidates
from tools.sweep.check import Wrong, check, compare, held_bytes, prepare
from tools.sweep.shrink import LAYERS, VOCABULARY, Shrinker

pytestmark = pytest.mark.slow  # the fixture takes ten seconds

BROKEN = ("NotTheSame", "ForeignError", "EndsTheProcess", "Stateful")
CHOSEN = {
    "llama": "LlamaForCausalLM",
    "t5": "T5ForConditionalGeneration",
    "swin": "SwinModel",
    "broken": " ".join(f"sweep_broken.{name}" for name in BROKEN),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of one run over CHOSEN, in one worker."""
    chosen = [Candidate("transformers", f, n) for f, names in CHOSEN.items() for n in names.split()]
    file = tmp_path_factory.mktemp("sweep") / "sweep.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "candidates", lambda libraries: chosen)
        options = ["--workers", "1", "--timeout", "300", "--out", str(file)]
        code = command.main(["--libraries", "transformers", *options])
    assert code == 1  # some are wrong
    document: dict[str, Any] = json.loads(file.read_text())
    return document


def outcome_of(results: dict[str, Any], family: str, name: str) -> dict[str, Any]:
    found: dict[str, Any] = results["results"][f"transformers:{family}:{name}"]
    return found


@pytest.mark.parametrize(("family", "generates"), [("llama", True), ("t5", True), ("swin", False)])
def test_what_streams_is_ok(results: dict[str, Any], family: str, generates: bool) -> None:
    outcome = outcome_of(results, family, CHOSEN[family])
    assert (outcome["outcome"], outcome["reason"]) == ("ok", "")
    assert outcome["generates"] is generates
    assert 0 < outcome["num_streamed"] <= outcome["num_blocks"]
    assert outcome["bytes_copied"] > 0 and 0 < outcome["least_part"] < 1


@pytest.mark.parametrize(
    ("name", "outcome", "reason"),
    [
        ("NotTheSame", "WRONG", "pass 1: Tensor-likes are not equal! Mismatched elements: 1 / "),
        ("ForeignError", "WRONG", "RuntimeError: no such luck"),
        ("EndsTheProcess", "WRONG", "the process ended with code 3"),
        ("Stateful", "refused", "UnsupportedModelError: "),
    ],
)
def test_what_is_wrong_is_seen(
    results: dict[str, Any], name: str, outcome: str, reason: str
) -> None:
    found = outcome_of(results, "broken", f"sweep_broken.{name}")
    assert found["outcome"] == outcome and reason in found["reason"]


def outcome_with(model: torch.nn.Module, **given: Any) -> Any:
    prepared = prepare([lambda: model], lambda _: [given])
    return check(*prepared) if isinstance(prepared, tuple) else prepared


def test_a_model_that_two_slots_hold_is_resident() -> None:
    assert outcome_with(make_stack(num_blocks=2), x=torch.ones(3, 16)).outcome == "resident"


@dataclass
class PerLayer:
    """As the configuration of a model whose layers differ."""

    head_dim: int = 8

    def __getattribute__(self, name: str) -> Any:
        if name == "head_dim":
            raise KeyError("it differs from layer to layer")
        return super().__getattribute__(name)


def test_experts_by_need_and_fields_that_raise_are_counted_right() -> None:
    model = make("mixtral")
    model.model.kept = PerLayer()
    given = {"input_ids": torch.tensor([[5, 6, 7]]), "use_cache": False}
    prepared = prepare([lambda: model], lambda _: [given])
    assert isinstance(prepared, tuple)
    found = check(*prepared, "int8")  # of which the dense parts fit in what the sweep gives
    assert found.outcome == "resident", found.reason


def test_a_model_that_does_not_run_by_itself_is_not_built() -> None:
    found = outcome_with(make_stack(), x=torch.ones(3, 15))
    assert found.outcome == "not built" and "running: RuntimeError" in found.reason


def test_weights_that_unwrap_gives_back_changed_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    import bminf

    unwrap = bminf.unwrap

    def spoil(model: torch.nn.Module) -> torch.nn.Module:
        with torch.no_grad():
            unwrap(model).layers[3].shift[0] += 1
        return model

    monkeypatch.setattr(bminf, "unwrap", spoil)
    found = outcome_with(make_stack(), x=torch.ones(3, 16))
    assert found.outcome == "WRONG" and found.reason.startswith("Wrong: after unwrap: ")
    assert "output.layers.3.shift" in found.reason


def test_bytes_that_are_not_counted_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    from tools.sweep import check as module

    monkeypatch.setattr(module, "held_bytes", lambda model: held_bytes(model) + 4)
    found = outcome_with(make_stack(), x=torch.ones(3, 16))
    assert found.outcome == "WRONG" and "the plan counts" in found.reason


def test_held_bytes_count_shared_memory_once() -> None:
    model = make_stack()
    before = held_bytes(model)
    model.tied = model.layers[0].up.weight
    model.register_buffer("part", model.layers[1].up.weight.detach()[2:4])
    assert held_bytes(model) == before == sum(t.nbytes for t in make_stack().state_dict().values())


@pytest.mark.parametrize(
    ("given", "expected", "what"),
    [
        ([torch.tensor([1.0, torch.nan])], [torch.tensor([1.0, 2.0])], "elements: 1 / 2"),
        ({"a": torch.ones(2)}, {"a": torch.ones(2, dtype=torch.half)}, "dtype"),
        ({"a": torch.ones(2)}, {"a": torch.ones(1, 2)}, "shape"),
        ({"a": torch.ones(2)}, {"b": torch.ones(2)}, "output.b"),
    ],
)
def test_what_differs_is_told(given: Any, expected: Any, what: str) -> None:
    compare(given, given, "pass 1")
    with pytest.raises(Wrong, match=f"(?s)^pass 1: .*{what}"):
        compare(given, expected, "pass 1")


def test_shrinking_keeps_relations() -> None:
    published = {
        "hidden_size": 1024, "num_attention_heads": 16, "head_dim": 64, "num_hidden_layers": 24,
        "layer_types": ["a", "b"] * 12, "vocab_size": 50000, "eos_token_id": 49999,
        "pad_token_id": None, "vision_config": {"hidden_sizes": [64, 128], "depths": [2, 2, 18]},
    }  # fmt: skip
    narrow, few = (s.shrink(published) for s in Shrinker.all_for(published)[:2])
    for small in (narrow, few):
        assert small["hidden_size"] == small["num_attention_heads"] * small["head_dim"] == 128
        assert small["num_hidden_layers"] == len(small["layer_types"]) == LAYERS
        assert small["eos_token_id"] < small["vocab_size"] == VOCABULARY
        assert small["vision_config"] == {"hidden_sizes": [8, 16], "depths": [2, 2, LAYERS]}
    assert narrow["head_dim"] == 8 and few["head_dim"] == 64


def test_every_class_of_transformers_is_a_candidate_once() -> None:
    found = candidates(["transformers"])
    names = [candidate.name for candidate in found]
    assert len(names) == len(set(names)) > 300
    assert {"LlamaForCausalLM", "T5EncoderModel", "CLIPModel", "WhisperModel"} <= set(names)
