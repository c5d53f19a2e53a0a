"""The benchmark of whole models at tiny sizes: what is measured, random weights, predictions.

bminf/models/random_weights.py, bminf/cli/tables/tasks.py.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import told_by
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import models, run
from benchmarks.models import GLM, ZOO, _opened, _runs
from benchmarks.report import ROOT
from bminf.arch.glm import GLM10B, GLM130B, GLMConfig
from bminf.arch.gpt import CPM1, GPTConfig
from bminf.arch.t5 import CPM2, T5Config
from bminf.cli import plan as plan_command
from bminf.cli.measure import rss_anon_bytes
from bminf.cli.tables.tasks import ANEW, ENCODER, LISTS, ONCE, Run, Task, parse_task
from bminf.layers.embedding import HostEmbedding
from bminf.models.assemble import plan_model
from bminf.models.random_weights import random_weights
from bminf.models.source import Source, check_shapes, find_sizes
from bminf.offload.predict import predict
from bminf.quantization.packed import PACKED_FIELDS, codes_of, dequantize
from bminf.units import parse_bytes

TASKS = {
    "zoo": ("encoder=8", "anew=8+12", "once=8+12"),
    "glm": ("encode=8", "decode=12", "cola=3x8"),
}
CASES = {"zoo": ZOO, "glm": GLM}
KINDS = {"zoo": [ENCODER, ANEW, ONCE], "glm": ["encode", "decode", "cola"]}
CONFIGS = {
    "tiny-t5": T5Config(128, 64, 96, 4, 16, 3, 3),
    "tiny-glm-130b": GLMConfig("glm-130b", 128, 64, 3, 4, 96, 1024),
    "tiny-glm-10b": GLMConfig("glm-10b", 128, 64, 3, 4, 96, 1024),
    "tiny-gpt": GPTConfig(128, 64, 3, 4, 1024, 96),
}
TINY = {"zoo": "tiny-t5", "glm": "tiny-glm-130b"}


@pytest.fixture(autouse=True)
def _published(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny ones, too."""
    for architecture, title in zip((CPM2, GLM130B, GLM10B, CPM1), CONFIGS, strict=True):
        monkeypatch.setitem(architecture.published, title, CONFIGS[title])


def tiny(case: str, model: str | None = None) -> tuple[str, ...]:
    """A command line; what is predicted for a tiny model is of no use."""
    return case, "--device", "cpu", "--model", model or TINY[case], "--tasks", *TASKS[case]


def tiny_run(case: str, dtype: torch.dtype, quantization: str, device: str = "cpu") -> Run:
    """What tiny() measures."""
    source = find_sizes(CONFIGS[TINY[case]])
    tasks = tuple(map(parse_task, TASKS[case]))
    return Run(source, dtype, quantization, "none", tasks, device=device)


def results_of(file: Path) -> tuple[dict[str, Any], list[Any], list[Any]]:
    """The content of a file, what was measured, what was predicted."""
    content = json.loads(file.read_text())
    measured = [result for result in content["results"] if "prediction" not in result]
    return content, measured, [r for r in content["results"] if "prediction" in r]


