// The level for AVX-512 with VNNI: vectors of 64 bytes, products of pairs of words and their sum in
// one instruction.

#include "product.h"

#ifdef __x86_64__

#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")))
#define INLINE TARGET inline __attribute__((always_inline))

namespace {

typedef __m512i Ints;
typedef __m512 Floats;
constexpr int BYTES = 64, LANES = 16;

constexpr int rows_of_w(int x_rows) { return x_rows == 1 ? 1 : 4; }

INLINE Ints no_ints() { return _mm512_setzero_si512(); }
INLINE Floats no_floats() { return _mm512_setzero_ps(); }
INLINE Ints load_ints(const u8* p) { return _mm512_loadu_si512(p); }
INLINE Ints load_some(const u8* p, i64 count) {
    if (count <= 0) return no_ints();
    const __mmask64 mask = count >= BYTES ? ~0ull : (1ull << count) - 1;
    return _mm512_maskz_loadu_epi8(mask, p);
}

INLINE Ints dot(Ints sums, Ints a, Ints b) { return _mm512_dpwssd_epi32(sums, a, b); }

// The instruction takes codes of W without a sign: 128 is added to each.
constexpr i32 ADDED_TO_CODES = 128;
INLINE Ints dot_bytes(Ints sums, Ints weights, Ints codes) {
    return _mm512_dpbusd_epi32(sums, _mm512_xor_si512(weights, _mm512_set1_epi8(-128)), codes);
}
INLINE Ints add_ints(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
INLINE i32 total_of_ints(Ints a) { return _mm512_reduce_add_epi32(a); }

template <int BITS, bool SIGNED, int PLANE>
INLINE Ints plane_of(Ints codes) {
    constexpr int UP = 16 - BITS * (PLANE + 1);
    if constexpr (SIGNED) {
        const Ints top = UP ? _mm512_slli_epi16(codes, UP) : codes;
        return _mm512_srai_epi16(top, 16 - BITS);
    }
    const Ints low = PLANE ? _mm512_srli_epi16(codes, BITS * PLANE) : codes;
    return UP ? _mm512_and_si512(low, _mm512_set1_epi16((1 << BITS) - 1)) : low;
}

INLINE Floats as_floats(Ints a) { return _mm512_cvtepi32_ps(a); }
INLINE Floats times(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
INLINE float total(Floats a) { return _mm512_reduce_add_ps(a); }
INLINE Floats load_all_floats(const void* p) { return _mm512_loadu_ps(p); }

INLINE Floats load_floats(const float* p, i64 count) {
    return _mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p);
}
INLINE Floats load_halves(const u16* p, i64 count) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), p));
}
INLINE Floats load_bytes(const u8* p, i64 count) {
    const __m128i bytes = _mm_maskz_loadu_epi8(__mmask16((1u << count) - 1), p);
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
}
INLINE Floats pick(Floats values, const i32* lanes) {
    return _mm512_permutexvar_ps(_mm512_loadu_si512(lanes), values);
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

extern const Level LEVEL_AVX512 = {
    "avx512", workspace_bytes, prepare, multiply, multiply_gated, unpack_rows};

#endif
