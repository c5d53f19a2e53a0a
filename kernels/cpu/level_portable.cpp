// The level for every processor: weights become floats, in loops that a compiler vectorises for
// whatever it compiles for; bytes are multiplied as integers.

#include "product.h"

#define TARGET static
#define INLINE static inline

namespace {

#include "numbers.h"
#include "unpack.h"

constexpr i32 ADDED_TO_CODES = 0;

constexpr int rows_of_w(int) { return 1; }

template <int X_ROWS, int W_ROWS>
TARGET void byte_sums(
    const u8* const* rows, i64 row_bytes, const u8* const* codes, i32 (*totals)[X_ROWS]) {
    for (int m = 0; m < X_ROWS; ++m) {
        i32 sum = 0;
        for (i64 i = 0; i < row_bytes; ++i) sum += i32(i8(rows[0][i])) * i32(i8(codes[m][i]));
        totals[0][m] = sum;
    }
}

#include "bytes.h"
#include "portable.h"
#include "gated.h"

}  // namespace

extern const Level LEVEL_PORTABLE = {
    "portable", workspace_bytes, prepare, multiply, multiply_gated, unpack_rows};
