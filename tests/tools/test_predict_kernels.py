"""The arithmetic of tools.predict_kernels, on cards and models of the test's own."""

from __future__ import annotations

import pytest
import torch

from bminf.arch.t5 import T5, T5Config
from bminf.quantization.packed import INT8, Format
from tools import predict_kernels
from tools.predict_kernels import (
    DRAIN_S,
    MODELS,
    REACHED,
    SMALL_S,
    Card,
    Model,
    bound_s,
    bytes_of,
    device_s,
    main,
    share_of_copy,
    tokens_s,
)

CARD = Card("card", 10, 1e9, 1e12, 90)  # 1.28e12 instructions and 1e12 bytes a second
MODEL = Model("model", INT8, 2, ((1000, 1000), (500, 1000)), (100, 1000), 20)


def test_bytes_of_a_weight() -> None:
    assert bytes_of(INT8) == 1 and bytes_of(Format(4)) == 0.5
    assert bytes_of(Format(4, 16)) == 0.5 + 2 / 16
    assert bytes_of(Format(4, 32, has_minimum=True, scale_bits=8)) == 0.5 + 2 / 32


def test_memory_and_instructions_overlap() -> None:
    assert share_of_copy(CARD, INT8, 0) == pytest.approx(REACHED)
    alike = 1.28 / REACHED  # as long as the memory needs at best
    assert share_of_copy(CARD, INT8, alike) == pytest.approx(REACHED / 2**0.25)
    assert share_of_copy(CARD, INT8, 1280) == pytest.approx(1 / 1000)
    assert share_of_copy(CARD, Format(4), 1280) == pytest.approx(1 / 2000)
    card = Card("twice the processors", 20, 1e9, 1e12, 90)
    assert share_of_copy(card, INT8, 2 * alike) == pytest.approx(REACHED / 2**0.25)


def test_a_step_is_its_matrices_its_small_kernels_and_the_host() -> None:
    assert MODEL.weights == 3_000_000
    found = device_s(CARD, MODEL, 20, instructions=1280)
    products = 2 * 2 + 1
    small = products * DRAIN_S + (20 - products) * SMALL_S
    assert found == pytest.approx(3e6 / 1e9 + 2e5 / (REACHED * 1e12) + small)
    assert bound_s(CARD, MODEL) == pytest.approx(3.2e6 / 1e12)
    assert tokens_s(CARD, MODEL, 20, 0.0, 1280) == (1 / found, 1 / found)
    eager, captured = tokens_s(CARD, MODEL, 20, 1.0, 1280)
    assert (eager, captured) == (1 / 20, 1 / found)


def test_the_matrices_of_cpm2_are_those_of_its_decoder() -> None:
    with torch.device("meta"):
        network = T5(T5Config(26240, 4096, 10240, 64, 64, 1, 24))
    linears = [m for m in network.decoder.modules() if isinstance(m, torch.nn.Linear)]
    model = MODELS[0]
    assert model.weights == sum(linear.weight.numel() for linear in linears)
    assert model.head == tuple(network.lm_head.weight.shape)


def test_what_it_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict_kernels, "per_weight", lambda card, form, num_rows: 0.0)
    assert main(["--host-us", "1000", "--launches", "400", "1000"]) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert ["few rows, M=1, int8", *["0.93"] * 4] in cells
    assert next(row for row in cells if row[0] == "tensor cores, M=8, int8")[1] == ""
    assert [row[2] for row in cells if row[0] == "CPM-2 int8"] == ["2.5"] * 4
