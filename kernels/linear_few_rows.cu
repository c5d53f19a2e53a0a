// y = x W^T + bias for a few rows of x, W packed to 8 or 4 bits: the product of decoding.
//
// x (M, K) and y (M, N) Element, row-major, K a multiple of 8.   codes (N, row_bytes), rows padded to
// 16 bytes.   scale and minimum (N, num_groups), one for group_size columns: float for 8 bits, half
// or 8-bit integers for 4; with these row_scale (N) float, otherwise null.   bias (N) or null.
// GATED: a second weight of the same shape, and y = activate(x W^T + bias) * (x W2^T + bias2).
//
// A block of 128 threads computes ROWS_OF_W weight rows times ROWS_OF_X rows of x: all of them, as
// launched, up to 16 in 16 bits and 4 in 32. Its threads walk along K, 16 bytes of each weight row at a
// time: a warp reads 512 contiguous bytes of each row, and ROWS_OF_W loads are in flight a thread. x
// comes from the caches, once for the ROWS_OF_W rows together.
// Sums are in float; codes are summed over a span of columns that share a scale first, and scaled then
// (with SPAN 0, where groups begin anywhere, every two codes are scaled by themselves).
//
// Bytes moved: N * row_bytes and the scales, each once; x and y are small beside them. With one row of
// x that is one multiplication a weight: the memory is the limit, from sm_61 to today.
// There is no half-precision arithmetic: on sm_61 it runs at 1/64 of the rate of float.
//
// Source: the matrix-vector product of every textbook. Codes to floats by placing them among the
// digits of a power of two: Kim et al. 2022, arXiv:2211.10017, section 3, there for half precision.

#include "common.cuh"

constexpr int THREADS = 128;
constexpr int WARPS = THREADS / WARP;
constexpr int SUMS = ROWS_OF_W * ROWS_OF_X;
// Blocks a multiprocessor shall hold: the compiler may then take registers enough not to spill.
constexpr int BLOCKS = ROWS_OF_X <= 2 ? 4 : ROWS_OF_X <= 8 ? 3 : 2;

// Adds up each sum over a warp. Partners share the work: at each step a lane keeps half of its sums and
// hands the other half over, so that COUNT sums, a power of two up to 32, cost COUNT + a few shuffles
// and not five each. Lane i ends with the total of sum i / (32 / COUNT), in sums[0].
template <int COUNT, int DISTANCE>
DEVICE void fold(float* sums, int lane) {
    if constexpr (COUNT == 1) {
        sums[0] += __shfl_xor_sync(ALL_LANES, sums[0], DISTANCE);
    } else {
        const bool keeps_upper = lane & DISTANCE;
#pragma unroll
        for (int i = 0; i < COUNT / 2; ++i) {
            const float lower = sums[i], upper = sums[i + COUNT / 2];
            const float given = __shfl_xor_sync(ALL_LANES, keeps_upper ? lower : upper, DISTANCE);
            sums[i] = (keeps_upper ? upper : lower) + given;
        }
    }
    if constexpr (DISTANCE > 1) fold<COUNT == 1 ? 1 : COUNT / 2, DISTANCE / 2>(sums, lane);
}

