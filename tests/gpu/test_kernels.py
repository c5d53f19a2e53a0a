"""The kernels on a real GPU: right, on torch's stream, in graphs, fast, and lean.

The cases of tests/kernels/cases.py run here as they do in the host build; what follows them is what
only a device can show.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from cases import CASES, CUT, LARGEST, ROUNDED, WHOLE, Case, relative_error, weight_on

import bminf
from benchmarks import run
from benchmarks.harness import poisoned
from benchmarks.kernels import PATHS, has_path, run_path
from benchmarks.targets import targets
from bminf.cuda.launcher import Launcher, launcher_for
from bminf.layers.attention import split_heads
from bminf.ops import linear_w8a8
from bminf.ops.dequantize import dequantize_weight
from bminf.ops.gated_linear import gated_linear
from bminf.ops.linear import linear
from bminf.ops.norm import add_layer_norm, add_rms_norm
from bminf.ops.quantize_rows import quantize_rows, rms_norm_quantize
from bminf.ops.rotary_append import rotary_append
from bminf.quantization.packed import INT4, INT8, Format, PackedWeight, dequantize, row_bytes
from bminf.quantization.packing import int8_rows, pack

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
SHAPES = ((40, 2), (37, 34), (33, 64), (130, 1000), (72, 4160))  # of weights
ROWS = (1, 3, 8, 16, 40, 200)
TARGET_GPUS = ("H100", "H200", "A100")
MARGIN = 1.5  # of the targets: a test is to find what broke, not what the weather was


@pytest.fixture(autouse=True)
def _waits_for_the_device() -> Iterator[None]:
    """An error of a kernel shows in the test that launched it."""
    torch.manual_seed(0)
    yield
    torch.cuda.synchronize()


def launcher() -> Launcher:
    found = launcher_for(torch.device(DEVICE))
    assert found is not None
    return found


# ---- the results ---------------------------------------------------------------------------------


def cases() -> list[Case]:
    """Each once: the lists of several compute capabilities overlap."""
    every = [case for group in (*CASES.values(), LARGEST) for case in group]
    return list({case.name: case for case in every}.values())


@pytest.mark.parametrize("case", cases(), ids=str)
def test_case(case: Case) -> None:
    with poisoned():
        case.run(DEVICE)


@pytest.mark.parametrize("dtype", ROUNDED, ids=str)
@pytest.mark.parametrize("form", (*WHOLE, *CUT), ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_each_path_that_could_be_chosen(path: str, form: Format, dtype: torch.dtype) -> None:
    """Also those that the thresholds of the day keep out."""
    for n, k in SHAPES:
        weight, values = weight_on(DEVICE, n, k, form)
        for m in ROWS:
            if not has_path(path, launcher().capability, m, dtype):
                continue
            x = torch.randn(m, k).to(dtype)
            with poisoned():
                y = run_path(path, x.to(DEVICE), weight)
            assert relative_error(y, x.double() @ values.T) < ROUNDED[dtype], (m, n, k)


@pytest.mark.parametrize("dtype", ROUNDED, ids=str)
@pytest.mark.parametrize("name", ["kernel_product", "library_product"])
def test_each_product_of_8_bit_activations(name: str, dtype: torch.dtype) -> None:
    for n, k in (*SHAPES, (7, 33)):
        weight, values = weight_on(DEVICE, n, k, INT8)
        for m in (*ROWS, 65, 129):
            x = torch.randn(m, k).to(dtype)
            codes, scale = int8_rows(x)
            expected = codes.double() * scale.double().unsqueeze(-1) @ values.T
            with poisoned():
                own_codes, own_scale = quantize_rows(x.to(DEVICE))
                product = getattr(linear_w8a8, name)
                y = product(launcher(), own_codes, own_scale, weight, None, dtype)
            assert relative_error(y, expected) < ROUNDED[dtype], (m, n, k)


@pytest.mark.parametrize("m", [1, 16])
@pytest.mark.parametrize("form", [INT8, INT4], ids=str)
def test_a_weight_of_more_bytes_than_32_bits_count(form: Format, m: int) -> None:
    n, k = (40_000, 65_536) if form == INT8 else (70_000, 65_536)
    if torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("needs 8 GiB of GPU memory")
    weight = random_weight(n, k, form)
    assert weight.qweight.nbytes > 2**31
    x = torch.randn(m, k, device=DEVICE, dtype=torch.float16)
    y = linear(x, weight)
    for rows in (slice(0, 50), slice(n // 2, n // 2 + 50), slice(n - 50, n)):
        values = dequantize(weight.rows(rows), torch.float64)
        assert relative_error(y[:, rows], x.double() @ values.T) < 2e-3, rows
    last = weight.rows(slice(n - 50, n))
    assert relative_error(dequantize_weight(last, x.dtype), dequantize(last, torch.float64)) < 1e-3


def random_weight(n: int, k: int, form: Format) -> PackedWeight:
    """Any codes are codes: quicker than to pack random numbers."""
    shape = (n, row_bytes(k, form.bits))
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, device=DEVICE)
    groups = (n,) if form.group_size is None else (n, -(-k // form.group_size))
    scale = torch.rand(groups, device=DEVICE) / 64
    if form.bits == 8:
        return PackedWeight(codes.view(torch.int8), scale, None, k, form.group_size)
    minimum = torch.randn(groups, device=DEVICE).half() if form.has_minimum else None
    return PackedWeight(codes, scale.half(), minimum, k, form.group_size)


def test_as_many_activations_as_32_bits_do_not_count() -> None:
    m, k = 40_000, 65_536
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of GPU memory")
    x = torch.randn(m, k, device=DEVICE, dtype=torch.float16)
    weight = torch.ones(k, device=DEVICE, dtype=torch.float16)
    for codes, scale in (quantize_rows(x), rms_norm_quantize(x, weight, 0.0)):
        for row in (0, m // 2, m - 1):
            back = codes[row].double() * scale[row].double()
            direction = x[row].double() / x[row].double().norm() * back.norm()
            assert relative_error(back, direction) < 2e-2, row


@pytest.mark.parametrize("m", [200, 2048])
def test_long_sums_of_half_precision_are_kept_in_float32(m: int) -> None:
    """Of the library's product, of as many columns as GLM-130B's widest. Each half of a sum is too
    large for half precision; torch lets partial sums be rounded to it, unless it is told not to.
    """
    columns = 32768
    packed = pack(torch.rand(256, columns) + 0.5, INT4)
    parts = [part.to(DEVICE) if isinstance(part, torch.Tensor) else part for part in packed]
    weight = PackedWeight(*parts)
    x = 8 * torch.rand(m, columns, device=DEVICE)
    x[:, columns // 2 :] *= -1
    x = x.half()
    exact = x.double() @ dequantize_weight(weight, torch.float16).double().T
    assert relative_error(linear(x, weight), exact) < 2e-3


# ---- the launch ----------------------------------------------------------------------------------

FEW, MANY = 2, 24  # rows: for the kernel that reads a weight once, and for tensor cores
Product = Callable[[torch.Tensor], torch.Tensor]
OPS = ("int8", "int4", "w8a8", "gated", "rms_norm", "add_rms_norm", "add_layer_norm", "append")


def products() -> dict[str, Product]:
    """Every op that launches kernels, for x of 192 columns."""
    weight = {form: weight_on(DEVICE, 256, 192, form)[0] for form in (INT8, INT4)}
    norm = torch.ones(192, device=DEVICE, dtype=torch.float16)
    return {
        "int8": lambda x: linear(x, weight[INT8]),
        "int4": lambda x: linear(x, weight[INT4]),
        "w8a8": lambda x: linear(x, weight[INT8], None, "int8"),
        "gated": lambda x: gated_linear(x, weight[INT4], weight[INT4], "silu"),
        "rms_norm": lambda x: rms_norm_quantize(x, norm, 1e-5)[0],
        "add_rms_norm": lambda x: add_rms_norm(x, x, norm, 1e-5)[1],
        "add_layer_norm": lambda x: add_layer_norm(x, x, norm, norm, 1e-5, 3.0)[1],
        "append": appended,
    }


def appended(x: torch.Tensor) -> torch.Tensor:
    """What is in the cache then: a token a row, of 8 heads of 8 columns."""
    query, key, value = split_heads(x.unsqueeze(0), 3, 8)
    cos, sin = torch.linspace(-1, 1, 8 * len(x), device=DEVICE).view(2, 1, 1, len(x), 4)
    cache = torch.zeros(2, 8, len(x), 8, device=DEVICE, dtype=x.dtype)
    cells = torch.arange(len(x), device=DEVICE).flip(0)
    rotary_append(launcher(), query, key, value, (cos, sin), cells, *cache)
    return cache


def is_same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, but for many rows: the library may sum in another order on another stream."""
    return torch.equal(a, b) or (len(a) > MANY and relative_error(a, b) < 1e-3)


