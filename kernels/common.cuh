// What all kernels share: element types, conversions, reductions over a block, and the few
// instructions that C++ has no word for. Its text is put in place of the #include before a kernel is
// compiled, and it includes nothing itself: a compiler library without headers is enough.
//
// Letters: M rows of activations, N output features, K input features (columns of a weight).
// A packed weight is (N, row_bytes), rows padded to 16 bytes; what lies in the padding is never used.

typedef signed char i8;
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

#define DEVICE static __device__ __forceinline__
#define DEVICE_MEMBER __device__ __forceinline__

#ifndef BMINF_HOST_SHIM
#define DYNAMIC_SHARED(type, name) extern __shared__ __align__(16) type name[]
#endif

constexpr int WARP = 32;
constexpr u32 ALL_LANES = 0xFFFFFFFFu;

// ---- numbers -------------------------------------------------------------------------------------

DEVICE float half_to_float(u16 bits) {
#ifdef BMINF_HOST_SHIM
    return shim_half_to_float(bits);
#else
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
#endif
}

DEVICE u16 float_to_half(float value) {
#ifdef BMINF_HOST_SHIM
    return shim_float_to_half(value);
#else
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
#endif
}

DEVICE float bfloat16_to_float(u16 bits) { return __uint_as_float(u32(bits) << 16); }

