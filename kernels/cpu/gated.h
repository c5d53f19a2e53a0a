// y = activation(x Wg^T + bg) * (x Wu^T + bu) for 1 to 16 rows of x: the first half of a gated
// feed-forward. Included in the unnamed namespace of a level.
//
// Some rows of the gate are multiplied and as many of the other weight, with what prepare() made of x
// once. Their results are floats in the nearest cache, from which those of y come, rounded once.
//
// All activations are quotients or products of e^x, in arithmetic that a compiler vectorises, always
// of as many numbers: a result comes from the same operations whatever is beside it.
//
// Bytes moved: those of two products, less the results of both, written and read.
//
// Sources: Shazeer 2020, arXiv:2002.05202; e^x: powers of 2 times its Taylor series, log 2 in two
// parts, Cody & Waite 1980; erf: Abramowitz & Stegun 1964, 7.1.26, within 1.5e-7.

#ifndef BMINF_CPU_GATED_H
#define BMINF_CPU_GATED_H

// Results of each weight at a time: so many that two streams in turn cost no more than one.
constexpr i64 GATED_RESULTS = 2048;
constexpr i64 AT_ONCE = 16;  // results: a vector, or some

// 0 below -104, infinity above 104, NaN of NaN.
inline float power_of_e(float x) {
    const float within = x < -104.0f ? -104.0f : x > 104.0f ? 104.0f : x;
    const float shifted = within * 1.44269504f + ROUNDING, n = shifted - ROUNDING;
    const float r = (within - n * 0.693359375f) + n * 2.12194440e-4f;  // at most log(2) / 2
    float series = 1.0f / 5040.0f;
    series = series * r + 1.0f / 720.0f;
    series = series * r + 1.0f / 120.0f;
    series = series * r + 1.0f / 24.0f;
    series = series * r + 1.0f / 6.0f;
    series = series * r + 0.5f;
    series = series * r + 1.0f;
    series = series * r + 1.0f;
    // In two steps: 2^150 and 2^-150 are no floats.
    const i32 exponent = i32(bits_of(shifted) - bits_of(ROUNDING)), half = exponent >> 1;
    return series * float_of(u32(half + 127) << 23) * float_of(u32(exponent - half + 127) << 23);
}

inline float silu(float x) { return x / (1.0f + power_of_e(-x)); }

// (1 + tanh(z)) / 2 = 1 / (1 + e^-2z).
inline float gelu_tanh(float x) {
    const float z = 0.7978845608f * (x + 0.044715f * x * x * x);
    return x / (1.0f + power_of_e(-2.0f * z));
}

inline float gelu(float x) {
    const float z = (x < 0.0f ? -x : x) * 0.7071067812f, t = 1.0f / (1.0f + 0.3275911f * z);
    float series = 1.061405429f;
    series = series * t - 1.453152027f;
    series = series * t + 1.421413741f;
    series = series * t - 0.284496736f;
    series = series * t + 0.254829592f;
    const float beyond = series * t * power_of_e(-z * z);  // 1 - erf(z)
    return 0.5f * x * (x < 0.0f ? beyond : 2.0f - beyond);
}

template <float ACTIVATION(float)>
TARGET void gate_with(float* gates, const float* ups, i64 count) {
    for (i64 first = 0; first < count; first += AT_ONCE)
        for (i64 i = first; i < first + AT_ONCE; ++i) gates[i] = ACTIVATION(gates[i]) * ups[i];
}

// As bminf/ops/gated_linear.py and kernels/common.cuh number them.
TARGET void gate(i64 activation, float* gates, const float* ups, i64 count) {
    switch (activation) {
        case 0: return gate_with<gelu_tanh>(gates, ups, count);
        case 1: return gate_with<gelu>(gates, ups, count);
        default: return gate_with<silu>(gates, ups, count);
    }
}

TARGET void multiply_gated(const Gated& g, const u8* workspace, i64 first, i64 last) {
    const Product& p = g.gate;
    float gates[GATED_RESULTS] = {}, ups[GATED_RESULTS] = {};
    const i64 num_w = GATED_RESULTS / p.num_rows / AT_ONCE * AT_ONCE;
    for (i64 row = first; row < last; row += num_w) {
        const i64 end = row + num_w < last ? row + num_w : last;
        multiply(g.gate, {gates, FLOAT, num_w, row}, workspace, row, end);
        multiply(g.up, {ups, FLOAT, num_w, row}, workspace, row, end);
        for (i64 m = 0; m < p.num_rows; ++m) {
            float* values = gates + m * num_w;
            gate(g.activation, values, ups + m * num_w, end - row);
            for (i64 n = row; n < end; ++n)
                store(p.y, p.element, m * p.out_features + n, values[n - row]);
        }
    }
}

#endif
