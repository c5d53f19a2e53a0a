// Activations as integers of 16 bits, in the order in which a vector of codes comes apart.
//
// A vector of BYTES bytes of codes has LANES lanes of 4 bytes, two words of 16 bits each. It comes
// apart into PLANES vectors of words, the bytes or nibbles at one place of each word; plane i meets
// the activations of the same columns, so that no code is ever moved between lanes. A lane sums 4
// columns in 8 bits and 8 in 4.
//
// A step is STEP vectors of a row, whose products a lane adds up as integers: 1 where the scale
// changes along the row, so that any group of whole lanes is scaled by itself. The columns of a lane
// of a step share a step size: x ~ digit * size with |digit| <= 32767. The rounding of one column is
// at most 2^-16 of the largest of these 8 or 16, so that of y is within 2^-14 of its norm.
//
// Layout of a row of x: for each step STEP * PLANES vectors of words, then LANES floats, the sizes.

#ifndef BMINF_CPU_DIGITS_H
#define BMINF_CPU_DIGITS_H

constexpr int WORDS = 2 * LANES;
constexpr float LARGEST_DIGIT = 32767.0f;
constexpr u32 TINY = 0x0DA24260;  // 1e-30: its reciprocal is a number
// The largest of a row is from 1e-20, beside which TINY is nothing, to 1e30: times codes and scales
// that are integers it is a number. Other rows, and those with infinities or NaN, stay floats.
constexpr u32 LEAST = 0x1E3CE508, MOST = 0x7149F2CA;

template <int BITS, int STEP>
struct Layout {
    static constexpr int PLANES = 16 / BITS;
    static constexpr int VECTOR_COLUMNS = WORDS * PLANES;
    static constexpr int COLUMNS = STEP * VECTOR_COLUMNS;
    static constexpr i64 BYTES_OF_STEP = STEP * PLANES * BYTES + LANES * 4;
    // In a word the bits of a nibble with an even column lie above those of its neighbour.
    static constexpr int column_of(int plane) { return BITS == 4 ? plane ^ 1 : plane; }
};

inline u32 larger(u32 a, u32 b) { return a > b ? a : b; }

// Writes one step; returns the bits of the largest absolute value, where NaN is above infinity.
template <int BITS, int STEP>
TARGET u32 write_step(const float* x, u8* out) {
    typedef Layout<BITS, STEP> L;
    constexpr int VECTORS = STEP * L::PLANES;
    float values[VECTORS][WORDS];
    for (int v = 0; v < STEP; ++v)
        for (int plane = 0; plane < L::PLANES; ++plane)
            for (int w = 0; w < WORDS; ++w)
                values[v * L::PLANES + plane][w] =
                    x[v * L::VECTOR_COLUMNS + w * L::PLANES + L::column_of(plane)];
    u32 tops[WORDS] = {};
    for (int v = 0; v < VECTORS; ++v)
        for (int w = 0; w < WORDS; ++w) tops[w] = larger(tops[w], bits_of(values[v][w]) & 0x7FFFFFFF);
    float sizes[LANES], inverses[WORDS];
    u32 top = 0;
    for (int lane = 0; lane < LANES; ++lane) {
        const u32 of_lane = larger(tops[2 * lane], tops[2 * lane + 1]);
        const float value = of_lane < TINY ? 0.0f : float_of(of_lane);
        sizes[lane] = value / LARGEST_DIGIT;
        inverses[2 * lane] = inverses[2 * lane + 1] = value > 0.0f ? LARGEST_DIGIT / value : 0.0f;
        top = larger(top, of_lane);
    }
    i16* digits = reinterpret_cast<i16*>(out);
    for (int v = 0; v < VECTORS; ++v)
        for (int w = 0; w < WORDS; ++w)
            digits[v * WORDS + w] = i16(bits_of(values[v][w] * inverses[w] + ROUNDING));
    std::memcpy(out + VECTORS * BYTES, sizes, sizeof sizes);
    return top;
}

// Writes a row of K activations; returns whether its digits stand for it.
template <int BITS, int STEP>
TARGET bool write_row(const float* x, i64 columns, u8* out) {
    typedef Layout<BITS, STEP> L;
    u32 top = 0;
    i64 first = 0;
    for (; first + L::COLUMNS <= columns; first += L::COLUMNS, out += L::BYTES_OF_STEP)
        top = larger(top, write_step<BITS, STEP>(x + first, out));
    if (first < columns) {
        float rest[L::COLUMNS] = {};
        std::memcpy(rest, x + first, (columns - first) * sizeof(float));
        top = larger(top, write_step<BITS, STEP>(rest, out));
    }
    return top == 0 || (top >= LEAST && top < MOST);
}

#endif
