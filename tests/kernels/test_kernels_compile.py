"""Every kernel is compiled for every architecture, as the library does it; no device is needed.

The library does it by bminf/cuda/compile.py, out of what bminf/cuda/source.py puts together.
"""

from __future__ import annotations

import re
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from variants import CAPABILITIES, fused_extremes, tensor_core_of, variants, weight_of

from bminf.cuda import compile as cuda_compile
from bminf.cuda.compile import compile_kernel
from bminf.cuda.source import Kernel, kernel_folder, source_of
from bminf.errors import KernelError
from bminf.ops import attention, linear_w8a8, linear_weight_only
from bminf.quantization.packed import INT4, INT8, Format

SCALE = linear_w8a8.scale_int32_kernel(torch.float16)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BMINF_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def compiled(kernel: Kernel, *options: str) -> tuple[str, str]:
    """What the compiler says of registers, shared memory and spills; and the text as PTX."""
    from cupy_backends.cuda.libs import nvrtc

    program = nvrtc.createProgram(source_of(kernel), f"kernels/{kernel.file}", (), ())
    try:
        nvrtc.compileProgram(program, (*options, "-std=c++17"))
        ptx = nvrtc.getPTX(program)
        return str(nvrtc.getProgramLog(program)), ptx.decode() if isinstance(ptx, bytes) else ptx
    finally:
        nvrtc.destroyProgram(program)


def ptx_of(kernel: Kernel, capability: int) -> str:
    return compiled(kernel, f"-arch=compute_{capability}")[1]


def registers_allowed(kernel: Kernel) -> int:
    """What leaves room for enough warps on a multiprocessor: 65536 registers are there."""
    macros = dict(kernel.macros)
    if kernel.name in ("linear_few_rows", "linear_grouped"):
        has_minimum, is_float = macros["HAS_MINIMUM"], macros["ELEMENT"] == 32
        rows = macros["ROWS_OF_X"]
        if rows <= 2:
            return 168 if has_minimum and is_float and not macros["SPAN"] else 128
        return 168 if rows <= 8 and not has_minimum and not is_float else 255
    if kernel.name == "linear_tensor_core":
        return {1: 128, 2: 168}.get(macros["X_TILES"], 255)
    if kernel.name in ("rms_norm", "layer_norm"):
        return 80 if macros["WIDE"] else 128
    if kernel.name == "attention_decode":  # two blocks of 256 threads, or one
        return 128 if macros["ROWS"] <= 2 else 200
    return {
        "gemm_w8a8_tensor_core": 160,
        "gemm_w8a8_dp4a": 64,
        "attention_decode_merge": 64,
        "rotary_append": 64,
    }.get(kernel.name, 48)


DIVISION = re.compile(r"\b(div|rem)\.[su](16|32|64)\b")
HALF_ARITHMETIC = re.compile(
    r"\b(add|sub|mul|fma|neg|abs|max|min|setp\.\w+)(\.\w+)*\.(b?f16)(x2)?\b"
)


def check(kernel: Kernel, capability: int) -> str:
    """What is wrong with the machine code of `kernel`; empty if nothing is."""
    log, ptx = compiled(kernel, f"-arch=sm_{capability}", "--ptxas-options=-v")
    entries = re.findall(r"Compiling entry function '(\w+)'", log)
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", log))
    frames = [int(n) for n in re.findall(r"(\d+) bytes stack frame", log)]
    shared = [int(n) for n in re.findall(r"(\d+) bytes smem", log)]
    warnings = [line for line in log.splitlines() if re.search("warning", line, re.IGNORECASE)]
    # Denormals are numbers, as in the host build; ex2 and rcp are parts of tanhf and expf.
    flushed = {line for line in ptx.splitlines() if re.search(r"\s(?!ex2|rcp)[a-z]\S*\.ftz", line)}
    complaints = {
        f"entries {entries}": entries != [kernel.name],
        f"registers {registers}": max(registers) > registers_allowed(kernel),
        f"{spilled} bytes spilled": spilled > 0,
        f"stack frames {frames}": max(frames) > 0,
        f"shared memory {shared}": max(shared, default=0) > 48 * 1024,
        f"warnings {warnings}": any("deprecated" not in line for line in warnings),
        f"no PTX, but {ptx[:100]}": f".target sm_{capability}" not in ptx,
        f"flushed denormals {flushed}": len(flushed) > 0,
        "division": DIVISION.search(ptx) is not None,
        "half arithmetic": capability == 61 and HALF_ARITHMETIC.search(ptx) is not None,
    }
    wrong = [text for text, is_wrong in complaints.items() if is_wrong]
    return f"{kernel} for sm_{capability}: {', '.join(wrong)}" if wrong else ""


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_kernel_compiles_without_spills_and_within_its_budget(capability: int) -> None:
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda kernel: check(kernel, capability), variants(capability))
    assert not [complaint for complaint in found if complaint]


