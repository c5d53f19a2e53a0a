"""CUDA's words on the CPU: each gives what the CUDA manuals say that a GPU gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from host_build import BuildError
from host_launcher import run
from host_memory import HostKernelError

# ---- Tensor cores. The formulas are those of the PTX ISA, "Matrix Fragments for mma.m...". ----

LANE = """
const int groupID = threadIdx.x >> 2, threadID_in_group = threadIdx.x % 4;
"""
M16N8K16 = """
unsigned A[4] = {}, B[2] = {};
for (int i = 0; i < 8; ++i) {
    const int row = (0 <= i && i < 2) || (4 <= i && i < 6) ? groupID : groupID + 8;
    const int col = threadID_in_group * 2 + (i & 1) + (i < 4 ? 0 : 8);
    A[i / 2] |= unsigned(a[row * 16 + col]) << (16 * (i % 2));
}
for (int i = 0; i < 4; ++i) {
    const int row = threadID_in_group * 2 + (i & 1) + (i < 2 ? 0 : 8);
    B[i / 2] |= unsigned(b[row * 8 + groupID]) << (16 * (i % 2));
}
"""
M16N8K32 = """
unsigned A[4] = {}, B[2] = {};
for (int i = 0; i < 16; ++i) {
    const int row = (0 <= i && i < 4) || (8 <= i && i < 12) ? groupID : groupID + 8;
    const int col = threadID_in_group * 4 + (i & 3) + (i < 8 ? 0 : 16);
    A[i / 4] |= unsigned(a[row * 32 + col] & 0xFF) << (8 * (i % 4));
}
for (int i = 0; i < 8; ++i) {
    const int row = threadID_in_group * 4 + (i & 3) + (i < 4 ? 0 : 16);
    B[i / 4] |= unsigned(b[row * 8 + groupID] & 0xFF) << (8 * (i % 4));
}
"""
M8N8K16 = """
unsigned A[1] = {}, B[1] = {};
for (int i = 0; i < 4; ++i) {
    A[0] |= unsigned(a[groupID * 16 + threadID_in_group * 4 + i] & 0xFF) << (8 * i);
    B[0] |= unsigned(b[(threadID_in_group * 4 + i) * 8 + groupID] & 0xFF) << (8 * i);
}
"""
SUMS = """
#define AT(i) c[(groupID + (i < 2 ? 0 : 8)) * 8 + threadID_in_group * 2 + (i & 1)]
for (int i = 0; i < COUNT; ++i) C[i] = AT(i);
CALL;
for (int i = 0; i < COUNT; ++i) AT(i) = C[i];
"""


def mma(layout: str, call: str, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """c + a b by one warp."""
    d = c.clone()
    count, sums = (c.shape[0] // 4, "int" if c.dtype == torch.int32 else "float")
    element = "signed char" if a.dtype == torch.int8 else "unsigned short"
    body = LANE + layout + f"{sums} C[{count}];" + SUMS
    body = body.replace("COUNT", str(count)).replace("CALL", call)
    run(body, a, b, d, parameters=f"const {element}* a, const {element}* b, {sums}* c")
    return d


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_mma_of_16_bit_floats(dtype: torch.dtype) -> None:
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
    c = torch.randn(16, 8)
    name = {torch.float16: "f16", torch.bfloat16: "bf16"}[dtype]
    d = mma(M16N8K16, f"shim_mma_m16n8k16_{name}(C, A, B)", a, b, c)
    torch.testing.assert_close(d.double(), c + a.double() @ b.double(), rtol=0, atol=1e-5)


def int8(*shape: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


@pytest.mark.parametrize(
    ("layout", "call", "rows", "depth"),
    [
        (M16N8K32, "shim_mma_m16n8k32_s8(C, A, B)", 16, 32),
        (M8N8K16, "shim_mma_m8n8k16_s8(C, A[0], B[0])", 8, 16),
    ],
    ids=["m16n8k32", "m8n8k16"],
)
def test_mma_of_8_bit_integers(layout: str, call: str, rows: int, depth: int) -> None:
    a, b = int8(rows, depth), int8(depth, 8)
    c = torch.randint(-(2**20), 2**20, (rows, 8), dtype=torch.int32)
    assert torch.equal(mma(layout, call, a, b, c), c + a.int() @ b.int())


# ---- Lanes ----


# What a lane gets, and what that is by the CUDA Programming Guide.
LANES: list[tuple[str, Callable[[int], int]]] = [
    ("__shfl_xor_sync(~0u, lane, 5)", lambda lane: lane ^ 5),
    ("__shfl_xor_sync(~0u, lane, 16, 16)", lambda lane: lane if lane < 16 else lane - 16),
    ("__shfl_down_sync(~0u, lane, 3)", lambda lane: lane + 3 if lane < 29 else lane),
    ("__shfl_down_sync(~0u, lane, 3, 8)", lambda lane: lane + 3 if lane % 8 < 5 else lane),
    ("__shfl_up_sync(~0u, lane, 2)", lambda lane: lane - 2 if lane >= 2 else lane),
    ("__shfl_up_sync(~0u, lane, 2, 4)", lambda lane: lane - 2 if lane % 4 >= 2 else lane),
    ("__shfl_sync(~0u, lane, 7)", lambda lane: 7),
    ("__shfl_sync(~0u, lane, 9, 8)", lambda lane: lane // 8 * 8 + 1),
    ("int(__shfl_sync(~0u, unsigned(lane), 35))", lambda lane: 3),
    ("int(__shfl_sync(~0u, float(lane), lane + 1))", lambda lane: (lane + 1) % 32),
    ("int(__ballot_sync(~0u, lane % 3 == 0) >> lane & 1)", lambda lane: lane % 3 == 0),
    ("__any_sync(~0u, lane == 31) + __any_sync(~0u, lane == 32)", lambda lane: 1),
    ("__all_sync(~0u, lane < 32) + __all_sync(~0u, lane < 31)", lambda lane: 1),
    ("lane < 8 ? __all_sync(0xFFu, lane < 8) : 2", lambda lane: 1 if lane < 8 else 2),
]


@pytest.mark.parametrize("order", ["forward", "reverse", 3])
def test_lanes_get_what_others_have(order: str | int) -> None:
    y = torch.full((len(LANES), 64), -1, dtype=torch.int32)
    body = "const int lane = threadIdx.x % 32;\n" + "".join(
        f"y[{i} * 64 + threadIdx.x] = {call};\n" for i, (call, _) in enumerate(LANES)
    )
    run(body, y, parameters="int* y", block=(64, 1, 1), order=order)
    for (call, source), values in zip(LANES, y.tolist(), strict=True):
        assert values == [int(source(lane)) for lane in range(32)] * 2, call


# ---- Numbers ----


def test_every_half_becomes_its_float() -> None:
    halves = torch.arange(2**16).to(torch.int32).to(torch.int16)
    y = torch.empty(2**16)
    body = "const int i = blockIdx.x * 1024 + threadIdx.x; y[i] = shim_half_to_float(x[i]);"
    parameters = "const unsigned short* x, float* y"
    run(body, halves, y, parameters=parameters, grid=(64, 1, 1), block=(1024, 1, 1))
    assert torch.equal(y.nan_to_num(7e7), halves.view(torch.float16).float().nan_to_num(7e7))


@pytest.mark.parametrize(
    ("function", "dtype"),
    [("shim_float_to_half", torch.float16), ("shim_float_to_bfloat16", torch.bfloat16)],
    ids=["half", "bfloat16"],
)
def test_floats_are_rounded_to_even(function: str, dtype: torch.dtype) -> None:
    exact = torch.randn(4096).to(dtype).float()
    ties = (exact + torch.nextafter(exact.to(dtype), torch.tensor(9.0, dtype=dtype)).float()) / 2
    special = torch.tensor([0.0, -0.0, 65520.0, 1e38, -1e38, torch.inf, -torch.inf, 6e-8, 3e-8])
    x = torch.cat([exact, ties, torch.randn(4096) * 1e-5, torch.randn(4096) * 1e5, special])
    x = torch.nn.functional.pad(x, (0, -len(x) % 1024))
    x[-1] = torch.nan
    y = torch.empty(len(x), dtype=dtype)
    body = f"const int i = blockIdx.x * 1024 + threadIdx.x; y[i] = {function}(x[i]);"
    parameters = "const float* x, unsigned short* y"
    run(body, x, y, parameters=parameters, grid=(len(x) // 1024, 1, 1), block=(1024, 1, 1))
    assert torch.equal(y[:-1].view(torch.int16), x[:-1].to(dtype).view(torch.int16))
    assert y[-1].isnan()


def test_floats_become_integers_as_on_a_device() -> None:
    x = torch.tensor(
        [0.5, 1.5, -2.5, 2.4999, 3e9, -3e9, torch.nan, torch.inf, -torch.inf, 0, 7, -1]
    )
    y = torch.zeros(32, dtype=torch.int32)
    run("y[threadIdx.x] = __float2int_rn(x[threadIdx.x % 12]);", x, y, parameters=XY_OF_INT)
    most, least = 2**31 - 1, -(2**31)
    assert y.tolist()[:12] == [0, 2, -2, 2, most, least, 0, most, least, 0, 7, -1]


XY_OF_INT = "const float* x, int* y"


SCALARS = [
    ("__dp4a(0x01FF7F80, 0x02FE7F80, 100)", 2 + 2 + 127 * 127 + 128 * 128 + 100),
    ("__dp4a(0x7F7F7F7F, 0x7F7F7F7F, 0x7FFFFFFF)", -(2**31) + 4 * 127 * 127 - 1),
    ("int(__byte_perm(0x33221100, 0x77665544, 0x7250))", 0x77225500),
    ("int(__byte_perm(0x33221100, 0x77665544, 0x9876))", 0x11007766),
    ("int(__umulhi(0x80000001u, 6u))", 3),
    ("__float_as_int(-2.0f)", -(2**30)),
    ("int(__float_as_uint(1.0f) >> 23)", 127),
    ("int(__uint_as_float(0x40400000u)) + int(__int_as_float(0x40800000))", 7),
    ("min(-3, 2) + max(-3, 2) * 10 + int(min(3u, 2u) + max(7u, 5u))", 26),
    ("int(fminf(1.0f, __int_as_float(0x7FC00000)) + fmaxf(1.5f, 2.5f) * 2)", 6),
    ("int(4 * rsqrtf(4.0f) + __fdividef(9.0f, 3.0f) + __fmaf_rn(2, 3, 4))", 15),
    ("int(1000 * (expf(0.5f) + tanhf(0.5f) + erff(0.5f) + fabsf(-1.0f)))", 3631),
    ("__popc(0xF0F0u) + __clz(1) + __ffs(8)", 8 + 31 + 4),
    ("int(make_uint4(1, 2, 3, 4).z + make_float2(1, 2).y + make_int2(5, 6).x)", 10),
    ("int(dim3(7).y) + warpSize + int(sizeof(uint4) + alignof(float4) + alignof(int2))", 73),
    ("__CUDA_ARCH__", 800),
    ("BMINF_HOST_SHIM", 1),
]


def test_scalar_functions() -> None:
    y = torch.zeros(len(SCALARS), dtype=torch.int32)
    body = "".join(f"y[{i}] = {expression};\n" for i, (expression, _) in enumerate(SCALARS))
    run(body, y, parameters="int* y", block=(1, 1, 1))
    for (expression, value), result in zip(SCALARS, y.tolist(), strict=True):
        assert result == value, expression


PAIRS = [
    ("shim_sub_f16x2(a[i], b[i])", torch.float16, lambda a, b, c: a - b),
    ("shim_mul_f16x2(a[i], b[i])", torch.float16, lambda a, b, c: a * b),
    ("shim_fma_f16x2(a[i], b[i], c[i])", torch.float16, lambda a, b, c: a * b + c),
    ("shim_fma_bf16x2(a[i], b[i], c[i])", torch.bfloat16, lambda a, b, c: a * b + c),
]


@pytest.mark.parametrize(("call", "dtype", "formula"), PAIRS, ids=lambda value: str(value)[:15])
def test_pairs_of_16_bits_are_rounded_once(
    call: str, dtype: torch.dtype, formula: Callable[..., torch.Tensor]
) -> None:
    """Each half of a word by itself: of numbers alike in size, so that float64 holds what is
    rounded; 1 + 2^-8 squared, less 1, which rounded in between would lose a digit; infinity."""
    a, b, c = (torch.randn(3, 128) * 16).to(dtype)
    a[:2], b[:2], c[:2] = 1 + 2**-7, 1 + 2**-7, -1
    a[2], b[2], c[2] = 60000, torch.inf, 1
    y = torch.zeros(64, dtype=torch.int32)
    run(
        f"const int i = threadIdx.x; y[i] = {call};",
        *(values.view(torch.int32) for values in (a, b, c)),
        y,
        parameters="const unsigned* a, const unsigned* b, const unsigned* c, unsigned* y",
        block=(64, 1, 1),
    )
    expected = formula(a.double(), b.double(), c.double()).to(dtype)
    assert torch.equal(y.view(dtype), expected)


# ---- Threads, blocks, memory ----

POSITION = """
const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
"""


def test_every_thread_of_every_block_runs_once() -> None:
    y = torch.zeros(2 * 3 * 4, 5 * 3 * 2, dtype=torch.int32)
    body = POSITION + "atomicAdd(y + block * 30 + thread, 1000 * block + thread);"
    run(body, y, parameters="int* y", grid=(2, 3, 4), block=(5, 3, 2))
    assert torch.equal(y, 1000 * torch.arange(24).int()[:, None] + torch.arange(30).int())


def order_of_threads(order: str | int) -> list[int]:
    y, count = torch.zeros(4 * 64, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    body = POSITION + "y[atomicAdd(count, 1)] = 64 * block + thread;"
    parameters = "int* y, int* count"
    run(body, y, count, parameters=parameters, grid=(4, 1, 1), block=(64, 1, 1), order=order)
    return y.tolist()


def test_orders_of_threads_and_blocks() -> None:
    forward = list(range(256))
    assert order_of_threads("forward") == forward
    assert order_of_threads("reverse") == forward[::-1]
    one, two = order_of_threads(1), order_of_threads(2)
    assert sorted(one) == sorted(two) == forward
    assert len({tuple(forward), tuple(one), tuple(two), tuple(forward[::-1])}) == 4
    assert order_of_threads(1) == one
    with pytest.raises(ValueError, match="order 'backward'"):
        order_of_threads("backward")


def test_shared_memory_is_rubbish_in_each_block() -> None:
    y = torch.zeros(3, 32)
    body = """
    __shared__ float fixed[32];
    DYNAMIC_SHARED(float, dynamic);
    y[blockIdx.x * 32 + threadIdx.x] = fixed[threadIdx.x] + dynamic[threadIdx.x];
    fixed[threadIdx.x] = dynamic[threadIdx.x] = 0;
    """
    run(body, y, parameters="float* y", grid=(3, 1, 1), shared_bytes=128)
    assert y.isnan().all()


def test_the_end_of_odd_dynamic_shared_memory_is_watched() -> None:
    body = "DYNAMIC_SHARED(char, bytes); bytes[100] = 1;"
    with pytest.raises(HostKernelError, match=r"wrote .* bytes past the end"):
        run(body, parameters="", shared_bytes=100)


def test_atomic_sums() -> None:
    sums, counts = torch.zeros(1), torch.zeros(1, dtype=torch.int32)
    body = "atomicAdd(sums, 0.5f); atomicAdd(reinterpret_cast<unsigned*>(counts), 2u);"
    run(body, sums, counts, parameters="float* sums, int* counts", grid=(3, 1, 1))
    assert sums.item() == 48 and counts.item() == 192


COPIES = """
__shared__ uint4 a, b;
if (threadIdx.x != 0) return;
shim_cp_async_16(&a, x, 16);
shim_cp_async_commit();
shim_cp_async_16(&b, x + 4, 6);
shim_cp_async_commit();
shim_cp_async_wait(PENDING);
*reinterpret_cast<uint4*>(y) = a;
*reinterpret_cast<uint4*>(y + 4) = b;
"""


@pytest.mark.parametrize(
    ("pending", "expected"),
    [
        (2, [-1] * 8),
        (1, [1, 2, 3, 4, -1, -1, -1, -1]),
        (0, [1, 2, 3, 4, 5, 6, 0, 0]),
    ],
)
def test_copies_are_there_when_they_were_waited_for(pending: int, expected: list[int]) -> None:
    x = torch.arange(1, 9, dtype=torch.int32)
    x[5] |= 0x7F << 16  # beyond the 6 bytes
    y = torch.zeros(8, dtype=torch.int32)
    run(COPIES.replace("PENDING", str(pending)), x, y, parameters="const int* x, int* y")
    assert y.tolist() == expected


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("__shared__ uint4 a; shim_cp_async_16(&a, x + 1, 16);", "from global .* misaligned"),
        ("__shared__ int a[8]; shim_cp_async_16(a + 1, x, 16);", "to shared .* misaligned"),
        ("uint4 a; shim_cp_async_16(&a, x, 16);", "not all in the block's shared memory"),
        ("__shared__ uint4 a; shim_cp_async_16(&a, x, 17);", "cp.async of 17 bytes"),
        ("__shared__ uint4 a; shim_cp_async_16(&a, x + 32, 16);", "byte 128 of the 128 of arg"),
        ("shim_store16(const_cast<int*>(x) + 2, shim_load16(x));", "misaligned access"),
        ("if (x[0] == 0) __builtin_trap();", "runs into a trap"),
    ],
)
def test_what_a_device_refuses(body: str, message: str) -> None:
    with pytest.raises(HostKernelError, match=message):
        run(body, torch.zeros(32, dtype=torch.int32), parameters="const int* x")


@pytest.mark.parametrize(
    ("body", "begins"),
    [
        ("y[0] = __dp4a(1, 2, 3);", 61),
        ("y[0] = shim_fma_bf16x2(1, 2, 3);", 80),
        ("unsigned a = 0; shim_mma_m8n8k16_s8(y, a, a);", 75),
        ("unsigned a[4] = {}; shim_mma_m16n8k32_s8(y, a, a);", 80),
        ("__shared__ uint4 a; shim_cp_async_16(&a, y, 16);", 80),
    ],
)
def test_instructions_of_later_devices_are_refused(body: str, begins: int) -> None:
    y = torch.zeros(32, dtype=torch.int32)
    run(body, y, parameters="int* y", capability=begins)
    with pytest.raises(HostKernelError, match=f"an instruction that begins at sm_{begins}"):
        run(body, y, parameters="int* y", capability=begins - 1)


@pytest.mark.parametrize(
    ("parameters", "body"),
    [
        ("int* y", "int x; y[0] = x;"),
        ("double* y, double x", "y[0] = x;"),
        ("int* y", "extern __shared__ int more[];"),
    ],
)
def test_what_nvrtc_or_the_launcher_would_refuse_is_not_compiled(
    parameters: str, body: str
) -> None:
    with pytest.raises(BuildError, match=r"word\.cu|kernel\.cu|cuda_shim\.h"):
        run(body, torch.zeros(1), parameters=parameters)