// To the nearest, ties to even; NaN stays NaN. In integers: the instruction begins at sm_80.
DEVICE u16 float_to_bfloat16(float value) {
    u32 bits = __float_as_uint(value);
    if (value != value) return u16((bits >> 16) | 0x40);
    return u16((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

// ELEMENT is the type of activations, bias and result: 16 for half, 17 for bfloat16, 32 for float.
#ifdef ELEMENT
#if ELEMENT == 32
typedef float Element;
DEVICE float to_float(Element value) { return value; }
DEVICE Element from_float(float value) { return value; }
#elif ELEMENT == 17
typedef u16 Element;
DEVICE float to_float(Element bits) { return bfloat16_to_float(bits); }
DEVICE Element from_float(float value) { return float_to_bfloat16(value); }
#else
typedef u16 Element;
DEVICE float to_float(Element bits) { return half_to_float(bits); }
DEVICE Element from_float(float value) { return float_to_half(value); }
#endif

// 8 neighbouring elements as floats; they begin at a multiple of 16 bytes.
DEVICE void load8(const Element* data, float values[8]) {
#if ELEMENT == 32
    const float4* wide = reinterpret_cast<const float4*>(data);
    const float4 low = wide[0], high = wide[1];
    values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
    values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
#else
    const uint4 wide = *reinterpret_cast<const uint4*>(data);
    const u32 words[4] = {wide.x, wide.y, wide.z, wide.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        values[2 * i] = to_float(u16(words[i]));
        values[2 * i + 1] = to_float(u16(words[i] >> 16));
    }
#endif
}

// The same from `column` of a row on; zeros beyond its end. Rows of x are padded to 8 columns and
// begin at multiples of 16 bytes, which the caller sees to.
DEVICE void load8_or_zeros(const Element* row, int column, int num_columns, float values[8]) {
    if (column < num_columns) return load8(row + column, values);
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = 0.0f;
}

// Two floats rounded to the 16-bit Element, the first in the low half.
#if ELEMENT != 32
DEVICE u32 pack2(float low, float high) {
#if defined(BMINF_HOST_SHIM) || __CUDA_ARCH__ < 800
    return u32(from_float(low)) | u32(from_float(high)) << 16;
#else
    u32 pair;
#if ELEMENT == 17
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#endif
    return pair;
#endif
}
#endif

// The inverse of load8: 8 neighbouring elements, from a multiple of 16 bytes on.
DEVICE void store8(Element* data, const float values[8]) {
#if ELEMENT == 32
    float4* wide = reinterpret_cast<float4*>(data);
    wide[0] = make_float4(values[0], values[1], values[2], values[3]);
    wide[1] = make_float4(values[4], values[5], values[6], values[7]);
#else
    *reinterpret_cast<uint4*>(data) =
        make_uint4(pack2(values[0], values[1]), pack2(values[2], values[3]),
                   pack2(values[4], values[5]), pack2(values[6], values[7]));
#endif
}

// The same from `column` of a row of any length on: writes what lies inside the row.
DEVICE void store8_within(Element* row, int column, int num_columns, const float values[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        if (column + i < num_columns) row[column + i] = from_float(values[i]);
    }
}
#endif  // ELEMENT

// ---- packed weights ------------------------------------------------------------------------------

// BITS is the width of a packed weight: 8, or 4 with the even column in the high half of a byte.
// HAS_MINIMUM, of 4 bits only: codes are 0..15 and a group has a minimum beside its scale.
// SCALE_BITS is the width of scales and minima: 32 (float) for 8 bits, 16 (half) or 8 for 4. With 8 they
// are integers, a minimum in steps of -16, and the sum over a row is multiplied with its row_scale.
// SPAN: that many columns, from each multiple of it on, share a scale: a whole chunk or half of one;
// 0 where groups begin anywhere; -1 where a row has one scale.
#ifdef BITS
constexpr int CHUNK_COLUMNS = 128 / BITS;  // columns in 16 bytes, which a thread reads at once
constexpr int CHUNK_STEPS = CHUNK_COLUMNS / 8;

DEVICE u32 num_chunks_of(int num_columns) {
    return u32(num_columns + CHUNK_COLUMNS - 1) / CHUNK_COLUMNS;
}

// (word & mask) ^ bits, in one instruction also where both are constants.
DEVICE u32 masked_xor(u32 word, u32 mask, u32 bits) {
#ifdef BMINF_HOST_SHIM
    return (word & mask) ^ bits;
#else
    u32 result;
    asm("lop3.b32 %0, %1, %2, %3, 0x6A;" : "=r"(result) : "r"(word), "r"(mask), "r"(bits));
    return result;
#endif
}

// Codes become floats without a conversion instruction (a quarter of the rate of an addition, or
// less): they are put among the digits of a power of two, which is subtracted.
//
// Byte `index` of `word`, of 0..255, less `offset`.
template <int index>
DEVICE float byte_at(u32 word, float offset) {
    return __uint_as_float(__byte_perm(word, 0x4B000000u, 0x7440 + index)) - (8388608.0f + offset);
}

// The 4 bits from `shift` on, up to 16; CODE_OFFSET is what they are stored above.
#if BITS == 4
constexpr int CODE_OFFSET = HAS_MINIMUM ? 0 : 8;  // -8..7 in two's complement: its sign is turned

template <int shift>
DEVICE float nibble_at(u32 word) {
    constexpr u32 exponent = u32(127 + 23 - shift) << 23;
    const u32 digits = masked_xor(word, 0xFu << shift, exponent | u32(CODE_OFFSET) << shift);
    return __uint_as_float(digits) - float((1 << (23 - shift)) + CODE_OFFSET);
}
#endif

// 8 packed weights, in two words or one, as floats: -127..127, -8..7, or 0..15 with a minimum.
DEVICE void unpack8(const u32* words, float values[8]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float* four = values + 4 * half;
#if BITS == 8
        const u32 word = words[half] ^ 0x80808080u;
        four[0] = byte_at<0>(word, 128.0f);
        four[1] = byte_at<1>(word, 128.0f);
        four[2] = byte_at<2>(word, 128.0f);
        four[3] = byte_at<3>(word, 128.0f);
#else
        const u32 word = words[0] >> (16 * half);
        four[0] = nibble_at<4>(word);
        four[1] = nibble_at<0>(word);
        four[2] = nibble_at<12>(word);
        four[3] = nibble_at<8>(word);
#endif
    }
}

// The words of 8 packed weights that begin at `data`.
DEVICE void load_words(u32 words[2], const u8* data) {
    words[0] = reinterpret_cast<const u32*>(data)[0];
    if (BITS == 8) words[1] = reinterpret_cast<const u32*>(data)[1];
}

// What turns the codes of one group of columns into weights: code * scale + minimum.
struct Scale {
    float factor, minimum;
};

// One weight's scales and minima.
struct Scales {
    const void *scale, *minimum;

    DEVICE_MEMBER Scale load(size_t index) const {
#if SCALE_BITS == 32
        return {static_cast<const float*>(scale)[index], 0.0f};
#elif SCALE_BITS == 16
        return {half_to_float(static_cast<const u16*>(scale)[index]),
                HAS_MINIMUM ? half_to_float(static_cast<const u16*>(minimum)[index]) : 0.0f};
#else
        return {float(static_cast<const u8*>(scale)[index]),
                HAS_MINIMUM ? -16.0f * float(static_cast<const u8*>(minimum)[index]) : 0.0f};
#endif
    }
};

// What is left to multiply when codes have the scales of their groups.
DEVICE float load_row_scale(const float* row_scale, size_t row) {
    return SCALE_BITS == 8 ? row_scale[row] : 1.0f;
}

// The groups of a row. A column is divided by their width in a multiplication: a division would take
// some 20 instructions, in front of the loads that wait for it.
struct Groups {
    u32 multiplier;  // 2^(32 + shift) / width, rounded up
    int shift, count;

    DEVICE_MEMBER int of(int column) const {
        return int(__umulhi(u32(column), multiplier) >> shift);
    }
};

// Codes to weights with the scale of their own columns, for chunks that lie in several groups. The
// width of a group is even, so two columns share a scale. `first`: the index of the row's first group.
DEVICE void scale_pairs(float values[8], int column, Scales scales, size_t first, Groups groups) {
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
        const Scale own = scales.load(first + min(groups.of(column + i), groups.count - 1));
        values[i] = values[i] * own.factor + own.minimum;
        values[i + 1] = values[i + 1] * own.factor + own.minimum;
    }
}
#endif  // BITS

// The `index`-th 16 bytes of data that no thread writes.
DEVICE uint4 load_once(const u8* data, size_t index) {
    return __ldg(reinterpret_cast<const uint4*>(data) + index);
}

// ---- reductions ----------------------------------------------------------------------------------

DEVICE float warp_sum(float value) {
#pragma unroll
    for (int distance = WARP / 2; distance > 0; distance /= 2) {
        value += __shfl_xor_sync(ALL_LANES, value, distance);
    }
    return value;
}

// fmaxf drops a NaN, which must come through.
DEVICE float max_or_nan(float a, float b) { return a > b || a != a ? a : b; }

DEVICE float warp_max(float value) {
#pragma unroll
    for (int distance = WARP / 2; distance > 0; distance /= 2) {
        value = max_or_nan(value, __shfl_xor_sync(ALL_LANES, value, distance));
    }
    return value;
}

// ---- 8-bit rows ----------------------------------------------------------------------------------

// The scale of a row whose largest absolute value is `most`, and what its values are divided by:
// a row of zeros has scale 0, and division by 1 keeps its codes at 0.
DEVICE float scale_of(float most) { return most / 127.0f; }
DEVICE float divisor_of(float scale) { return scale == 0.0f ? 1.0f : scale; }

DEVICE u32 code_of(float value, float divisor) {
    return u32(min(max(__float2int_rn(value / divisor), -127), 127)) & 0xFF;
}

// 8 values to 8 bytes, the first in the lowest.
DEVICE uint2 codes_of(const float values[8], float divisor) {
    u32 words[2] = {};
#pragma unroll
    for (int i = 0; i < 8; ++i) words[i / 4] |= code_of(values[i], divisor) << (8 * (i % 4));
    return make_uint2(words[0], words[1]);
}

// ---- activations of a feed-forward ---------------------------------------------------------------

// 0: GELU by tanh (Hendrycks & Gimpel 2016, arXiv:1606.08415, section 2), 1: GELU by erf, 2: SiLU.
DEVICE float activate(float x, int kind) {
    if (kind == 0) return 0.5f * x * (1.0f + tanhf(0.7978845608f * (x + 0.044715f * x * x * x)));
    if (kind == 1) return 0.5f * x * (1.0f + erff(0.7071067812f * x));
    return x / (1.0f + expf(-x));
}

// ---- tensor cores and asynchronous copies --------------------------------------------------------

#if defined(ELEMENT) && ELEMENT != 32
// Arithmetic with two 16-bit Elements in a word, each rounded once.
DEVICE u32 fma2(u32 a, u32 b, u32 c) {
    u32 pair;
#if ELEMENT == 17 && defined(BMINF_HOST_SHIM)
    pair = shim_fma_bf16x2(a, b, c);
#elif ELEMENT == 17
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(pair) : "r"(a), "r"(b), "r"(c));
#elif defined(BMINF_HOST_SHIM)
    pair = shim_fma_f16x2(a, b, c);
#else
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(pair) : "r"(a), "r"(b), "r"(c));
#endif
    return pair;
}

