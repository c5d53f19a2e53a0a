// The functions of a level, for processors without vectors that we know: all rows of x are
// multiplied as floats. Included in the unnamed namespace of a level.

#ifndef BMINF_CPU_PORTABLE_H
#define BMINF_CPU_PORTABLE_H

constexpr i64 ALIGNMENT = 64;

i64 workspace_bytes(const Product& p) {
    const i64 bytes = p.num_rows * p.in_features * i64(sizeof(float));
    return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

void prepare(const Product& p, u8* workspace) {
    float* x = reinterpret_cast<float*>(workspace);
    for (i64 i = 0; i < p.num_rows * p.in_features; ++i) x[i] = load(p.x, p.element, i);
}

void multiply(const Product& p, const Result& y, const u8* workspace, i64 first, i64 last) {
    const float* x[MAX_ROWS];
    float totals[MAX_ROWS];
    for (i64 m = 0; m < p.num_rows; ++m)
        x[m] = reinterpret_cast<const float*>(workspace) + m * p.in_features;
    for (i64 n = first; n < last; ++n) {
        plain_products(p, n, x, int(p.num_rows), totals);
        for (i64 m = 0; m < p.num_rows; ++m) write_result(p, y, n, m, totals[m]);
    }
}

#endif
