"""The functions of kernels/common.cuh by themselves, where no kernel shows all that they do."""

from __future__ import annotations

import torch
from host_launcher import run

from bminf.cuda.source import kernel_folder
from bminf.ops.dequantize import divider


def test_floats_are_rounded_to_bfloat16_as_torch_does() -> None:
    """Each upper half of a float with lower halves around a tie, and NaN of any digits."""
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    words = (torch.arange(2**16).unsqueeze(1) * 2**16 + lower).flatten()
    values = torch.where(words < 2**31, words, words - 2**32).to(torch.int32).view(torch.float32)
    given = torch.empty(len(values), dtype=torch.bfloat16)
    body = "const int i = blockIdx.x * 256 + threadIdx.x; y[i] = float_to_bfloat16(x[i]);"
    common = f"#define ELEMENT 17\n{(kernel_folder() / 'common.cuh').read_text()}"
    run(
        body, values, given, parameters="const float* x, u16* y", before=common,
        grid=(len(values) // 256, 1, 1), block=(256, 1, 1),
    )  # fmt: skip
    expected, is_number = values.bfloat16(), ~values.isnan()
    assert torch.equal(given.isnan(), values.isnan())
    same = given.view(torch.int16) == expected.view(torch.int16)
    assert bool(same[is_number].all())


WIDTHS = (2, 4, 6, 10, 16, 34, 48, 96, 128, 4096, 32766, 2**30 + 2, 2**31 - 1)


def test_columns_are_divided_by_the_width_of_a_group() -> None:
    """At both sides of each multiple, the last below 2^31 among them."""
    common = "#define BITS 4\n#define HAS_MINIMUM 0\n#define SCALE_BITS 16\n#define ELEMENT 16\n"
    common += (kernel_folder() / "common.cuh").read_text()
    body = (
        "const Groups groups = {multiplier, shift, 1}; y[threadIdx.x] = groups.of(x[threadIdx.x]);"
    )
    for width in WIDTHS:
        last = (2**31 - 1) // width
        multiples = width * torch.tensor([0, 1, 2, 3, 7, last // 2, last - 1, last]).clamp_min(0)
        columns = torch.cat([multiples, multiples - 1, torch.tensor([2**31 - 1])]).clamp(
            0, 2**31 - 1
        )
        given = torch.empty(len(columns), dtype=torch.int32)
        run(
            body, columns.int(), given, *divider(width), before=common,
            parameters="const int* x, int* y, u32 multiplier, int shift",
            block=(len(columns), 1, 1),
        )  # fmt: skip
        assert torch.equal(given.long(), columns // width), width
