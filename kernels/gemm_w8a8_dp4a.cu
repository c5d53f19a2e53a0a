// y = (x_codes W^T) * x_scale * w_scale + bias, 8-bit codes on both sides: for cards without 8-bit
// tensor cores (sm_61, sm_70).
//
// x_codes (M, row_bytes) and w_codes (N, row_bytes), rows padded with zeros to 16 bytes.   x_scale (M),
// w_scale (N) float.   bias (N) Element or null.   y (M, N) Element, row-major. Sums are exact, in 32 bits.
//
// A block of 256 threads computes a 64 x 64 tile, each thread 4 x 4 of it with dp4a, 4 products an
// instruction. 32 bytes of each row are in shared memory at a time, transposed, four codes a word, so
// that a thread reads its 4 rows or columns as one 16-byte word.
// Work: 2 M N K operations; bytes from memory: (M N / 32) row_bytes + outputs.

#include "common.cuh"

constexpr int TILE = 64;
constexpr int THREADS = 256;
constexpr int WORDS = 8;           // of 4 codes, in the 32 bytes of a row
constexpr int STRIDE = TILE + 4;   // keeps 16-byte alignment and spreads the columns over the banks

// Thread i of 128 brings 16 bytes of a row, as 4 words below each other.
DEVICE void load_tile(int tile[WORDS][STRIDE], const i8* codes, int thread, int first_row,
                      int num_rows, int chunk, int num_chunks) {
    const int row = thread % TILE, part = thread / TILE;
    uint4 words = make_uint4(0, 0, 0, 0);
    if (chunk + part < num_chunks) {
        const size_t source = min(first_row + row, num_rows - 1);
        words = load_once(reinterpret_cast<const u8*>(codes), source * num_chunks + chunk + part);
    }
    tile[4 * part][row] = words.x;
    tile[4 * part + 1][row] = words.y;
    tile[4 * part + 2][row] = words.z;
    tile[4 * part + 3][row] = words.w;
}

extern "C" __global__ void __launch_bounds__(THREADS)
gemm_w8a8_dp4a(const i8* x_codes, const float* x_scale, const i8* w_codes, const float* w_scale,
               const Element* bias, Element* y, int M, int N, int row_bytes) {
    __shared__ __align__(16) int x_tile[WORDS][STRIDE];
    __shared__ __align__(16) int w_tile[WORDS][STRIDE];
    const int thread = threadIdx.x;
    const int first_m = blockIdx.y * TILE, first_n = blockIdx.x * TILE;
    const int own_m = thread / 16 * 4, own_n = thread % 16 * 4;
    const int num_chunks = row_bytes / 16;

    int sums[4][4] = {};
    for (int chunk = 0; chunk < num_chunks; chunk += 2) {
        if (thread < THREADS / 2) {
            load_tile(x_tile, x_codes, thread, first_m, M, chunk, num_chunks);
        } else {
            load_tile(w_tile, w_codes, thread - THREADS / 2, first_n, N, chunk, num_chunks);
        }
        __syncthreads();
#pragma unroll
        for (int word = 0; word < WORDS; ++word) {
            const int4 a = *reinterpret_cast<const int4*>(&x_tile[word][own_m]);
            const int4 b = *reinterpret_cast<const int4*>(&w_tile[word][own_n]);
            const int rows[4] = {a.x, a.y, a.z, a.w}, columns[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
#pragma unroll
                for (int j = 0; j < 4; ++j) sums[i][j] = __dp4a(rows[i], columns[j], sums[i][j]);
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int m = first_m + own_m + i, n = first_n + own_n + j;
            if (m >= M || n >= N) continue;
            float value = float(sums[i][j]) * x_scale[m] * w_scale[n];
            if (bias) value += to_float(bias[n]);
            y[size_t(m) * N + n] = from_float(value);
        }
    }
}