#if ELEMENT == 16
DEVICE u32 mul2(u32 a, u32 b) {
#ifdef BMINF_HOST_SHIM
    return shim_mul_f16x2(a, b);
#else
    u32 pair;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
    return pair;
#endif
}

DEVICE u32 sub2(u32 a, u32 b) {
#ifdef BMINF_HOST_SHIM
    return shim_sub_f16x2(a, b);
#else
    u32 pair;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
    return pair;
#endif
}
#endif

// sums (16, 8) += a (16, 16) b (16, 8), spread over a warp as PTX lays down for mma.m16n8k16.
DEVICE void mma_16x8x16(float sums[4], const u32 a[4], const u32 b[2]) {
#ifdef BMINF_HOST_SHIM
#if ELEMENT == 17
    shim_mma_m16n8k16_bf16(sums, a, b);
#else
    shim_mma_m16n8k16_f16(sums, a, b);
#endif
#elif __CUDA_ARCH__ >= 800
#if ELEMENT == 17
#define BMINF_TYPES "f32.bf16.bf16.f32"
#else
#define BMINF_TYPES "f32.f16.f16.f32"
#endif
    asm("mma.sync.aligned.m16n8k16.row.col." BMINF_TYPES
        " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#undef BMINF_TYPES
#endif
}
#endif  // 16-bit ELEMENT

// sums (16, 8) += a (16, 32) b (32, 8), 8-bit integers: mma.m16n8k32, or four m8n8k16 before sm_80.
// In k16 pieces, word 0 of a lane pairs with word 0 and so on, in both shapes alike.
DEVICE void mma_16x8x32(int sums[4], const u32 a[4], const u32 b[2]) {
#if __CUDA_ARCH__ >= 800
#ifdef BMINF_HOST_SHIM
    shim_mma_m16n8k32_s8(sums, a, b);
#else
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32"
        " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
#elif __CUDA_ARCH__ >= 750
#pragma unroll
    for (int k = 0; k < 2; ++k) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#ifdef BMINF_HOST_SHIM
            shim_mma_m8n8k16_s8(sums + 2 * half, a[2 * k + half], b[k]);
#else
            asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
                : "+r"(sums[2 * half]), "+r"(sums[2 * half + 1])
                : "r"(a[2 * k + half]), "r"(b[k]));
#endif
        }
    }
