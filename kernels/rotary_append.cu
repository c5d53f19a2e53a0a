// Keys and values of new tokens to their cells of a cache; with rotary positions, queries and keys are
// rotated on the way.
//
// query, key, value: head h of token t begins at t * token_stride + h * head_stride, D columns of
// Element; the parts of a fused projection, whatever its order, lie so.   cells (tokens) 64-bit: that of
// each token, below 0 for none.   keys, values (H, num_cells, D) Element: one layer of the cache.
// rotated (tokens, H, D) Element: the queries.
// ANGLE: the type of cos and sin (tokens, D / 2), 16 for half, 32 for float; 0 is no rotation, and query,
// cos, sin and rotated are null. Column j is rotated together with column j + D / 2; where angles and
// elements are half, products and sums are rounded to half, otherwise all is float until the end.
// WIDTH: neighbours that a thread takes, 8 or 1. With 8 all strides and D / 2 (D, without a rotation) are
// multiples of 8, and everything begins at multiples of 16 bytes.
//
// Grid: x is the token, y some heads. Block: x is the columns, y the heads.
// Bytes moved: 6 sizeof(Element) for each column of a head, 4 without a rotation, and the angles.
// Source: Su et al. 2021, arXiv:2104.09864.

#include "common.cuh"

DEVICE void load_columns(const Element* from, float values[WIDTH]) {
#if WIDTH == 8
    load8(from, values);
#else
    values[0] = to_float(*from);
#endif
}

DEVICE void store_columns(Element* to, const float values[WIDTH]) {
#if WIDTH == 8
    store8(to, values);
#else
    *to = from_float(values[0]);
#endif
}

DEVICE void copy_columns(const Element* from, Element* to) {
    float values[WIDTH];
    load_columns(from, values);
    store_columns(to, values);
}

#if ANGLE
#if ANGLE == 16
typedef u16 Angle;
DEVICE float to_angle(Angle bits) { return half_to_float(bits); }
#else
typedef float Angle;
DEVICE float to_angle(Angle value) { return value; }
#endif

DEVICE void load_angles(const Angle* from, float values[WIDTH]) {
#if WIDTH == 8
    __align__(16) Angle angles[8];
#pragma unroll
    for (int i = 0; i < int(sizeof(Angle)) / 2; ++i) {
        reinterpret_cast<uint4*>(angles)[i] = reinterpret_cast<const uint4*>(from)[i];
    }
#else
    const Angle* angles = from;
#endif
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) values[i] = to_angle(angles[i]);
}

// A product or a sum of an element and an angle, as torch promotes the types of the two.
DEVICE float promoted(float value) {
    return ELEMENT == 16 && ANGLE == 16 ? rounded(value) : value;
}

// The columns at `from` and half a head behind.
DEVICE void rotate_columns(const Element* from, Element* to, int half, const float cos[WIDTH],
                           const float sin[WIDTH]) {
    float first[WIDTH], second[WIDTH];
    load_columns(from, first);
    load_columns(from + half, second);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
        const float a = first[i], b = second[i];
        first[i] = __fsub_rn(promoted(__fmul_rn(a, cos[i])), promoted(__fmul_rn(b, sin[i])));
        second[i] = __fadd_rn(promoted(__fmul_rn(b, cos[i])), promoted(__fmul_rn(a, sin[i])));
    }
    store_columns(to, first);
    store_columns(to + half, second);
}
#else
typedef float Angle;
#endif

extern "C" __global__ void
rotary_append(const Element* query, const Element* key, const Element* value, const Angle* cos,
              const Angle* sin, const i64* cells, Element* rotated, Element* keys, Element* values,
              int num_heads, int head_dim, int token_stride, int head_stride, int num_cells) {
    const int head = blockIdx.y * blockDim.y + threadIdx.y, column = WIDTH * threadIdx.x;
    if (head >= num_heads) return;
    const size_t token = blockIdx.x;
    const size_t source = token * token_stride + size_t(head) * head_stride + column;
    const i64 cell = cells[token];
    const size_t target = (size_t(head) * num_cells + cell) * head_dim + column;
#if ANGLE
    const int half = head_dim / 2;
    float cosines[WIDTH], sines[WIDTH];
    load_angles(cos + token * half + column, cosines);
    load_angles(sin + token * half + column, sines);
    const size_t own = (token * num_heads + head) * head_dim + column;
    rotate_columns(query + source, rotated + own, half, cosines, sines);
    if (cell < 0) return;
    rotate_columns(key + source, keys + target, half, cosines, sines);
    copy_columns(value + source + half, values + target + half);
#else
    if (cell < 0) return;
    copy_columns(key + source, keys + target);
#endif
    copy_columns(value + source, values + target);
}
