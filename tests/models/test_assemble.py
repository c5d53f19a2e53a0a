"""bminf/models/assemble.py: plans of published models, with no checkpoint, and of folders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_glm import ice_tokenizer, tiny_glm130b
from tiny_zoo import save

from bminf.arch.registry import ARCHITECTURES
from bminf.errors import ArgumentError, BudgetError, CheckpointError
from bminf.models import convert, plan_glm, plan_model
from bminf.models.source import published
from bminf.quantization.packed import Format

Loader = Callable[..., Any]
GIB = 2**30


def test_sizes_are_those_of_the_paper() -> None:
    """Bytes of a layer of GLM-130B in the authors' 4 bits, without its norms (facts, section 1)."""
    plan = plan_glm("GLM-130B", 2**50, "int4-row")
    first = [block for block in plan.blocks if block.name.startswith("layers.0.")]
    weights, scales, biases = 1_811_939_328 // 2, 253_952, 2 * 126_976
    assert sum(block.nbytes for block in first) == weights + scales + biases


def test_what_host_memory_has_no_room_for_waits_on_the_disk() -> None:
    limit = int(24 * GIB * 0.9)
    free = plan_glm("GLM-130B", limit, "int4-row", max_length=512)
    assert not free.on_disk and free.streamed_bytes > 40 * GIB
    disk_bytes = [free.streamed_bytes]
    for host in (10 * GIB, 20 * GIB, 40 * GIB):
        plan = plan_glm("GLM-130B", limit, "int4-row", max_length=512, host_memory=host)
        assert plan.resident == free.resident and plan.host_bytes <= host
        homes = plan.host_bytes - plan.staging_bytes
        assert homes + plan.disk_bytes == plan.streamed_bytes
        disk_bytes.append(plan.disk_bytes)
    assert disk_bytes == sorted(disk_bytes, reverse=True) and disk_bytes[-1] > 0
    with pytest.raises(BudgetError, match="host memory"):
        plan_glm("GLM-130B", limit, "int4-row", max_length=512, host_memory=2**20)


# ---- any model of the zoo ------------------------------------------------------------------------

KINDS = ["cpm1", "cpm2", "eva", "glm130b", "glm10b"]
SIZES = {"max_length": 24, "max_batch_size": 2}


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
@pytest.mark.parametrize("name", KINDS)
def test_the_plan_of_a_folder_is_that_of_the_model(
    name: str, quantization: str | None, load: Loader, folders: dict[str, Path]
) -> None:
    """At a limit that streams; so is that of its configuration."""
    options: dict[str, Any] = {"quantization": quantization, "dtype": torch.float16, **SIZES}
    whole = plan_model(folders[name], device="cpu", **options)
    limit = (whole.least_limit + whole.total_bytes) // 2
    plan = plan_model(folders[name], limit, device="cpu", **options)
    model = load(name, memory_limit=limit, **options)
    assert plan.streamed and plan == model.plan
    assert plan_model(model.config, limit, device="cpu", **options) == plan


@pytest.mark.parametrize("name", ["glm130b", "glm10b"])
@pytest.mark.parametrize(
    ("quantization", "head", "dtype"),
    [("int8", "int4", None), ("int4-row", "int8", torch.bfloat16), (Format(8, 32), None, None)],
)
def test_the_plan_of_a_packed_head_is_that_of_the_model(
    name: str, quantization: Any, head: Any, dtype: Any, load: Loader
) -> None:
    """In however many parts the configuration has cut its head."""
    packed = {"quantization": quantization, "head_quantization": head, "dtype": dtype, **SIZES}
    whole = load(name, **packed)
    limit = (whole.plan.least_limit + whole.plan.total_bytes) // 2
    model = load(name, memory_limit=limit, **packed)
    assert model.plan.streamed and model.plan.resident
    for config in (model.config, replace(model.config, num_head_parts=1)):
        assert plan_glm(config, limit, device="cpu", **packed) == model.plan


@pytest.mark.parametrize("name", ["glm130b", "glm10b"])
def test_the_head_is_packed_if_asked_for(load: Loader, name: str) -> None:
    plain = load(name, quantization="int4")
    for head, share in (("int8", 4), ("int4", 6)):  # of float32
        packed = load(name, quantization="int4", head_quantization=head)
        sizes = [
            sum(block.nbytes for block in model.plan.blocks if block.name.startswith("lm_head"))
            for model in (plain, packed)
        ]
        assert sizes[1] < sizes[0] / (share - 2)
        logits = (
            plain.logits("the blocks of a layer wait"),
            packed.logits("the blocks of a layer wait"),
        )
        assert not torch.equal(*logits) and torch.allclose(*logits, atol=2)


