// Numbers of 16 bits and floats, in integer arithmetic that every compiler can vectorise, and what a
// weight stores of each group. Included in the unnamed namespace of a level.

#ifndef BMINF_CPU_NUMBERS_H
#define BMINF_CPU_NUMBERS_H


inline u32 bits_of(float value) {
    u32 bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

inline float float_of(u32 bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline float half_to_float(u16 half) {
    const u32 sign = u32(half & 0x8000) << 16, rest = half & 0x7FFF;
    const u32 normal = (rest << 13) + (112u << 23);
    const u32 special = (rest << 13) | 0x7F800000;
    // Of integers: a mode that flushes small floats to zero leaves these as they are.
    const u32 small = bits_of(float(i32(rest)) * 0x1p-24f);
    const u32 finite = rest < 0x0400 ? small : normal;
    return float_of(sign | (rest < 0x7C00 ? finite : special));
}

// To the nearest, ties to even.
inline u16 float_to_half(float value) {
    const u32 bits = bits_of(value), sign = (bits >> 16) & 0x8000, rest = bits & 0x7FFFFFFF;
    if (rest > 0x7F800000) return u16(sign | 0x7E00);
    if (rest >= 0x47800000) return u16(sign | 0x7C00);
    // The last bit of 0.5f is the smallest half: the addition rounds to it.
    if (rest < 0x38800000) return u16(sign | (bits_of(float_of(rest) + 0.5f) - bits_of(0.5f)));
    return u16(sign | ((rest + 0xFFF + ((rest >> 13) & 1) - (112u << 23)) >> 13));
}

constexpr float ROUNDING = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to an integer

inline float bfloat16_to_float(u16 value) { return float_of(u32(value) << 16); }

inline u16 float_to_bfloat16(float value) {
    const u32 bits = bits_of(value);
    if (value != value) return u16((bits >> 16) | 0x40);
    return u16((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

inline float load(const void* values, i64 element, i64 i) {
    if (element == FLOAT) return static_cast<const float*>(values)[i];
    const u16 bits = static_cast<const u16*>(values)[i];
    return element == HALF ? half_to_float(bits) : bfloat16_to_float(bits);
}

// Row `row` of x, which is in `space` where it is not of floats.
TARGET const float* as_floats_of(const Product& p, i64 row, float* space) {
    const i64 start = row * p.in_features;
    if (p.element == FLOAT) return static_cast<const float*>(p.x) + start;
    const u16* x = static_cast<const u16*>(p.x) + start;
    if (p.element == HALF)
        for (i64 i = 0; i < p.in_features; ++i) space[i] = half_to_float(x[i]);
    else
        for (i64 i = 0; i < p.in_features; ++i) space[i] = bfloat16_to_float(x[i]);
    return space;
}

inline void store(void* values, i64 element, i64 i, float value) {
    if (element == FLOAT) {
        static_cast<float*>(values)[i] = value;
    } else {
        const u16 bits = element == HALF ? float_to_half(value) : float_to_bfloat16(value);
        static_cast<u16*>(values)[i] = bits;
    }
}

inline void write_result(const Product& p, const Result& y, i64 n, i64 m, float value) {
    if (p.bias) value += load(p.bias, p.element, n);
    store(y.values, y.element, m * y.stride + n - y.first, value);
}

// weight = (code * scale + minimum) * factor.
inline float stored(const Product& p, const void* values, i64 i) {
    if (p.bits == 8) return static_cast<const float*>(values)[i];
    if (p.row_scale) return static_cast<const u8*>(values)[i];
    return half_to_float(static_cast<const u16*>(values)[i]);
}

inline float minimum_step(const Product& p) { return p.row_scale ? -16.0f : 1.0f; }

inline float factor_of(const Product& p, i64 row) { return p.row_scale ? p.row_scale[row] : 1.0f; }

#endif
