"""The zoo benchmark runs at tiny sizes, loads within its bound, and predicts what bytes give."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # as in test_benchmarks.py

from benchmarks import run, zoo_table
from benchmarks.card import Card
from benchmarks.gpu_session.steps import ZOO
from benchmarks.gpu_session.summary import summary_of
from benchmarks.harness import Result, Sample, Settings, Variant
from benchmarks.random_model import random_weights
from benchmarks.report import DOCUMENTS, ROOT, with_tables
from benchmarks.zoo import add_arguments, config_of, title
from benchmarks.zoo_model import PUBLISHED, Sizes, planned
from benchmarks.zoo_prediction import ANEW, ENCODER, ONCE, of_phase, predictions
from bminf.arch.t5 import CPM2, T5Config
from bminf.cli import plan as plan_command
from bminf.cli.measure import rss_anon_bytes
from bminf.offload.backends.cuda import allocated_bytes
from bminf.offload.plan import least_budget, plan
from bminf.quantization.packed import FORMATS, Format, PackedWeight, codes_of, dequantize

TINY = (
    "--device", "cpu", "--layers", "4", "--hidden-size", "64", "--intermediate-size", "80",
    "--heads", "4", "--head-size", "8", "--vocabulary", "64", "--prompt-length", "8",
    "--steps", "5", "--max-length", "16",
)  # fmt: skip
QUICK = ("--warmup", "0", "--repeats", "2")
TINY_CONFIG = T5Config(64, 64, 80, 4, 8, 4, 4)
PHASES = ["encoder", "decoder, projections anew", "decoder, projections once"]
CARD = Card("a card", 6 * 10**9, 12 * 10**9, 150 * 10**9)


def results_of(file: Path) -> tuple[dict[str, Any], list[Any], list[Any]]:
    """The content of a file, what was measured, what was predicted."""
    content = json.loads(file.read_text())
    measured = [result for result in content["results"] if "prediction" not in result]
    return content, measured, [r for r in content["results"] if "prediction" in r]


# ---- the case ------------------------------------------------------------------------------------


def test_zoo_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, limits = tmp_path / "zoo.json", ("300KB", "1GB")
    options = ("--memory-limit", *limits, "--quantization", "int8", "int4")
    assert run.main(["zoo", *TINY, *QUICK, *options, "--out", str(file)]) == 0
    content, measured, predicted = results_of(file)
    assert len(measured) == 2 * len(limits) * len(PHASES)
    assert [result["details"]["phase"] for result in measured] == PHASES * 4
    assert all(len(result["samples"]) == 2 for result in measured)
    assert content["parameters"]["config"] == vars(TINY_CONFIG)
    assert "4 + 4 layers of 24 + 24" in content["parameters"]["model"]
    for result in measured:
        details, is_encoder = result["details"], result["details"]["phase"] == "encoder"
        assert details["tokens"] == (8 if is_encoder else 5)
        mean_s = sum(sample["wall_s"] for sample in result["samples"]) / 2
        assert details["tokens_per_s"] == pytest.approx(details["tokens"] / mean_s)
        assert details["planned_bytes"] <= details["memory_limit"]
        assert details["resident"] + details["streamed"] == 12
    printed = capsys.readouterr().out
    assert all(result["name"] in printed for result in [*measured, *predicted])
    text = zoo_table.table(content)
    assert all(f"| {result['name']} |" in text for result in [*measured, *predicted])


def test_streamed_bytes_are_those_of_the_plan_and_give_the_same(tmp_path: Path) -> None:
    file = tmp_path / "zoo.json"
    tiny = Sizes(TINY_CONFIG, torch.float32, "int8", max_length=16)
    limit = planned(tiny, 10**9)[1].least_limit  # of this CPU, whose products hold what they need
    options = ("--memory-limit", str(limit), "1GB", "--steps", "16")  # many beside a wrong guess
    run.main(["zoo", *TINY, *QUICK, *options, "--out", str(file)])
    _, measured, _ = results_of(file)
    streamed, resident = measured[:3], measured[3:]
    digests = [
        [result["details"]["result_sha256"] for result in each] for each in (streamed, resident)
    ]
    assert digests[0] == digests[1] and digests[0][1] == digests[0][2] != digests[0][0]
    assert all(result["details"]["copied_bytes_per_step"] == 0 for result in resident)
    _, the_plan = planned(tiny, limit)
    sizes = {block.name: (block.list_name, block.nbytes) for block in the_plan.blocks}
    moved = [sizes[name] for name in the_plan.streamed]
    most = max(nbytes for _, nbytes in sizes.values())
    encoder, anew, once = (result["details"] for result in streamed)
    expected = {name: sum(n for held, n in moved if held == name) for name, _ in sizes.values()}
    per_step = [
        expected["encoder.layers"],
        expected["cross_projections.layers"] + expected["decoder.layers"],
        expected["decoder.layers"],
    ]
    assert 0 < per_step[2] < per_step[1] and per_step[0] > 0
    for details, nbytes in zip((encoder, anew, once), per_step, strict=True):
        assert details["streamed_bytes_per_step"] == nbytes
        num_steps = 3 * details["steps"]  # a checked run and two timed ones
        # Besides: what is copied ahead across phases, and the projections that are run once.
        beyond = details["copied_bytes_per_step"] * num_steps - nbytes * num_steps
        once_a_run = expected["cross_projections.layers"] if details is once else 0
        assert abs(beyond - 3 * once_a_run) <= 3 * 4 * most
        assert details["link_gbps"] > 0


def test_models_are_left_out_when_the_time_is_over(tmp_path: Path) -> None:
    file = tmp_path / "zoo.json"
    threads = torch.get_num_threads()
    run.main(["zoo", *TINY, *QUICK, "--seconds", "-1", "--threads", "1", "--out", str(file)])
    content, measured, predicted = results_of(file)
    assert content["parameters"]["left_out"] == ["cpu int8 no limit"]
    assert not measured and predicted
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("num_phases", [0, 1, 3, 4])
def test_a_stopped_run_leaves_the_phases_it_measured(
    num_phases: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Phases are measured in groups of one and two; the model that is not done is left out."""
    file, measured = tmp_path / "zoo.json", list[str]()

    def stopped_later(variants: list[Variant], settings: Settings) -> list[Result]:
        if len(measured) == num_phases:
            raise KeyboardInterrupt
        measured.extend(variant.name for variant in variants)
        details = {"tokens": 1, "is_bound": False}
        return [Result(v.name, [Sample(0, 1.0, 1.0)], details=dict(details)) for v in variants]

    monkeypatch.setattr("benchmarks.model_run.harness.measure", stopped_later)
    limits = ("--memory-limit", "1GB", "300KB")
    with pytest.raises(KeyboardInterrupt):
        run.main(["zoo", *TINY, *QUICK, *limits, "--out", str(file)])
    content, results, predicted = results_of(file)
    assert [result["name"] for result in results] == measured and predicted
    names = ["cpu int8 1 GB", "cpu int8 300 KB"]
    assert content["parameters"]["left_out"] == names[num_phases // 3 :]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--memory-limit", "1GB", "1KB"), "below the least"),
        (("--memory-limit", "1XB"), "unknown unit"),
        (("--link", "fast"), "--link"),
        (("--card-limit", "1GB"), "below the least"),
        (("--steps", "17"), "--max-length"),
        (("--layers", "0"), "2"),
        (("--quantization", "int2"), "2"),
    ],
)
def test_wrong_usage_ends_before_anything_is_made(
    options: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.zoo_run.Run.parts", lambda *_: pytest.fail("measured"))
    with pytest.raises(SystemExit) as exit:
        run.main(["zoo", *TINY, *options])
    assert message in str(exit.value)


def test_the_sizes_are_those_of_cpm2_unless_others_are_given() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert config_of(parser.parse_args([])) == PUBLISHED
    assert title(PUBLISHED).startswith("CPM-2")
    shortened = config_of(parser.parse_args(["--layers", "2"]))
    assert shortened == replace(PUBLISHED, num_encoder_layers=2, num_decoder_layers=2)
    assert title(shortened).startswith("CPM-2") and "2 + 2 layers of 24 + 24" in title(shortened)
    narrow = config_of(parser.parse_args(["--hidden-size", "64"]))
    assert title(narrow).startswith("a T5 of other sizes than CPM-2")


@pytest.mark.gpu
def test_zoo_case_on_a_gpu(tmp_path: Path) -> None:
    file = tmp_path / "zoo.json"
    options = ("--device", "cuda", "--memory-limit", "300KB", "1GB", "--out", str(file))
    assert run.main(["zoo", *TINY, *QUICK, *options]) == 0
    _, measured, _ = results_of(file)
    digests = [result["details"]["result_sha256"] for result in measured]
    assert digests[:3] == digests[3:] and measured[0]["details"]["streamed"] > 0
    assert all(result["peak_cuda_bytes"] for result in measured)


# ---- random weights ------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [*FORMATS.values(), Format(4, 32, has_minimum=True)])
def test_random_weights_are_packed_weights_of_the_right_size(form: Format) -> None:
    from bminf.models.assemble import Formats, assemble
    from bminf.models.source import check_shapes, sizes_of

    config = replace(TINY_CONFIG, hidden_size=200, intermediate_size=328)  # rows with padding
    source = sizes_of(CPM2, config, "tiny")
    weights = random_weights(assemble(source, Formats(form), torch.float32).network)
    network = sizes_of(CPM2, config, "tiny").network
    check_shapes(network, weights, CPM2.blocks(network))
    down = "decoder.layers.3.feed_forward.down"
    fields = {
        key: weights.tensors[f"{down}.{key}"].read()
        for key in ("qweight", "scale", "minimum", "code_sum")
        if f"{down}.{key}" in weights.tensors
    }
    packed = PackedWeight(
        fields["qweight"],
        fields["scale"].contiguous(),
        fields["minimum"].contiguous() if form.has_minimum else None,
        328,
        form.group_size,
        fields.get("code_sum"),
    )
    packed.check()
    assert packed.form == form
    if packed.code_sum is not None:
        assert torch.equal(packed.code_sum, codes_of(packed).sum(1, dtype=torch.int32))
    assert not packed.qweight[:, 328 * form.bits // 8 :].any()
    weight = dequantize(packed, torch.float32)
    assert weight.std().item() == pytest.approx(328**-0.5, rel=0.05)
    assert len(weight.unique()) > 10


LOADING = """
import json, sys, torch
from pathlib import Path
from benchmarks.zoo_model import Sizes, loaded, planned
from bminf.arch.t5 import T5Config
from bminf.cli.measure import PeakMemory, rss_anon_bytes
from bminf.offload.backends.cpu import CpuBackend
from bminf.offload.plan import least_budget

sizes = Sizes(T5Config(64, 1024, 4096, 16, 64, 3, 3), torch.float32, "int8", max_length=16)
assembly, whole = planned(sizes, 10**9)
limit = least_budget(whole) if sys.argv[1] == "least" else whole.budget
_, plan = planned(sizes, limit)
torch.ones(2**20).sum()  # what torch sets up at its first operation
with PeakMemory(is_cuda=False, baseline_bytes=rss_anon_bytes()) as peak:
    with loaded(sizes, limit, CpuBackend(), Path(sys.argv[2])) as opened:
        assert opened.scheduler.plan.streamed == plan.streamed
print(json.dumps([peak.peak_bytes, plan.total_bytes, assembly.blobs.nbytes]))
"""


@pytest.mark.skipif(rss_anon_bytes() is None, reason="the system does not tell RssAnon")
@pytest.mark.parametrize("limit", ["whole", "least"])
def test_loading_takes_the_packed_model_and_little_more(limit: str, tmp_path: Path) -> None:
    """In a process of its own: what others have freed would be taken again without a trace."""
    done = subprocess.run(
        [sys.executable, "-c", LOADING, limit, str(tmp_path)],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    peak_bytes, planned_bytes, packed_bytes = json.loads(done.stdout)
    # The largest weight, which all others are views of, and what malloc keeps.
    assert peak_bytes <= planned_bytes + 1024 * 4096 + 2 * 10**7
    assert packed_bytes > 9 * 10**7  # so that a second copy, or wider weights, would be seen


# ---- the prediction ------------------------------------------------------------------------------


def linear_bytes(out_features: int, in_features: int, bits: int) -> int:
    """Codes, and a float32 scale and a sum a row, or a half-precision scale for 16 columns."""
    scales = 8 * out_features if bits == 8 else 2 * out_features * in_features // 16
    return out_features * in_features * bits // 8 + scales


@pytest.mark.parametrize(("quantization", "bits"), [("int8", 8), ("int4", 4)])
def test_prediction_by_hand(quantization: str, bits: int) -> None:
    hidden, inner, wide, num_layers = 4096, 64 * 64, 10240, 24
    norm = 2 * hidden
    attention = linear_bytes(3 * inner, hidden, bits) + linear_bytes(hidden, inner, bits)
    feed_forward = 2 * linear_bytes(wide, hidden, bits) + linear_bytes(hidden, wide, bits)
    cross = linear_bytes(inner, hidden, bits) + linear_bytes(hidden, inner, bits)
    encoder_layer = attention + feed_forward + 2 * norm
    decoder_layer = encoder_layer + cross + norm
    projection = linear_bytes(2 * inner, hidden, bits)
    encoder_layer, decoder_layer, projection = (
        allocated_bytes(nbytes) for nbytes in (encoder_layer, decoder_layer, projection)
    )
    encoder, anew, once = predictions(CARD, [quantization])
    assert {block.nbytes for block in once.plan.blocks if block.list_name == "decoder.layers"} == {
        decoder_layer
    }
    streamed = [name.rpartition(".")[0] for name in once.plan.streamed]
    copied = {
        "encoder": streamed.count("encoder.layers") * encoder_layer,
        "projections": streamed.count("cross_projections.layers") * projection,
        "decoder": streamed.count("decoder.layers") * decoder_layer,
    }
    link, memory = CARD.link_bytes_per_s, CARD.memory_bytes_per_s
    decoder_read_s = num_layers * decoder_layer / memory
    assert once.prediction.compute_s == pytest.approx(decoder_read_s)
    assert once.prediction.copy_s == pytest.approx(copied["decoder"] / link)
    # Copies hide behind computation and it behind them, all but one block of either.
    assert once.prediction.pass_s == pytest.approx(
        max(decoder_read_s, copied["decoder"] / link), rel=0.02
    )
    assert anew.prediction.copy_s == pytest.approx(
        (copied["projections"] + copied["decoder"]) / link
    )
    assert anew.prediction.compute_s == pytest.approx(
        decoder_read_s + num_layers * projection / memory
    )
    assert encoder.prediction.copy_s == pytest.approx(copied["encoder"] / link)
    assert encoder.tokens_per_s == pytest.approx(256 / encoder.prediction.pass_s)
    assert anew.prediction.pass_s >= max(anew.prediction.copy_s, anew.prediction.compute_s)
    assert once.plan.total_bytes <= CARD.memory_limit


def test_more_memory_is_never_slower_and_projecting_anew_never_faster() -> None:
    for quantization in FORMATS:
        sizes = Sizes(PUBLISHED, torch.float16, quantization)
        _, whole = planned(sizes, 10**11)
        before = float("inf")
        for limit in range(least_budget(whole), whole.total_bytes + 10**9, 250 * 10**6):
            the_plan = plan(
                whole.blocks,
                limit,
                CPM2.uses,
                outside_bytes=whole.outside_bytes,
                reserved_bytes=whole.reserved_bytes,
            )
            now = of_phase(the_plan, CARD, ONCE).pass_s
            assert now <= before * (1 + 1e-9), limit
            assert of_phase(the_plan, CARD, ANEW).pass_s > now
            before = now
        assert not the_plan.streamed
        assert of_phase(the_plan, CARD, ENCODER).copy_s == 0


def test_the_prediction_alone_needs_no_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.zoo_run.Run.parts", lambda *_: pytest.fail("measured"))
    file = tmp_path / ZOO
    assert run.main(["zoo", "--predict-only", "--out", str(file)]) == 0
    _, measured, predicted = results_of(file)
    assert not measured and len(predicted) == len(FORMATS) * len(PHASES)
    once = next(result for result in predicted if not result["is_bound"])
    assert once["details"]["phase"] == PHASES[2] and once["details"]["quantization"] == "int8"
    assert once["details"]["card"]["memory_limit"] == 6 * 10**9
    assert 4.4 in once["published_tokens_per_s"].values()
    printed = capsys.readouterr().out
    assert "4.4 (BMInf" in printed and "GTX 1060 6 GB" in printed and "at most" in printed
    assert f"{once['prediction']['tokens_per_s']:.1f}" in printed
    assert printed.strip() in summary_of(tmp_path, [])


def test_the_card_has_the_speeds_that_bminf_plan_assumes() -> None:
    ours, theirs = argparse.ArgumentParser(), argparse.ArgumentParser()
    add_arguments(ours)
    plan_command.add_arguments(theirs)
    for option in ("link", "memory_bandwidth"):
        assert ours.get_default(option) == theirs.get_default(option)


def test_the_page_of_the_benchmarks_shows_what_is_in_the_json_file() -> None:
    page = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    assert "benchmarks/README.md" in DOCUMENTS and "<!-- zoo-cpu.json -->" in page
    assert with_tables(page) == page
