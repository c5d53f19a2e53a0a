// y = (x_codes W^T) * x_scale * w_scale + bias, 8-bit codes on both sides, on tensor cores: sm_75 and up.
//
// x_codes (M, row_bytes) and w_codes (N, row_bytes), rows padded with zeros to 16 bytes.   x_scale (M),
// w_scale (N) float.   bias (N) Element or null.   y (M, N) Element, row-major. Sums are exact, in 32 bits.
//
// A block computes a TILE_M x TILE_N tile with WARPS_M x WARPS_N warps. 64 bytes of each row are in shared
// memory at a time, in three stages: from sm_80 on, two are on their way while one is multiplied.
// In mma.m16n8k32 a lane holds 8 codes of two rows. The sum over k may be taken in any order, so a lane
// reads 16 contiguous bytes of a row and uses them for two instructions; the eight lanes of a phase then
// read 128 contiguous bytes of shared memory, which touches each bank once.
// Work: 2 M N K operations; bytes from memory: M N (1 / TILE_M + 1 / TILE_N) row_bytes + outputs.
// Source: fragment layouts from the PTX ISA manual, "Matrix Fragments for mma.m16n8k32".

#include "common.cuh"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 750
#error "the tensor cores that this kernel needs begin at sm_75"
#endif

constexpr int THREADS = WARP * WARPS_M * WARPS_N;
constexpr int DEPTH = 64;                  // bytes of a row in a stage
constexpr int CHUNKS = DEPTH / 16;
constexpr int STAGES = 3;
constexpr int M_TILES = TILE_M / WARPS_M / 16;  // of 16 rows, for a warp
constexpr int N_TILES = TILE_N / WARPS_N / 8;   // of 8 columns
constexpr int STAGE_BYTES = (TILE_M + TILE_N) * DEPTH;

// Queues the copy of one stage of `num_tile_rows` rows. Rows that are not there repeat the last one;
// what lies beyond the end of a row is zeros.
DEVICE void copy_rows(i8* stage, const i8* codes, int num_tile_rows, int first_row, int num_rows,
                      int first_chunk, int num_chunks) {
    for (int i = threadIdx.x; i < num_tile_rows * CHUNKS; i += THREADS) {
        const int chunk = first_chunk + i % CHUNKS;
        const size_t row = min(first_row + i / CHUNKS, num_rows - 1);
        const bool is_there = chunk < num_chunks;
        const i8* source = codes + (row * num_chunks + (is_there ? chunk : 0)) * 16;
        copy_16(stage + 16 * i, source, is_there ? 16 : 0);
    }
}

// The 16 bytes of a row that belong to this lane.
DEVICE uint4 lane_bytes(const i8* stage, int row, int lane) {
    return *reinterpret_cast<const uint4*>(stage + row * DEPTH + lane % 4 * 16);
}

extern "C" __global__ void __launch_bounds__(THREADS)
gemm_w8a8_tensor_core(const i8* x_codes, const float* x_scale, const i8* w_codes,
                      const float* w_scale, const Element* bias, Element* y, int M, int N,
                      int row_bytes) {
    __shared__ __align__(16) i8 stages[STAGES][STAGE_BYTES];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int first_m = blockIdx.y * TILE_M, first_n = blockIdx.x * TILE_N;
    const int warp_m = warp / WARPS_N * (TILE_M / WARPS_M);
    const int warp_n = warp % WARPS_N * (TILE_N / WARPS_N);
    const int num_chunks = row_bytes / 16;
    const int num_steps = (num_chunks + CHUNKS - 1) / CHUNKS;

    int sums[M_TILES][N_TILES][4] = {};
    for (int step = 0; step < num_steps + STAGES - 1; ++step) {
        if (step < num_steps) {
            i8* stage = stages[step % STAGES];
            copy_rows(stage, x_codes, TILE_M, first_m, M, step * CHUNKS, num_chunks);
            copy_rows(stage + TILE_M * DEPTH, w_codes, TILE_N, first_n, N, step * CHUNKS, num_chunks);
        }
        commit_copies();  // an empty group, too: so a wait always counts the same
        if (step < STAGES - 1) continue;

        wait_for_copies<STAGES - 1>();
        __syncthreads();
        const i8* x_stage = stages[(step - (STAGES - 1)) % STAGES];
        const i8* w_stage = x_stage + TILE_M * DEPTH;
        uint4 columns[N_TILES];
#pragma unroll
        for (int j = 0; j < N_TILES; ++j) {
            columns[j] = lane_bytes(w_stage, warp_n + 8 * j + lane / 4, lane);
        }
#pragma unroll
        for (int i = 0; i < M_TILES; ++i) {
            const uint4 top = lane_bytes(x_stage, warp_m + 16 * i + lane / 4, lane);
            const uint4 bottom = lane_bytes(x_stage, warp_m + 16 * i + 8 + lane / 4, lane);
            const u32 a[2][4] = {{top.x, bottom.x, top.y, bottom.y},
                                 {top.z, bottom.z, top.w, bottom.w}};
#pragma unroll
            for (int j = 0; j < N_TILES; ++j) {
                const u32 b[2][2] = {{columns[j].x, columns[j].y}, {columns[j].z, columns[j].w}};
                mma_16x8x32(sums[i][j], a[0], b[0]);
                mma_16x8x32(sums[i][j], a[1], b[1]);
            }
        }
        __syncthreads();  // this stage is overwritten next
    }
#pragma unroll
    for (int i = 0; i < M_TILES; ++i) {
#pragma unroll
        for (int j = 0; j < N_TILES; ++j) {
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const int m = first_m + warp_m + 16 * i + lane / 4 + 8 * (k / 2);
                const int n = first_n + warp_n + 8 * j + lane % 4 * 2 + k % 2;
                if (m >= M || n >= N) continue;
                float value = float(sums[i][j][k]) * x_scale[m] * w_scale[n];
                if (bias) value += to_float(bias[n]);
                y[size_t(m) * N + n] = from_float(value);
            }
        }
    }
}
