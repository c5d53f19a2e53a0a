// Each row of x to 8-bit codes and one scale: codes = round(x / scale), scale = max |x| / 127.
//
// x (M, K) Element, row-major, K a multiple of 8.   codes (M, row_bytes) 8-bit, row_bytes K rounded up
// to 16, zeros in the padding.   scale (M) float.
//
// A block of 256 threads takes a row: once for the maximum, once more, from the cache, for the codes.
// Thread i reads columns 8 i to 8 i + 7, and so on in steps of 2048.
// Bytes moved: sizeof(Element) + 1 an element.
// Source: row-wise absolute-maximum quantization, Dettmers et al. 2022, arXiv:2208.07339, section 2.

#include "common.cuh"

constexpr int THREADS = 256;

DEVICE float block_max(float value) {
    __shared__ float of_warps[THREADS / WARP];
    value = warp_max(value);
    if (threadIdx.x % WARP == 0) of_warps[threadIdx.x / WARP] = value;
    __syncthreads();
    float most = of_warps[0];
    for (int warp = 1; warp < THREADS / WARP; ++warp) most = max_or_nan(most, of_warps[warp]);
    return most;
}

extern "C" __global__ void __launch_bounds__(THREADS)
quantize_rows(const Element* x, i8* codes, float* scale, int K, int row_bytes) {
    const Element* row = x + size_t(blockIdx.x) * K;
    float most = 0.0f;
    for (int column = 8 * threadIdx.x; column < K; column += 8 * THREADS) {
        float values[8];
        load8_or_zeros(row, column, K, values);
#pragma unroll
        for (int i = 0; i < 8; ++i) most = max_or_nan(most, fabsf(values[i]));
    }
    const float row_scale = scale_of(block_max(most));
    if (threadIdx.x == 0) scale[blockIdx.x] = row_scale;

    uint2* row_codes = reinterpret_cast<uint2*>(codes + size_t(blockIdx.x) * row_bytes);
    for (int column = 8 * threadIdx.x; column < row_bytes; column += 8 * THREADS) {
        float values[8];
        load8_or_zeros(row, column, K, values);
        row_codes[column / 8] = codes_of(values, divisor_of(row_scale));
    }
}
