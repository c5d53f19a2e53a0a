// The functions of a level, for processors without vectors that we know: all rows of x are multiplied
// as floats, but those in 8 bits. Included in the unnamed namespace of a level.

#ifndef BMINF_CPU_PORTABLE_H
#define BMINF_CPU_PORTABLE_H

i64 workspace_bytes(const Product& p) {
    if (p.activation_bits == 8) return bytes_of_rounded(p);
    return aligned(p.num_rows * p.in_features * i64(sizeof(float)));
}

void prepare(const Product& p, u8* workspace) {
    if (p.activation_bits == 8) return round_rows(p, workspace);
    float* x = reinterpret_cast<float*>(workspace);
    for (i64 i = 0; i < p.num_rows * p.in_features; ++i) x[i] = load(p.x, p.element, i);
}

void multiply(const Product& p, const Result& y, const u8* workspace, i64 first, i64 last) {
    if (p.activation_bits == 8) return multiply_rounded(p, y, workspace, first, last);
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
