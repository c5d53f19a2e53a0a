// CUDA's words for a kernel that g++ compiles, so that the real .cu text runs on a CPU in tests.
//
// A block's threads are fibers, which the runtime switches at barriers and warp intrinsics. What
// CUDA leaves undefined is made visible here: shared memory starts as 0xFF (NaN), the target of a
// cp.async holds 0xFF until it is waited for, an access to memory that is not the kernel's, or is
// not aligned, ends the launch with an error that names the block, the thread and the line.
//
// Like NVRTC this includes no standard header, so a kernel that needs one fails here as well.
// The memory accesses in here are instrumented with the kernel's, those of the runtime are not.
#pragma once
#include "shim_interface.h"

// ---- Words of the language ----

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#ifdef __OPTIMIZE__
#define __forceinline__ inline __attribute__((always_inline))
#else
#define __forceinline__ inline  // so that coverage sees every function called
#endif
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ static __attribute__((section("shim_shared")))
// `extern __shared__ type name[]` has no host spelling.
#define DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(shim_dynamic_shared())
// The line of the caller, as an argument that nobody writes.
#define SHIM_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

typedef __SIZE_TYPE__ size_t;

constexpr int warpSize = 32;

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// ---- Vector types, aligned as CUDA aligns them ----

#define SHIM_VECTOR_2(name, type)                                     \
    struct alignas(2 * sizeof(type)) name {                           \
        type x, y;                                                    \
    };                                                                \
    inline name make_##name(type x, type y) { return name{x, y}; }
#define SHIM_VECTOR_4(name, type)                                                              \
    struct alignas(4 * sizeof(type)) name {                                                    \
        type x, y, z, w;                                                                       \
    };                                                                                         \
    inline name make_##name(type x, type y, type z, type w) { return name{x, y, z, w}; }

SHIM_VECTOR_2(char2, signed char)
SHIM_VECTOR_2(uchar2, unsigned char)
SHIM_VECTOR_2(short2, short)
SHIM_VECTOR_2(ushort2, unsigned short)
SHIM_VECTOR_2(int2, int)
SHIM_VECTOR_2(uint2, unsigned)
SHIM_VECTOR_2(float2, float)
SHIM_VECTOR_4(char4, signed char)
SHIM_VECTOR_4(uchar4, unsigned char)
SHIM_VECTOR_4(short4, short)
SHIM_VECTOR_4(ushort4, unsigned short)
SHIM_VECTOR_4(int4, int)
SHIM_VECTOR_4(uint4, unsigned)
SHIM_VECTOR_4(float4, float)

// ---- Scalar functions ----

extern "C" {
float acosf(float);
float atan2f(float, float);
float ceilf(float);
float copysignf(float, float);
float cosf(float);
float erff(float);
float exp2f(float);
float expf(float);
float fabsf(float);
float floorf(float);
float fmaf(float, float, float);
float fmaxf(float, float);
float fminf(float, float);
float fmodf(float, float);
float ldexpf(float, int);
float log1pf(float);
float log2f(float);
float logf(float);
float powf(float, float);
float rintf(float);
float roundf(float);
float sinf(float);
float sqrtf(float);
float tanhf(float);
float truncf(float);
int abs(int);
}

