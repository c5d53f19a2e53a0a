"""A folder of transformers that is opened: what is to be read is what transformers reads."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import pytest
import torch
from tiny_models import TINY

from bminf.layout import tensors_of
from bminf.pretrained import open_pretrained


def aliases(model: torch.nn.Module) -> set[frozenset[str]]:
    """Names of tensors that are one object."""
    names: dict[int, set[str]] = {}
    for name, _, tensor in tensors_of(model):
        names.setdefault(id(tensor), set()).add(name)
    return set(map(frozenset, names.values()))


def attributes(model: torch.nn.Module) -> dict[str, set[str]]:
    return {name: set(vars(module)) for name, module in model.named_modules()}


@pytest.mark.parametrize(
    ("name", "dtype"), [*zip(TINY, cycle((None, torch.bfloat16)), strict=False)]
)
def test_what_is_to_be_read_is_what_transformers_reads(
    name: str, dtype: torch.dtype | None, saved_tiny: Callable[[str], Path]
) -> None:
    expected = TINY[name].model.from_pretrained(saved_tiny(name), dtype=dtype or "auto")
    opened = open_pretrained(saved_tiny(name), dtype)
    values = {name: tensor for name, _, tensor in tensors_of(expected)}
    assert opened.tensors.keys() == values.keys()
    for key, value in values.items():
        read = opened.tensors[key].read()
        assert read.dtype == value.dtype and torch.equal(read, value), key
    metas = {name: tensor for name, _, tensor in tensors_of(opened.model)}
    assert all(tensor.is_meta for tensor in metas.values())
    kinds = [{n: (type(t), t.requires_grad) for n, t in x.items()} for x in (metas, values)]
    assert kinds[0] == kinds[1]
    assert aliases(opened.model) == aliases(expected)
    assert attributes(opened.model) == attributes(expected)
    assert opened.model.config.to_dict() == expected.config.to_dict()
    if expected.can_generate():
        configs = [one.generation_config.to_dict() for one in (opened.model, expected)]
        assert configs[0] == configs[1]
