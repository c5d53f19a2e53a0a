"""The perplexity benchmark on a tiny random model, and the table in the document it is for."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

# Benchmarks are not installed; at the end of the path, so that an installed bminf is found first.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import perplexity
from benchmarks import report as table
from bminf.cli import models
from bminf.quantization.packed import INT4, INT8, Format


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=96,
        intermediate_size=80,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=128,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def windows(count: int) -> torch.Tensor:
    return torch.randint(0, 128, (count, perplexity.WINDOW), generator=torch.Generator())


def test_fp32_is_what_the_model_says_its_loss_is(model: LlamaForCausalLM) -> None:
    reader = perplexity.Reader(model, windows(2))
    with torch.no_grad():
        losses = [model(window[None], labels=window[None]).loss.item() for window in windows(2)]
    assert reader.plain.perplexity == pytest.approx(math.exp(sum(losses) / 2), rel=1e-5)
    assert reader.plain.kl == [0.0]


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_weights_are_replaced_by_what_packing_leaves_of_them(
    model: LlamaForCausalLM, seed: int | None
) -> None:
    reader = perplexity.Reader(model, windows(1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    same = reader.read(seed, torch.clone)
    assert same.nll == pytest.approx(reader.plain.nll, abs=2e-6)
    assert same.kl == pytest.approx([0.0], abs=2e-6)
    gone = reader.read(seed, torch.zeros_like)
    assert gone.kl[0] > 0.01
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_grid_of_neighbouring_columns_is_found_only_in_their_own_order(
    model: LlamaForCausalLM,
) -> None:
    form = Format(4, group_size=16, has_minimum=True)
    for linear in perplexity.quantized_linears(model):
        linear.weight.data = perplexity.repacked(linear.weight.data, form)
    reader = perplexity.Reader(model, windows(1))
    result = perplexity.measure(reader, [form], [0, 1])[1].as_json()
    assert result["own_order"]["kl"]["max"] < 1e-5
    assert result["permuted"]["kl"]["min"] > 1e-4
    assert [sample["seed"] for sample in result["samples"]] == [None, 0, 1]


def test_the_head_stays_as_it_is(model: LlamaForCausalLM) -> None:
    linears = perplexity.quantized_linears(model)
    assert len(linears) == 7
    assert all(linear is not model.lm_head for linear in linears)


def test_bits_are_weighted_by_the_size_of_the_linears() -> None:
    linears = [torch.nn.Linear(64, 1), torch.nn.Linear(96, 2)]
    form = Format(4, group_size=64)
    bits = [form.bits_per_weight(columns) for columns in (64, 96)]
    assert perplexity.mean_bits(linears, form) == pytest.approx(
        (64 * bits[0] + 192 * bits[1]) / 256
    )


@pytest.mark.parametrize(
    ("form", "name"),
    [
        (Format(8), "int8 row symmetric"),
        (Format(4, 32, has_minimum=True), "int4 g32 minimum"),
        (Format(4), "int4 row symmetric"),
    ],
)
def test_names(form: Format, name: str) -> None:
    assert perplexity.name_of(form) == name


def test_a_text_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(ValueError, match="3 tokens do not fill a window of 512"):
        perplexity.windows_of([1, 2, 3], 600)


def test_the_command(
    model: LlamaForCausalLM,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def tokenizer(text: str) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode("ascii", "replace"))}

    monkeypatch.setattr(models, "load_model", lambda source, dtype: model)
    monkeypatch.setattr(models, "load_tokenizer", lambda source: tokenizer)
    file, threads = tmp_path / "perplexity.json", torch.get_num_threads()
    options = ["--model", "tiny.gguf", "--tokens", "600", "--seeds", "1", "--out", str(file)]
    assert perplexity.main(options) == 0
    assert torch.get_num_threads() == threads
    content = json.loads(file.read_text())
    assert content["parameters"]["model"] == "tiny"
    assert content["parameters"]["text"] == "pydoc_data.topics"
    assert content["parameters"]["windows"] == 1
    names = ["fp32", *map(perplexity.name_of, perplexity.FORMATS)]
    assert [result["name"] for result in content["results"]] == names
    assert content["results"][1]["permuted"] == content["results"][1]["own_order"]
    assert table.table(content) in capsys.readouterr().out


def test_text_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("Zwölf", encoding="utf-8")
    assert perplexity.read_text(tmp_path / "text") == "Zwölf"


def committed() -> dict[str, Any]:
    path = table.ROOT / "benchmarks" / "results" / "perplexity.json"
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return {result["name"]: result for result in content["results"]}


def test_the_table_of_the_document_is_that_of_the_json_file() -> None:
    text = (table.ROOT / "docs" / "quantization.md").read_text(encoding="utf-8")
    assert "<!-- perplexity.json -->" in text
    assert table.with_tables(text) == text


def test_the_summaries_of_the_committed_results_are_those_of_their_samples() -> None:
    results = committed()
    for result in results.values():
        own, *permuted = [perplexity.Sample(**sample) for sample in result["samples"]]
        plain = perplexity.Sample(**results["fp32"]["samples"][0])
        assert own.perplexity == pytest.approx(result["own_order"]["perplexity"]["median"])
        kl = perplexity.summary([sample.mean_kl for sample in permuted or [own]])
        assert kl == pytest.approx(result["permuted"]["kl"])
        ratio = own.perplexity / plain.perplexity
        assert ratio == pytest.approx(result["own_order"]["ratio"]["median"])


def test_what_the_document_says_of_short_texts() -> None:
    results = committed()
    plain, int8 = (results[name]["samples"][0]["nll"] for name in ("fp32", "int8 row symmetric"))
    differences = [after - before for after, before in zip(int8, plain, strict=True)]
    runs = [math.exp(sum(differences[i : i + 8]) / 8) for i in range(len(differences) - 7)]
    text = (table.ROOT / "docs" / "quantization.md").read_text(encoding="utf-8")
    assert f"from {min(runs):.4f} to {max(runs):.4f} for eight windows" in text
    ratio = results["int8 row symmetric"]["own_order"]["ratio"]["median"]
    assert f"stands at {ratio:.4f} for" in " ".join(text.split())


def test_the_defaults_keep_what_the_document_says() -> None:
    results = committed()
    int8, int4 = (results[perplexity.name_of(form)] for form in (INT8, INT4))
    assert int8["own_order"]["ratio"]["max"] <= 1.004
    assert int4["own_order"]["ratio"]["max"] <= 1.40
    assert int4["bits_per_weight"] <= 0.32 * 16
    rivals = [
        result
        for result in results.values()
        if result["name"].startswith("int4") and result["bits_per_weight"] <= 0.32 * 16
    ]
    for key in ("ratio", "kl"):
        assert min(rivals, key=lambda rival: rival["permuted"][key]["median"]) == int4
