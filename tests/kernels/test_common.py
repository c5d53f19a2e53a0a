"""The functions of kernels/common.cuh by themselves, where no kernel shows all that they do."""

from __future__ import annotations

import torch
from host_launcher import HostLauncher

from bminf.cuda.source import Argument, Kernel, kernel_folder


def run(body: str, *arguments: Argument, parameters: str, num_threads: int) -> None:
    """`body` once for each i below num_threads, a multiple of 256."""
    common = (kernel_folder() / "common.cuh").read_text()
    source = (
        f"#define ELEMENT 17\n{common}\n"
        f'extern "C" __global__ void word({parameters}) {{\n'
        f"const int i = blockIdx.x * 256 + threadIdx.x;\n{body}\n}}\n"
    )
    launcher = HostLauncher(source_of=lambda kernel: source)
    grid = (num_threads // 256, 1, 1)
    launcher.launch(Kernel("word.cu", "word"), grid, (256, 1, 1), arguments)


def test_floats_are_rounded_to_bfloat16_as_torch_does() -> None:
    """Each upper half of a float with lower halves around a tie, and NaN of any digits."""
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    words = (torch.arange(2**16).unsqueeze(1) * 2**16 + lower).flatten()
    values = torch.where(words < 2**31, words, words - 2**32).to(torch.int32).view(torch.float32)
    given = torch.empty(len(values), dtype=torch.bfloat16)
    parameters = "const float* x, u16* y"
    run("y[i] = float_to_bfloat16(x[i]);", values, given, parameters=parameters,
        num_threads=len(values))  # fmt: skip
    expected, is_number = values.bfloat16(), ~values.isnan()
    assert torch.equal(given.isnan(), values.isnan())
    same = given.view(torch.int16) == expected.view(torch.int16)
    assert bool(same[is_number].all())


def test_codes_stay_within_127() -> None:
    x = torch.tensor([0.5, 1.5, -2.5, 126.6, 127.0, 127.6, 128.0, 1e9, float("inf")])
    values = torch.cat([x, -x, torch.zeros(256 - 2 * len(x))])
    codes = torch.empty(256, dtype=torch.int32)
    run("code[i] = i8(code_of(x[i], 1.0f));", values, codes, parameters="const float* x, int* code",
        num_threads=256)  # fmt: skip
    assert torch.equal(codes, values.round().clamp(-127, 127).int())
