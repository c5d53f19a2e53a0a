"""The evaluation of formats on a tiny random model, and what its document says of the results."""

from __future__ import annotations

import json
import math
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import report, run
from benchmarks.harness import Settings
from bminf.cli import models
from bminf.errors import ArgumentError
from bminf.quantization.packed import INT4, INT8, Format
from bminf.quantization.packing import DIVISORS
from tools import perplexity
from tools.other_formats import OTHER_FORMATS, OtherFormat, Stored


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


def reader_of(model: LlamaForCausalLM, num_tokens: int = perplexity.WINDOW) -> perplexity.Reader:
    return perplexity.Reader(model, torch.randint(0, 128, (num_tokens,)))


def test_fp32_is_what_the_model_says_its_loss_is(model: LlamaForCausalLM) -> None:
    reader = reader_of(model, 2 * perplexity.WINDOW + 7)
    assert len(reader.ids) == 2 * perplexity.WINDOW
    with torch.no_grad():
        windows = reader.ids.view(2, 1, -1)
        losses = [model(window, labels=window).loss.item() for window in windows]
    assert reader.plain["nll"] == pytest.approx(losses, rel=1e-5)
    assert reader.plain["kl"] == [0.0]
    with pytest.raises(ArgumentError, match="3 tokens do not fill a window of 512"):
        reader_of(model, 3)


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_weights_are_replaced_by_what_packing_leaves_of_them(
    model: LlamaForCausalLM, seed: int | None
) -> None:
    reader = reader_of(model)
    assert len(reader.linears) == 7 and model.lm_head not in reader.linears
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    same = reader.read(seed, torch.clone)
    assert same["nll"] == pytest.approx(reader.plain["nll"], abs=2e-6)
    assert same["kl"] == pytest.approx([0.0], abs=2e-6)
    gone = reader.read(seed, torch.zeros_like)
    assert gone["kl"][0] > 0.01
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_the_head_is_packed_where_that_is_asked_for(model: LlamaForCausalLM) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight  # which stays, as it is read by row
    ids = torch.randint(0, 128, (perplexity.WINDOW,))
    readers = [perplexity.Reader(model, ids, head) for head in (None, INT8)]
    plain, packed = (reader.read(None, torch.clone) for reader in readers)
    assert readers[0].plain == readers[1].plain and plain["kl"] == pytest.approx([0], abs=2e-6)
    assert 2e-6 < packed["kl"][0] < 1e-2
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_grid_of_neighbouring_columns_is_found_only_in_their_own_order(
    model: LlamaForCausalLM,
) -> None:
    form = Format(4, group_size=16, has_minimum=True)
    for linear in reader_of(model).linears:
        linear.weight.data = perplexity.repacked(linear.weight.data, form)
    ((result,),) = perplexity.measure(reader_of(model), form, [0, 1], Settings())
    assert result["own_order"]["kl"]["max"] < 1e-5
    assert result["permuted"]["kl"]["min"] > 1e-4
    assert [sample["seed"] for sample in result["samples"]] == [None, 0, 1]


def test_other_divisors_are_for_integer_scales(model: LlamaForCausalLM) -> None:
    def kl(form: Format, *divisors: float) -> float:
        reader = reader_of(model)
        ((result,),) = perplexity.measure(reader, form, [0], Settings(), divisors or DIVISORS)
        return float(result["own_order"]["kl"]["median"])

    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    found = {}
    for form in (INT4, Format(4, 16)):
        for divisors in ((), (6.0,)):
            torch.random.set_rng_state(state)  # the same text
            found[form, divisors] = kl(form, *divisors)
    assert found[INT4, ()] < found[INT4, (6.0,)]
    assert found[Format(4, 16), ()] == found[Format(4, 16), (6.0,)]


def test_bits_are_weighted_by_the_size_of_the_linears() -> None:
    linears = [torch.nn.Linear(64, 1), torch.nn.Linear(96, 2)]
    form = Format(4, group_size=64)
    bits = [form.bits_per_weight(columns) for columns in (64, 96)]
    assert perplexity.mean_bits(linears, form) == pytest.approx(
        (64 * bits[0] + 192 * bits[1]) / 256
    )


