"""The zoo on a real GPU: as on the CPU to half precision, streamed as resident bit for bit."""

from __future__ import annotations

import gc
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_glm import tiny_glm10b
from tiny_zoo import tiny

import bminf
from benchmarks.harness import Settings
from benchmarks.models import measured
from bminf.cli.tables.tasks import Run, Task
from bminf.models.source import find_sizes
from bminf.offload.plan import least_budget

pytestmark = pytest.mark.gpu

KINDS = {"cpm1": bminf.models.CPM1, "cpm2": bminf.models.CPM2, "eva": bminf.models.EVA}
TEXT = "今天天气很好"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("zoo")
    return {
        name: tiny(name).write_original(root / name / "original")
        for name in ("cpm1", "cpm2", "eva")
    }


def load(folders: dict[str, Path], name: str, device: str = "cuda", **arguments: Any) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="found no sentencepiece model")
        return KINDS[name](folders[name], device=device, **arguments)


def logits(model: Any) -> torch.Tensor:
    return model.logits(TEXT) if isinstance(model, bminf.models.CPM1) else model.logits(TEXT, TEXT)


def limit_for_slots(model: Any) -> int:
    """What a model needs with every block streamed."""
    plan = model.plan
    largest = max(block.nbytes for block in plan.blocks)
    return int(plan.outside_bytes + plan.reserved_bytes + 2 * largest)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_logits_are_those_of_the_cpu(
    folders: dict[str, Path], name: str, quantization: str | None
) -> None:
    expected = logits(load(folders, name, "cpu", quantization=quantization))
    for dtype, tolerance in ((torch.float32, 2e-3), (None, 2e-2)):
        model = load(folders, name, quantization=quantization, dtype=dtype, activations="float")
        assert model.model.embed_tokens.weight.dtype == (dtype or torch.float16)
        error = (logits(model) - expected).norm() / expected.norm()
        assert error < tolerance, (dtype, float(error))


@pytest.mark.parametrize("name", KINDS)
def test_graphs_give_the_texts_of_other_passes(folders: dict[str, Path], name: str) -> None:
    """Also where another length, or number of texts, is captured between two runs of one."""
    texts = [TEXT, TEXT[:3], TEXT[1:]]
    found = []
    for has_graphs in (False, True):
        model = load(folders, name, max_batch_size=3, max_length=64, cuda_graph=has_graphs)
        options: Any = {"max_tokens": 12, "temperature": 0}
        found.append([model.generate_batch(texts[:count], **options) for count in (1, 3, 1, 2, 3)])
        if has_graphs:
            assert model.row_model.steps._graphs
        model.close()
    assert found[0] == found[1]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_streamed_texts_are_the_resident_ones(
    folders: dict[str, Path], name: str, quantization: str | None
) -> None:
    resident = load(folders, name, quantization=quantization, max_batch_size=2)
    limit = limit_for_slots(resident)
    streamed = load(folders, name, quantization=quantization, max_batch_size=2, memory_limit=limit)
    assert streamed.plan.streamed and not resident.plan.streamed
    assert torch.equal(logits(streamed), logits(resident))
    for options in ({"seed": 3}, {"temperature": 0}, {"num_beams": 2}):
        texts = [
            model.generate_batch([TEXT], max_tokens=12, **options) for model in (resident, streamed)
        ]
        assert texts[0] == texts[1]


@pytest.mark.parametrize("name", KINDS)
def test_the_memory_limit_is_kept(folders: dict[str, Path], name: str) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = load(folders, name, max_batch_size=2, max_length=200)
    text = TEXT * 12
    model.generate_batch([text, TEXT], max_tokens=100, seed=1)
    # torch rounds each tensor up to 512 bytes; a product of a library may take a workspace.
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= model.plan.total_bytes + 64 * 2**20
    model.close()
    gc.collect()
    assert torch.cuda.memory_allocated() <= before + 2**20


# ---- GLM -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", ["int4-row", "int4"])
def test_full_size_layers_of_glm130b_at_a_limit(quantization: str) -> None:
    """Random packed weights: what streams gives what stays does, within the limit."""
    gc.collect()
    torch.cuda.empty_cache()
    published = find_sizes("GLM-130B")
    config = replace(published.config, num_hidden_layers=2, vocab_size=40000)
    tasks = (Task("encode", 256), Task("decode", 8))
    source = replace(published, config=config)
    run = Run(source, torch.float16, quantization, "int8", tasks, device="cuda")
    _, whole = run.planned(2**40)
    before, digests = torch.cuda.memory_allocated(), []
    for limit in (whole.total_bytes, least_budget(whole)):
        parts = measured(replace(run, limit=limit), Settings(0, 1, 1))
        results = [result for part in parts for result in part]
        digests.append([result["details"]["result_sha256"] for result in results])
        for result in results:
            is_streamed = limit < whole.total_bytes
            assert (result["details"]["copied_bytes_per_step"] > 0) is is_streamed
            assert result["peak_cuda_bytes"] is not None
            # torch rounds each tensor up to 512 bytes; a product of a library takes a workspace.
            assert result["peak_cuda_bytes"] - before <= limit + 64 * 2**20
    assert digests[0] == digests[1]


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_a_streamed_glm10b_is_the_resident_one(tmp_path: Path, quantization: str | None) -> None:
    folder = tiny_glm10b().write_original(tmp_path / "glm10b")
    arguments = {"quantization": quantization, "head_quantization": quantization}
    resident = bminf.models.GLM(folder, device="cuda", **arguments)
    limit = limit_for_slots(resident)
    streamed = bminf.models.GLM(folder, device="cuda", memory_limit=limit, **arguments)
    assert streamed.plan.streamed and not resident.plan.streamed
    text = "the blocks [MASK] on the host"
    assert torch.equal(streamed.logits(text), resident.logits(text))
    for options in ({"seed": 3}, {"temperature": 0}, {"num_beams": 1, "top_p": 0.9, "seed": 1}):
        answers = [
            model.fill_blank(text, max_tokens=12, **options) for model in (resident, streamed)
        ]
        assert answers[0] == answers[1]
    on_cpu = bminf.models.GLM(folder, device="cpu", **arguments)
    expected = on_cpu.logits(text)
    error = (resident.logits(text) - expected).norm() / expected.norm()
    assert error < 2e-2, float(error)
