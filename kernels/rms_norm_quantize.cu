// RMSNorm and the quantization of its result in one step: y = x / sqrt(mean(x^2) + eps) * weight, then
// codes = round(y / scale), scale = max |y| / 127, row by row. y itself is never stored.
//
// x (M, K) Element, row-major, K a multiple of 8.   weight (K) Element.   codes (M, row_bytes) 8-bit,
// row_bytes K rounded up to 16, zeros in the padding.   scale (M) float.   All sums in float.
//
// A block of 256 threads takes a row: once for the sum of squares and the largest |x weight|, which
// differs from the largest |y| by a factor only, and once more, from the cache, for the codes.
// num_columns: of K, those that count; the rest is padding.
// Bytes moved: sizeof(Element) + 1 an element, and the weight.
// Source: Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4.

#include "common.cuh"

constexpr int THREADS = 256;

struct Totals {
    float squares, most;
};

DEVICE Totals block_totals(Totals own) {
    __shared__ Totals of_warps[THREADS / WARP];
    own = {warp_sum(own.squares), warp_max(own.most)};
    if (threadIdx.x % WARP == 0) of_warps[threadIdx.x / WARP] = own;
    __syncthreads();
    Totals all = of_warps[0];
    for (int warp = 1; warp < THREADS / WARP; ++warp) {
        all.squares += of_warps[warp].squares;
        all.most = max_or_nan(all.most, of_warps[warp].most);
    }
    return all;
}

extern "C" __global__ void __launch_bounds__(THREADS)
rms_norm_quantize(const Element* x, const Element* weight, i8* codes, float* scale, int K,
                  int num_columns, int row_bytes, float eps) {
    const Element* row = x + size_t(blockIdx.x) * K;
    Totals own = {0.0f, 0.0f};
    for (int column = 8 * threadIdx.x; column < K; column += 8 * THREADS) {
        float values[8], weights[8];
        load8_or_zeros(row, column, K, values);
        load8_or_zeros(weight, column, K, weights);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            own.squares += values[i] * values[i];
            own.most = max_or_nan(own.most, fabsf(values[i] * weights[i]));
        }
    }
    const Totals all = block_totals(own);
    const float factor = 1.0f / sqrtf(all.squares / num_columns + eps);
    const float row_scale = scale_of(all.most * factor);
    if (threadIdx.x == 0) scale[blockIdx.x] = row_scale;

    uint2* row_codes = reinterpret_cast<uint2*>(codes + size_t(blockIdx.x) * row_bytes);
    for (int column = 8 * threadIdx.x; column < row_bytes; column += 8 * THREADS) {
        float values[8], weights[8];
        load8_or_zeros(row, column, K, values);
        load8_or_zeros(weight, column, K, weights);
#pragma unroll
        for (int i = 0; i < 8; ++i) values[i] *= factor * weights[i];
        row_codes[column / 8] = codes_of(values, divisor_of(row_scale));
    }
}
