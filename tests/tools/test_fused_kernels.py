"""tools/fused_kernels.py: what it says of kernels that are right, and of some that are not."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "kernels"))
from host_launcher import HostLauncher, served_by

from bminf.arch.bloom import BloomConfig
from bminf.arch.glm import GLMConfig
from bminf.arch.gpt import GPTConfig
from bminf.arch.t5 import T5Config
from tools import fused_kernels

CONFIGS = {
    "cpm2": T5Config(64, 32, 80, 4, 8, 1, 2),
    "glm130b": GLMConfig("glm-130b", 64, 32, 2, 4, 80, 64),
    "glm10b": GLMConfig("glm-10b", 64, 32, 2, 4, 80, 64),
    "cpm1": GPTConfig(64, 32, 2, 4, 64, 80),
    "bloom": BloomConfig(64, 32, 2, 4),
}


class Wrong(HostLauncher):
    """Gives no rows of a norm but those that were in memory before."""

    def run(self, plan: Any, tensors: Any) -> None:
        if "norm" in plan.kernel.name:
            tensors[-1].fill_(7)
        else:
            super().run(plan, tensors)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    find = fused_kernels.find_sizes
    monkeypatch.setattr(fused_kernels, "find_sizes", lambda name: find(CONFIGS[name]))


def compare(out: Path, *names: str) -> int:
    sizes = ("--tokens", "4", "--prompt", "3", "--repeats", "1", "--layers", "2")
    return fused_kernels.main([*names, "--device", "cpu", *sizes, "--out", str(out)])


def test_both_ways_of_each_model_are_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launcher = HostLauncher()
    with served_by(launcher):
        assert compare(tmp_path / "out.json", *CONFIGS) == 0
    assert {"rms_norm", "layer_norm", "rotary_append"} < {*launcher.names}
    found = json.loads((tmp_path / "out.json").read_text())["models"]
    assert [one["model"] for one in found] == [*CONFIGS]
    for one in found:
        assert one["first_other"] is None and one["num_tokens"] == 4
        assert 0 < one["difference"] < 1e-4  # of float32: sums in another order
        assert min(one["fused_s"], one["torch_s"]) > 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(CONFIGS)
    assert all("the same tokens, logits differ by" in line for line in lines)


def test_kernels_that_are_wrong_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with served_by(Wrong()):
        assert compare(tmp_path / "out.json", "cpm1") == 1
    (found,) = json.loads((tmp_path / "out.json").read_text())["models"]
    assert found["difference"] > fused_kernels.MOST
    assert "WRONG" in capsys.readouterr().out


def test_nan_is_wrong() -> None:
    found = fused_kernels.Found("x", 3, None, float("nan"), 1.0, 1.0)
    assert not found.is_right and "WRONG" in str(found)
