// y = x W^T + bias for some rows of x (3 to 64) on tensor cores, W packed to 8 or 4 bits. sm_80 and up.
//
// x (M, K) and y (M, N) Element of 16 bits, row-major, K a multiple of 8.   codes (N, row_bytes), rows
// padded to 16 bytes.   scale and minimum (N, num_groups), row_scale (N): see linear_few_rows.cu.
// bias (N) or null.
//
// A block of WARPS, 4 or more, computes 16 * W_TILES weight rows times 8 * X_TILES rows of x; the warps
// take turns along K and add up at the end. In mma.m16n8k16 the weights are the (16, 16) matrix and x the (16, 8) one.
// The sum over k may be taken in any order, so each lane reads 16 contiguous bytes of a weight row and
// declares them to be the columns that the instruction wants from it; the same columns of x follow, 16
// bytes at a time. So codes go from memory to registers once and in one step, without shared memory.
//
// A weight, code * scale + minimum, is rounded once to Element, as a dequantized weight would be. Codes
// with one scale a row and no minimum stay integers, exact in Element, and are scaled at the end; with
// integer scales weights are integers, too, and the scale of their row comes at the end.
//
// Bytes moved: N * row_bytes and the scales once for each 8 * X_TILES rows of x; x from the caches,
// once for the weight rows of a block.
// Source: fragment layouts from the PTX ISA manual, "Matrix Fragments for mma.m16n8k16"; the permuted k
// is a known freedom of matrix products (used alike by Frantar et al. 2024, arXiv:2408.11743, Marlin).

#include "common.cuh"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "the tensor cores that this kernel needs begin at sm_80"
#endif

// Blocks of four warps a multiprocessor shall hold: the compiler may then take registers enough not to
// spill.
constexpr int BLOCKS = X_TILES == 1 ? 4 : X_TILES == 2 ? 3 : 2;
constexpr int ROWS_OF_W = 16 * W_TILES;
constexpr int ROWS_OF_X = 8 * X_TILES;
constexpr int LANE_ROWS = 2 * W_TILES;  // of the weight
constexpr int SEGMENT = 4;  // chunks of 16 bytes that the four lanes of a weight row read together
constexpr int SEGMENT_COLUMNS = SEGMENT * CHUNK_COLUMNS;
constexpr int SPANS = SPAN > 0 ? CHUNK_COLUMNS / SPAN : 1;  // of a chunk
constexpr bool SCALES_AT_END = SPAN < 0 && !HAS_MINIMUM;
// Whether two codes of 4 bits become a pair in one word: then these are the columns 0 and 4, 1 and 5,
// 2 and 6, 3 and 7 of eight.
constexpr bool NIBBLE_PAIRS = BITS == 4 && SPAN != 0 && (ELEMENT == 16 || SCALES_AT_END);

// The lane's place in a fragment: rows `row` and `row + 8` of the weights, row `row` of x.
struct Lane {
    int row, chunk;
};

DEVICE Lane lane_of(int thread) { return {thread % WARP / 4, thread % 4}; }

// What a lane works on. Rows that are not there are replaced by the last one, and their results not
// written.
struct Rows {
    const u8* codes[LANE_ROWS];
    size_t first_group[LANE_ROWS];
    const Element* x[X_TILES];
    Scales scales;
    Groups groups;
};

DEVICE void load_codes(uint4 packed[LANE_ROWS], const Rows& rows, int chunk) {
#pragma unroll
    for (int r = 0; r < LANE_ROWS; ++r) packed[r] = load_once(rows.codes[r], chunk);
}

// ---- codes to pairs of Elements ------------------------------------------------------------------

// A scale in the form in which the codes of its kernel take it.
struct Factor {
    Scale scale;
    u32 factors, minima;  // twice each, as a pair of half
};

#if BITS == 4 && ELEMENT == 16
DEVICE u32 twice(u16 half) { return __byte_perm(half, 0, 0x1010); }

