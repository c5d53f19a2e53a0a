"""Small kernels, each with a bug that is compiled in or not: what the checker has to see.

All take `(const float* x, float* y, int n)`, run in 4 blocks of 64 threads with 256 bytes of
dynamic shared memory, and have x and y of n = 252 floats, so the last block is not full.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

N, BLOCKS, THREADS, SHARED_BYTES = 252, 4, 64, 256
WRONG = "other numbers than expected, in one order of threads at least"
UNSEEN = "the expected numbers in every order"


def _same(x: torch.Tensor) -> torch.Tensor:
    return x


def _reversed(x: torch.Tensor) -> torch.Tensor:
    """Each block's threads, the last first."""
    padded = torch.nn.functional.pad(x, (0, BLOCKS * THREADS - N))
    return padded.view(BLOCKS, THREADS).flip(1).reshape(-1)[:N]


@dataclass(frozen=True)
class Bug:
    """A kernel's body, with IF_BUG(...) and IF_RIGHT(...) where its two versions differ.

    fast: WRONG, UNSEEN or a pattern for the error of the build without a sanitizer.
    address, undefined, thread: a pattern for what that sanitizer says, if it has to see the bug.
    """

    name: str
    body: str
    fast: str
    address: str = ""
    undefined: str = ""
    thread: str = ""
    expected: Callable[[torch.Tensor], torch.Tensor] = _same

    @property
    def text(self) -> str:
        parameters = "const float* x, float* y, int n"
        first = "const int i = blockIdx.x * 64 + threadIdx.x, t = threadIdx.x;"
        return (
            f'#line 1 "{self.name}.cu"\n'
            f'extern "C" __global__ void {self.name}({parameters}) {{\n{first}{self.body}}}\n'
        )


