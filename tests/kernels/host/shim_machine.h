// The state of a launch, and how its threads take turns. Used by shim_*.cpp only.
//
// A thread runs until it meets a barrier or a warp intrinsic, and is resumed when all that it has
// to meet there have come. Threads that may run are a stack: those just released go on top, in the
// launch's order, so one warp runs on as far as it can. That is as unfair as the GPU may be.
//
// Nothing of the runtime is instrumented. ThreadSanitizer is told what orders threads on a GPU,
// namely __syncthreads and __syncwarp, and nothing else.
#pragma once
#define SHIM_RUNTIME

#include <signal.h>

#include <cstring>
#include <memory>
#include <vector>

#include "shim_fiber.h"
#include "shim_interface.h"

constexpr unsigned kLanes = 32, kMaxThreads = 1024, kMaxWarps = kMaxThreads / kLanes;
constexpr unsigned char kRubbish = 0xFF;  // NaN as half, bfloat16 and float

struct Site {
    const char* file;
    int line;
    bool operator==(const Site& other) const {
        return line == other.line && (file == other.file || strcmp(file, other.file) == 0);
    }
};

enum class State { running, at_barrier, in_collective, exited };

struct PendingCopy {
    ShimCopy copy;
    int group;
};

struct Thread {
    Fiber fiber;
    uint3 index;
    unsigned number;
    State state;
    Site site;  // where it waits
    Thread* next_ready;
    std::vector<PendingCopy> copies;
    size_t first_copy;  // those before are done
    int groups;         // committed so far

    unsigned lane() const { return number % kLanes; }
    unsigned warp() const { return number / kLanes; }
};

struct Warp {
    unsigned waiting;  // lanes in a collective
    unsigned exited;   // lanes that are done, or that the block does not have
    unsigned mask[kLanes];
    ShimOperation operation[kLanes];
    void* payload[kLanes];
    unsigned generation;
    char order[2];  // addresses that stand for __syncwarp, by parity of the generation
};

// One launch at a time, so its state may be global.
struct Machine {
    const ShimLaunch* launch;
    const ShimProgram* program;
    void** arguments;
    ShimFailure* failure;
    bool failed;

    unsigned num_threads, num_exited, num_at_barrier;
    Site barrier;
    unsigned barrier_generation;
    char barrier_order[2], block_begin, block_end;  // addresses that stand for orderings

    Fiber process;
    Thread* current;  // null while the process itself runs
    Thread* ready;
    std::vector<std::unique_ptr<Thread>> threads;
    Warp warps[kMaxWarps];
    std::vector<unsigned> schedule;
    uint64_t random;

    unsigned char* dynamic_begin;
    unsigned char* dynamic_end;  // where a page begins that nobody may touch

    Thread& thread_of(unsigned warp, unsigned lane) { return *threads[warp * kLanes + lane]; }
};

extern Machine machine;

// Writes the failure; the first one counts.
__attribute__((format(printf, 1, 2))) void report(const char* format, ...);
// The same on a thread, which then ends the launch.
[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...);
const char* name_of(ShimOperation operation);

// The numbers from 0 on, in the order of the launch. A seeded one is another each time.
void arrange(unsigned* numbers, unsigned count);
// Lets the threads at a barrier go on once all are there that have not exited.
void open_barrier_if_complete();
// Fails if others of the warp wait for this thread, which has come to its end.
void check_exit(const Thread& thread);

inline void make_ready(Thread& thread) {
    thread.state = State::running;
    thread.next_ready = machine.ready;
    machine.ready = &thread;
}

inline void enter(Thread& thread) {
    machine.current = &thread;
    threadIdx = thread.index;
}

// Leaves the current thread for the next that may run. Where there is none the block is done, or
// stuck, which the process sees.
inline void run_next() {
    Thread* const self = machine.current;
    Thread* const next = machine.ready;
    if (next == nullptr) return self->fiber.switch_to(machine.process);
    machine.ready = next->next_ready;
    if (next == self) return;
    enter(*next);
    self->fiber.switch_to(next->fiber);
}

inline void tsan_release(char* address) {
    if (__tsan_release) __tsan_release(address);
}

inline void tsan_acquire(char* address) {
    if (__tsan_acquire) __tsan_acquire(address);
}

// Holds while a launch runs: Python, pytest and torch have signal handlers of their own.
class SignalGuard {
public:
    SignalGuard();
    ~SignalGuard();

private:
    stack_t previous_stack_ = {};
};
