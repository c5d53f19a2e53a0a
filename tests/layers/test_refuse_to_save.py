"""bminf/layers/saving.py: save_pretrained() of packed weights, which nothing reads, is refused."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from tiny_models import make

import bminf
from bminf.errors import UnsupportedModelError


@pytest.mark.parametrize("limit", ["1GB", 60_000])
def test_a_model_its_parts_and_copies_are_not_saved(limit: str | int, tmp_path: Path) -> None:
    model = bminf.wrapper(make("llama"), memory_limit=limit, device="cpu")
    copies = [] if bminf.plan_of(model).streamed else [copy.deepcopy(model)]
    for saved in (model, model.model, *copies):
        with pytest.raises(UnsupportedModelError, match="state_dict"):
            saved.save_pretrained(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_nor_is_a_model_around_a_packed_part(tmp_path: Path) -> None:
    model = make("llama")
    bminf.wrapper(model.model, memory_limit="1GB", device="cpu")
    with pytest.raises(UnsupportedModelError, match="state_dict"):
        model.save_pretrained(tmp_path)
    assert list(tmp_path.glob("*.safetensors")) == []