// Those of half or of 8 bits as pairs; -16 * minimum is exact in half, too.
DEVICE void load_pairs(Factor& own, Scales scales, size_t index) {
#if SCALE_BITS == 16
    own.factors = twice(static_cast<const u16*>(scales.scale)[index]);
    if (HAS_MINIMUM) own.minima = twice(static_cast<const u16*>(scales.minimum)[index]);
#else
    const u32 k1024 = 0x64006400u;  // among whose digits the integer is put
    own.factors = sub2(twice(static_cast<const u8*>(scales.scale)[index]) | k1024, k1024);
    if (HAS_MINIMUM) {
        const u32 digits = twice(static_cast<const u8*>(scales.minimum)[index]) | k1024;
        own.minima = fma2(digits, 0xCC00CC00u, 0x74007400u);  // * -16 + 16384
    }
#endif
}
#endif

// The scale of the group that `column` is in, of the lane's row `r`.
DEVICE Factor load_factor(const Rows& rows, int r, int column) {
    Factor own = {};
    const size_t index = rows.first_group[r] + rows.groups.of(column);
#if BITS == 4 && ELEMENT == 16
    if (NIBBLE_PAIRS) load_pairs(own, rows.scales, index);
#endif
    if (!NIBBLE_PAIRS) own.scale = rows.scales.load(index);
    return own;
}

#if BITS == 4
// The codes of 4 bits at SHIFT and SHIFT + 16 as a pair: put among the digits of a power of two,
// as nibble_at does.
template <int SHIFT>
DEVICE u32 nibble_pair(u32 word) {
#if ELEMENT == 17
    constexpr u32 digits = 0x4300u + CODE_OFFSET;  // 128
    const u32 pair = masked_xor(word >> SHIFT, 0x000F000Fu, digits * 0x10001u);
    return fma2(pair, 0x3F803F80u, (0x8000u | digits) * 0x10001u);  // * 1 - digits
#else
    constexpr bool IS_HIGH = SHIFT % 8;  // the digits are 16 times as large, and an offset of 64 more
    constexpr u32 digits = 0x6400u | CODE_OFFSET << (IS_HIGH ? 4 : 0);  // 1024
    const u32 mask = IS_HIGH ? 0x00F000F0u : 0x000F000Fu;
    const u32 pair = masked_xor(word >> (SHIFT & 8), mask, digits * 0x10001u);
    if (!IS_HIGH) return sub2(pair, digits * 0x10001u);
    return fma2(pair, 0x2C002C00u, (CODE_OFFSET ? 0xD480u : 0xD400u) * 0x10001u);  // / 16 - 72, 64
#endif
}

// The four pairs of 8 weights, in the columns of NIBBLE_PAIRS.
DEVICE void unpack_pairs(u32 pairs[4], u32 word, const Factor& own) {
    pairs[0] = nibble_pair<4>(word);
    pairs[1] = nibble_pair<0>(word);
    pairs[2] = nibble_pair<12>(word);
    pairs[3] = nibble_pair<8>(word);
#if ELEMENT == 16
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (SCALES_AT_END) break;
        pairs[i] = HAS_MINIMUM ? fma2(pairs[i], own.factors, own.minima) : mul2(pairs[i], own.factors);
    }
#endif
}

// A code of 4 bits at SHIFT, times its scale. (digits - offset) * scale as one multiply-add is exact,
// because offset * scale is: the offset has at most 13 digits from SHIFT 8 on, a scale 11.
template <int SHIFT>
DEVICE float scaled_nibble(u32 word, float scale) {
    constexpr u32 exponent = u32(127 + 23 - SHIFT) << 23;
    constexpr float offset = float((1 << (23 - SHIFT)) + CODE_OFFSET);
    const u32 digits = masked_xor(word, 0xFu << SHIFT, exponent | u32(CODE_OFFSET) << SHIFT);
    return fmaf(__uint_as_float(digits), scale, -offset * scale);
}

