// What a tensor core computes, with its operands spread over 32 lanes as the PTX ISA lays out the
// fragments of mma.sync.aligned.row.col. With g = lane / 4, t = lane % 4 and P elements a register:
//   A, register r, element j: row g + 8 (r % 2), column P t + j + 4 P (r / 2)
//   B, register r, element j: row P t + j + 4 P r, column g
//   D, register r:            row g + 8 (r / 2), column 2 t + r % 2
#pragma once
#include <cstdint>
#include <cstring>

#include "shim_interface.h"

struct HalfElement {
    using Value = float;
    static constexpr unsigned kPerRegister = 2;
    static float decode(unsigned bits) {
        const auto half_bits = static_cast<uint16_t>(bits);
#if defined(__x86_64__)
        _Float16 half;
#else
        __fp16 half;
#endif
        memcpy(&half, &half_bits, sizeof half);
        return static_cast<float>(half);
    }
};

struct Bfloat16Element {
    using Value = float;
    static constexpr unsigned kPerRegister = 2;
    static float decode(unsigned bits) {
        const uint32_t float_bits = bits << 16;
        float value;
        memcpy(&value, &float_bits, sizeof value);
        return value;
    }
};

struct Int8Element {
    using Value = int32_t;
    static constexpr unsigned kPerRegister = 4;
    static int32_t decode(unsigned bits) { return static_cast<int8_t>(bits); }
};

template <typename Element, unsigned kRows, unsigned kDepth>
class Mma {
    using Value = typename Element::Value;
    static constexpr unsigned kLanes = 32, kColumns = 8, kPer = Element::kPerRegister;
    static constexpr unsigned kBits = 32 / kPer;

public:
    static void run(void* const* payloads) {
        Mma mma;
        for (unsigned lane = 0; lane < kLanes; ++lane) mma.gather(lane, payload(payloads, lane));
        mma.multiply();
        for (unsigned lane = 0; lane < kLanes; ++lane) mma.scatter(lane, payload(payloads, lane));
    }

private:
    static const ShimMma& payload(void* const* payloads, unsigned lane) {
        return *static_cast<const ShimMma*>(payloads[lane]);
    }

    void gather(unsigned lane, const ShimMma& mma) {
        const unsigned g = lane / 4, t = lane % 4;
        constexpr unsigned a_rows = kRows / 8;
        for (unsigned r = 0; r < kRows * kDepth / kLanes / kPer; ++r)
            for (unsigned j = 0; j < kPer; ++j)
                a_[g + 8 * (r % a_rows)][kPer * t + j + 4 * kPer * (r / a_rows)] =
                    Element::decode(mma.a[r] >> (kBits * j));
        for (unsigned r = 0; r < kDepth * kColumns / kLanes / kPer; ++r)
            for (unsigned j = 0; j < kPer; ++j)
                b_[kPer * t + j + 4 * kPer * r][g] = Element::decode(mma.b[r] >> (kBits * j));
        const Value* d = static_cast<const Value*>(mma.d);
        for (unsigned r = 0; r < kRows / 4; ++r) d_[g + 8 * (r / 2)][2 * t + r % 2] = d[r];
    }

    void multiply() {
        for (unsigned k = 0; k < kDepth; ++k)
            for (unsigned row = 0; row < kRows; ++row)
                for (unsigned column = 0; column < kColumns; ++column)
                    d_[row][column] += a_[row][k] * b_[k][column];
    }

    void scatter(unsigned lane, const ShimMma& mma) {
        const unsigned g = lane / 4, t = lane % 4;
        Value* d = static_cast<Value*>(mma.d);
        for (unsigned r = 0; r < kRows / 4; ++r) d[r] = d_[g + 8 * (r / 2)][2 * t + r % 2];
    }

    Value a_[kRows][kDepth], b_[kDepth][kColumns], d_[kRows][kColumns];
};
