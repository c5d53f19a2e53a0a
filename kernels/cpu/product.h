// One product with a packed weight, as Python hands it over: what bminf/cpu/library.py packs.
//
// Letters: M rows of activations, N output features, K input features, G groups of a weight row.
// A packed weight is (N, row_bytes), rows padded to 16 bytes; see bminf/quantization/packed.py.

#ifndef BMINF_CPU_PRODUCT_H
#define BMINF_CPU_PRODUCT_H

#include <cstdint>
#include <cstring>

typedef std::int8_t i8;
typedef std::uint8_t u8;
typedef std::int16_t i16;
typedef std::uint16_t u16;
typedef std::int32_t i32;
typedef std::uint32_t u32;
typedef std::int64_t i64;

constexpr i64 MAX_ROWS = 16;  // of activations in one call
constexpr i64 ALIGNMENT = 64;  // of a workspace, and of its parts

inline i64 aligned(i64 bytes) { return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

constexpr i64 BLOCK_ROWS = 4;  // of W: they stay in the nearest cache for further rows of x

enum Element : i64 { HALF = 16, BFLOAT16 = 17, FLOAT = 32 };

// Every field has 8 bytes, so that no compiler pads them.
struct Product {
    const u8* codes;         // (N, row_bytes)
    const void* scale;       // (N, G): float for 8 bits; half for 4; u8 with row_scale
    const void* minimum;     // as scale, or null
    const float* row_scale;  // (N), or null
    const void* bias;        // (N) in `element`, or null
    const void* x;           // (M, K) in `element`, contiguous; null to unpack
    void* y;                 // (M, N) in `element`; (N, K) to unpack
    i64 num_rows;            // M
    i64 out_features;        // N
    i64 in_features;         // K
    i64 row_bytes;
    i64 group_size;          // K for a scale a row
    i64 num_groups;          // G
    i64 bits;                // 8 or 4
    i64 element;             // of x, bias and y
    i64 num_threads;
    i64 float_elements;      // a weight of at most so many is multiplied as floats
    i64 activation_bits;     // 16, or 8 of a token and W in 8 bits with a scale a row
};

// Two products of the same form, sizes, x and y: y = activation(gate) * up.
struct Gated {
    const Product& gate;
    const Product& up;
    i64 activation;  // 0 is GELU by tanh, 1 GELU, 2 SiLU
};

// Where the products of row m of x and row n of a weight go: to values[m * stride + n - first].
struct Result {
    void* values;
    i64 element;
    i64 stride;
    i64 first;
};

inline Result result_of(const Product& p) { return {p.y, p.element, p.out_features, 0}; }

// The functions of one level: the same code, compiled for some instructions.
struct Level {
    const char* name;
    // Bytes that prepare() fills for all rows of x.
    i64 (*workspace_bytes)(const Product&);
    void (*prepare)(const Product&, u8* workspace);
    // The columns that weight rows first to last give.
    void (*multiply)(const Product&, const Result&, const u8* workspace, i64 first, i64 last);
    // The same of y, of two weights, from what prepare() made of x for one of them.
    void (*multiply_gated)(const Gated&, const u8* workspace, i64 first, i64 last);
    // Weight rows first to last as numbers.
    void (*unpack)(const Product&, i64 first, i64 last);
};

#endif