BUGS = [
    Bug(
        "no_barrier_after_load",
        """
        __shared__ float tile[64];
        tile[t] = i < n ? x[i] : 0;
        IF_RIGHT(__syncthreads();)
        if (i < n) y[i] = tile[63 - t];
        """,
        WRONG,
        thread="data race",
        expected=_reversed,
    ),
    Bug(
        "no_barrier_after_use",
        """
        __shared__ float tile[64];
        float sum = 0;
        for (int factor = 1; factor <= 2; ++factor) {
            tile[t] = i < n ? x[i] * factor : 0;
            __syncthreads();
            sum += tile[63 - t];
            IF_RIGHT(__syncthreads();)
        }
        if (i < n) y[i] = sum;
        """,
        WRONG,
        thread="data race",
        expected=lambda x: 3 * _reversed(x),
    ),
    Bug(
        "shared_array_too_short",
        """
        __shared__ float tile[IF_BUG(63) IF_RIGHT(64)];
        tile[t] = i < n ? x[i] : 0;
        __syncthreads();
        if (i < n) y[i] = tile[63 - t];
        """,
        r"thread \(63, 0, 0\): undefined behaviour at .*: index out of bounds",
        address="global-buffer-overflow|index out of bounds",
        undefined="index out of bounds",
        expected=_reversed,
    ),
    Bug(
        "shared_pointer_too_far",
        """
        __shared__ float tile[65];
        float* const end = tile + IF_BUG(2) IF_RIGHT(1) + 63;
        end[-t] = i < n ? x[i] : 0;
        __syncthreads();
        if (i < n) y[i] = end[t - 63];
        """,
        UNSEEN,
        address="global-buffer-overflow",
        expected=_reversed,
    ),
    Bug(
        "no_bound",
        """
        IF_RIGHT(if (i < n)) y[i] = x[i];
        """,
        r"block \(3, 0, 0\), thread \(60, 0, 0\): reads .* byte 1008 of the 1008 of argument 0",
        address="use-after-poison",
        undefined="byte 1008 of the 1008 of argument 0",
    ),
    Bug(
        "no_bound_of_result",
        """
        const float value = i < n ? x[i] : 0;
        IF_RIGHT(if (i < n)) y[i] = value;
        """,
        r"block \(3, 0, 0\), thread \(60, 0, 0\): writes .* byte 1008 of the 1008 of argument 1",
        address="use-after-poison",
    ),
    Bug(
        "write_before_begin",
        """
        if (i < n) y[i] = x[i];
        IF_BUG(if (i == 0) y[-1] = 0;)
        """,
        r"wrote 1 bytes before the 1008 bytes of argument 1",
        address="use-after-poison",
    ),
    Bug(
        "misaligned_vector",
        """
        const float4 four = *reinterpret_cast<const float4*>(x + IF_BUG(1) IF_RIGHT(0));
        if (i < n) y[i] = x[i] + 0 * four.x;
        """,
        r"thread \(0, 0, 0\): misaligned access at .* is not a multiple of 16",
        undefined="misaligned access",
    ),
    Bug(
        "uninitialised_shared",
        """
        __shared__ float tile[64];
        IF_BUG(if (t > 0)) tile[t] = i < n ? x[i] : 0;
        __syncthreads();
        if (i < n) y[i] = tile[63 - t];
        """,
        WRONG,
        expected=_reversed,
    ),
    Bug(
        "uninitialised_local",
        """
        float local[4];
        for (int k = IF_BUG(1) IF_RIGHT(0); k < 4; ++k) local[k] = x[i < n ? i : 0];
        if (i < n) y[i] = local[n % 4];
        """,
        WRONG,
    ),
    Bug(
        "lanes_missing",
        """
        float value = i < n ? x[i] : 0;
        if (t % 32 < IF_BUG(31) IF_RIGHT(32)) value = __shfl_xor_sync(~0u, value, 0);
        if (i < n) y[i] = value;
        """,
        r"thread \(31, 0, 0\): exits, while lane 0 of its warp waits for it in __shfl_sync",
    ),
    Bug(
        "lane_exited",
        """
        IF_BUG(if (i >= n) return;)
        float value = __shfl_xor_sync(~0u, i < n ? x[i] : 0, 0);
        if (i < n) y[i] = value;
        """,
        r"block \(3, 0, 0\), thread .*exit",
    ),
    Bug(
        "divergent_barrier",
        """
        IF_BUG(if (t < 32) __syncthreads(); else)
            __syncthreads();
        if (i < n) y[i] = x[i];
        """,
        "a barrier in a divergent branch",
    ),
    Bug(
        "barrier_and_shuffle",
        """
        if (t % 2 IF_RIGHT(|| true)) __syncthreads();
        float value = __shfl_xor_sync(~0u, 1.0f, 1);
        if (i < n) y[i] = x[i] * value;
        """,
        r"deadlock; thread \(0, 0, 0\) in __shfl_sync at .*; thread \(1, 0, 0\) in __syncthreads",
    ),
    Bug(
        "no_syncwarp",
        """
        __shared__ float tile[64];
        tile[t] = i < n ? x[i] : 0;
        IF_RIGHT(__syncwarp();)
        if (i < n) y[i] = tile[t ^ 1];
        """,
        WRONG,
        thread="data race",
        expected=lambda x: x.view(-1, 2).flip(1).reshape(-1),
    ),
    Bug(
        "count_not_atomic",
        """
        __shared__ int count;
        if (t == 0) count = 0;
        __syncthreads();
        IF_BUG(count += 1;) IF_RIGHT(atomicAdd(&count, 1);)
        __syncthreads();
        if (i < n) y[i] = x[i] * count;
        """,
        UNSEEN,
        thread="data race",
        expected=lambda x: 64 * x,
    ),
    Bug(
        "copy_without_wait",
        """
        __shared__ __align__(16) float tile[64];
        if (t < 16) {
            const bool inside = 4 * t + blockIdx.x * 64 < n;
            shim_cp_async_16(tile + 4 * t, x + (inside ? 4 * t + blockIdx.x * 64 : 0), 16 * inside);
        }
        shim_cp_async_commit();
        IF_RIGHT(shim_cp_async_wait(0);) IF_BUG(shim_cp_async_wait(1);)
        __syncthreads();
        if (i < n) y[i] = tile[63 - t];
        """,
        WRONG,
        expected=_reversed,
    ),
    Bug(
        "copy_without_barrier",
        """
        __shared__ __align__(16) float tile[64];
        if (t < 16) {
            const bool inside = 4 * t + blockIdx.x * 64 < n;
            shim_cp_async_16(tile + 4 * t, x + (inside ? 4 * t + blockIdx.x * 64 : 0), 16 * inside);
        }
        shim_cp_async_commit();
        shim_cp_async_wait(0);
        IF_RIGHT(__syncthreads();)
        if (i < n) y[i] = tile[63 - t];
        """,
        WRONG,
        thread="data race",
        expected=_reversed,
    ),
    Bug(
        "copy_into_buffer_in_use",
        """
        __shared__ __align__(16) float tile[64];
        tile[t] = i < n ? x[i] : 0;
        __syncthreads();
        const float value = tile[63 - t];
        IF_RIGHT(__syncthreads();)
        if (t < 16) shim_cp_async_16(tile + 4 * t, x, 16);
        shim_cp_async_commit();
        shim_cp_async_wait(0);
        if (i < n) y[i] = value;
        """,
        WRONG,
        thread="data race",
        expected=_reversed,
    ),
    Bug(
        "const_is_written",
        """
        if (i < n) y[i] = x[i];
        IF_BUG(if (i == 7) const_cast<float*>(x)[i] = 0;)
        """,
        r"thread \(7, 0, 0\): writes .* byte 28 of the 1008 of argument 0, which is only read",
    ),
    Bug(
        "dynamic_shared_overrun",
        """
        DYNAMIC_SHARED(float, tile);
        tile[t + IF_BUG(1) IF_RIGHT(0)] = i < n ? x[i] : 0;
        __syncthreads();
        if (i < n) y[i] = tile[t];
        """,
        r"thread \(63, 0, 0\): writes 0 bytes past the end of its dynamic shared memory",
    ),
    Bug(
        "other_mask",
        """
        const float value = __shfl_xor_sync(t % 2 IF_RIGHT(* 0) ? 0xFFFFFFFEu : ~0u, 1.0f, 0);
        if (i < n) y[i] = x[i] * value;
        """,
        "with mask 0xfffffffe, while lane . gives mask 0xffffffff",
    ),
    Bug(
        "other_intrinsic",
        """
        unsigned lanes = ~0u;
        if (t % 2 IF_RIGHT(* 0)) __syncwarp(); else lanes = __ballot_sync(~0u, 1);
        if (i < n) y[i] = lanes == ~0u ? x[i] : 0;
        """,
        "while lane 0 of the warp is in __ballot_sync",
    ),
    Bug(
        "divergent_intrinsic",
        """
        float value = 1;
        IF_BUG(if (t % 2) value = __shfl_xor_sync(~0u, 1.0f, 1); else)
            value = __shfl_xor_sync(~0u, 1.0f, 1);
        if (i < n) y[i] = x[i] * value;
        """,
        "a warp intrinsic in a divergent branch",
    ),
    Bug(
        "lane_outside_of_mask",
        """
        float value = 1;
        if (t % 32 < 16) value = __shfl_sync(0xFFFFu, 1.0f, IF_BUG(20) IF_RIGHT(10));
        if (i < n) y[i] = x[i] * value;
        """,
        "lane 0 reads lane 20, which is not in the mask 0x0000ffff",
    ),
    Bug(
        "division_by_zero",
        """
        const int quotient = n / (IF_RIGHT(1 +) n - 252);
        if (i < n) y[i] = x[i] * quotient;
        """,
        "integer division by zero",
        undefined="division by zero",
        expected=lambda x: 252 * x,
    ),
    Bug(
        "shift_too_far",
        """
        const int bit = 1 << (IF_RIGHT(-252 +) n);
        if (i < n) y[i] = bit ? x[i] : 0;
        """,
        UNSEEN,
        undefined="shift by a negative or too large number",
    ),
    Bug(
        "deep_stack",
        """
        volatile float local[IF_BUG(100000) IF_RIGHT(10)];
        local[0] = 1;
        if (i < n) y[i] = x[i] * local[0];
        """,
        "overflows its stack of 256 KiB",
    ),
]

SOURCE = """
#if BUG
#define IF_BUG(...) __VA_ARGS__
#define IF_RIGHT(...)
#else
#define IF_BUG(...)
#define IF_RIGHT(...) __VA_ARGS__
#endif
""" + "".join(bug.text for bug in BUGS)