DEVICE void unpack_scaled(float w[8], u32 word, float scale) {
    w[0] = scaled_nibble<12>(word << 8, scale);
    w[1] = scaled_nibble<8>(word << 8, scale);
    w[2] = scaled_nibble<12>(word, scale);
    w[3] = scaled_nibble<8>(word, scale);
    w[4] = scaled_nibble<8>(word >> 12, scale);
    w[5] = scaled_nibble<16>(word, scale);
    w[6] = scaled_nibble<16>(word >> 12, scale);
    w[7] = scaled_nibble<12>(word >> 12, scale);
}
#endif

#if BITS == 8
// 8 bytes, which both types hold exactly, as four pairs.
DEVICE void unpack_bytes(u32 pairs[4], const u32 words[2]) {
#if ELEMENT == 17
    float w[8];
    unpack8(words, w);
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // the upper halves are all of them
        pairs[i] = __byte_perm(__float_as_uint(w[2 * i]), __float_as_uint(w[2 * i + 1]), 0x7632);
    }
#else
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const u32 digits = __byte_perm(words[i / 2] ^ 0x80808080u, 0x64646464u, i % 2 ? 0x4342 : 0x4140);
        pairs[i] = sub2(digits, 0x64806480u);  // 1024 + 128
    }
#endif
}
#endif

// The lane's 8 weights of its row `r`, from `column` on, as four pairs.
DEVICE void unpack_weights(u32 pairs[4], const u32* words, const Rows& rows, int r, int column,
                           const Factor& own) {
#if BITS == 4
    if (NIBBLE_PAIRS) return unpack_pairs(pairs, words[0], own);
#else
    if (SCALES_AT_END) return unpack_bytes(pairs, words);
#endif
    float w[8];
#if BITS == 4
    constexpr bool IS_SCALED = SPAN != 0 && !HAS_MINIMUM;
    if (IS_SCALED) unpack_scaled(w, words[0], own.scale.factor);
#else
    constexpr bool IS_SCALED = false;
#endif
    if (!IS_SCALED) unpack8(words, w);
    if (SPAN == 0) scale_pairs(w, column, rows.scales, rows.first_group[r], rows.groups);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        if (SPAN != 0 && !IS_SCALED) w[i] = w[i] * own.scale.factor + own.scale.minimum;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = pack2(w[2 * i], w[2 * i + 1]);
}

// ---- products ------------------------------------------------------------------------------------

// 8 columns of x in the order of the weights.
DEVICE void order_pairs(u32 pairs[4], uint4 x) {
    pairs[0] = NIBBLE_PAIRS ? __byte_perm(x.x, x.z, 0x5410) : x.x;
    pairs[1] = NIBBLE_PAIRS ? __byte_perm(x.x, x.z, 0x7632) : x.y;
    pairs[2] = NIBBLE_PAIRS ? __byte_perm(x.y, x.w, 0x5410) : x.z;
    pairs[3] = NIBBLE_PAIRS ? __byte_perm(x.y, x.w, 0x7632) : x.w;
}

// sums += a b for one tile of x, 32 columns that the lanes of a row share out.
DEVICE void multiply(float sums[W_TILES][X_TILES][4], int tile, const u32 a[LANE_ROWS][4], uint4 x) {
    u32 b[4];
    order_pairs(b, x);
#pragma unroll
    for (int w_tile = 0; w_tile < W_TILES; ++w_tile) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const u32* top = a[2 * w_tile] + 2 * half;
            const u32* bottom = a[2 * w_tile + 1] + 2 * half;
            const u32 fragment[4] = {top[0], bottom[0], top[1], bottom[1]};
            mma_16x8x16(sums[w_tile][tile], fragment, b + 2 * half);
        }
    }
}

