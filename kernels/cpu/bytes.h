// y = x W^T + bias for 1 to 16 rows of x rounded to 8 bits, W in 8 bits with a scale a row. Included in
// the unnamed namespace of a level, after its byte_sums().
//
// A row of x is codes times a scale, its largest absolute value over 127; codes are rounded to the
// nearest, of ties to the even one. Sums are integers, exact, and become floats that are multiplied
// with the scale of x, then that of W: all bits are those of torch's operations in
// bminf/ops/cpu_linear.py. A row with infinity or NaN is NaN, as there: that is its scale, or infinity,
// and then all codes are 0.
//
// Layout of the workspace: Rounded; for each row its codes, zeros up to ALIGNMENT; K floats.
//
// Bytes moved: N * row_bytes, once. Against 16 bits half the products, and half of x from the cache.
//
// Source: Dettmers et al. 2022, arXiv:2208.07339, section 2.

#ifndef BMINF_CPU_BYTES_H
#define BMINF_CPU_BYTES_H

constexpr float LARGEST_CODE = 127.0f;

struct Rounded {
    float scales[MAX_ROWS];
    i32 surpluses[MAX_ROWS];  // of sums: what the level adds to each code of W, times those of x
    const u8* codes[MAX_ROWS];
};

inline i64 bytes_of_rounded(const Product& p) {
    return aligned(sizeof(Rounded)) + p.num_rows * aligned(p.row_bytes) + aligned(p.in_features * 4);
}

// NaN is above infinity.
TARGET float largest_of(const float* x, i64 count) {
    i32 top = 0;
    for (i64 i = 0; i < count; ++i) {
        const i32 bits = i32(bits_of(x[i]) & 0x7FFFFFFF);
        top = bits > top ? bits : top;
    }
    return float_of(u32(top));
}

TARGET void write_codes(const float* x, i64 count, float scale, i8* codes) {
    const float divisor = scale == 0.0f ? 1.0f : scale;
    for (i64 i = 0; i < count; ++i) {
        const float code = x[i] / divisor;
        // Beyond the largest are codes of scales so small that they have few digits themselves.
        const float low = code < -LARGEST_CODE ? -LARGEST_CODE : code;
        codes[i] = i8(bits_of((low > LARGEST_CODE ? LARGEST_CODE : low) + ROUNDING));
    }
}

TARGET i32 sum_of(const i8* codes, i64 count) {
    i32 sum = 0;
    for (i64 i = 0; i < count; ++i) sum += codes[i];
    return sum;
}

TARGET void round_rows(const Product& p, u8* workspace) {
    Rounded& x = *reinterpret_cast<Rounded*>(workspace);
    u8* codes = workspace + aligned(sizeof(Rounded));
    float* space = reinterpret_cast<float*>(codes + p.num_rows * aligned(p.row_bytes));
    for (i64 m = 0; m < p.num_rows; ++m, codes += aligned(p.row_bytes)) {
        const float* values = as_floats_of(p, m, space);
        i8* signed_codes = reinterpret_cast<i8*>(codes);
        x.scales[m] = largest_of(values, p.in_features) / LARGEST_CODE;
        write_codes(values, p.in_features, x.scales[m], signed_codes);
        std::memset(codes + p.in_features, 0, aligned(p.row_bytes) - p.in_features);
        x.surpluses[m] = ADDED_TO_CODES * sum_of(signed_codes, p.in_features);
        x.codes[m] = codes;
    }
}

// X_ROWS rows of x, from the first_x-th, times weight rows first to last.
template <int X_ROWS>
TARGET void multiply_rounded_rows(
    const Product& p, const Result& y, const Rounded& x, i64 first, i64 last, i64 first_x) {
    constexpr int W_ROWS = rows_of_w(X_ROWS);
    for (i64 row = first; row < last; row += W_ROWS) {
        const u8* weights[W_ROWS];
        i32 sums[W_ROWS][X_ROWS];
        for (int r = 0; r < W_ROWS; ++r)
            weights[r] = p.codes + (row + r < last ? row + r : last - 1) * p.row_bytes;
        byte_sums<X_ROWS, W_ROWS>(weights, p.row_bytes, x.codes + first_x, sums);
        for (i64 n = row; n < row + W_ROWS && n < last; ++n) {
            for (i64 m = first_x; m < first_x + X_ROWS; ++m) {
                const float sum = float(sums[n - row][m - first_x] - x.surpluses[m]);
                write_result(p, y, n, m, sum * x.scales[m] * stored(p, p.scale, n));
            }
        }
    }
}

TARGET void multiply_rounded(
    const Product& p, const Result& y, const u8* workspace, i64 first, i64 last) {
    const Rounded& x = *reinterpret_cast<const Rounded*>(workspace);
    for (i64 row = first; row < last; row += BLOCK_ROWS) {
        const i64 end = row + BLOCK_ROWS < last ? row + BLOCK_ROWS : last;
        i64 m = 0;
        for (; m + 4 <= p.num_rows; m += 4) multiply_rounded_rows<4>(p, y, x, row, end, m);
        for (; m + 2 <= p.num_rows; m += 2) multiply_rounded_rows<2>(p, y, x, row, end, m);
        if (m < p.num_rows) multiply_rounded_rows<1>(p, y, x, row, end, m);
    }
}

#endif
