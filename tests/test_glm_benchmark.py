"""The GLM benchmark runs at tiny sizes, plans as the library does, and predicts what bytes give."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # as in test_benchmarks.py

from benchmarks import glm_table, run
from benchmarks.glm import add_arguments, config_of, tasks_of, title
from benchmarks.glm_model import PUBLISHED, Sizes, planned
from benchmarks.glm_run import Task
from benchmarks.gpu_session.steps import GLM
from benchmarks.gpu_session.summary import summary_of
from benchmarks.random_model import random_weights
from benchmarks.report import DOCUMENTS, ROOT, with_tables
from bminf.arch.glm import GLM130B
from bminf.errors import ArgumentError
from bminf.layers.embedding import HostEmbedding
from bminf.models import plan_glm
from bminf.models.source import check_shapes, meta_network
from bminf.offload.predict import predict

SIZES = (
    "--layers", "3", "--hidden-size", "64", "--intermediate-size", "96", "--heads", "4",
    "--vocabulary", "128",
)  # fmt: skip
TASKS = ("--encode", "8", "--decode", "12", "--cola", "3", "8")
TINY = ("--device", "cpu", *SIZES, *TASKS)
TINY_CONFIG = replace(
    PUBLISHED, num_hidden_layers=3, hidden_size=64, intermediate_size=96, num_attention_heads=4,
    vocab_size=128,
)  # fmt: skip
NAMES = ["encode", "decode", "cola"]
GIB = 2**30


def results_of(file: Path) -> tuple[dict[str, Any], list[Any], list[Any]]:
    """The content of a file, what was measured, what was predicted."""
    content = json.loads(file.read_text())
    measured = [result for result in content["results"] if "prediction" not in result]
    return content, measured, [r for r in content["results"] if "prediction" in r]


# ---- the case ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a run with everything in it."""
    file = tmp_path_factory.mktemp("glm") / GLM
    sizes = Sizes(TINY_CONFIG, torch.float32, "int4-row", "none", batches=((3, 8), (1, 12)))
    _, whole = planned(sizes, 10**9)
    limit = whole.outside_bytes + whole.reserved_bytes + 3 * max(b.nbytes for b in whole.blocks)
    options = ("--memory-limit", str(limit), "1GB", "--head-quantization", "none")
    assert run.main(["glm", *TINY, *options, "--repeats", "2", "--out", str(file)]) == 0
    return file


def test_glm_case(written: Path) -> None:
    content, measured, predicted = results_of(written)
    assert [result["details"]["task"] for result in measured] == NAMES * 2
    assert content["parameters"]["config"] == vars(TINY_CONFIG)
    assert content["parameters"]["model"].endswith("3 of 70 layers")
    for result in measured:
        details, is_decode = result["details"], result["details"]["task"] == "decode"
        assert len(result["samples"]) == 2
        assert details["tokens"] == details["rows"] * details["length"]
        assert details["steps"] == (details["length"] if is_decode else 1)
        mean_s = sum(sample["wall_s"] for sample in result["samples"]) / 2
        assert details["tokens_per_s"] == pytest.approx(details["tokens"] / mean_s)
        assert details["planned_bytes"] <= details["memory_limit"]
    assert [result["details"]["quantization"] for result in predicted] == ["int4-row"]


def test_what_streams_is_counted_and_gives_the_same(written: Path) -> None:
    _, measured, _ = results_of(written)
    streamed, resident = measured[:3], measured[3:]
    for few, whole in zip(streamed, resident, strict=True):
        assert few["details"]["result_sha256"] == whole["details"]["result_sha256"]
        assert few["details"]["streamed"] > 0 == whole["details"]["streamed"]
        assert whole["details"]["copied_bytes_per_step"] == 0
        assert whole["details"]["link_gbps"] is whole["details"]["fraction_of_bound"] is None
    assert len({result["details"]["result_sha256"] for result in streamed}) == len(NAMES)
    details = streamed[1]["details"]  # the longest: least beside what is copied ahead
    nbytes, num_steps = details["streamed_bytes_per_step"], 3 * details["steps"]
    ahead = 2 * 2 * 96 * 64 * 4  # both slots, of no more than the largest matrix in float32
    assert abs(details["copied_bytes_per_step"] - nbytes) * num_steps <= 3 * ahead
    bound_s = nbytes / details["link_gbps"] / 1e9
    assert details["bound_s_per_step"] == pytest.approx(bound_s)
    step_s = details["steps"] / details["tokens_per_s"] / details["steps"]
    assert details["fraction_of_bound"] == pytest.approx(bound_s / step_s)


