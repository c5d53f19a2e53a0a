// A packed weight back to numbers: y = code * scale (+ minimum), rounded once to Element.
//
// codes (N, row_bytes), rows padded to 16 bytes.   scale and minimum (N, num_groups), row_scale (N): see
// linear_few_rows.cu.   y (N, K) Element, row-major, any K.
// SPAN, here: 8 where each 8 columns from a multiple of 8 on share a scale, 0 where groups begin
// anywhere, -1 where a row has one scale.   IS_ALIGNED: K is a multiple of 8.
//
// A row of blocks takes a row of the weight, a thread 8 columns; neighbours write neighbouring columns,
// 16 bytes at once where rows of y are aligned to them.
// Bytes moved: BITS / 8 + sizeof(Element) a weight.

#include "common.cuh"

constexpr int THREADS = 128;

extern "C" __global__ void __launch_bounds__(THREADS)
dequantize(const u8* codes, const void* scale, const void* minimum, const float* row_scale, Element* y,
           int K, u32 group_multiplier, int group_shift, int num_groups) {
    const size_t row = blockIdx.x;
    const u32 step = blockIdx.y * THREADS + threadIdx.x;
    const int column = 8 * step;
    if (column >= K) return;

    u32 words[2];
    load_words(words, codes + row * num_chunks_of(K) * 16 + step * BITS);
    float values[8];
    unpack8(words, values);
    const Scales scales = {scale, minimum};
    const Groups groups = {group_multiplier, group_shift, num_groups};
    if (SPAN == 0) {
        scale_pairs(values, column, scales, row * num_groups, groups);
    } else {
        const Scale own = scales.load(SPAN < 0 ? row : row * num_groups + groups.of(column));
#pragma unroll
        for (int i = 0; i < 8; ++i) values[i] = values[i] * own.factor + own.minimum;
    }
    if (SCALE_BITS == 8) {
#pragma unroll
        for (int i = 0; i < 8; ++i) values[i] *= row_scale[row];
    }
    if (IS_ALIGNED) {
        store8(y + row * K + column, values);
    } else {
        store8_within(y + row * K, column, K, values);
    }
}
