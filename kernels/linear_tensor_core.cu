// y = x W^T + bias for some rows of x (4 to 128) on tensor cores, W packed to 8 or 4 bits. sm_80 and up.
//
// x (M, K) and y (M, N) Element of 16 bits, row-major, K a multiple of 8.   codes (N, row_bytes), rows
// padded to 16 bytes.   scale and minimum (N, num_groups), row_scale (N): see linear_few_rows.cu.
// bias (N) or null.
//
// A block of 4 warps computes 16 * W_TILES weight rows times 8 * X_TILES rows of x; the warps take turns along K
// and add up at the end. In mma.m16n8k16 the weights are the (16, 16) matrix and x the (16, 8) one.
// The sum over k may be taken in any order, so each lane reads 16 contiguous bytes of a weight row and
// declares them to be the columns that the instruction wants from it; the same columns of x follow, 16
// bytes at a time. So codes go from memory to registers once and in one step, without shared memory.
//
// Codes become floats, get scale and minimum, and are rounded to Element: as a dequantized weight
// would be. 8-bit codes with one scale a row stay integers, exact in Element, and are scaled at the end;
// with integer scales weights are integers, too, and the scale of their row comes at the end.
//
// Bytes moved: N * row_bytes and the scales once for each 8 * X_TILES rows of x; x from the caches,
// once for the weight rows of a block.
// Source: fragment layouts from the PTX ISA manual, "Matrix Fragments for mma.m16n8k16"; the permuted k
// is a known freedom of matrix products (used alike by Frantar et al. 2024, arXiv:2408.11743, Marlin).

#include "common.cuh"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "the tensor cores that this kernel needs begin at sm_80"
#endif

constexpr int WARPS = 4;
constexpr int ROWS_OF_W = 16 * W_TILES;
constexpr int ROWS_OF_X = 8 * X_TILES;
constexpr int SEGMENT = 4;  // chunks of 16 bytes that the four lanes of a weight row read together

// The lane's place in a fragment: rows `row` and `row + 8` of the weights, row `row` of x.
struct Lane {
    int row, chunk;
};

DEVICE Lane lane_of(int thread) { return {thread % WARP / 4, thread % 4}; }

// The codes of one segment: chunk `chunk` of the weight rows of this lane; zeros beyond the row's end.
DEVICE void load_codes(uint4 packed[2 * W_TILES], const u8* codes, const int rows[2 * W_TILES],
                       int chunk, int num_chunks) {
#pragma unroll
    for (int r = 0; r < 2 * W_TILES; ++r) {
        packed[r] = make_uint4(0, 0, 0, 0);
        if (chunk < num_chunks) packed[r] = load_once(codes, size_t(rows[r]) * num_chunks + chunk);
    }
}