def test_bits_of_another_format_are_counted_from_what_it_stores(model: LlamaForCausalLM) -> None:
    def pack(_: Any, weight: torch.Tensor) -> Stored:
        return Stored(torch.zeros_like(weight), 3 * len(weight))

    other = OtherFormat("torch", "nothing", "torch", 1, pack)
    reader = reader_of(model)
    ((result,),) = perplexity.measure_other(reader, other, [0, 1], Settings())
    assert (result["name"], result["library"]["version"]) == ("torch nothing", torch.__version__)
    num_rows = sum(len(linear.weight) for linear in reader.linears)
    num_weights = sum(linear.weight.numel() for linear in reader.linears)
    assert result["bits_per_weight"] == pytest.approx(8 * 3 * num_rows / num_weights)
    own, *permuted = result["samples"]
    assert own == reader.read(None, torch.zeros_like)
    assert [sample["seed"] for sample in permuted] == [0, 1]
    assert result["permuted"] == perplexity.summaries(permuted, reader.plain)


def test_formats_are_chosen_by_name() -> None:
    forms, others = perplexity.chosen(["int8 *", "gguf Q4_0"], OTHER_FORMATS)
    assert forms == [form for form in perplexity.FORMATS if form.bits == 8]
    assert [other.name for other in others] == ["gguf Q4_0"]
    assert perplexity.chosen(["*"], ()) == (list(perplexity.FORMATS), [])
    with pytest.raises(SystemExit, match=r"--formats 'gguf\*' is none of: int8 row symmetric, "):
        perplexity.chosen(["int8*", "gguf*"], ())


