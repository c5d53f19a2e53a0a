// y = x W^T + bias for a few rows of x, W packed to 8 or 4 bits: the product of decoding.
//
// x (M, K) and y (M, N) Element, row-major, K a multiple of 8.   codes (N, row_bytes), rows padded to
// 16 bytes.   scale and minimum (N, num_groups), one for group_size columns: float for 8 bits, half
// or 8-bit integers for 4; with these row_scale (N) float, otherwise null.   bias (N) or null.
// GATED: a second weight of the same shape, and y = activate(x W^T + bias) * (x W2^T + bias2).
// GROUPED: many weights of one shape, and row p of y is the product of one row of x with one of them, as
// the router of a mixture of experts has it. Their addresses are in a table, since each may lie anywhere.
//
// A block of 128 threads computes ROWS_OF_W weight rows times ROWS_OF_X rows of x: all of them, as
// launched, up to 16 in 16 bits and 4 in 32. Its threads walk along K, 16 bytes of each weight row at a
// time: a warp reads 512 contiguous bytes of each row, and ROWS_OF_W loads are in flight a thread while
// it multiplies what it has. x comes from the caches, once for the ROWS_OF_W rows together.
// Sums are in float; codes are summed over the columns that share a scale first, a chunk, half of one or
// the row, and scaled then (with SPAN 0, where groups begin anywhere, every two codes by themselves).
// What is left of a row behind its last whole chunk is multiplied after the loop.
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
constexpr int SPANS = SPAN > 0 ? CHUNK_COLUMNS / SPAN : 1;  // of a chunk
// Blocks a multiprocessor shall hold: the compiler may then take registers enough not to spill.
constexpr bool IS_LIGHT = ROWS_OF_X <= 8 && !HAS_MINIMUM && ELEMENT != 32;
constexpr bool IS_HEAVY = SPAN == 0 && HAS_MINIMUM && ELEMENT == 32;  // in spite of few rows
constexpr int BLOCKS = ROWS_OF_X <= 2 ? 4 - (ROWS_OF_X == 2 && IS_HEAVY) : IS_LIGHT ? 3 : 2;
// Whether the next codes are read while the last are multiplied; with more rows of x the sums take the
// registers, and the products more time than the memory.
constexpr bool PREFETCHES = SPAN != 0 && SUMS <= (HAS_MINIMUM ? 4 : 8);

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

// What a thread works on. Rows that are not there are replaced by the last one, and their results not
// written. Of GATED kernels the second half of the weight rows is of the second weight.
struct Rows {
    const u8* codes[ROWS_OF_W];
    Scales scales[ROWS_OF_W];
    size_t first_group[ROWS_OF_W];
    const Element* x[ROWS_OF_X];
    Groups groups;
};

DEVICE void load_codes(uint4 packed[ROWS_OF_W], const Rows& rows, int chunk) {
#pragma unroll
    for (int r = 0; r < ROWS_OF_W; ++r) packed[r] = load_once(rows.codes[r], chunk);
}

// The scales of the group that `column` is in.
DEVICE void load_scales(Scale scales[ROWS_OF_W], const Rows& rows, int column) {
    const int group = rows.groups.of(column);
#pragma unroll
    for (int r = 0; r < ROWS_OF_W; ++r) scales[r] = rows.scales[r].load(rows.first_group[r] + group);
}

// Adds the products of 8 columns from `column` on to `sums`, and the columns of x to `x_sums`.
DEVICE void add_products(float sums[SUMS], float x_sums[ROWS_OF_X], const Rows& rows, int column,
                         const u32* const words[ROWS_OF_W]) {
    float w[ROWS_OF_W][8];
#pragma unroll
    for (int r = 0; r < ROWS_OF_W; ++r) {
        unpack8(words[r], w[r]);
        if (SPAN == 0) {
            scale_pairs(w[r], column, rows.scales[r], rows.first_group[r], rows.groups);
        }
    }
#pragma unroll
    for (int m = 0; m < ROWS_OF_X; ++m) {
        float values[8];
        load8(rows.x[m] + column, values);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
#pragma unroll
            for (int r = 0; r < ROWS_OF_W; ++r) sums[r * ROWS_OF_X + m] += w[r][j] * values[j];
            if (HAS_MINIMUM && SPAN) x_sums[m] += values[j];
        }
    }
}

