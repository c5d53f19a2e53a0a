"""One more decoder-only model is two files and a line in a list: toy_arch.py, toy_model.py. And the
sizes of those that are there.

bminf/arch/registry.py, bminf/arch/architecture.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_zoo import vocabulary, write_ranks, write_vocabulary
from toy_arch import NAMES, TOY, Toy, ToyConfig
from toy_model import ToyModel

from bminf.arch import registry
from bminf.arch.t5 import EVA
from bminf.errors import CheckpointError
from bminf.models import CPM1, convert, plan_model
from bminf.models.source import meta_network, published

SMALL: Any = TOY.published["toy-small"]


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "ARCHITECTURES", (*registry.ARCHITECTURES, TOY))


def network(config: ToyConfig = SMALL) -> Toy:
    torch.manual_seed(0)
    model = Toy(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def on_disk(model: Toy) -> dict[str, torch.Tensor]:
    state, num_layers = model.state_dict(), model.config.num_hidden_layers
    return {
        theirs.format(n=n): state[ours.format(n=n)]
        for theirs, ours in NAMES.items()
        for n in range(num_layers)
    }


def of_rank(name: str, tensor: torch.Tensor, rank: int) -> torch.Tensor:
    if ".qkv." in name:
        return torch.cat([third.chunk(2)[rank] for third in tensor.chunk(3)])
    if "ln" in name:
        return tensor
    return tensor.chunk(2, dim=1 if ".out." in name or ".down." in name else 0)[rank]


def write(folder: Path, model: Toy) -> Path:
    """For two ranks, with a vocabulary."""
    tensors = on_disk(model)
    ranks = [{n: of_rank(n, t, rank).clone() for n, t in tensors.items()} for rank in range(2)]
    write_vocabulary(folder, vocabulary())
    return write_ranks(folder, ranks)


def states(model: Toy, ids: list[int]) -> torch.Tensor:
    cache = model.new_cache(1, len(ids))
    return model.head(model(torch.tensor([ids]), cache))


def test_it_is_told_by_its_files_and_by_its_name(tmp_path: Path) -> None:
    folder = write(tmp_path, network())
    assert registry.detect(registry.checkpoint_in(folder)) is TOY
    assert registry.named("toy") is TOY
    named = published("Toy small")
    assert named is not None and named.architecture is TOY and named.config == SMALL
    with pytest.raises(CheckpointError, match="holds Toy, not CPM-1"):
        CPM1(folder, device="cpu")


def test_it_loads_from_its_ranks_bit_for_bit(tmp_path: Path) -> None:
    whole = network()
    with ToyModel(write(tmp_path, whole), device="cpu", quantization=None) as model:
        assert model.config == SMALL and model.max_length == 64
        with torch.inference_mode():
            assert torch.equal(states(model.model, [1, 2, 3]), states(whole, [1, 2, 3]))


def test_it_streams_and_generates_the_same(tmp_path: Path) -> None:
    folder = write(tmp_path, network())
    texts = []
    with ToyModel(folder, device="cpu", quantization="int8") as model:
        assert model.plan.streamed == ()
        texts.append(model.generate_batch(["今天天气"], max_tokens=12, seed=0))
        least = model.plan.reserved_bytes + model.plan.outside_bytes
        limit = least + 2 * max(block.nbytes for block in model.plan.blocks)
    with ToyModel(folder, limit, device="cpu", quantization="int8") as model:
        assert len(model.plan.streamed) > 1 and model.plan.streamed[0].startswith("layers.")
        texts.append(model.generate_batch(["今天天气"], max_tokens=12, seed=0))
    assert texts[0] == texts[1] and texts[0][0][0]


def test_it_is_planned_without_its_weights(tmp_path: Path) -> None:
    for model in (write(tmp_path, network()), "Toy small", SMALL):
        whole = plan_model(model)
        assert [block.name for block in whole.blocks] == [f"layers.{n}" for n in range(4)]
        assert plan_model(model, whole.total_bytes - 1).streamed


@pytest.mark.parametrize("name", ["toy", None])
def test_it_converts(name: str | None, tmp_path: Path) -> None:
    folder = write(tmp_path / "from", network())
    made = convert(folder, tmp_path / "to", model=name)
    assert json.loads((made / "config.json").read_text())["model"] == "toy"
    answers = []
    for place in (folder, made):
        with ToyModel(place, device="cpu", quantization="int8") as model:
            answers.append(model.generate_batch(["今天天气"], max_tokens=12, seed=0))
    assert answers[0] == answers[1]


def test_what_its_configuration_has_to_say_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path, network(ToyConfig(256, 32, 3, 4, 48)))
    with pytest.raises(CheckpointError, match=r"no published Toy .*width, depth, heads, inner"):
        ToyModel(folder, device="cpu")
    config = {"width": 32, "depth": 3, "heads": 4, "inner": 48}
    with ToyModel(folder, device="cpu", config=config) as model:
        assert model.config.num_hidden_layers == 3


# ---- the architectures that are there ------------------------------------------------------------

NUM_PARAMETERS = {
    "cpm1": {"TsinghuaAI/CPM-Generate": 2_597_073_920},
    "cpm2": {
        "CPM-2 (Chinese), CPM-2.1": 11_087_097_856, "CPM-2 (Chinese and English)": 11_297_861_632
    },
    "eva": {
        "thu-coai/EVA1.0": 2_841_040_896, "thu-coai/EVA2.0-xlarge": 2_841_040_896,
        "thu-coai/EVA2.0-large": 967_535_616, "thu-coai/EVA2.0-base": 300_932_352,
    },
    "glm130b": {"GLM-130B": 128_697_794_560},
    "glm10b": {
        "GLM-10B": 9_880_682_496, "GLM-10B-chinese": 9_879_633_920, "GLM-2B": 1_920_122_880
    },
    "bloom": {
        "bigscience/bloom-560m": 559_214_592, "bigscience/bloom-1b1": 1_065_314_304,
        "bigscience/bloom-1b7": 1_722_408_960, "bigscience/bloomz-3b": 3_002_557_440,
        "bigscience/bloomz-7b1": 7_069_016_064, "bigscience/bloom": 176_247_271_424,
    },
}  # fmt: skip
"""Counted from the papers: facts that no tiny model knows."""


@pytest.mark.parametrize("name", NUM_PARAMETERS)
def test_the_published_sizes_are_those_of_the_papers(name: str) -> None:
    architecture = registry.named(name)
    for title, count in NUM_PARAMETERS[name].items():
        network = meta_network(architecture, architecture.published[title])
        assert sum(parameter.numel() for parameter in network.parameters()) == count


def test_only_eva_2_scales_its_attention() -> None:
    scaled = [name for name, config in EVA.published.items() if config.is_attention_scaled]
    assert scaled == [f"thu-coai/EVA2.0-{size}" for size in ("xlarge", "large", "base")]
