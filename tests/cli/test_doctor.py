"""`bminf doctor`: its report; that it predicts of a real model what `bminf bench` measures.

bminf/cli/doctor.py. Processor time is compared, so that what else runs here does not count.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from terminal import Command, started

from bminf.cli import _parser, doctor, machine, session
from bminf.cli.gpus import Speeds

WITHIN = 0.5  # 0.25 on a machine of one's own


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little is measured."""
    for name, value in (("PROBE_BYTES", 2**20), ("_DISK_BYTES", 2**23), ("_NORMS", 1)):
        monkeypatch.setattr(machine, name, value)
    monkeypatch.setattr(machine, "SHAPES", ((64, 96), (128, 128)))


def arguments_of(*argv: object) -> argparse.Namespace:
    words = ["doctor", *map(str, argv)]
    return _parser(words).parse_args(words)


@pytest.mark.usefixtures("quick")
def test_json_has_all_parts(command: Command) -> None:
    found = json.loads(command("doctor", "--json").out)
    assert set(found) == {
        *("versions", "processors", "memory", "gpu", "measured", "models", "seconds"),
    }
    measured = found["measured"]
    assert measured.pop("products") and measured.pop("disk_bytes_per_s", 1)
    assert min(measured.values()) > 0
    assert {one["quantization"] for one in found["models"]} == {"none", "int8", "int4"}
    fits = [one for one in found["models"] if one["streamed_bytes"] == 0]
    assert fits and all(one["tokens_per_s"] > 0 for one in fits)


@pytest.mark.usefixtures("quick")
def test_text_has_a_line_for_each_part_and_for_each_model(command: Command) -> None:
    out, err = command("doctor")
    heads = [line.split("  ")[0] for line in out.splitlines()]
    assert err == "" and heads[:8] == [
        *("versions", "processors", "GPU", "memory", "link", "bandwidth", "disk", "a call"),
    ]
    assert heads.count("SmolLM2 135M") == 3 and heads.count("Llama 3.3 70B") == 3
    assert "GB/s" in out and "tokens/s" in out


@pytest.mark.usefixtures("quick")
def test_a_model_is_predicted_whole_half_and_within_a_limit(folder: Path, command: Command) -> None:
    options = ("--quantization", "none", "--json")
    whole, half = json.loads(command("doctor", folder, *options).out)["models"]
    assert whole["streamed_bytes"] == 0 < half["streamed_bytes"]
    assert whole["model"] == "LlamaForCausalLM" and whole["quantization"] == "none"
    assert half["memory_limit"] < whole["memory_limit"]
    limits = ("--memory-limit", str(half["memory_limit"]))
    *_, asked = json.loads(command("doctor", folder, *options, *limits).out)["models"]
    assert asked["memory_limit"] == half["memory_limit"]
    assert asked["streamed_bytes"] == half["streamed_bytes"]
    *_, none = json.loads(command("doctor", folder, *options, "--memory-limit", "1").out)["models"]
    assert none["tokens_per_s"] is none["resident_bytes"] is None
    assert "does not fit" in command("doctor", folder, "--memory-limit", "1").out


def test_reports_of_bugs_are_asked_for_it() -> None:
    forms = Path(__file__).resolve().parents[2] / ".github" / "ISSUE_TEMPLATE"
    for name in ("bug.yml", "model.yml"):
        fields = yaml.safe_load((forms / name).read_text())["body"]
        (asked,) = (field for field in fields if field.get("id") == "doctor")
        assert "`bminf doctor`" in asked["attributes"]["label"]
        assert asked["validations"]["required"]


def test_wrong_use_is_told(tmp_path: Path, command: Command) -> None:
    assert "--memory-limit" in command("doctor", "--memory-limit", "many", code=2).error


@pytest.mark.usefixtures("quick")
def test_a_folder_and_a_model_that_are_not_there(tmp_path: Path, command: Command) -> None:
    missing = tmp_path / "nowhere"
    assert str(missing) in command("doctor", "--offload-dir", missing, code=1).error
    assert str(missing) in command("doctor", missing, code=1).error