#endif
}

// 16 bytes from device to shared memory; of the source only `source_bytes`, the rest as zeros.
// From sm_80 on in the background, until wait_for_copies.
DEVICE void copy_16(void* shared, const void* global, int source_bytes) {
#if __CUDA_ARCH__ < 800
    uint4 value = make_uint4(0, 0, 0, 0);
    if (source_bytes) value = *static_cast<const uint4*>(global);
    *static_cast<uint4*>(shared) = value;
#elif defined(BMINF_HOST_SHIM)
    shim_cp_async_16(shared, global, source_bytes);
#else
    u32 address = u32(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(address), "l"(global), "r"(source_bytes) : "memory");
#endif
}

DEVICE void commit_copies() {
#if __CUDA_ARCH__ >= 800
#ifdef BMINF_HOST_SHIM
    shim_cp_async_commit();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
#endif
}

// Until at most `num_pending` of the latest commits are under way.
template <int num_pending>
DEVICE void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
#ifdef BMINF_HOST_SHIM
    shim_cp_async_wait(num_pending);
#else
    asm volatile("cp.async.wait_group %0;" :: "n"(num_pending) : "memory");
#endif
#endif
}

// ---- rows of any length --------------------------------------------------------------------------

// is_wide: whether rows are of a multiple of 8 elements and begin at multiples of 16 bytes.
#ifdef ELEMENT
// What is left of a number that is stored as an Element and read again.
DEVICE float rounded(float value) { return to_float(from_float(value)); }

DEVICE void load8_of(const Element* row, int column, int num_columns, bool is_wide, float values[8]) {
    if (is_wide) return load8_or_zeros(row, column, num_columns, values);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        values[i] = column + i < num_columns ? to_float(row[column + i]) : 0.0f;
    }
}

DEVICE void store8_of(Element* row, int column, int num_columns, bool is_wide, const float values[8]) {
    if (!is_wide) return store8_within(row, column, num_columns, values);
    if (column < num_columns) store8(row + column, values);
}
#endif  // ELEMENT

// CHUNKS: a block holds a row in its registers, that many times 8 columns in each thread: thread i has
// columns 8 i to 8 i + 7, and so on in steps of 8 blockDim.x; zeros beyond the end.
#ifdef CHUNKS
DEVICE int column_of(int chunk) { return 8 * (threadIdx.x + chunk * blockDim.x); }

// Row blockIdx.x of x; where there is a delta, x * scale + delta, which is written to `sum`, too. Each
// of the two steps is rounded, as by an operator of torch: neither is contracted with the other.
DEVICE void load_row(float values[CHUNKS][8], const Element* __restrict__ x,
                     const Element* __restrict__ delta, Element* __restrict__ sum, int num_columns,
                     bool is_wide, float scale) {
    const size_t first = size_t(blockIdx.x) * num_columns;
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
        load8_of(x + first, column_of(chunk), num_columns, is_wide, values[chunk]);
    }
    if (delta == nullptr) return;
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
        float* own = values[chunk];
        float more[8];
        load8_of(delta + first, column_of(chunk), num_columns, is_wide, more);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            own[i] = rounded(__fadd_rn(rounded(__fmul_rn(own[i], scale)), more[i]));
        }
        store8_of(sum + first, column_of(chunk), num_columns, is_wide, own);
    }
}

// The sum over all threads of a block.   of_warps: in shared memory, for this sum alone.
DEVICE float block_sum(float value, float* of_warps) {
    value = warp_sum(value);
    if (threadIdx.x % WARP == 0) of_warps[threadIdx.x / WARP] = value;
    __syncthreads();
    float sum = of_warps[0];
    for (int warp = 1; warp < blockDim.x / WARP; ++warp) sum += of_warps[warp];
    return sum;
}
#endif  // CHUNKS