def test_every_source_is_compiled() -> None:
    compiled = {kernel.file for capability in (61, 80) for kernel in variants(capability)}
    assert compiled == {path.name for path in kernel_folder().glob("*.cu")}


# ---- instructions --------------------------------------------------------------------------------


@pytest.mark.parametrize("capability", [61, 75, 90])
@pytest.mark.parametrize("form", [INT8, INT4], ids=["int8", "int4"])
def test_few_rows_read_16_bytes_at_a_time(form: Format, capability: int) -> None:
    """The first codes, and the next in the loop; but for integer scales, two a row of int4 there
    and one in what is left of a row."""
    kernel = linear_weight_only.few_rows_kernel(torch.float16, weight_of(form), 1)
    text = ptx_of(kernel, capability)
    rows = int(dict(kernel.macros)["ROWS_OF_W"])
    assert text.count("ld.global.nc.v4") == 2 * rows
    num_scales = 3 * rows if form.scale_bits == 8 else 0
    assert len(re.findall(r"ld\.global\.(nc\.)?[usb]8", text)) == num_scales


@pytest.mark.parametrize("capability", [61, 80, 90])
@pytest.mark.parametrize("num_rows", [1, 4])
def test_attention_reads_16_bytes_at_a_time_and_divides_nothing(
    num_rows: int, capability: int
) -> None:
    """Keys and values, DEPTH of them in one step of a loop that is not unrolled."""
    kernel = attention.attention_kernel(torch.float16, 128, num_rows)
    text = ptx_of(kernel, capability)
    assert text.count("ld.global.nc.v4") == 2 * (4 if num_rows == 1 else 2)
    for own in (kernel, attention.merge_kernel(torch.float16, 128)):
        assert not re.search(r"\b(div|rem)\.[us]\d+", ptx_of(own, capability))


def test_tensor_cores_where_they_are_promised() -> None:
    kernel = tensor_core_of(torch.bfloat16, INT4, 16)
    text = ptx_of(kernel, 80)
    assert "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32" in text
    assert "ld.global.nc.v4" in text
    kernel = linear_w8a8.tensor_core_kernel(torch.float16, is_large=True)
    assert "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32" in ptx_of(kernel, 80)
    assert "cp.async.cg.shared.global" in ptx_of(kernel, 80)
    assert "mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32" in ptx_of(kernel, 75)


def test_dp4a_where_there_are_no_tensor_cores_for_8_bits() -> None:
    text = ptx_of(linear_w8a8.dp4a_kernel(torch.float16), 61)
    products = re.findall(r"\bdp4a\.s32\.s32\b", text)
    assert len(products) == 8 * 16 and "ld.global.nc.v4" in text


def test_norms_and_appends_read_16_bytes_at_a_time_and_divide_no_integers() -> None:
    """A division of integers takes tens of instructions, on 6.1 above all."""
    for capability in (61, 90):
        for kernel in fused_extremes():
            text, is_wide = ptx_of(kernel, capability), 0 < dict(kernel.macros).get("WIDE", 1)
            assert not re.search(r"\b(div|rem)\.[su]\d", text), kernel
            if dict(kernel.macros).get("WIDTH", 8) == 8:
                assert bool(re.search(r"ld\.global\.(nc\.)?v4", text)) is is_wide, kernel
                assert ("st.global.v4" in text) is is_wide, kernel


# ---- the compiler and its cache ------------------------------------------------------------------


