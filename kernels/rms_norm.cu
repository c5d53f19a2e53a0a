// RMSNorm, behind a residual connection or not: s = x * scale + delta, or s = x where delta is null;
// y = s / sqrt(mean(s^2) + eps) * weight, row by row. The quotient is rounded before it is scaled.
//
// x, delta, sum, y (M, K) Element, row-major.   weight (K) Element.   sum takes s where there is a delta.
// WIDE: see is_wide in common.cuh.   All sums in float.
//
// A block of up to 512 threads takes a row and reads it once.
// Bytes moved: 2 sizeof(Element) an element, with a residual connection 4, and the weight.
// Source: Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4; Raffel et al. 2020, arXiv:1910.10683.

#include "common.cuh"

constexpr int MAX_THREADS = 512;

extern "C" __global__ void __launch_bounds__(MAX_THREADS, 1)
rms_norm(const Element* x, const Element* delta, const Element* weight, Element* sum, Element* y,
         int K, float scale, float eps) {
    __shared__ float of_warps[MAX_THREADS / WARP];
    Element* const own = y + size_t(blockIdx.x) * K;
    float values[CHUNKS][8], squares = 0.0f;
    load_row(values, x, delta, sum, K, WIDE, scale);
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
#pragma unroll
        for (int i = 0; i < 8; ++i) squares += values[chunk][i] * values[chunk][i];
    }
    const float factor = rsqrtf(block_sum(squares, of_warps) / K + eps);
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
        float weights[8];
        load8_of(weight, column_of(chunk), K, WIDE, weights);
#pragma unroll
        for (int i = 0; i < 8; ++i) weights[i] *= rounded(values[chunk][i] * factor);
        store8_of(own, column_of(chunk), K, WIDE, weights);
    }
}
