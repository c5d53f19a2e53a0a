// Joins what the blocks of attention_decode.cu have made of their chunks of keys.
//
// partial (B, H, T, num_chunks, D + 2) float: of each chunk the sum of weighted values, relative to
// the largest score in the chunk, that score, and the sum of weights.   y (B, T, H, D) Element.
// lengths, S and is_causal as there: chunks behind the last key that a query sees are not read.
//
// A block has a query and a head: T, H, B are the grid, a thread a column.
// Bytes moved: 4 (D + 2) a chunk, beside 2 * CHUNK * D elements of keys and values.

#include "common.cuh"

constexpr float LOG2_E = 1.4426950408889634f;

extern "C" __global__ void __launch_bounds__(256)
attention_decode_merge(const float* partial, const int* lengths, Element* y, int S, int num_chunks,
                       int is_causal) {
    const int T = gridDim.x, H = gridDim.y, token = blockIdx.x, head = blockIdx.y, batch = blockIdx.z;
    const int length = lengths ? min(lengths[batch], S) : S;
    const int num_seen = max(length - (is_causal ? T - 1 - token : 0), 0);
    const int num_used = (u32(num_seen) + CHUNK - 1) / CHUNK;  // CHUNK is a power of two
    const float* own = partial + ((size_t(batch) * H + head) * T + token) * num_chunks * (HEAD_DIM + 2);

    float most = __uint_as_float(0xFF800000u);
    for (int chunk = 0; chunk < num_used; ++chunk) {
        most = fmaxf(most, own[size_t(chunk) * (HEAD_DIM + 2) + HEAD_DIM]);
    }
    if (most == __uint_as_float(0xFF800000u)) most = 0.0f;  // of no key
    const int column = min(int(threadIdx.x), HEAD_DIM - 1);
    float total = 0.0f, sum = 0.0f;
    for (int chunk = 0; chunk < num_used; ++chunk) {
        const float* of_chunk = own + size_t(chunk) * (HEAD_DIM + 2);
        const float factor = exp2f((of_chunk[HEAD_DIM] - most) * LOG2_E);
        total += factor * of_chunk[HEAD_DIM + 1];
        sum += factor * of_chunk[column];
    }
    const size_t row = (size_t(batch) * T + token) * H + head;
    if (threadIdx.x < HEAD_DIM) {
        y[row * HEAD_DIM + threadIdx.x] = from_float(total == 0.0f ? 0.0f : sum / total);
    }
}