def test_machine_code_is_kept_of_each_device_source_and_compiler_and_found_again(
    cache_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cupy_backends.cuda.libs import nvrtc

    code = compile_kernel(SCALE, 80)
    assert code[:4] == b"\x7fELF" and len(list(cache_folder.iterdir())) == 1
    assert compile_kernel(SCALE, 86) != code and len(list(cache_folder.iterdir())) == 2
    folder = copy_of_sources(tmp_path, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(cuda_compile, "_compile", lambda *_: pytest.fail("compiled again"))
        assert compile_kernel(SCALE, 80) == code
    common = folder / "common.cuh"
    common.write_text(common.read_text() + "// another text\n")
    compile_kernel(SCALE, 80)
    assert len(list(cache_folder.iterdir())) == 3
    monkeypatch.setattr(nvrtc, "getVersion", lambda: (99, 1))
    compile_kernel(SCALE, 80)
    assert len(list(cache_folder.iterdir())) == 4


def test_damaged_machine_code_is_compiled_anew(
    cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = compile_kernel(SCALE, 80)
    (file,) = cache_folder.iterdir()
    content = file.read_bytes()
    monkeypatch.setattr(cuda_compile, "_compile", lambda *_: code)
    flipped = bytes([content[1000] ^ 1])
    for damaged in (
        b"",
        content[:20],
        content[:-1],
        content[:-32],  # without a digest
        content[:1000] + flipped + content[1001:],
        content[:-1] + bytes([content[-1] ^ 1]),
        bytes(len(content)),
    ):
        file.write_bytes(damaged)
        assert compile_kernel(SCALE, 80) == code
        assert file.read_bytes() == content and list(cache_folder.iterdir()) == [file]


def copy_of_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "kernels"
    folder.mkdir()
    for path in kernel_folder().glob("*.cu*"):
        (folder / path.name).write_text(path.read_text())
    monkeypatch.setattr("bminf.cuda.source.kernel_folder", lambda: folder)
    return folder


def test_an_error_names_file_line_and_architecture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_of_sources(tmp_path, monkeypatch)
    source = folder / SCALE.file
    lines = source.read_text().splitlines()
    number = next(i for i, line in enumerate(lines, 1) if "if (n >= N) return" in line)
    lines[number - 1] += " int other = nothing_of_that_name;"
    source.write_text("\n".join(lines) + "\n")
    with pytest.raises(KernelError) as caught:
        compile_kernel(SCALE, 80)
    message = str(caught.value)
    where = f"kernels/scale_int32.cu({number}): error"
    assert message.count("): error") == message.count(where) == 1 and "sm_80" in message
    assert "nothing_of_that_name" in message and "install bminf anew" in message
    common = folder / "common.cuh"
    common.write_text("// text\nthis is no C++\n")
    with pytest.raises(KernelError, match=r"kernels/common\.cuh\(2\): error"):
        compile_kernel(SCALE, 80)


def test_devices_too_old_or_unknown_are_refused() -> None:
    with pytest.raises(KernelError, match=r"5\.2 is too old .* need 6\.1 \(GTX 10 series\)"):
        compile_kernel(SCALE, 52)
    with pytest.raises(KernelError, match=r"cannot compile for this GPU \(-arch=sm_999\); install"):
        compile_kernel(SCALE, 999)


def test_a_missing_compiler_is_said_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    from cupy_backends.cuda.libs import nvrtc

    def missing() -> tuple[int, int]:
        raise RuntimeError("Failure finding libnvrtc.so\nand a long explanation")

    monkeypatch.setattr(nvrtc, "getVersion", missing)
    with pytest.raises(KernelError) as caught:
        compile_kernel(SCALE, 80)
    assert "pip install nvidia-cuda-nvrtc-cu12" in str(caught.value)
    assert "Failure finding libnvrtc.so); install" in str(caught.value)


def test_a_compiler_without_its_own_library_is_said_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As the wheel of 13.0 is without cuda-pathfinder 1.9: nothing there says where it lies."""
    from cupy_backends.cuda.libs import nvrtc

    def fail(*_: object) -> None:
        raise nvrtc.NVRTCError(7)

    log = "nvrtc: error: failed to open libnvrtc-builtins.so.13.0.\n  Make sure ...\n"
    monkeypatch.setattr(nvrtc, "compileProgram", fail)
    monkeypatch.setattr(nvrtc, "getProgramLog", lambda _: log)
    with pytest.raises(KernelError) as caught:
        compile_kernel(SCALE, 90)
    assert "failed to open libnvrtc-builtins.so.13.0" in str(caught.value)
    assert "pip install -U cuda-pathfinder" in str(caught.value)
    assert "bminf anew" not in str(caught.value)


def test_a_missing_cupy_is_said_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cupy_backends.cuda.libs", None)
    with pytest.raises(KernelError, match="pip install cupy-cuda12x"):
        compile_kernel(SCALE, 80)


def test_a_cache_that_cannot_be_written_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BMINF_CACHE_DIR", str(tmp_path / "file" / "below"))
    assert compile_kernel(SCALE, 80)
    assert "set BMINF_CACHE_DIR" in caplog.text


def test_nothing_is_left_where_writing_fails(
    cache_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = cache_folder / "code.cubin"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:  # a disk that takes 64 KiB of a file
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
        cuda_compile._write(file, bytes(2**17))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "set BMINF_CACHE_DIR" in caplog.text and not list(cache_folder.iterdir())


def test_missing_sources_are_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("bminf.cuda.source._PACKAGE", tmp_path / "bminf")
    with pytest.raises(KernelError, match="install bminf anew"):
        kernel_folder()
    with pytest.raises(KernelError, match="install bminf anew"):
        source_of(SCALE)


def test_kept_machine_code_needs_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    code = compile_kernel(SCALE, 90)

    def missing() -> object:
        raise KernelError("there is none")

    monkeypatch.setattr(cuda_compile, "_nvrtc", missing)
    assert compile_kernel(SCALE, 90) == code
    with pytest.raises(KernelError, match="there is none"):
        compile_kernel(SCALE, 80)
    (file,) = cuda_compile.kept_files(SCALE, 90)
    file.write_bytes(b"damaged")
    with pytest.raises(KernelError, match="there is none"):
        compile_kernel(SCALE, 90)


def test_sources_are_compiled_where_there_is_no_torch(cache_folder: Path) -> None:
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from bminf.cuda.compile import compile_kernel\nfrom bminf.cuda.source import Kernel\n"
        f"compile_kernel({SCALE!r}, 90)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    assert len(list(cache_folder.glob("*.cubin"))) == 1
