"""What other libraries store: gguf itself, the others as they are installed, or with stand-ins."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
import torch

from tools import other_formats
from tools.other_formats import OTHER_FORMATS, OtherFormat, Stored

FORMATS = {form.name: form for form in OTHER_FORMATS}
GGUF = [form for form in OTHER_FORMATS if form.library == "gguf"]
WIDTH = 384  # whole groups of every format


def weight_of(num_rows: int, width: int = WIDTH) -> torch.Tensor:
    return torch.randn(num_rows, width, generator=torch.Generator().manual_seed(0)) * 0.05


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what hqq imports of torch
@pytest.mark.parametrize("form", OTHER_FORMATS, ids=lambda form: form.name)
def test_a_library_keeps_a_weight_about_as_it_was(form: OtherFormat) -> None:
    pytest.importorskip(form.library)
    weight = weight_of(48)
    before = weight.clone()
    kept, num_bytes = form.quantize(weight)
    assert torch.equal(weight, before)
    assert (kept.shape, kept.dtype) == (weight.shape, torch.float32)
    is_8_bit = form.title == "Q8_0"
    # 64 normal weights span about 5 sigma, in 15 steps, and errors are 1/sqrt(12) of a step: 0.1.
    assert 0 < (kept - weight).norm() / weight.norm() < (0.01 if is_8_bit else 0.15)
    bits = 8 * num_bytes / weight.numel()
    assert (8 if is_8_bit else 4) < bits <= (8.5 if is_8_bit else 5.0)
    assert form.version is not None


@pytest.mark.parametrize("form", GGUF, ids=lambda form: form.name)
def test_gguf_is_asked_for_the_kind_of_the_title(form: OtherFormat) -> None:
    weight = weight_of(5)
    kept, num_bytes = form.quantize(weight)
    columns, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[form.title]]
    assert columns == form.group_size
    assert num_bytes == weight.numel() // columns * block_bytes
    again = form.quantize(kept)  # which lies on the grid by now
    assert torch.allclose(again.weight, kept, rtol=1e-3, atol=0)
    assert again.num_bytes == num_bytes


def stand_in(monkeypatch: pytest.MonkeyPatch, form: OtherFormat, **content: Any) -> None:
    monkeypatch.setitem(sys.modules, form.module, SimpleNamespace(**content))


@pytest.mark.parametrize("is_double", [False, True])
def test_scales_of_nf4_are_counted_where_they_are_quantized_and_where_not(
    monkeypatch: pytest.MonkeyPatch, is_double: bool
) -> None:
    form = FORMATS["bitsandbytes NF4 g64 double" if is_double else "bitsandbytes NF4 g64"]
    weight, codes = weight_of(4), torch.zeros(4 * WIDTH // 2, 1, dtype=torch.uint8)
    scale_dtype = torch.uint8 if is_double else torch.float32
    state = SimpleNamespace(absmax=torch.zeros(4 * WIDTH // 64, dtype=scale_dtype))
    tensors = [codes, state.absmax]
    if is_double:
        state.state2, state.offset = SimpleNamespace(absmax=torch.zeros(1)), torch.zeros(())
        tensors += [state.state2.absmax, state.offset]

    def quantize_4bit(values: torch.Tensor, **options: Any) -> tuple[torch.Tensor, Any]:
        expected = {"blocksize": 64, "compress_statistics": is_double, "quant_type": "nf4"}
        assert values is weight and options == expected
        return codes, state

    def dequantize_4bit(packed: torch.Tensor, packed_state: Any) -> torch.Tensor:
        assert packed is codes and packed_state is state
        return weight + 1

    stand_in(monkeypatch, form, quantize_4bit=quantize_4bit, dequantize_4bit=dequantize_4bit)
    kept, num_bytes = form.quantize(weight)
    assert torch.equal(kept, weight + 1)
    assert num_bytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_torchao_is_unpacked_by_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    form = FORMATS["torchao int4 g32"]

    def from_hp(weight: torch.Tensor, block_size: list[int]) -> Any:
        assert block_size == [1, 32]
        packed: Any = weight.clone()
        packed.qdata = torch.zeros(4, WIDTH // 2, dtype=torch.uint8)
        packed.scale_and_zero = torch.zeros(WIDTH // 32, 4, 2, dtype=weight.dtype)
        return packed

    stand_in(monkeypatch, form, Int4OpaqueTensor=SimpleNamespace(from_hp=from_hp))
    weight = weight_of(4)
    kept, num_bytes = form.quantize(weight)
    assert torch.equal(kept, weight.bfloat16().float()) and kept.is_contiguous()
    assert num_bytes == 4 * WIDTH // 2 + 2 * 2 * 4 * WIDTH // 32


def test_hqq_counts_scales_and_zero_points(monkeypatch: pytest.MonkeyPatch) -> None:
    form, weight = FORMATS["hqq int4 g32"], weight_of(4)

    class HQQLinear:
        def __init__(self, linear: Any, config: Any, compute_dtype: Any, device: str) -> None:
            assert (config, device) == ({"nbits": 4, "group_size": 32}, "cpu")
            self.weight: torch.Tensor = linear.weight.data.to(compute_dtype)
            self.W_q = torch.zeros(2 * WIDTH // 32, 32, dtype=torch.uint8)
            scales = torch.zeros(4 * WIDTH // 32, 1, dtype=compute_dtype)
            self.meta = {"scale": scales, "zero": scales, "group_size": 32}

        def dequantize(self) -> torch.Tensor:
            return self.weight

    stand_in(monkeypatch, form, HQQLinear=HQQLinear, BaseQuantizeConfig=dict)
    kept, num_bytes = form.quantize(weight)
    assert torch.equal(kept, weight.half().float())
    assert num_bytes == 4 * WIDTH // 2 + 2 * 2 * 4 * WIDTH // 32


def test_what_cannot_be_stored_is_left_out_with_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "absent_library", None)
    monkeypatch.setitem(sys.modules, "present_library", SimpleNamespace())

    def form_of(title: str, library: str, group_size: int) -> OtherFormat:
        return OtherFormat(library, title, library, group_size, lambda _, weight: Stored(weight, 1))

    forms = [
        form_of("fits", "present_library", 32),
        form_of("too wide", "present_library", 128),
        form_of("missing", "absent_library", 32),
    ]
    linears = [torch.nn.Linear(width, 2) for width in (576, 1536, 64)]
    assert list(other_formats.possible(forms, linears)) == forms[:1]
    wide, missing = capsys.readouterr().out.splitlines()
    reason = "64 and 576 columns are no whole groups of 128"
    assert wide == f"left out: present_library too wide: {reason}"
    assert missing.startswith(
        "left out: absent_library missing: absent_library cannot be imported (import of"
    )
