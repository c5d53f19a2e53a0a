// Sums of products of bytes, in the vectors of a level. Included in its unnamed namespace.
//
// As in few_rows.h up to four rows of x and of W are multiplied together. For one of each several sums
// are kept, as each takes some cycles to be added to: integers are the same in any order.

#ifndef BMINF_CPU_BYTE_SUMS_H
#define BMINF_CPU_BYTE_SUMS_H

// W_ROWS rows of W and X_ROWS of codes, which zeros follow up to a whole vector.
template <int X_ROWS, int W_ROWS>
TARGET void byte_sums(
    const u8* const* rows, i64 row_bytes, const u8* const* codes, i32 (*totals)[X_ROWS]) {
    constexpr int CHAINS = X_ROWS * W_ROWS == 1 ? 4 : 1, STEP = CHAINS * BYTES;
    Ints sums[W_ROWS][X_ROWS][CHAINS];
    for (int r = 0; r < W_ROWS; ++r)
        for (int m = 0; m < X_ROWS; ++m)
            for (int c = 0; c < CHAINS; ++c) sums[r][m][c] = no_ints();
    i64 first = 0;
    for (; first + STEP <= row_bytes; first += STEP) {
        for (int r = 0; r < W_ROWS; ++r) {
            ask_beyond<X_ROWS>(rows[r] + first, row_bytes, STEP);
            for (int c = 0; c < CHAINS; ++c) {
                const i64 place = first + c * BYTES;
                const Ints weights = load_ints(rows[r] + place);
                for (int m = 0; m < X_ROWS; ++m)
                    sums[r][m][c] = dot_bytes(sums[r][m][c], weights, load_ints(codes[m] + place));
            }
        }
    }
    for (; first < row_bytes; first += BYTES) {
        for (int r = 0; r < W_ROWS; ++r) {
            const Ints weights = load_some(rows[r] + first, row_bytes - first);
            for (int m = 0; m < X_ROWS; ++m)
                sums[r][m][0] = dot_bytes(sums[r][m][0], weights, load_ints(codes[m] + first));
        }
    }
    for (int r = 0; r < W_ROWS; ++r) {
        for (int m = 0; m < X_ROWS; ++m) {
            for (int c = 1; c < CHAINS; ++c)
                sums[r][m][0] = add_ints(sums[r][m][0], sums[r][m][c]);
            totals[r][m] = total_of_ints(sums[r][m][0]);
        }
    }
}

#endif