// Adds to `sums` what was summed over columns that share a scale.
DEVICE void add_scaled(float sums[SUMS], const Scale scales[ROWS_OF_W], const float partial[SUMS],
                       const float x_sums[ROWS_OF_X]) {
#pragma unroll
    for (int i = 0; i < SUMS; ++i) {
        const Scale own = scales[i / ROWS_OF_X];
        sums[i] += own.factor * partial[i];
        if (HAS_MINIMUM) sums[i] += own.minimum * x_sums[i % ROWS_OF_X];
    }
}

#ifdef GROUPED
// An address in the memory of the device: told so, the compiler reads it as it does a parameter.
template <typename T>
DEVICE const T* global(i64 address) {
#ifdef BMINF_HOST_SHIM
    return reinterpret_cast<const T*>(address);
#else
    return static_cast<const T*>(__cvta_global_to_generic(address));
#endif
}
#endif

// One product, or the two of GATED kernels: the block's part of it.
struct Weight {
    const u8* codes;
    const void *scale, *minimum;
    const float* row_scale;
    const Element* bias;
};

DEVICE void multiply(const Element* x, const Weight& weight, const Weight& second, Element* y, int M, int N,
                     int K, const Groups& groups, int first_m, int activation) {
    constexpr int OUTPUTS = GATED ? ROWS_OF_W / 2 : ROWS_OF_W;
    const int num_whole = u32(K) / CHUNK_COLUMNS;
    const size_t row_bytes = size_t(num_chunks_of(K)) * 16;

    Rows rows;
    rows.groups = groups;
#pragma unroll
    for (int r = 0; r < ROWS_OF_W; ++r) {
        const bool is_second = r >= OUTPUTS;
        const size_t n = min(int(blockIdx.x) * OUTPUTS + r % OUTPUTS, N - 1);
        const Weight& own = is_second ? second : weight;
        rows.codes[r] = own.codes + n * row_bytes;
        rows.scales[r] = {own.scale, own.minimum};
        rows.first_group[r] = n * groups.count;
    }
#pragma unroll
    for (int m = 0; m < ROWS_OF_X; ++m) rows.x[m] = x + size_t(min(first_m + m, M - 1)) * K;

    float sums[SUMS] = {};
    float x_sums[ROWS_OF_X] = {};
    Scale scales[ROWS_OF_W];
    uint4 packed[ROWS_OF_W];
    const int last = max(num_whole - 1, 0);
    if (PREFETCHES) load_codes(packed, rows, min(int(threadIdx.x), last));
#pragma unroll 1
    for (int chunk = threadIdx.x; chunk < num_whole; chunk += THREADS) {
        uint4 next[ROWS_OF_W];  // on its way while this chunk is multiplied
        load_codes(PREFETCHES ? next : packed, rows, PREFETCHES ? min(chunk + THREADS, last) : chunk);
#pragma unroll
        for (int span = 0; span < SPANS; ++span) {
            const int first = chunk * CHUNK_COLUMNS + span * (CHUNK_COLUMNS / SPANS);
            float partial[SUMS] = {}, partial_x[ROWS_OF_X] = {};
            if (SPAN > 0) load_scales(scales, rows, first);
#pragma unroll
            for (int i = 0; i < CHUNK_STEPS / SPANS; ++i) {
                const int step = span * (CHUNK_STEPS / SPANS) + i;
                const u32* words[ROWS_OF_W];
#pragma unroll
                for (int r = 0; r < ROWS_OF_W; ++r) words[r] = &packed[r].x + step * 8 * BITS / 32;
                add_products(SPAN > 0 ? partial : sums, SPAN > 0 ? partial_x : x_sums, rows,
                             first + 8 * i, words);
            }
            if (SPAN > 0) add_scaled(sums, scales, partial, partial_x);
        }
#pragma unroll
        for (int r = 0; r < ROWS_OF_W && PREFETCHES; ++r) packed[r] = next[r];
    }

    // What is left of the row, less than a chunk: 8 columns a thread.
    const int column = num_whole * CHUNK_COLUMNS + 8 * threadIdx.x;
    if (column < K) {
        float partial[SUMS] = {}, partial_x[ROWS_OF_X] = {};
        u32 packed8[ROWS_OF_W][2];
        const u32* words[ROWS_OF_W];
#pragma unroll
        for (int r = 0; r < ROWS_OF_W; ++r) {
            load_words(packed8[r], rows.codes[r] + size_t(column) * BITS / 8);
            words[r] = packed8[r];
        }
        if (SPAN > 0) load_scales(scales, rows, column);
        add_products(SPAN > 0 ? partial : sums, SPAN > 0 ? partial_x : x_sums, rows, column, words);
        if (SPAN > 0) add_scaled(sums, scales, partial, partial_x);
    }
    if (SPAN < 0) {
        float scaled[SUMS] = {};
        load_scales(scales, rows, 0);
        add_scaled(scaled, scales, sums, x_sums);
#pragma unroll
        for (int i = 0; i < SUMS; ++i) sums[i] = scaled[i];
    }
    float total = block_totals(sums);

    const int m = first_m + threadIdx.x % ROWS_OF_X;
    const int r = threadIdx.x / ROWS_OF_X;
    const int n = blockIdx.x * OUTPUTS + r % OUTPUTS;
    const Element* own_bias = r >= OUTPUTS ? second.bias : weight.bias;
    const bool is_there = threadIdx.x < SUMS && m < M && n < N;
    if (is_there) total *= load_row_scale(r >= OUTPUTS ? second.row_scale : weight.row_scale, n);
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

#ifdef GROUPED
// table (num_slots, 5): the addresses of a Weight, of no weight where they are 0.   slots (P): which of
// them row p is multiplied with; y keeps its row where there is none.   rows (P): that of x, or null for p.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
linear_grouped(const Element* x, const i64* table, const i64* slots, const i64* rows, Element* y,
               int num_slots, int N, int K, u32 group_multiplier, int group_shift, int num_groups) {
    const int pair = blockIdx.y;
    const i64 slot = slots[pair];
    if (slot < 0 || slot >= num_slots) return;
    const i64* own = table + 5 * slot;
    if (own[0] == 0) return;
    const Weight weight = {global<u8>(own[0]), global<u8>(own[1]), global<u8>(own[2]),
                           global<float>(own[3]), global<Element>(own[4])};
    const size_t row = rows ? rows[pair] : pair;
    multiply(x + row * K, weight, weight, y + size_t(pair) * N, 1, N, K,
             {group_multiplier, group_shift, num_groups}, 0, 0);
}
#else
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
linear_few_rows(const Element* x, const u8* codes, const void* scale, const void* minimum,
                const float* row_scale, const Element* bias, const u8* codes2, const void* scale2,
                const void* minimum2, const float* row_scale2, const Element* bias2, Element* y,
                int M, int N, int K, u32 group_multiplier, int group_shift, int num_groups,
                int activation) {
    const Weight weight = {codes, scale, minimum, row_scale, bias};
    const Weight second = {codes2, scale2, minimum2, row_scale2, bias2};
    multiply(x, weight, second, y, M, N, K, {group_multiplier, group_shift, num_groups},
             blockIdx.y * ROWS_OF_X, activation);
}
#endif