def test_the_tables_show_what_is_in_the_file(written: Path) -> None:
    content, measured, predicted = results_of(written)
    text, printed = glm_table.table(content), "\n".join(glm_table.lines(content))
    for result in [*measured, *predicted]:
        assert f"| {result['name']} |" in text and result["name"] in printed
    assert f"{predicted[0]['prediction']['tokens_per_s']:.3f}" in text
    assert printed.strip() in summary_of(written.parent, [])


def test_published_times_stand_beside_those_of_the_same_length() -> None:
    details = {"task": "decode", "length": 1024}
    assert "89 (8 x A100" in glm_table._published(details)
    assert glm_table._published(details | {"length": 1000}) == ""
    assert glm_table._published({"task": "cola", "length": 1024}) == ""


def test_models_are_left_out_when_the_time_is_over(tmp_path: Path) -> None:
    file = tmp_path / "glm.json"
    run.main(["glm", *TINY, "--seconds", "-1", "--out", str(file)])
    content, measured, predicted = results_of(file)
    assert content["parameters"]["left_out"] == ["cpu int4-row, head int8, no limit"]
    assert not measured and predicted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--memory-limit", "1GB", "1KB"), "below the least"),
        (("--memory-limit", "1XB"), "unknown unit"),
        (("--link", "fast"), "--link"),
        (("--card-limit", "1GB"), "below the least"),
        (("--decode", "2049"), "2048 positions"),
        (("--cola", "30", "1"), "--cola"),
        (("--hidden-size", "63"), "not a multiple"),
        (("--layers", "0"), "2"),
        (("--quantization", "int2"), "2"),
    ],
)
def test_wrong_usage_ends_before_anything_is_made(
    options: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.glm_run.Run.parts", lambda *_: pytest.fail("measured"))
    with pytest.raises(SystemExit) as exit:
        run.main(["glm", *TINY, *options])
    assert message in str(exit.value)


def test_the_sizes_are_those_of_glm130b_unless_others_are_given() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert config_of(parser.parse_args([])) == PUBLISHED
    assert title(PUBLISHED) == "GLM-130B"
    shortened = config_of(parser.parse_args(["--layers", "2"]))
    assert shortened == replace(PUBLISHED, num_hidden_layers=2)
    assert title(shortened) == "GLM-130B, shortened: 2 of 70 layers"
    narrow = config_of(parser.parse_args(["--hidden-size", "192"]))
    assert title(narrow).startswith("a GLM of other sizes than GLM-130B")
    assert tasks_of(parser.parse_args(["--tasks", "cola", "encode"])) == (
        *(Task("encode", length) for length in (512, 1024, 2048)),
        Task("cola", 32, 30),
    )


@pytest.mark.gpu
def test_glm_case_on_a_gpu(tmp_path: Path) -> None:
    file = tmp_path / "glm.json"
    sizes = Sizes(TINY_CONFIG, torch.float16, "int4-row", "int8", batches=((3, 8), (1, 12)))
    _, whole = planned(sizes, 10**9, "cuda")
    limit = whole.outside_bytes + whole.reserved_bytes + 2 * max(b.nbytes for b in whole.blocks)
    options = ("--device", "cuda", "--memory-limit", str(limit), "1GB", "--out", str(file))
    assert run.main(["glm", *TINY, *options]) == 0
    _, measured, _ = results_of(file)
    digests = [result["details"]["result_sha256"] for result in measured]
    assert digests[:3] == digests[3:] and measured[0]["details"]["streamed"] > 0
    assert all(result["peak_cuda_bytes"] for result in measured)


# ---- random weights ------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", ["int4-row", "int8", "none"])
def test_rows_of_random_weights_are_read_as_the_whole_is(quantization: str) -> None:
    config = replace(TINY_CONFIG, intermediate_size=100)  # rows with padding
    assembly, _ = planned(Sizes(config, torch.float32, quantization, "int8"), 10**9)
    weights = random_weights(assembly.network)
    network = meta_network(GLM130B, assembly.source.config)
    check_shapes(network, weights, GLM130B.blocks(network))
    for stored in weights.tensors.values():
        whole, half = stored.read(), max(1, stored.shape[0] // 2)
        assert torch.equal(stored.rows(half - 1, half + 1).read(), whole[half - 1 : half + 1])
        if len(stored.shape) == 2:
            assert torch.equal(stored.columns(1, 3).read(), whole[:, 1:3])
    name = "layers.1.feed_forward.up." + ("weight" if quantization == "none" else "qweight")
    matrix = weights.tensors[name].read()
    assert len(matrix.unique(dim=0)) == len(matrix)
    other = weights.tensors[name.replace("layers.1", "layers.2")].read()
    assert not torch.equal(matrix, other)
    with pytest.raises(ArgumentError, match="which has"):
        weights.tensors[name].rows(0, len(matrix) + 1)


def test_random_matrices_go_on_behind_the_end_of_the_numbers() -> None:
    config = replace(TINY_CONFIG, hidden_size=2048, vocab_size=9000)
    network = planned(Sizes(config, torch.float32, "int8", "int8"), 10**10)[0].network
    head = random_weights(network).tensors["lm_head.parts.0.qweight"]
    whole = head.read()
    assert whole.nbytes > 2**22
    assert torch.equal(head.rows(len(whole) - 700, len(whole)).read(), whole[-700:])
    assert len(whole.unique(dim=0)) == len(whole)


def test_the_table_takes_no_room_of_its_own() -> None:
    shortened = replace(PUBLISHED, num_hidden_layers=1)
    network = planned(Sizes(shortened, torch.float16, "int4-row", "int8"), 10**12)[0].network
    table = random_weights(network).table
    assert table is not None
    rows = table.read()
    assert rows.shape == (PUBLISHED.vocab_size, PUBLISHED.hidden_size)
    assert rows.untyped_storage().nbytes() < 2**24
    (embedding,) = (module for module in network.modules() if isinstance(module, HostEmbedding))
    embedding.keep([rows], rows.dtype)
    ids = torch.tensor([[0, 1, PUBLISHED.vocab_size - 1]])
    assert len(embedding(ids)[0].unique(dim=0)) == 3


# ---- the plan and the prediction -----------------------------------------------------------------


@pytest.mark.parametrize(("device", "head"), [("cuda", "int8"), ("cpu", "none")])
def test_the_plan_is_that_of_the_library(device: str, head: str) -> None:
    limit = 20 * GIB
    sizes = Sizes(PUBLISHED, torch.float16, "int4-row", head)
    theirs = plan_glm(
        "GLM-130B", limit, "int4-row", torch.float16, max_length=512, device=device,
        head_quantization=None if head == "none" else head,
    )  # fmt: skip
    assert planned(sizes, limit, device)[1] == theirs


def test_glm130b_on_a_24_gb_card() -> None:
    """The demonstration: int4-row, an int8 head, 512 tokens of cache, PCIe 4."""
    link, memory = 25 * 10**9, 936 * 10**9
    limit = int(0.9 * 24 * GIB)
    the_plan = plan_glm("GLM-130B", limit, "int4-row", max_length=512, head_quantization="int8")
    prediction = predict(the_plan, link, memory)
    assert 1 / prediction.pass_s >= 0.55
    assert prediction.bound == "link" and prediction.link_busy > 0.99
    # All that streams, once a token: nothing could be faster over this link.
    assert prediction.pass_s == pytest.approx(the_plan.streamed_bytes / link, rel=0.01)
    assert the_plan.total_bytes <= limit
    assert the_plan.streamed_bytes + the_plan.resident_bytes > 65e9


def test_the_prediction_alone_needs_no_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.glm_run.Run.parts", lambda *_: pytest.fail("measured"))
    file = tmp_path / "glm.json"
    assert run.main(["glm", "--predict-only", "--out", str(file)]) == 0
    _, measured, (predicted,) = results_of(file)
    assert not measured
    assert predicted["prediction"]["tokens_per_s"] >= 0.55
    assert predicted["prediction"]["bound"] == "link"
    printed = capsys.readouterr().out
    assert "24 GB card" in printed and f"{predicted['prediction']['tokens_per_s']:.3f}" in printed


def test_the_page_of_the_benchmarks_shows_what_is_in_the_json_file() -> None:
    page = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    assert "benchmarks/README.md" in DOCUMENTS and "<!-- glm-cpu.json -->" in page
    assert with_tables(page) == page
