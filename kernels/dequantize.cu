// A packed weight back to numbers: y = code * scale (+ minimum), rounded once to Element.
//
// codes (N, row_bytes), rows padded to 16 bytes.   scale and minimum (N, num_groups), row_scale (N): see
// linear_few_rows.cu.   y (N, K) Element, row-major, any K.
//
// A thread writes 8 columns of a row; neighbours write neighbouring columns.
// Bytes moved: BITS / 8 + sizeof(Element) a weight.

#include "common.cuh"

constexpr int THREADS = 256;

extern "C" __global__ void __launch_bounds__(THREADS)
dequantize(const u8* codes, const void* scale, const void* minimum, const float* row_scale, Element* y,
           int N, int K, u32 group_multiplier, int group_shift, int num_groups) {
    const int steps = (K + 7) / 8;
    const size_t index = size_t(blockIdx.x) * THREADS + threadIdx.x;
    const size_t row = index / steps;
    if (row >= N) return;
    const int column = 8 * int(index % steps);

    const size_t row_bytes = size_t(K + CHUNK_COLUMNS - 1) / CHUNK_COLUMNS * 16;
    u32 words[2];
    load_words(words, codes + row * row_bytes + size_t(column) * BITS / 8);
    float values[8];
    unpack8(words, values);
    scale_pairs(values, column, {scale, minimum}, row * num_groups,
                {group_multiplier, group_shift, num_groups});
    if (SCALE_BITS == 8) {
#pragma unroll
        for (int i = 0; i < 8; ++i) values[i] *= row_scale[row];
    }
    store8(y + row * K, column, K, values);
}