# ---- the cases -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "quantization"), [("zoo", "int8"), ("glm", "int4-row")])
def test_what_streams_is_counted_and_gives_what_stays_does(
    case: str, quantization: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, own = tmp_path / "models.json", tiny_run(case, torch.float32, quantization)
    limit = own.planned(10**9)[1].least_limit  # of this CPU, whose products hold what they need
    head = () if case == "zoo" else ("--head-quantization", "none")
    options = ("--memory-limit", str(limit), "1GB", "--warmup", "0", "--repeats", "2", *head)
    assert run.main([*tiny(case), *options, "--out", str(file)]) == 0
    content, measured, predicted = results_of(file)
    assert content["parameters"]["config"] == vars(own.source.config)
    assert content["parameters"]["left_out"] == [] and predicted
    assert [result["details"]["task"] for result in measured] == KINDS[case] * 2
    digests = [result["details"]["result_sha256"] for result in measured]
    assert digests[:3] == digests[3:]
    assert len(set(digests)) == (2 if case == "zoo" else 3)  # projected anew or once, the same
    the_plan = own.planned(limit)[1]
    moved = [block for block in the_plan.blocks if block.name in the_plan.streamed]
    for few, whole in zip(measured[:3], measured[3:], strict=True):
        check_fields(few)
        assert few["details"]["streamed"] == len(the_plan.streamed)
        assert few["details"]["planned_bytes"] <= limit
        assert whole["details"]["streamed"] == whole["details"]["copied_bytes_per_step"] == 0
        assert whole["details"]["link_gbps"] is whole["details"]["fraction_of_bound"] is None
        lists = LISTS.get(few["details"]["task"])
        nbytes = sum(b.nbytes for b in moved if lists is None or b.list_name in lists)
        assert few["details"]["streamed_bytes_per_step"] == nbytes
    few = measured[1]["details"]  # the longest: least beside what is copied ahead, in 3 runs
    beyond = (few["copied_bytes_per_step"] - few["streamed_bytes_per_step"]) * 3 * few["steps"]
    assert abs(beyond) <= 3 * 4 * max(block.nbytes for block in the_plan.blocks)
    printed = capsys.readouterr().out
    assert all(f"| {result['name']} |" in printed for result in [*measured, *predicted])


class Seen(TorchDispatchMode):
    """The names of all operations of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("case", TASKS)
def test_what_a_task_reads_is_made_before_it_is_timed(case: str) -> None:
    """To draw it takes longer than a GPU takes for some layers."""
    own = tiny_run(case, torch.float32, "int8")
    with own.loaded() as (network, scheduler):
        for task in own.tasks:
            with _opened(task, network, scheduler) as work, Seen() as seen:
                work.run()
            assert seen.names and not [name for name in seen.names if "rand" in name]


def check_fields(result: dict[str, Any]) -> None:
    """What follows from the samples and from what was copied."""
    details = result["details"]
    is_steps = details["task"] in ("decode", ANEW, ONCE)
    assert details["steps"] == (details["length"] if is_steps else 1)
    assert details["tokens"] == details["rows"] * details["length"]
    mean_s = sum(sample["wall_s"] for sample in result["samples"]) / 2
    assert details["tokens_per_s"] == pytest.approx(details["tokens"] / mean_s)
    bound_s = details["streamed_bytes_per_step"] / details["link_gbps"] / 1e9
    assert details["bound_s_per_step"] == pytest.approx(bound_s)
    assert details["fraction_of_bound"] == pytest.approx(bound_s * details["steps"] / mean_s)


@pytest.mark.parametrize(
    ("case", "model"),
    [("zoo", "tiny-t5"), ("glm", "tiny-glm-10b"), ("glm", "tiny-gpt")],
)
def test_other_models_of_the_zoo(case: str, model: str, tmp_path: Path) -> None:
    file = tmp_path / "models.json"
    options = ("--memory-limit", "1GB", "--layers", "2")
    assert run.main([*tiny(case, model), *options, "--out", str(file)]) == 0
    content, measured, predicted = results_of(file)
    layers = "2 + 2 layers of 3 + 3" if case == "zoo" else "2 layers of 3"
    assert content["parameters"]["model"] == f"{model}, shortened: {layers}"
    assert predicted[0]["details"]["model"] == model
    assert [result["details"]["task"] for result in measured] == KINDS[case]
    assert all(result["published_tokens_per_s"] == {} for result in predicted)


@pytest.mark.parametrize(
    ("case", "options", "message"),
    [
        ("zoo", ("--memory-limit", "1GB", "1KB"), "below the least"),
        ("zoo", ("--memory-limit", "1XB"), "unknown unit"),
        ("zoo", ("--quantization", "int4-row"), "accepted"),
        ("zoo", ("--model", "GLM-130B"), "nothing that GLM-130B can do"),
        ("zoo", ("--model", "GPT-5"), "accepted"),
        ("glm", ("--tasks", "decode=1025"), "1024 positions"),
        ("glm", ("--model", "tiny-gpt", "--head-quantization", "int8"), "leave it out"),
    ],
)
def test_wrong_usage_ends_before_anything_is_made(
    case: str, options: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "measured", lambda *_: pytest.fail("measured"))
    with pytest.raises(SystemExit) as exit:
        run.main([*tiny(case), *options])
    assert message in str(exit.value)


@pytest.mark.parametrize(
    "task", ["cola=30x1", "decode=0", "encoder=1x0", "sum=3", "encode", "once=a"]
)
def test_a_task_that_is_none_is_refused(task: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["glm", "--tasks", task])
    assert f"invalid parse_task value: '{task}'" in capsys.readouterr().err


def test_the_tasks_are_those_that_are_published_unless_others_are_given() -> None:
    def tasks(*options: str) -> tuple[Task, ...]:
        arguments = run._parser().parse_args(options)
        return _runs(arguments, find_sizes(arguments.model))[0].tasks

    assert tasks("zoo") == (
        Task(ENCODER, 256), Task(ANEW, 255, prompt=256), Task(ONCE, 255, prompt=256),
    )  # fmt: skip
    encode = [Task("encode", length) for length in (512, 1024, 2048)]
    decode = [Task("decode", length) for length in (128, 512, 1024, 2048)]
    assert tasks("glm") == (*encode, *decode, Task("cola", 32, 30))
    assert tasks("zoo", "--model", "CPM-1", "--tasks", "decode=4x8") == (Task("decode", 8, 4),)


@pytest.mark.gpu
@pytest.mark.parametrize("case", TASKS)
def test_a_case_on_a_gpu(case: str, tmp_path: Path) -> None:
    file = tmp_path / "models.json"
    quantization = "int8" if case == "zoo" else "int4-row"
    limit = tiny_run(case, torch.float16, quantization, "cuda").planned(10**9)[1].least_limit
    head = () if case == "zoo" else ("--head-quantization", "none")
    options = ("--device", "cuda", "--memory-limit", str(limit), "1GB", *head)
    assert run.main([*tiny(case), *options, "--out", str(file)]) == 0
    _, measured, _ = results_of(file)
    digests = [result["details"]["result_sha256"] for result in measured]
    assert digests[:3] == digests[3:] and measured[0]["details"]["streamed"] > 0
    assert all(result["peak_cuda_bytes"] for result in measured)


# ---- random weights ------------------------------------------------------------------------------


def sized(case: str, quantization: str, **sizes: int) -> tuple[Source, Any]:
    """A source and its packed network."""
    own = tiny_run(case, torch.float32, quantization)
    source = replace(own.source, config=replace(own.source.config, **sizes))
    head = "none" if case == "zoo" else "int8"
    return source, replace(own, source=source, head_quantization=head).planned(10**10)[0].network


@pytest.mark.parametrize(
    ("case", "quantization"),
    [("zoo", "int8"), ("zoo", "int4"), ("glm", "int4-row"), ("glm", "none")],
)
def test_random_weights_are_those_of_a_checkpoint(case: str, quantization: str) -> None:
    source, network = sized(case, quantization, intermediate_size=100)  # rows with padding
    weights = random_weights(network)
    plain = find_sizes(source).network
    if case == "zoo":
        check_shapes(plain, weights, source.architecture.blocks(plain))
    for stored in weights.tensors.values():
        whole, half = stored.read(), max(1, stored.shape[0] // 2)
        assert tuple(whole.shape) == tuple(stored.shape) and whole.dtype == stored.dtype
        assert torch.equal(stored.rows(half - 1, half + 1).read(), whole[half - 1 : half + 1])
    stem = "decoder.layers.{}.feed_forward.up" if case == "zoo" else "layers.{}.feed_forward.up"
    key = "weight" if quantization == "none" else "qweight"
    matrix, other = (weights.tensors[f"{stem.format(i)}.{key}"].read() for i in (1, 2))
    assert len(matrix.unique(dim=0)) == 16 and not torch.equal(matrix, other)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_random_packed_weights_stand_for_numbers_of_the_right_size(quantization: str) -> None:
    _, network = sized("zoo", quantization, intermediate_size=328)  # rows with padding
    name = "decoder.layers.2.feed_forward.down"
    like, weights = network.get_submodule(name).packed, random_weights(network)
    found = {key: weights.tensors.get(f"{name}.{key}") for key in PACKED_FIELDS}
    parts = {key: stored and stored.read().contiguous() for key, stored in found.items()}
    packed = like._replace(**parts)
    packed.check()
    assert (packed.code_sum is None) == (like.code_sum is None)
    if packed.code_sum is not None:
        assert torch.equal(packed.code_sum, codes_of(packed).sum(1, dtype=torch.int32))
    assert not packed.qweight[:, 328 * like.bits // 8 :].any()
    weight = dequantize(packed, torch.float32)
    assert weight.std().item() == pytest.approx(328**-0.5, rel=0.05)
    assert len(weight.unique()) > 10


def test_the_table_takes_no_room_of_its_own() -> None:
    whole = find_sizes(GLM.title)
    source = replace(whole, config=replace(whole.config, num_hidden_layers=1))
    own = Run(source, torch.float16, "int4-row", "int8", (Task("decode", 512),))
    network = own.planned(10**12)[0].network
    table = random_weights(network).table
    assert table is not None
    rows = table.read()
    assert rows.shape == (whole.config.vocab_size, whole.config.hidden_size)
    assert rows.untyped_storage().nbytes() < 2**24
    (embedding,) = (module for module in network.modules() if isinstance(module, HostEmbedding))
    embedding.keep([rows], rows.dtype)
    ids = torch.tensor([[0, 1, whole.config.vocab_size - 1]])
    assert len(embedding(ids)[0].unique(dim=0)) == 3


LOADING = """
import json, sys, torch
from dataclasses import replace
from pathlib import Path
from bminf.cli.tables.tasks import ENCODER, Run, Task
from bminf.arch.t5 import T5Config
from bminf.cli.measure import PeakMemory, rss_anon_bytes
from bminf.models.source import find_sizes

source = find_sizes(T5Config(64, 1024, 4096, 16, 64, 3, 3))
tasks = (Task(ENCODER, 16),)
run = Run(source, torch.float32, "int8", "none", tasks, offload_dir=Path(sys.argv[2]))
assembly, whole = run.planned(10**9)
run = replace(run, limit=whole.least_limit if sys.argv[1] == "least" else whole.budget)
_, plan = run.planned(run.limit)
torch.ones(2**20).sum()  # what torch sets up at its first operation
with PeakMemory(is_cuda=False, baseline_bytes=rss_anon_bytes()) as peak:
    with run.loaded() as (_, scheduler):
        assert scheduler.plan.streamed == plan.streamed
print(json.dumps([peak.peak_bytes, plan.total_bytes, assembly.blobs.nbytes]))
"""


@pytest.mark.skipif(rss_anon_bytes() is None, reason="the system does not tell RssAnon")
@pytest.mark.parametrize("limit", ["whole", "least"])
def test_loading_takes_the_packed_model_and_little_more(limit: str, tmp_path: Path) -> None:
    """In a process of its own: what others have freed would be taken again without a trace."""
    peak_bytes, planned_bytes, packed_bytes = told_by(LOADING, limit, tmp_path, cwd=ROOT)
    # Some rows of each weight, one weight that is read, and what malloc keeps.
    assert peak_bytes <= planned_bytes + 1024 * 4096 + 2 * 10**7
    assert packed_bytes > 9 * 10**7  # so that a second copy, or wider weights, would be seen


# ---- the predictions -----------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["zoo", "glm"])
def predicted(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The case, and what it predicts: no weights are made for it."""
    file = tmp_path_factory.mktemp("predicted") / "models.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "measured", lambda *_: pytest.fail("measured"))
        assert run.main([request.param, "--predict-only", "--out", str(file)]) == 0
    content, measured, found = results_of(file)
    assert not measured and content["parameters"]["device"] is None
    yield request.param, found


def test_a_prediction_is_that_of_the_plan(predicted: Any) -> None:
    case, found = predicted
    card, title = CASES[case].card, CASES[case].title
    kinds = KINDS["zoo"] if case == "zoo" else ["decode"]
    assert [result["details"]["task"] for result in found] == kinds * (len(found) // len(kinds))
    for result in found:
        details, head = result["details"], None if case == "zoo" else "int8"
        the_plan = plan_model(
            title, card.memory_limit, details["quantization"], torch.float16, 512,
            head_quantization=head,
        )  # fmt: skip
        speeds = (card.link_bytes_per_s, card.memory_bytes_per_s)
        expected = predict(the_plan, *speeds, LISTS.get(details["task"]))
        assert result["prediction"]["pass_s"] == expected.pass_s
        tokens = 256 if details["task"] == ENCODER else 1
        assert result["prediction"]["tokens_per_s"] == tokens / expected.pass_s
        assert details["planned_bytes"] == the_plan.total_bytes <= card.memory_limit
        assert result["is_bound"] is (details["task"] in (ENCODER, ANEW))


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize(("case", "head"), [("zoo", "none"), ("glm", "int8"), ("glm", "none")])
def test_a_run_is_planned_as_the_library_does(case: str, head: str, device: str) -> None:
    quantization, limit = ("int8", 5 * 10**9) if case == "zoo" else ("int4-row", 20 * 10**9)
    source, tasks = find_sizes(CASES[case].title), (Task("decode", 512),)
    own = Run(source, torch.float16, quantization, head, tasks, device=device).planned(limit)[1]
    assert own.streamed and own == plan_model(
        source, limit, quantization, torch.float16, 512, device=device,
        head_quantization=None if head == "none" else head,
    )  # fmt: skip


def test_what_is_predicted_for_the_published_models(predicted: Any) -> None:
    case, found = predicted
    if case == "zoo":
        _, anew, once = found[:3]
        assert anew["prediction"]["pass_s"] > once["prediction"]["pass_s"]
        assert once["details"]["quantization"] == "int8"
        assert 4.4 in once["published_tokens_per_s"].values()
        return
    # The demonstration: int4-row, an int8 head, 512 tokens of cache, PCIe 4.
    (decode,) = found
    details, prediction = decode["details"], decode["prediction"]
    assert prediction["tokens_per_s"] >= 0.55
    assert prediction["bound"] == "link" and prediction["link_busy"] > 0.99
    # All that streams, once a token: nothing could be faster over this link.
    link_s = details["streamed_bytes"] / GLM.card.link_bytes_per_s
    assert prediction["pass_s"] == pytest.approx(link_s, rel=0.01)
    assert details["streamed_bytes"] + details["resident_bytes"] > 65e9


def test_the_card_has_the_speeds_that_bminf_plan_assumes() -> None:
    theirs = argparse.ArgumentParser()
    plan_command.add_arguments(theirs)
    assert ZOO.card.link_bytes_per_s == parse_bytes(theirs.get_default("link"))
    assert ZOO.card.memory_bytes_per_s == parse_bytes(theirs.get_default("memory_bandwidth"))
