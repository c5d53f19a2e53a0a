"""fused_kernels=False: passes of a model take torch's operators, and give the same texts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "kernels"))
from host_launcher import HostLauncher, served_by

from bminf.cuda.launcher import fused_by_default
from bminf.errors import ArgumentError

Loader = Callable[..., Any]
FUSED = {"rms_norm", "layer_norm", "rotary_append"}
TEXTS = {"glm130b": "the blocks of a layer wait", "cpm1": "今天天气很好", "cpm2": "今天天气很好"}


def work(model: Any, text: str) -> dict[str, Any]:
    """Both ways to passes: rows of the engine, and what has the whole cache."""
    return {
        "greedy": model.generate(text, max_tokens=3, temperature=0),
        "beams": model.generate(text, max_tokens=3, num_beams=2),
    }


@pytest.mark.parametrize("name", TEXTS)
def test_every_pass_takes_the_operators_that_were_asked_for(load: Loader, name: str) -> None:
    found = []
    for is_fused in (True, False):
        model = load(name, max_batch_size=2, quantization="int8", fused_kernels=is_fused)
        launcher = HostLauncher()
        with served_by(launcher):
            found.append(work(model, TEXTS[name]))
        assert bool(FUSED & {*launcher.names}) is is_fused
        assert {*launcher.names} - FUSED  # those that have no operator of torch in their place
    assert found[0] == found[1]


def test_words_in_place_of_a_switch_are_refused(
    load: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ArgumentError, match="fused_kernels='no'; accepted: True, False"):
        load("cpm1", fused_kernels="no")
    monkeypatch.setenv("BMINF_FUSED_KERNELS", "off")
    fused_by_default.cache_clear()
    with pytest.raises(ArgumentError, match="BMINF_FUSED_KERNELS is 'off'; accepted: 0 "):
        load("cpm1")
    fused_by_default.cache_clear()
    monkeypatch.delenv("BMINF_FUSED_KERNELS")
    assert fused_by_default()
