// What a kernel's translation unit (cuda_shim.h) and the runtime (shim_runtime.cpp) share.
// Includes nothing, because a kernel must not see more names here than CUDA gives it.
#pragma once

extern "C" {

struct uint3 {
    unsigned x, y, z;
};

enum ShimOrder { SHIM_FORWARD, SHIM_REVERSE, SHIM_SEEDED };

struct ShimLaunch {
    const char* kernel;
    uint3 grid;
    uint3 block;
    unsigned shared_bytes;
    unsigned order;  // ShimOrder, of threads and of blocks
    unsigned seed;
};

struct ShimFailure {
    char message[768];
    const void* address;  // of the memory that could not be used, or null
    const void* code;     // the instruction that tried, or null
};

// One thread of a launch, and where the static shared memory of its kernel lies.
struct ShimProgram {
    void (*thread)(void** arguments);
    unsigned char* shared_begin;
    unsigned char* shared_end;
};

int shim_run(const ShimLaunch* launch, const ShimProgram* program, void** arguments,
             ShimFailure* failure);

// What all lanes of a mask do together. The last to arrive does it for all.
enum ShimOperation {
    SHIM_SYNCWARP,
    SHIM_SHUFFLE,
    SHIM_BALLOT,
    SHIM_MMA_M16N8K16_F16,
    SHIM_MMA_M16N8K16_BF16,
    SHIM_MMA_M16N8K32_S8,
    SHIM_MMA_M8N8K16_S8
};

struct ShimShuffle {
    unsigned value;
    unsigned source_lane;
    unsigned result;
};

struct ShimBallot {
    unsigned predicate;
    unsigned result;
};

struct ShimMma {
    void* d;
    const unsigned* a;
    const unsigned* b;
};

struct ShimCopy {
    void* shared;
    const void* global;
    int source_bytes;
};

void shim_collective(unsigned mask, ShimOperation operation, void* payload, const char* file,
                     int line);
void shim_barrier(const char* file, int line);
void shim_missing_instruction(int architecture, const char* file, int line);
unsigned shim_lane();
void* shim_dynamic_shared();

void shim_copy_issue(const ShimCopy* copy);
void shim_copy_commit();
int shim_copy_next(int groups_still_pending, ShimCopy* copy);

// The runtime sets these whenever it resumes a thread. To a kernel they are constants.
#ifdef SHIM_RUNTIME
#define SHIM_CONSTANT
#else
#define SHIM_CONSTANT const
#endif
extern SHIM_CONSTANT uint3 gridDim, blockDim, blockIdx, threadIdx;
}