@pytest.mark.usefixtures("quick")
def test_a_disk_that_is_full_leaves_the_rest_of_the_report(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(machine, "disk_speed", full)
    with pytest.warns(UserWarning, match="is not measured: No space left.*: --offload-dir"):
        found = json.loads(command("doctor", "--json").out)
    assert found["measured"]["disk_bytes_per_s"] is None and found["measured"]["call_s"] > 0
    said = command("doctor", "--offload-dir", tmp_path, code=1).error
    assert f"the disk of {tmp_path} cannot be measured: No space left" in said


def test_a_file_of_the_disk_is_gone_after_ctrl_c(tmp_path: Path) -> None:
    """While it measures: the file is there then, and has no name."""
    process = started("doctor", "--offload-dir", str(tmp_path))
    links = Path(f"/proc/{process.pid}/fd")
    until_s = time.monotonic() + 60
    while not any(str(tmp_path) in str(target) for target in targets(links)):
        assert process.poll() is None and time.monotonic() < until_s
        time.sleep(0.002)
    assert list(tmp_path.iterdir()) == []
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert list(tmp_path.iterdir()) == []


def targets(links: Path) -> list[Path]:
    found = []
    for link in links.iterdir():
        try:
            found.append(link.readlink())
        except OSError:  # closed meanwhile
            continue
    return found


def test_predictions_are_what_is_measured(
    smollm2_folder: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SmolLM2, plain and half streamed, alternating, medians of three each."""
    monkeypatch.setattr(session, "time", SimpleNamespace(perf_counter=time.thread_time))
    monkeypatch.setattr(machine, "SHAPES", machine.SHAPES[:2])  # as large as its own
    monkeypatch.setattr(machine, "PACKED", ())  # of which it has none
    given = arguments_of(smollm2_folder, "--quantization", "none", "--max-length", 48)
    seen: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for _ in range(3):
        here = doctor.measured(given, time.thread_time)
        for kind, one in zip(("plain", "half"), doctor.expected(given, here), strict=True):
            assert one.tokens_per_s is not None and bool(one.streamed_bytes) == (kind == "half")
            seen[kind, "predicted"].append(one.tokens_per_s)
            seen[kind, "measured"].append(bench(command, smollm2_folder, one.memory_limit))
    for kind in ("plain", "half"):
        predicted, measured = (statistics.median(seen[kind, x]) for x in ("predicted", "measured"))
        assert 1 - WITHIN <= predicted / measured <= 1 + WITHIN, dict(seen)


def bench(command: Command, model: Path, limit: int) -> float:
    sizes = ("--prompt-tokens", "16", "--max-new-tokens", "13", "--runs", "1")
    options = ("--quantization", "none", "--memory-limit", limit, "--max-length", "48")
    found: dict[str, Any] = json.loads(command("bench", model, *sizes, *options, "--json").out)
    return float(found["decode_tokens_per_s"])


@pytest.mark.gpu
def test_a_gpu_is_measured(command: Command) -> None:
    found = json.loads(command("doctor", "--json").out)
    assert found["gpu"]["name"] == torch.cuda.get_device_name(0)
    assert found["measured"]["memory_bytes_per_s"] > found["measured"]["link_bytes_per_s"]
    assert found["seconds"] < 20


def test_a_gpu_that_is_not_here_is_shown() -> None:
    """Its lines, with numbers that are given."""
    gpu = {"name": "GPU", "capability": "6.1", "free_bytes": 2**32, "total_bytes": 2**33}
    assert doctor._gpu(gpu) == "GPU, compute capability 6.1, 4.0 GiB of 8.0 GiB free"
    speeds = Speeds(12 * 10**9, 192 * 10**9)
    measured = {
        "link_bytes_per_s": speeds.link, "memory_bytes_per_s": speeds.memory,
        "host_memory_bytes_per_s": 10**10, "disk_bytes_per_s": None, "call_s": 5e-6,
        "products": [],
    }  # fmt: skip
    assert list(doctor._measured(measured, True)) == [
        "link        12.0 GB/s, from page-locked memory",
        "bandwidth   192.0 GB/s of the GPU, 10.0 GB/s of host memory",
        "disk        not measured on this system",
        "a call      5.0 us",
    ]