def activations(m: int) -> torch.Tensor:
    return torch.randn(m, 192, device=DEVICE, dtype=torch.float16)


@pytest.mark.parametrize("m", [FEW, MANY, 200])
@pytest.mark.parametrize("op", OPS)
def test_a_graph_gives_the_same_with_new_inputs(op: str, m: int) -> None:
    product = products()[op]
    x = activations(m)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # kernels are compiled, libraries set up, before a capture
        product(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        y = product(x)
    for _ in range(3):
        new = activations(m)
        x.copy_(new)
        graph.replay()
        assert is_same(y, product(new))


@pytest.mark.parametrize("m", [FEW, MANY, 200])
def test_nothing_waits_for_the_device(m: int) -> None:
    found, x = products(), activations(m)
    expected = {op: product(x) for op, product in found.items()}
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        given = {op: product(x) for op, product in found.items()}
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(given[op], expected[op]) for op in found)


@pytest.mark.parametrize("m", [FEW, MANY, 200])
@pytest.mark.parametrize("op", OPS)
def test_kernels_follow_on_the_stream_of_the_moment(op: str, m: int) -> None:
    product = products()[op]
    x, new = torch.zeros(m, 192, device=DEVICE, dtype=torch.float16), activations(m)
    product(x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # some 30 ms: another stream would not wait for the copy
        x.copy_(new)
        y = product(x)
    stream.synchronize()
    assert is_same(y, product(new))


def test_a_new_thread_launches_too() -> None:
    product, x = products()["int8"], activations(FEW)
    expected, given = product(x), []
    thread = threading.Thread(target=lambda: given.append(product(x)))
    thread.start()
    thread.join()
    assert torch.equal(given[0], expected)


def test_tensors_of_another_gpu_are_served_there() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    weight, values = weight_on("cuda:1", 33, 64, INT4)
    x = torch.randn(2, 64)
    assert relative_error(linear(x.to("cuda:1"), weight), x.double() @ values.T) < 2e-6


@pytest.mark.filterwarnings("default")  # of the compiler
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_a_compiled_layer_is_the_layer(quantization: str, backend: str) -> None:
    plain = torch.nn.Linear(192, 256).half()
    layer = bminf.QuantizedLinear(plain, quantization=quantization).to(DEVICE)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    with torch.no_grad():
        for m in (FEW, MANY):
            x = activations(m)
            assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("form", [INT8, INT4], ids=str)
@pytest.mark.parametrize("m", [1, 4, 16])
def test_few_rows_allocate_the_result_and_nothing_else(form: Format, m: int) -> None:
    weight, _ = weight_on(DEVICE, 4096, 4096, form)
    x = torch.randn(m, 4096, device=DEVICE, dtype=torch.float16)
    assert bytes_beyond_the_result(lambda: linear(x, weight)) == 0
    if m <= 4:  # beyond, tensor cores may serve two linears better
        assert bytes_beyond_the_result(lambda: gated_linear(x, weight, weight, "silu")) == 0


def bytes_beyond_the_result(product: Callable[[], torch.Tensor]) -> int:
    product()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = product()
    most: int = torch.cuda.max_memory_allocated()
    return most - before - y.nbytes


# ---- the speed -----------------------------------------------------------------------------------


def test_the_targets_are_within_reach(tmp_path: Path) -> None:
    name = torch.cuda.get_device_name()
    if not any(known in name for known in TARGET_GPUS):
        pytest.skip(f"the targets are for {', '.join(TARGET_GPUS)}, not for {name}")
    file = tmp_path / "kernels.json"
    large = ("--shapes", "12288x12288", "--rows", "1", "4", "16", "2048", "--rounds", "3")
    ops = ("--ops", "weight-only", "w8a8")
    assert run.main(["kernels", "--device", DEVICE, *ops, *large, "--out", str(file)]) == 0
    found = targets(json.loads(file.read_text()))
    assert len(found) == 7  # two formats, three numbers of rows; W8A8
    missed = [str(target) for target in found if not target.is_met(MARGIN)]
    assert not missed, missed
