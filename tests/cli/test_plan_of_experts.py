"""`bminf plan` of published mixtures of experts, from config.json alone, in the int4 default."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from moe_configs import CONFIGS, SIZES, Sizes
from terminal import Command

from bminf.cli.sources import build_on_meta
from bminf.units import parse_bytes

Report = Callable[..., dict[str, Any]]

LINK, MEMORY = 12e9, 150e9
BLOCK = re.compile(r"(layers|blocks)\.\d+\.")


def packed_bytes(rows: int, columns: int) -> float:
    """Codes of 4 bits, an 8-bit scale for 16 of them, and a float32 a row."""
    return rows * (columns / 2 + columns / 16 + 4)


def expert_bytes(sizes: Sizes) -> float:
    gate_and_up, down = (2 * sizes.inner, sizes.hidden), (sizes.hidden, sizes.inner)
    biases = 2 * (gate_and_up[0] + down[0]) if sizes.has_bias else 0
    return packed_bytes(*gate_and_up) + packed_bytes(*down) + biases


def dense_bytes(model: torch.nn.Module, left_out: str = "-") -> float:
    """All beside experts and the embedding: linears of layers in 4 bits, the head in 8.

    left_out: what is in the names of modules that are not counted.
    """
    total = 0.0
    for name, module in model.named_modules():
        if name.endswith(("embed_tokens", "mlp.experts")) or left_out in name:
            continue
        own = dict(module.named_parameters(recurse=False))
        if isinstance(module, torch.nn.Linear):
            rows, columns = own.pop("weight").shape
            if BLOCK.search(name):
                total += packed_bytes(rows, columns)
            else:  # beside the head those that join pictures and text, which are not packed
                total += rows * (columns + 8) if name == "lm_head" else 2 * rows * columns
        total += sum(2 * parameter.numel() for parameter in own.values())
    return total


def test_experts_that_host_memory_has_no_room_for_are_read_from_disk(
    tmp_path: Path, command: Command, report: Report
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["DeepSeek-V3"]))
    arguments = [tmp_path, "--quantization", "int4", "--memory-limit", "24GB"]
    arguments += ["--host-memory", "128GB", "--disk", "2GB"]
    shown = report(*arguments)
    experts = shown["experts"]
    # Beside the embedding and two staging buffers.
    in_host = (128e9 - shown["table_bytes"]) / experts["slot_bytes"] - 2
    assert len(experts["on_disk"]) == pytest.approx(experts["number"] - in_host, abs=2)
    share = len(experts["on_disk"]) / experts["number"]
    assert shown["disk_s"] == pytest.approx(experts["missed_bytes"] * share / 2e9)
    assert shown["bound"] == experts["best"]["bound"] == "disk"
    out = command("plan", *arguments).out
    assert f"reading the disk {shown['disk_s'] * 1e3:.1f} ms at 2 GB/s" in out
    assert "disk busy" in out and "bound by the disk" in out


def test_a_pool_for_less_than_a_token_is_said_to_hit_nothing(
    tmp_path: Path, command: Command, report: Report
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["OLMoE"]))
    least = report(tmp_path, "--quantization", "int4")["least_limit"]
    arguments = (tmp_path, "--quantization", "int4", "--memory-limit", str(least))
    shown = report(*arguments)
    assert shown["experts"]["num_slots"] == 2 and shown["experts"]["hit_rate"] == 0
    assert shown["experts"]["best"]["token_s"] == shown["token_s"]
    out = command("plan", *arguments).out
    assert "nothing hit in the pool" in out and "published" not in out


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_planned_from_its_configuration(
    name: str, tmp_path: Path, command: Command, report: Report
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]))
    sizes = SIZES[name]
    arguments = (tmp_path, "--quantization", "int4", "--memory-limit", sizes.limit)
    shown = report(*arguments)
    experts, number = shown["experts"], sizes.layers * sizes.experts
    assert shown["dtype"] == "bfloat16" and not shown["streamed"]
    assert experts["number"] == number
    # A slot is a little larger: each tensor begins at a multiple of 256 bytes.
    assert experts["slot_bytes"] == pytest.approx(expert_bytes(sizes), rel=2e-3)

    model = build_on_meta(CONFIGS[name])
    slots = (parse_bytes(sizes.limit) - dense_bytes(model)) / expert_bytes(sizes)
    assert 0.995 * slots - 1 < experts["num_slots"] <= slots
    wanted = sizes.layers * sizes.chosen * expert_bytes(sizes)
    missed = wanted * (1 - slots / number)
    assert experts["bytes_per_token"] == pytest.approx(wanted, rel=2e-3)
    assert experts["missed_bytes"] == pytest.approx(missed, rel=1e-2)

    # Layers that see pictures run once a request.
    copying, reading = missed / LINK, (dense_bytes(model, "visual.blocks") + wanted) / MEMORY
    assert shown["bound"] == ("link" if copying > reading else "compute")
    assert shown["token_s"] == pytest.approx(copying + reading, rel=2e-2)

    best, share = experts["best"], slots / number
    # Lines from nothing to the two points that were published, and from there to all.
    hits = np.interp(share, [0, 1 / 8, 1 / 4, 1], [0, 0.67, 0.81, 1])
    assert best["hit_rate"] == pytest.approx(hits, rel=1e-2)
    assert best["missed_bytes"] == pytest.approx(wanted * (1 - hits), rel=2e-2)
    fewer = wanted * (1 - hits) / LINK
    assert best["token_s"] == pytest.approx(fewer + reading, rel=2e-2)
    assert best["bound"] == ("link" if fewer > reading else "compute")
    out = command("plan", *map(str, arguments)).out
    assert f"{experts['num_slots']} slots of" in out and f"{number} by need" in out
    assert "bound by the link" in out
    one, other = (f"{1 / time_s:.1f} tokens/s" for time_s in (shown["token_s"], best["token_s"]))
    assert one in out and other in out and f"with {best['hit_rate']:.0%}, the most" in out
    fast_link = command("plan", *map(str, arguments), "--link", "1TB").out
    assert "bound by reading weights" in fast_link
