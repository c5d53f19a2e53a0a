// The level for AVX2: vectors of 32 bytes, and two instructions for the products of pairs of words
// and their sum. Sixteen registers hold fewer rows of W where there are more of x.

#include "product.h"

#ifdef __x86_64__

#include <immintrin.h>

#define TARGET __attribute__((target("avx2,fma,f16c")))
#define INLINE TARGET inline __attribute__((always_inline))


namespace {

typedef __m256i Ints;
typedef __m256 Floats;
constexpr int BYTES = 32, LANES = 8;

constexpr int rows_of_w(int x_rows) { return x_rows == 2 ? 2 : 1; }

INLINE Ints no_ints() { return _mm256_setzero_si256(); }
INLINE Floats no_floats() { return _mm256_setzero_ps(); }
INLINE Ints load_ints(const u8* p) { return _mm256_loadu_si256((const __m256i*)p); }
INLINE Ints load_some(const u8* p, i64 count) {
    if (count <= 0) return no_ints();
    if (count >= BYTES) return load_ints(p);
    u8 bytes[BYTES] = {};
    std::memcpy(bytes, p, count);
    return load_ints(bytes);
}

INLINE Ints dot(Ints sums, Ints a, Ints b) {
    return _mm256_add_epi32(sums, _mm256_madd_epi16(a, b));
}

// The sign of a code of W moves to that of x, which is not -128. Of a pair the sum is at most
// 2 * 128 * 127: it fits 16 bits.
constexpr i32 ADDED_TO_CODES = 0;
INLINE Ints dot_bytes(Ints sums, Ints weights, Ints codes) {
    const Ints sizes = _mm256_abs_epi8(weights), turned = _mm256_sign_epi8(codes, weights);
    const Ints pairs = _mm256_maddubs_epi16(sizes, turned);
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
INLINE Ints add_ints(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
INLINE i32 total_of_ints(Ints a) {
    __m128i sums = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    sums = _mm_add_epi32(sums, _mm_shuffle_epi32(sums, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(sums, _mm_shuffle_epi32(sums, 0xB1)));
}

template <int BITS, bool SIGNED, int PLANE>
INLINE Ints plane_of(Ints codes) {
    constexpr int UP = 16 - BITS * (PLANE + 1);
    if constexpr (SIGNED) {
        const Ints top = UP ? _mm256_slli_epi16(codes, UP) : codes;
        return _mm256_srai_epi16(top, 16 - BITS);
    }
    const Ints low = PLANE ? _mm256_srli_epi16(codes, BITS * PLANE) : codes;
    return UP ? _mm256_and_si256(low, _mm256_set1_epi16((1 << BITS) - 1)) : low;
}

INLINE Floats as_floats(Ints a) { return _mm256_cvtepi32_ps(a); }
INLINE Floats times(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
INLINE Floats load_all_floats(const void* p) { return _mm256_loadu_ps((const float*)p); }
INLINE float total(Floats a) {
    __m128 sums = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    sums = _mm_add_ps(sums, _mm_movehl_ps(sums, sums));
    return _mm_cvtss_f32(_mm_add_ss(sums, _mm_shuffle_ps(sums, sums, 1)));
}

template <typename T>
INLINE const T* whole(const T* p, i64 count, T* space) {
    if (count >= LANES) return p;
    std::memset(space, 0, LANES * sizeof(T));
    std::memcpy(space, p, count * sizeof(T));
    return space;
}
INLINE Floats load_floats(const float* p, i64 count) {
    float space[LANES];
    return _mm256_loadu_ps(whole(p, count, space));
}
INLINE Floats load_halves(const u16* p, i64 count) {
    u16 space[LANES];
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)whole(p, count, space)));
}
INLINE Floats load_bytes(const u8* p, i64 count) {
    u8 space[LANES];
    const __m128i bytes = _mm_loadl_epi64((const __m128i*)whole(p, count, space));
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
}
INLINE Floats pick(Floats values, const i32* lanes) {
    return _mm256_permutevar8x32_ps(values, _mm256_loadu_si256((const __m256i*)lanes));
}

#include "numbers.h"
#include "unpack.h"
#include "digits.h"
#include "ahead.h"
#include "byte_sums.h"
#include "bytes.h"
#include "few_rows.h"
#include "gated.h"

}  // namespace

extern const Level LEVEL_AVX2 = {
    "avx2", workspace_bytes, prepare, multiply, multiply_gated, unpack_rows};

#endif
