// LayerNorm, behind a residual connection or not: s = x * scale + delta, or s = x where delta is null;
// y = (s - mean(s)) / sqrt(variance(s) + eps) * weight + bias, row by row. With a scale above 1 it is
// the norm of DeepNorm.
//
// x, delta, sum, y (M, K) Element, row-major.   weight, bias (K) Element.   sum takes s where there is a
// delta.   WIDE: see is_wide in common.cuh.   All in float, but for s; the variance is of deviations, so
// that a large mean costs no digits.
//
// A block of up to 512 threads takes a row and reads it once.
// Bytes moved: 2 sizeof(Element) an element, with a residual connection 4, and weight and bias.
// Source: Ba et al. 2016, arXiv:1607.06450; Wang et al. 2022, arXiv:2203.00555.

#include "common.cuh"

constexpr int MAX_THREADS = 512;

extern "C" __global__ void __launch_bounds__(MAX_THREADS, 1)
layer_norm(const Element* x, const Element* delta, const Element* weight, const Element* bias,
           Element* sum, Element* y, int K, float scale, float eps) {
    __shared__ float of_warps[2][MAX_THREADS / WARP];
    Element* const own = y + size_t(blockIdx.x) * K;
    float values[CHUNKS][8], total = 0.0f, squares = 0.0f;
    load_row(values, x, delta, sum, K, WIDE, scale);
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
#pragma unroll
        for (int i = 0; i < 8; ++i) total += values[chunk][i];
    }
    const float mean = block_sum(total, of_warps[0]) / K;
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            values[chunk][i] -= mean;
            if (column_of(chunk) + i < K) squares += values[chunk][i] * values[chunk][i];
        }
    }
    const float factor = rsqrtf(block_sum(squares, of_warps[1]) / K + eps);
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
        float weights[8], biases[8];
        load8_of(weight, column_of(chunk), K, WIDE, weights);
        load8_of(bias, column_of(chunk), K, WIDE, biases);
#pragma unroll
        for (int i = 0; i < 8; ++i) weights[i] = values[chunk][i] * factor * weights[i] + biases[i];
        store8_of(own, column_of(chunk), K, WIDE, weights);
    }
}
