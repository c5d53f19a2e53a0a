// The level for every processor: weights become floats, in loops that a compiler vectorises for
// whatever it compiles for.

#include "product.h"

#define TARGET static
#define INLINE static inline

namespace {

#include "numbers.h"
#include "unpack.h"
#include "portable.h"
#include "gated.h"

}  // namespace

extern const Level LEVEL_PORTABLE = {
    "portable", workspace_bytes, prepare, multiply, multiply_gated, unpack_rows};
