// The functions that Python calls, by way of ctypes: plain C.
//
// They take a Product whose pointers and sizes have been checked, and return 0, or 1 where there is no
// memory for the activations or no such level.

#include "product.h"
#include "threads.h"

#include <cstdlib>

#ifdef __x86_64__
extern const Level LEVEL_AVX512, LEVEL_AVX2;
#endif
extern const Level LEVEL_PORTABLE;

namespace {

constexpr i64 PART_BYTES = 1 << 17;  // of codes: a few microseconds to read, 100 times those of a part
constexpr i64 PART_ROWS = 4;         // a part has a multiple of these
// Bytes of codes times rows of x, of one thread: it takes as long to wake another as to compute less.
constexpr i64 LEAST_WORK = 1 << 19;
constexpr i64 PARTS_PER_THREAD = 8;  // of which the slower threads take fewer

// The processor's levels, the best first.
const Level* level_at(i64 index) {
#ifdef __x86_64__
    static const Level* const levels[] = {&LEVEL_AVX512, &LEVEL_AVX2, &LEVEL_PORTABLE};
    return index < 3 ? levels[index] : nullptr;
#else
    return index == 0 ? &LEVEL_PORTABLE : nullptr;
#endif
}

bool can_run(i64 index) {
#ifdef __x86_64__
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (index == 1) return has_avx2;
    if (index == 0)
        return has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vnni");
#endif
    return level_at(index) != nullptr;
}

constexpr i64 MOST_AT_ONCE = 64;     // products whose parts are shared out together

struct Job {
    const Product* product;
    const Gated* gated;  // whose gate is the product, or null
    const Level* level;
    const u8* workspace;  // null to unpack
    i64 part_rows;

    i64 num_parts() const { return (product->out_features + part_rows - 1) / part_rows; }
};

void run_part(void* data, i64 index) {
    const Job& job = *static_cast<const Job*>(data);
    const Product& p = *job.product;
    const i64 first = index * job.part_rows, rows = p.out_features;
    const i64 last = first + job.part_rows < rows ? first + job.part_rows : rows;
    if (job.gated) job.level->multiply_gated(*job.gated, job.workspace, first, last);
    else if (job.workspace) job.level->multiply(p, result_of(p), job.workspace, first, last);
    else job.level->unpack(p, first, last);
}

i64 rows_of_part(const Product& p, i64 num_threads) {
    const i64 for_bytes = PART_BYTES / p.row_bytes;
    const i64 for_threads = p.out_features / (PARTS_PER_THREAD * num_threads);
    const i64 rows = for_bytes < for_threads ? for_bytes : for_threads;
    return rows < PART_ROWS ? PART_ROWS : rows / PART_ROWS * PART_ROWS;
}

void run(const Product& p, const Gated* gated, const Level& level, const u8* workspace) {
    const i64 work = p.out_features * p.row_bytes * (workspace ? p.num_rows : MAX_ROWS);
    const i64 most = (gated ? 2 * work : work) / LEAST_WORK;
    const i64 num_threads = most < p.num_threads ? most : p.num_threads;
    if (num_threads <= 1) {
        Job job = {&p, gated, &level, workspace, p.out_features};
        return run_part(&job, 0);
    }
    Job job = {&p, gated, &level, workspace, rows_of_part(p, num_threads)};
    run_parts(run_part, &job, job.num_parts(), num_threads);
}

// 0, or 1 where there is no memory.
i64 prepare_and_run(const Product& p, const Gated* gated, const Level& level) {
    // aligned_alloc() takes multiples of the alignment, which workspace_bytes() gives.
    u8* workspace = static_cast<u8*>(std::aligned_alloc(64, level.workspace_bytes(p)));
    if (!workspace) return 1;
    level.prepare(p, workspace);
    run(p, gated, level, workspace);
    std::free(workspace);
    return 0;
}

// Part `index` of those of all jobs, one after another.
void run_part_of_many(void* data, i64 index) {
    Job* job = static_cast<Job*>(data);
    for (; index >= job->num_parts(); ++job) index -= job->num_parts();
    run_part(job, index);
}

// Products that have been prepared: each thread takes parts of any of them.
void run_many(Job* jobs, i64 count) {
    i64 work = 0, num_parts = 0, most = 1;
    for (i64 i = 0; i < count; ++i) {
        const Product& p = *jobs[i].product;
        work += p.out_features * p.row_bytes * p.num_rows;
        most = p.num_threads;
    }
    const i64 num_threads = work / LEAST_WORK < most ? work / LEAST_WORK : most;
    for (i64 i = 0; i < count; ++i) {
        const Product& p = *jobs[i].product;
        const i64 of_each = (num_threads + count - 1) / count;
        jobs[i].part_rows = num_threads > 1 ? rows_of_part(p, of_each) : p.out_features;
        num_parts += jobs[i].num_parts();
    }
    if (num_threads > 1) return run_parts(run_part_of_many, jobs, num_parts, num_threads);
    for (i64 i = 0; i < count; ++i) run_part(jobs + i, 0);
}

// 0, or 1 where there is no memory. At most MOST_AT_ONCE products.
i64 prepare_and_run_many(const Product* products, i64 count, const Level& level) {
    i64 bytes = 0;
    for (i64 i = 0; i < count; ++i) bytes += level.workspace_bytes(products[i]);
    u8* workspace = static_cast<u8*>(std::aligned_alloc(ALIGNMENT, bytes));
    if (!workspace) return 1;
    Job jobs[MOST_AT_ONCE];
    u8* place = workspace;
    for (i64 i = 0; i < count; ++i) {
        level.prepare(products[i], place);
        jobs[i] = {products + i, nullptr, &level, place, 0};
        place += level.workspace_bytes(products[i]);
    }
    run_many(jobs, count);
    std::free(workspace);
    return 0;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// What Python packs must have as many bytes.
EXPORT i64 bminf_cpu_product_bytes() { return sizeof(Product); }

EXPORT const char* bminf_cpu_level_name(i64 index) {
    const Level* level = level_at(index);
    return level ? level->name : nullptr;
}

EXPORT i64 bminf_cpu_can_run(i64 index) { return can_run(index); }

// y = x W^T + bias, with M from 1 to 16 and nothing empty.
EXPORT i64 bminf_cpu_multiply(const Product* product, i64 level_index) {
    const Level* level = level_at(level_index);
    return level ? prepare_and_run(*product, nullptr, *level) : 1;
}

// The same of `count` products, one after another in memory, whatever their sizes.
EXPORT i64 bminf_cpu_multiply_many(const Product* products, i64 count, i64 level_index) {
    const Level* level = level_at(level_index);
    i64 has_failed = level ? 0 : 1;
    for (i64 first = 0; first < count && !has_failed; first += MOST_AT_ONCE) {
        const i64 left = count - first;
        has_failed = prepare_and_run_many(
            products + first, left < MOST_AT_ONCE ? left : MOST_AT_ONCE, *level);
    }
    return has_failed;
}

// y = activation(x Wg^T + bg) * (x Wu^T + bu), of products that are alike but for weights and bias.
EXPORT i64 bminf_cpu_multiply_gated(
    const Product* gate, const Product* up, i64 activation, i64 level_index) {
    const Level* level = level_at(level_index);
    const Gated gated = {*gate, *up, activation};
    return level ? prepare_and_run(*gate, &gated, *level) : 1;
}

// y = W, as bminf.quantization.packed.dequantize gives it.
EXPORT i64 bminf_cpu_unpack(const Product* product, i64 level_index) {
    const Level* level = level_at(level_index);
    if (!level) return 1;
    run(*product, nullptr, *level, nullptr);
    return 0;
}
