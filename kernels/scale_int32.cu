// The end of an 8-bit product that a library has summed: y = sums * row_scale * column_scale + bias.
//
// sums (M, N) 32-bit integers with `stride` elements from row to row.   row_scale (M) and column_scale
// (N) float.   bias (N) Element or null.   y (M, N) Element, row-major.
//
// A row of blocks takes a row, a thread one element of it. Bytes moved: 4 + sizeof(Element) an element.

#include "common.cuh"

constexpr int THREADS = 256;

extern "C" __global__ void __launch_bounds__(THREADS)
scale_int32(const int* sums, const float* row_scale, const float* column_scale,
            const Element* bias, Element* y, int N, int stride) {
    const size_t m = blockIdx.x;
    const int n = blockIdx.y * THREADS + threadIdx.x;
    if (n >= N) return;
    float value = float(sums[m * stride + n]) * row_scale[m] * column_scale[n];
    if (bias) value += to_float(bias[n]);
    y[m * N + n] = from_float(value);
}