@pytest.fixture
def loaded(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is asked for, it is `model`, and a token is a letter."""

    def tokenizer(text: str) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode("ascii", "replace"))}

    monkeypatch.setattr(models, "load_model", lambda source, dtype: model)
    monkeypatch.setattr(models, "load_tokenizer", lambda source: tokenizer)


@pytest.mark.usefixtures("loaded")
def test_others_stand_beside_ours_with_their_library(
    model: LlamaForCausalLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "out.json"
    options = ["perplexity", "--model", "tiny", "--tokens", "512", "--seeds", "1", "--others"]
    options += ["--formats", "int8 row*", "gguf Q8_0", "gguf Q4_0", "--out", str(file)]
    assert run.main(options) == 0
    assert capsys.readouterr().out.splitlines()[:2] == [
        f"left out: gguf {kind}: 80 columns are no whole groups of 32" for kind in ("Q8_0", "Q4_0")
    ]
    model.model.layers[0].mlp = torch.nn.Sequential(torch.nn.Linear(96, 96, bias=False))
    assert run.main(options) == 0
    plain, int8, q8_0, q4_0 = json.loads(file.read_text())["results"]
    assert (plain["name"], int8["name"]) == ("fp32", "int8 row symmetric")
    assert q8_0["library"] == {"name": "gguf", "version": version("gguf")}
    assert q8_0["bits_per_weight"] - q4_0["bits_per_weight"] == 4
    assert 0 < q8_0["own_order"]["kl"]["median"] < q4_0["own_order"]["kl"]["median"]
    rows = capsys.readouterr().out.strip().splitlines()
    assert rows[-1].startswith(f"| gguf Q4_0 | gguf {version('gguf')} | ")
    assert rows[-3].startswith("| int8 row symmetric |  | ")


@pytest.mark.usefixtures("loaded")
def test_perplexity_case(tmp_path: Path) -> None:
    file, text, threads = tmp_path / "out.json", tmp_path / "text", torch.get_num_threads()
    text.write_text("Zwölf" * 200, encoding="utf-8")
    options = ("perplexity", "--model", "tiny.gguf", "--tokens", "600", "--seeds", "1")
    assert run.main([*options, "--text", str(text), "--out", str(file)]) == 0
    assert torch.get_num_threads() == threads
    content = json.loads(file.read_text())
    parameters = content["parameters"]
    assert (parameters["model"], parameters["windows"]) == ("tiny", 1)
    assert (parameters["text"], parameters["text_bytes"]) == ("a file", 1200)
    names = ["fp32", *map(perplexity.name_of, perplexity.FORMATS)]
    assert [result["name"] for result in content["results"]] == names
    assert content["results"][1]["permuted"] == content["results"][1]["own_order"]
    with pytest.raises(SystemExit, match="nothing is timed"):
        run.main([*options, "--repeats", "2"])


@pytest.mark.usefixtures("loaded")
def test_what_is_not_measured_is_kept_of_earlier_runs(tmp_path: Path) -> None:
    texts = {name: tmp_path / name for name in ("one", "two")}
    for name, text in texts.items():
        text.write_text(name * 400, encoding="utf-8")

    def results(*options: str, text: str = "one") -> list[dict[str, Any]]:
        file = tmp_path / "out.json"
        given = ("perplexity", "--model", "tiny.gguf", "--tokens", "600", "--seeds", "0")
        assert run.main([*given, "--text", str(texts[text]), "--out", str(file), *options]) == 0
        found: list[dict[str, Any]] = json.loads(file.read_text())["results"]
        return found

    first = results("--formats", "int4 row symmetric", "int4 g32 m*")
    earlier = tmp_path / "earlier.json"
    (tmp_path / "out.json").rename(earlier)
    both = results("--formats", "int4 row*", "int8 row*", "--keep", str(earlier))
    names = ["fp32", "int8 row symmetric", "int4 g32 minimum, 8-bit scales", "int4 g32 minimum",
             "int4 row minimum", "int4 row symmetric"]  # fmt: skip
    assert [result["name"] for result in both] == names
    kept = [result for result in both if "kept_from" in result]
    run_of = json.loads(earlier.read_text())
    assert [result["name"] for result in kept] == names[2:4]
    for result in kept:
        origin = result.pop("kept_from")
        assert origin == {key: run_of[key] for key in ("commit", "date")} and result in first
    with pytest.raises(SystemExit, match=r"earlier.json: text_sha256 is '"):
        results("--keep", str(earlier), text="two")
    changed = {**run_of, "results": [{**first[0], "samples": [{"nll": [1.0]}]}]}
    earlier.write_text(json.dumps(changed))
    with pytest.raises(SystemExit, match="fp32 reads the text otherwise"):
        results("--keep", str(earlier))


# ---- what the document says ----------------------------------------------------------------------


def committed() -> dict[str, Any]:
    path = report.ROOT / "benchmarks" / "results" / "perplexity.json"
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return {result["name"]: result for result in content["results"]}


def test_the_summaries_of_the_committed_results_are_those_of_their_samples() -> None:
    results = committed()
    of = partial(perplexity.summaries, plain=results["fp32"]["samples"][0])
    for result in results.values():
        own, *permuted = result["samples"]
        for found, key in ((of([own]), "own_order"), (of(permuted or [own]), "permuted")):
            for name, values in found.items():
                assert values == pytest.approx(result[key][name]), (result["name"], name)


def test_what_the_document_says_of_short_texts() -> None:
    results = committed()
    plain, int8 = (results[name]["samples"][0]["nll"] for name in ("fp32", "int8 row symmetric"))
    differences = [after - before for after, before in zip(int8, plain, strict=True)]
    runs = [math.exp(sum(differences[i : i + 8]) / 8) for i in range(len(differences) - 7)]
    ratio = results["int8 row symmetric"]["own_order"]["ratio"]["median"]
    text = (report.ROOT / "docs" / "quantization.md").read_text(encoding="utf-8")
    assert "lie below 1 or three times as far above" in " ".join(text.split())
    assert min(runs) < 1 and max(runs) - 1 >= 3 * (ratio - 1)


def test_the_defaults_keep_what_the_document_says() -> None:
    results = committed()
    int8, int4 = (results[perplexity.name_of(form)] for form in (INT8, INT4))
    assert int8["own_order"]["ratio"]["max"] <= 1.004
    assert int4["own_order"]["ratio"]["max"] <= 1.40
    assert int4["bits_per_weight"] <= 4.55
    rivals = [
        result
        for result in results.values()
        if result["name"].startswith("int4") and result["bits_per_weight"] <= 4.55
    ]
    for key in ("ratio", "kl"):
        assert min(rivals, key=lambda rival: rival["permuted"][key]["median"]) == int4