template <typename To, typename From>
inline To shim_bits(From value) {
    static_assert(sizeof(To) == sizeof(From), "the same bits in another type");
    To bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline unsigned __float_as_uint(float value) { return shim_bits<unsigned>(value); }
inline int __float_as_int(float value) { return shim_bits<int>(value); }
inline float __uint_as_float(unsigned bits) { return shim_bits<float>(bits); }
inline float __int_as_float(int bits) { return shim_bits<float>(bits); }

inline int min(int a, int b) { return b < a ? b : a; }
inline int max(int a, int b) { return a < b ? b : a; }
inline unsigned min(unsigned a, unsigned b) { return b < a ? b : a; }
inline unsigned max(unsigned a, unsigned b) { return a < b ? b : a; }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline bool isnan(float value) { return __builtin_isnan(value); }
inline bool isinf(float value) { return __builtin_isinf(value); }

inline float rsqrtf(float value) { return 1.0f / sqrtf(value); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __expf(float value) { return expf(value); }
inline float __logf(float value) { return logf(value); }
inline float __int2float_rn(int value) { return static_cast<float>(value); }
inline float __saturatef(float value) { return fminf(fmaxf(value, 0.0f), 1.0f); }

// The GPU saturates, and takes NaN to 0; x86 gives INT_MIN for both.
inline int shim_saturate_int(float integral) {
    if (!(integral == integral)) return 0;
    if (integral >= 2147483648.0f) return 2147483647;
    if (integral < -2147483648.0f) return -2147483647 - 1;
    return static_cast<int>(integral);
}
inline int __float2int_rn(float value) { return shim_saturate_int(rintf(value)); }
inline int __float2int_rz(float value) { return shim_saturate_int(truncf(value)); }
inline int __float2int_rd(float value) { return shim_saturate_int(floorf(value)); }
inline int __float2int_ru(float value) { return shim_saturate_int(ceilf(value)); }

inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __clz(int value) { return value == 0 ? 32 : __builtin_clz(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }

inline unsigned __umulhi(unsigned a, unsigned b) {
    return static_cast<unsigned>((static_cast<unsigned long long>(a) * b) >> 32);
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const unsigned long long bytes = (static_cast<unsigned long long>(y) << 32) | x;
    unsigned result = 0;
    for (unsigned i = 0; i < 4; ++i) {
        const unsigned chosen = (selector >> (4 * i)) & 7;
        result |= static_cast<unsigned>((bytes >> (8 * chosen)) & 0xFF) << (8 * i);
    }
    return result;
}

// An instruction that the GPU does not have is an error when it is met, not when it is compiled: a
// header may hold it for other GPUs.
inline void shim_require(int architecture, SHIM_SITE) {
    if (__CUDA_ARCH__ < architecture) shim_missing_instruction(architecture, file, line);
}

// Sums wrap as the hardware's do, hence unsigned.
inline int __dp4a(int a, int b, int sum) {
    shim_require(610);
    unsigned total = static_cast<unsigned>(sum);
    for (unsigned i = 0; i < 32; i += 8) {
        total += static_cast<signed char>(a >> i) * static_cast<signed char>(b >> i);
    }
    return static_cast<int>(total);
}

#if defined(__x86_64__)
typedef _Float16 shim_half;
#else
typedef __fp16 shim_half;
#endif

inline float shim_half_to_float(unsigned short bits) {
    return static_cast<float>(shim_bits<shim_half>(bits));
}
inline unsigned short shim_float_to_half(float value) {
    return shim_bits<unsigned short>(static_cast<shim_half>(value));
}
inline unsigned short shim_float_to_bfloat16(float value) {
    if (!(value == value)) return 0x7FFF;  // rounding could carry a NaN's bits into infinity
    const unsigned bits = __float_as_uint(value);
    const unsigned half_and_ties_to_even = 0x7FFF + ((bits >> 16) & 1);
    return static_cast<unsigned short>((bits + half_and_ties_to_even) >> 16);
}

// Pairs of 16-bit numbers in a word. double holds what is rounded exactly but for sums of numbers that
// are far apart; fmaf's own rounding is seen in bfloat16 only half-way between two of them.
template <typename Operation>
inline unsigned shim_pair(Operation half) {
    return half(0) | static_cast<unsigned>(half(16)) << 16;
}
inline double shim_half_at(unsigned pair, int shift) {
    return shim_half_to_float(static_cast<unsigned short>(pair >> shift));
}
inline unsigned short shim_double_to_half(double value) {
    return shim_bits<unsigned short>(static_cast<shim_half>(value));
}
inline unsigned shim_fma_f16x2(unsigned a, unsigned b, unsigned c) {
    return shim_pair([=](int i) {
        return shim_double_to_half(shim_half_at(a, i) * shim_half_at(b, i) + shim_half_at(c, i));
    });
}
inline unsigned shim_mul_f16x2(unsigned a, unsigned b) {
    return shim_pair([=](int i) {
        return shim_double_to_half(shim_half_at(a, i) * shim_half_at(b, i));
    });
}
inline unsigned shim_sub_f16x2(unsigned a, unsigned b) {
    return shim_pair([=](int i) {
        return shim_double_to_half(shim_half_at(a, i) - shim_half_at(b, i));
    });
}
inline unsigned shim_fma_bf16x2(unsigned a, unsigned b, unsigned c, SHIM_SITE) {
    shim_require(800, file, line);
    const auto at = [](unsigned pair, int i) { return __uint_as_float(pair >> i << 16); };
    return shim_pair([=](int i) {
        return shim_float_to_bfloat16(fmaf(at(a, i), at(b, i), at(c, i)));
    });
}

// ---- Memory ----

template <typename T>
inline T __ldg(const T* address) {
    return *address;
}
template <typename T>
inline T __ldcs(const T* address) {
    return *address;
}
inline uint4 shim_load16(const void* address) { return *static_cast<const uint4*>(address); }
inline void shim_store16(void* address, uint4 value) { *static_cast<uint4*>(address) = value; }

inline void __threadfence() {}
inline void __threadfence_block() {}

// Fibers cannot interrupt each other; the builtins are for ThreadSanitizer, which has to know.
inline int atomicAdd(int* address, int value) {
    return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
inline unsigned atomicAdd(unsigned* address, unsigned value) {
    return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
inline float atomicAdd(float* address, float value) {
    unsigned* bits = reinterpret_cast<unsigned*>(address);
    unsigned seen = __atomic_load_n(bits, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(bits, &seen, __float_as_uint(__uint_as_float(seen) + value),
                                        false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    return __uint_as_float(seen);
}

// ---- Barriers and warp intrinsics ----

inline void __syncthreads(SHIM_SITE) { shim_barrier(file, line); }

inline void __syncwarp(unsigned mask = 0xFFFFFFFFu, SHIM_SITE) {
    shim_collective(mask, SHIM_SYNCWARP, nullptr, file, line);
}

template <typename T>
inline T shim_shuffle(unsigned mask, T value, int source_lane, const char* file, int line) {
    ShimShuffle shuffle{shim_bits<unsigned>(value), static_cast<unsigned>(source_lane), 0};
    shim_collective(mask, SHIM_SHUFFLE, &shuffle, file, line);
    return shim_bits<T>(shuffle.result);
}

template <typename T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32, SHIM_SITE) {
    const int segment = static_cast<int>(shim_lane()) & ~(width - 1);
    return shim_shuffle(mask, value, segment | (source & (width - 1)), file, line);
}

template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, SHIM_SITE) {
    const int lane = static_cast<int>(shim_lane());
    const int source = lane ^ lane_mask;
    const bool inside = source <= (lane | (width - 1));
    return shim_shuffle(mask, value, inside ? source : lane, file, line);
}

template <typename T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, SHIM_SITE) {
    const int lane = static_cast<int>(shim_lane());
    const int source = lane + static_cast<int>(delta);
    const bool inside = source <= (lane | (width - 1));
    return shim_shuffle(mask, value, inside ? source : lane, file, line);
}

template <typename T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, SHIM_SITE) {
    const int lane = static_cast<int>(shim_lane());
    const int source = lane - static_cast<int>(delta);
    const bool inside = source >= (lane & ~(width - 1));
    return shim_shuffle(mask, value, inside ? source : lane, file, line);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, SHIM_SITE) {
    ShimBallot ballot{predicate != 0, 0};
    shim_collective(mask, SHIM_BALLOT, &ballot, file, line);
    return ballot.result;
}
inline int __any_sync(unsigned mask, int predicate, SHIM_SITE) {
    return __ballot_sync(mask, predicate, file, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, SHIM_SITE) {
    return __ballot_sync(mask, predicate, file, line) == mask;
}

// ---- Tensor cores: d += a * b, fragments laid out over the lanes as PTX says ----

inline void shim_mma(ShimOperation operation, int from, void* d, const unsigned* a,
                     const unsigned* b, const char* file, int line) {
    ShimMma mma{d, a, b};
    shim_require(from);
    shim_collective(0xFFFFFFFFu, operation, &mma, file, line);
}

inline void shim_mma_m8n8k16_s8(int d[2], unsigned a, unsigned b, SHIM_SITE) {
    shim_mma(SHIM_MMA_M8N8K16_S8, 750, d, &a, &b, file, line);
}
inline void shim_mma_m16n8k16_f16(float d[4], const unsigned a[4], const unsigned b[2], SHIM_SITE) {
    shim_mma(SHIM_MMA_M16N8K16_F16, 800, d, a, b, file, line);
}
inline void shim_mma_m16n8k16_bf16(float d[4], const unsigned a[4], const unsigned b[2],
                                   SHIM_SITE) {
    shim_mma(SHIM_MMA_M16N8K16_BF16, 800, d, a, b, file, line);
}
inline void shim_mma_m16n8k32_s8(int d[4], const unsigned a[4], const unsigned b[2], SHIM_SITE) {
    shim_mma(SHIM_MMA_M16N8K32_S8, 800, d, a, b, file, line);
}

// ---- cp.async ----

// Nothing may rely on the target between issue and wait: it is filled with rubbish here and
// written in shim_cp_async_wait. Both writes race, for ThreadSanitizer, with a reader that no
// barrier separates. The source is read here already, so that a bad address names this line.
inline void shim_cp_async_16(void* shared, const void* global, int source_bytes) {
    const ShimCopy copy{shared, global, source_bytes};
    shim_require(800);
    shim_copy_issue(&copy);
    for (int i = 0; i < source_bytes; ++i) {
        (void)static_cast<const volatile unsigned char*>(global)[i];
    }
    shim_store16(shared, make_uint4(~0u, ~0u, ~0u, ~0u));
}

inline void shim_cp_async_commit() { shim_copy_commit(); }

inline void shim_cp_async_wait(int groups_still_pending) {
    ShimCopy copy;
    while (shim_copy_next(groups_still_pending, &copy)) {
        uint4 value = make_uint4(0, 0, 0, 0);
        for (int i = 0; i < copy.source_bytes; ++i) {
            reinterpret_cast<unsigned char*>(&value)[i] =
                static_cast<const unsigned char*>(copy.global)[i];
        }
        shim_store16(copy.shared, value);
    }
}

// ---- The way in: a C function that takes CUDA's array of pointers to arguments ----

template <typename T>
struct ShimKind {
    static_assert(sizeof(T) == 4, "a kernel takes pointers, 32-bit integers and floats");
    static constexpr char value = static_cast<T>(0.5f) == T(0) ? 'i' : 'f';
};
template <typename T>
struct ShimKind<T*> {
    static constexpr char value = 'w';
};
template <typename T>
struct ShimKind<const T*> {
    static constexpr char value = 'r';
};

template <unsigned... indices>
struct ShimIndices {};

template <typename Type, Type kernel>
struct ShimEntry;
template <typename... Parameters, void (*kernel)(Parameters...)>
struct ShimEntry<void (*)(Parameters...), kernel> {
    // One letter a parameter: r reads through a pointer, w writes, i is an integer, f a float.
    static constexpr char signature[] = {ShimKind<Parameters>::value..., '\0'};

    template <unsigned... indices>
    static void call(void** arguments, ShimIndices<indices...>) {
        kernel(*static_cast<Parameters*>(arguments[indices])...);
    }
    static void thread(void** arguments) {
        call(arguments, ShimIndices<__integer_pack(sizeof...(Parameters))...>());
    }
};

#define SHIM_VISIBLE __attribute__((visibility("default"), externally_visible))

// The linker's names for the ends of the section; a kernel may have no shared memory at all.
extern "C" {
extern __attribute__((weak, visibility("hidden"))) unsigned char __start_shim_shared[];
extern __attribute__((weak, visibility("hidden"))) unsigned char __stop_shim_shared[];

SHIM_VISIBLE unsigned shim_static_shared_bytes() {
#ifdef __SANITIZE_ADDRESS__
    return 0;  // its red zones lie in the section too; the other builds hold the limit
#else
    return static_cast<unsigned>(__stop_shim_shared - __start_shim_shared);
#endif
}
}

// `bound` is the kernel's __launch_bounds__.
#define SHIM_EXPORT(kernel, bound)                                                         \
    extern "C" SHIM_VISIBLE const char* shim_signature_##kernel() {                        \
        return ShimEntry<decltype(&kernel), &kernel>::signature;                           \
    }                                                                                      \
    extern "C" SHIM_VISIBLE unsigned shim_bound_##kernel() { return bound; }               \
    extern "C" SHIM_VISIBLE int shim_launch_##kernel(const ShimLaunch* launch,             \
                                                     void** arguments,                     \
                                                     ShimFailure* failure) {               \
        const ShimProgram program{ShimEntry<decltype(&kernel), &kernel>::thread,           \
                                  __start_shim_shared, __stop_shim_shared};                \
        return shim_run(launch, &program, arguments, failure);                             \
    }