extern "C" __global__ void __launch_bounds__(WARPS * WARP)
linear_tensor_core(const Element* x, const u8* codes, const void* scale, const void* minimum,
                   const float* row_scale, const Element* bias, Element* y, int M, int N, int K,
                   int group_size, int num_groups) {
    const Lane lane = lane_of(threadIdx.x);
    const int warp = threadIdx.x / WARP;
    const int num_chunks = (K + CHUNK_COLUMNS - 1) / CHUNK_COLUMNS;
    const int first_n = blockIdx.x * ROWS_OF_W;
    const int first_m = blockIdx.y * ROWS_OF_X;
    const bool scales_at_end = BITS == 8 && num_groups == 1;

    // A row that is not there is replaced by the last one, and its result is not written.
    int rows[2 * W_TILES];
#pragma unroll
    for (int r = 0; r < 2 * W_TILES; ++r) rows[r] = min(first_n + lane.row + 8 * r, N - 1);

    float sums[W_TILES][X_TILES][4] = {};
    uint4 packed[2 * W_TILES];
    int chunk = SEGMENT * warp + lane.chunk;
    load_codes(packed, codes, rows, chunk, num_chunks);
#pragma unroll 1
    for (int first = SEGMENT * warp; first < num_chunks; first += SEGMENT * WARPS) {
        uint4 next[2 * W_TILES];  // on its way while this segment is multiplied
        load_codes(next, codes, rows, chunk + SEGMENT * WARPS, num_chunks);
        Scale scales[2 * W_TILES][SPANS];
#pragma unroll
        for (int r = 0; r < 2 * W_TILES; ++r) {
            if (SPAN && !scales_at_end) {
                load_scales(scales[r], scale, minimum, chunk, size_t(rows[r]) * num_groups,
                            group_size, num_groups);
            } else {
#pragma unroll
                for (int span = 0; span < SPANS; ++span) scales[r][span] = {1.0f, 0.0f};
            }
        }
#pragma unroll
        for (int step = 0; step < CHUNK_STEPS; ++step) {
            const int column = chunk * CHUNK_COLUMNS + 8 * step;
            u32 a[2 * W_TILES][4];  // 8 weights of each row, in pairs
#pragma unroll
            for (int r = 0; r < 2 * W_TILES; ++r) {
                const u32 words[4] = {packed[r].x, packed[r].y, packed[r].z, packed[r].w};
                float w[8];
                unpack8(words, step, w);
                if (!SPAN) {
                    scale_pairs(w, column, scale, minimum, size_t(rows[r]) * num_groups, group_size,
                                num_groups);
                }
                const Scale own = scales[r][step * SPANS / CHUNK_STEPS];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    a[r][i] = pack2(w[2 * i] * own.factor + own.minimum,
                                    w[2 * i + 1] * own.factor + own.minimum);
                }
            }
#pragma unroll
            for (int tile = 0; tile < X_TILES; ++tile) {
                const int m = first_m + 8 * tile + lane.row;
                uint4 values = make_uint4(0, 0, 0, 0);
                if (m < M && column < K) {
                    values = *reinterpret_cast<const uint4*>(x + size_t(m) * K + column);
                }
                const u32 b[2][2] = {{values.x, values.y}, {values.z, values.w}};
#pragma unroll
                for (int w_tile = 0; w_tile < W_TILES; ++w_tile) {
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const u32* top = a[2 * w_tile] + 2 * half;
                        const u32* bottom = a[2 * w_tile + 1] + 2 * half;
                        const u32 fragment[4] = {top[0], bottom[0], top[1], bottom[1]};
                        mma_16x8x16(sums[w_tile][tile], fragment, b[half]);
                    }
                }
            }
        }
#pragma unroll
        for (int r = 0; r < 2 * W_TILES; ++r) packed[r] = next[r];
        chunk += SEGMENT * WARPS;
    }

    // The four warps' sums, (row of x, row of W), added up by the threads that write them.
    __shared__ float of_warps[WARPS][ROWS_OF_X][ROWS_OF_W + 1];
#pragma unroll
    for (int w_tile = 0; w_tile < W_TILES; ++w_tile) {
#pragma unroll
        for (int tile = 0; tile < X_TILES; ++tile) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int n = 16 * w_tile + lane.row + 8 * (i / 2);
                const int m = 8 * tile + 2 * lane.chunk + i % 2;
                of_warps[warp][m][n] = sums[w_tile][tile][i];
            }
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < ROWS_OF_X * ROWS_OF_W; i += WARPS * WARP) {
        const int m = i / ROWS_OF_W, n = i % ROWS_OF_W;
        if (first_m + m >= M || first_n + n >= N) continue;
        float total = 0.0f;
#pragma unroll
        for (int other = 0; other < WARPS; ++other) total += of_warps[other][m][n];
        if (scales_at_end) total *= load_scale(scale, minimum, first_n + n).factor;
        total *= load_row_scale(row_scale, first_n + n);
        if (bias) total += to_float(bias[first_n + n]);
        y[size_t(first_m + m) * N + first_n + n] = from_float(total);
    }
}