extern "C" __global__ void __launch_bounds__(WARPS * WARP, BLOCKS * 4 / WARPS)
linear_tensor_core(const Element* x, const u8* codes, const void* scale, const void* minimum,
                   const float* row_scale, const Element* bias, Element* y, int M, int N, int K,
                   u32 group_multiplier, int group_shift, int num_groups) {
    const Lane lane = lane_of(threadIdx.x);
    const int warp = threadIdx.x / WARP;
    const int num_whole = u32(K) / SEGMENT_COLUMNS;
    const size_t row_bytes = size_t(num_chunks_of(K)) * 16;
    const int first_n = blockIdx.x * ROWS_OF_W;
    const int first_m = blockIdx.y * ROWS_OF_X;

    Rows rows;
    rows.scales = {scale, minimum};
    rows.groups = {group_multiplier, group_shift, num_groups};
#pragma unroll
    for (int r = 0; r < LANE_ROWS; ++r) {
        const size_t n = min(first_n + lane.row + 8 * r, N - 1);
        rows.codes[r] = codes + n * row_bytes;
        rows.first_group[r] = n * num_groups;
    }
#pragma unroll
    for (int tile = 0; tile < X_TILES; ++tile) {
        rows.x[tile] = x + size_t(min(first_m + 8 * tile + lane.row, M - 1)) * K;
    }

    float sums[W_TILES][X_TILES][4] = {};
    Factor own[LANE_ROWS];
    if (SPAN < 0 && !SCALES_AT_END) {
#pragma unroll
        for (int r = 0; r < LANE_ROWS; ++r) own[r] = load_factor(rows, r, 0);
    }
    uint4 packed[LANE_ROWS];
    const int last = max(num_whole - 1, 0);
    // Lanes begin beyond the end of a row that is shorter than a segment.
    const int last_chunk = int(num_chunks_of(K)) - 1;
    load_codes(packed, rows, min(SEGMENT * min(warp, last) + lane.chunk, last_chunk));
#pragma unroll 1
    for (int segment = warp; segment < num_whole; segment += WARPS) {
        const int chunk = SEGMENT * segment + lane.chunk;
        uint4 next[LANE_ROWS];  // on its way while this segment is multiplied
        load_codes(next, rows, SEGMENT * min(segment + WARPS, last) + lane.chunk);
#pragma unroll
        for (int step = 0; step < CHUNK_STEPS; ++step) {
            const int column = chunk * CHUNK_COLUMNS + 8 * step;
            const bool is_first = step % (CHUNK_STEPS / SPANS) == 0;
            u32 a[LANE_ROWS][4];
#pragma unroll
            for (int r = 0; r < LANE_ROWS; ++r) {
                if (SPAN > 0 && is_first) own[r] = load_factor(rows, r, column);
                const u32* words = &packed[r].x + step * 8 * BITS / 32;
                unpack_weights(a[r], words, rows, r, column, own[r]);
            }
#pragma unroll
            for (int tile = 0; tile < X_TILES; ++tile) {
                multiply(sums, tile, a, *reinterpret_cast<const uint4*>(rows.x[tile] + column));
            }
        }
#pragma unroll
        for (int r = 0; r < LANE_ROWS; ++r) packed[r] = next[r];
    }

    // What is left of the row, less than a segment: 32 columns a warp, 8 a lane.
    const int first = num_whole * SEGMENT_COLUMNS + 32 * warp;
    if (first < K) {
        const bool is_there = first + 8 * lane.chunk < K;
        const int column = first + (is_there ? 8 * lane.chunk : 0);
        u32 a[LANE_ROWS][4];
#pragma unroll
        for (int r = 0; r < LANE_ROWS; ++r) {
            u32 words[2];
            load_words(words, rows.codes[r] + size_t(column) * BITS / 8);
            if (SPAN > 0) own[r] = load_factor(rows, r, column);
            unpack_weights(a[r], words, rows, r, column, own[r]);
        }
#pragma unroll
        for (int tile = 0; tile < X_TILES; ++tile) {
            uint4 values = make_uint4(0, 0, 0, 0);
            if (is_there) values = *reinterpret_cast<const uint4*>(rows.x[tile] + column);
            multiply(sums, tile, a, values);
        }
    }

    // The warps' sums, (row of x, row of W), added up by the threads that write them.
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
        if (SCALES_AT_END) total *= rows.scales.load(first_n + n).factor;
        total *= load_row_scale(row_scale, first_n + n);
        if (bias) total += to_float(bias[first_n + n]);
        y[size_t(first_m + m) * N + first_n + n] = from_float(total);
    }
}
