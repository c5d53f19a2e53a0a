// Weight rows as floats, and products with them: for formats whose groups fit no vector, for rows of
// x that hold infinities, NaN, the largest or the smallest numbers, and for products with many rows.
//
// TARGET is the attribute of the level. Sixteen sums a product, added up in one order: a vector of
// 16 floats is as many registers as the level has for it.

#ifndef BMINF_CPU_UNPACK_H
#define BMINF_CPU_UNPACK_H

constexpr i64 SPAN = 256;  // columns that are unpacked at a time: they stay in the nearest cache
constexpr int SUMS = 16;

typedef float Sums __attribute__((vector_size(SUMS * sizeof(float))));
typedef float LooseSums __attribute__((vector_size(SUMS * sizeof(float)), aligned(4), may_alias));

// Codes of columns first (even) to first + count of a row.
TARGET void codes_of(const Product& p, i64 row, i64 first, i64 count, i8* out) {
    const u8* bytes = p.codes + row * p.row_bytes + first * p.bits / 8;
    if (p.bits == 8) {
        std::memcpy(out, bytes, count);
        return;
    }
    const i32 flip = p.minimum ? 0 : 8;  // two's complement of 4 bits
    for (i64 i = 0; i < count / 2; ++i) {
        out[2 * i] = i8(((bytes[i] >> 4) ^ flip) - flip);
        out[2 * i + 1] = i8(((bytes[i] & 15) ^ flip) - flip);
    }
}

TARGET void scale_codes(
    const i8* codes, i64 count, float scale, float minimum, float factor, float* out) {
    for (i64 i = 0; i < count; ++i) out[i] = (float(codes[i]) * scale + minimum) * factor;
}

// Columns first (a multiple of SPAN) to first + count, at most SPAN, of a row.
TARGET void unpack_span(const Product& p, i64 row, i64 first, i64 count, float* out) {
    i8 codes[SPAN];
    codes_of(p, row, first, count, codes);
    const float step = minimum_step(p), factor = factor_of(p, row);
    i64 group = first / p.group_size;
    for (i64 column = first; column < first + count; ++group) {
        const i64 end = (group + 1) * p.group_size, last = end < first + count ? end : first + count;
        const i64 i = row * p.num_groups + group;
        const float minimum = p.minimum ? stored(p, p.minimum, i) * step : 0.0f;
        const i64 offset = column - first;
        const float scale = stored(p, p.scale, i);
        scale_codes(codes + offset, last - column, scale, minimum, factor, out + offset);
        column = last;
    }
}

TARGET void unpack_rows(const Product& p, i64 first, i64 last) {
    float values[SPAN];
    for (i64 row = first; row < last; ++row) {
        for (i64 column = 0; column < p.in_features; column += SPAN) {
            const i64 left = p.in_features - column, count = left < SPAN ? left : SPAN;
            const i64 start = row * p.in_features + column;
            if (p.element == FLOAT) {
                unpack_span(p, row, column, count, static_cast<float*>(p.y) + start);
                continue;
            }
            unpack_span(p, row, column, count, values);
            for (i64 i = 0; i < count; ++i) store(p.y, p.element, start + i, values[i]);
        }
    }
}

// Adds products of `count` weights and activations to the 16 sums.
TARGET void add_products(const float* weights, const float* x, i64 count, float* sums) {
    Sums total = *reinterpret_cast<const LooseSums*>(sums);
    i64 i = 0;
    for (; i + SUMS <= count; i += SUMS) {
        const Sums w = *reinterpret_cast<const LooseSums*>(weights + i);
        total += w * *reinterpret_cast<const LooseSums*>(x + i);
    }
    *reinterpret_cast<LooseSums*>(sums) = total;
    for (int lane = 0; i + lane < count; ++lane) sums[lane] += weights[i + lane] * x[i + lane];
}

// The sums of one weight row and rows of x (each of K floats): totals[m] of the m-th of them.
TARGET void plain_products(
    const Product& p, i64 row, const float* const* x, int num_x, float* totals) {
    float weights[SPAN], sums[MAX_ROWS][SUMS] = {};
    for (i64 column = 0; column < p.in_features; column += SPAN) {
        const i64 left = p.in_features - column, count = left < SPAN ? left : SPAN;
        unpack_span(p, row, column, count, weights);
        for (int m = 0; m < num_x; ++m) add_products(weights, x[m] + column, count, sums[m]);
    }
    for (int m = 0; m < num_x; ++m) {
        totals[m] = 0.0f;
        for (int lane = 0; lane < SUMS; ++lane) totals[m] += sums[m][lane];
    }
}

#endif