@pytest.mark.filterwarnings("ignore:found no sentencepiece model")
@pytest.mark.parametrize("name", ["cpm1", "cpm2", "glm130b"])
def test_a_converted_folder_is_planned_as_it_is_packed(
    name: str, load: Loader, folders: dict[str, Path], tmp_path: Path
) -> None:
    head = {"head_quantization": "int8"} if name == "glm130b" else {}
    tokenizer = ice_tokenizer() if name == "glm130b" else None
    made = convert(folders[name], tmp_path / "to", "int4", name, tokenizer=tokenizer, **head)
    plan = plan_model(made, device="cpu", dtype=torch.float16, **SIZES)
    model = load(name, checkpoint=made, quantization="int4", dtype=torch.float16, **SIZES)
    assert replace(plan, budget=model.plan.budget) == model.plan
    assert plan == plan_model(made, None, "int4", torch.float16, device="cpu", **SIZES)
    with pytest.raises(ArgumentError, match=r"packed as .*convert the original to what you want"):
        plan_model(made, None, "int8")


def test_codes_of_the_authors_are_planned_as_they_are(load: Loader, tmp_path: Path) -> None:
    """In groups of columns, because two ranks were packed by themselves."""
    original = tiny_glm130b().write_original(tmp_path / "a")
    codes = convert(original, tmp_path / "b", "int4", tp=2)
    plan = plan_model(codes, device="cpu", **SIZES)
    model = load("glm130b", checkpoint=codes, quantization="int4", **SIZES)
    assert replace(plan, budget=model.plan.budget) == model.plan
    assert plan.total_bytes != plan_model(original, device="cpu", **SIZES).total_bytes


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda one: one.name)
def test_every_published_model_is_planned_by_its_name(architecture: Any) -> None:
    """Several names may be of the same sizes, which are planned once."""
    for name, config in architecture.published.items():
        assert published(name).config == published(name.lower()).config == config
    for config, name in {c: n for n, c in architecture.published.items()}.items():
        plan = plan_model(name, max_length=64)
        assert plan == plan_model(config, max_length=64)
        assert plan_model(name, plan.least_limit, max_length=64).streamed


OF_ANY_PLAN: list[tuple[dict[str, Any], str]] = [
    ({"device": "tpu"}, 'device=\'tpu\'; accepted: "cuda", "cpu"'),
    ({"dtype": torch.int8}, r"dtype=torch\.int8; accepted"),
    ({"quantization": "int5"}, "quantization='int5'; accepted"),
    ({"max_length": 0}, "max_length=0"),
    ({"max_length": 1025}, "max_length=1025, but the model has 1024 positions"),
    ({"max_batch_size": "2"}, "max_batch_size='2'"),
    ({"memory_limit": "lots"}, "memory_limit='lots'"),
    ({"memory_limit": "1MB"}, "below the least that would do"),
    ({"host_memory": "lots"}, "host_memory='lots'"),
]


@pytest.mark.parametrize(
    ("plan", "arguments", "words"),
    [
        *((plan, *case) for plan in (plan_model, plan_glm) for case in OF_ANY_PLAN),
        (plan_model, {"model": "GPT-5"}, "model='GPT-5'; accepted: a folder that ex.*GLM-130B"),
        (plan_model, {"model": ""}, "model=''; accepted"),
        (plan_model, {"model": 3}, "model is a int; accepted"),
        (plan_model, {"head_quantization": "int8"}, "head_quantization is for GLM-130B, GLM-10B"),
        (plan_model, {"memory": "6GB"}, r"plan_model\(\) has no keyword 'memory'"),
        (plan_glm, {"model": "GLM-4"}, "model='GLM-4'; accepted: GLM-130B, .*a GLMConfig"),
        (plan_glm, {"model": ["GLM-2B"]}, "model=.*accepted: GLM-130B"),
        (plan_glm, {"head_quantization": "int5"}, "head_quantization='int5'"),
        (plan_glm, {"memory_limit": None}, "memory_limit=None"),
    ],
)
def test_what_cannot_be_planned_is_refused(
    plan: Callable[..., Any], arguments: dict[str, Any], words: str
) -> None:
    model = "GLM-2B" if plan is plan_glm else "TsinghuaAI/CPM-Generate"
    error = BudgetError if words == "below the least that would do" else ArgumentError
    with pytest.raises(error, match=words):
        plan(**{"model": model, "memory_limit": "8GB", **arguments})


def test_a_folder_that_cannot_be_loaded_is_not_planned(tmp_path: Path) -> None:
    save(
        {"module": {"word_embeddings.weight": torch.ones(2)}},
        tmp_path / "mp_rank_00_model_states.pt",
    )
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        plan_model(tmp_path)