// Adds up each sum over the block; thread i gets the i-th total.
DEVICE float block_totals(float sums[SUMS]) {
    __shared__ float of_warps[WARPS][SUMS];
    constexpr int LANES = WARP / SUMS;
    const int lane = threadIdx.x % WARP;
    fold<SUMS, WARP / 2>(sums, lane);
    if (lane % LANES == 0) of_warps[threadIdx.x / WARP][lane / LANES] = sums[0];
    __syncthreads();
    float total = 0.0f;
    if (threadIdx.x < SUMS) {
        for (int warp = 0; warp < WARPS; ++warp) total += of_warps[warp][threadIdx.x];
    }
    return total;
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
linear_few_rows(const Element* x, const u8* codes, const void* scale, const void* minimum,
                const float* row_scale, const Element* bias, const u8* codes2, const void* scale2,
                const void* minimum2, const float* row_scale2, const Element* bias2, Element* y,
                int M, int N, int K, int group_size, int num_groups, int activation) {
    constexpr int OUTPUTS = GATED ? ROWS_OF_W / 2 : ROWS_OF_W;
    const int num_chunks = (K + CHUNK_COLUMNS - 1) / CHUNK_COLUMNS;
    const int first_m = blockIdx.y * ROWS_OF_X;

    // A row that is not there is replaced by the last one, and its result is not written.
    int rows[ROWS_OF_W];
#pragma unroll
    for (int r = 0; r < ROWS_OF_W; ++r) rows[r] = min(int(blockIdx.x) * OUTPUTS + r % OUTPUTS, N - 1);

    float sums[SUMS] = {};
#pragma unroll 1
    for (int chunk = threadIdx.x; chunk < num_chunks; chunk += THREADS) {
        uint4 packed[ROWS_OF_W];
        Scale scales[ROWS_OF_W][SPANS];
#pragma unroll
        for (int r = 0; r < ROWS_OF_W; ++r) {
            const bool is_second = r >= OUTPUTS;
            packed[r] = load_once(is_second ? codes2 : codes, size_t(rows[r]) * num_chunks + chunk);
            if (SPAN) {
                load_scales(scales[r], is_second ? scale2 : scale, is_second ? minimum2 : minimum,
                            chunk, size_t(rows[r]) * num_groups, group_size, num_groups);
            }
        }
#pragma unroll
        for (int span = 0; span < SPANS; ++span) {
            float partial[SUMS] = {};
            float x_sums[ROWS_OF_X] = {};
#pragma unroll
            for (int i = 0; i < CHUNK_STEPS / SPANS; ++i) {
                const int step = span * (CHUNK_STEPS / SPANS) + i;
                const int column = chunk * CHUNK_COLUMNS + 8 * step;
                float w[ROWS_OF_W][8];
#pragma unroll
                for (int r = 0; r < ROWS_OF_W; ++r) {
                    const u32 words[4] = {packed[r].x, packed[r].y, packed[r].z, packed[r].w};
                    unpack8(words, step, w[r]);
                    if (!SPAN) {
                        const bool is_second = r >= OUTPUTS;
                        scale_pairs(w[r], column, is_second ? scale2 : scale,
                                    is_second ? minimum2 : minimum, size_t(rows[r]) * num_groups,
                                    group_size, num_groups);
                    }
                }
#pragma unroll
                for (int m = 0; m < ROWS_OF_X; ++m) {
                    float values[8];
                    load8(x + size_t(min(first_m + m, M - 1)) * K, column, K, values);
#pragma unroll
                    for (int j = 0; j < 8; ++j) {
#pragma unroll
                        for (int r = 0; r < ROWS_OF_W; ++r) {
                            partial[r * ROWS_OF_X + m] += w[r][j] * values[j];
                        }
                        if (HAS_MINIMUM && SPAN) x_sums[m] += values[j];
                    }
                }
            }
#pragma unroll
            for (int i = 0; i < SUMS; ++i) {
                const Scale own = SPAN ? scales[i / ROWS_OF_X][span] : Scale{1.0f, 0.0f};
                sums[i] += own.factor * partial[i] + own.minimum * x_sums[i % ROWS_OF_X];
            }
        }
    }
    float total = block_totals(sums);

    const int m = first_m + threadIdx.x % ROWS_OF_X;
    const int r = threadIdx.x / ROWS_OF_X;
    const int n = blockIdx.x * OUTPUTS + r % OUTPUTS;
    const Element* own_bias = r >= OUTPUTS ? bias2 : bias;
    const bool is_there = threadIdx.x < SUMS && m < M && n < N;
    if (is_there) total *= load_row_scale(r >= OUTPUTS ? row_scale2 : row_scale, n);
    const float value = is_there && own_bias ? total + to_float(own_bias[n]) : total;
#if GATED
    __shared__ float gates[SUMS / 2];
    if (threadIdx.x < SUMS / 2) gates[threadIdx.x] = activate(value, activation);
    __syncthreads();
    if (is_there && r >= OUTPUTS) {
        y[size_t(m) * N + n] = from_float(gates[threadIdx.x - SUMS / 2] * value);
    }
#else
    if (is_there) y[size_t(m) * N + n] = from_float(value);
#endif
}
