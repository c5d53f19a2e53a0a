// Runs a launch: its blocks one after another, the threads of a block as fibers.
#include "shim_machine.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <mutex>
#include <utility>

uint3 gridDim, blockDim, blockIdx, threadIdx;
Machine machine;

namespace {

std::mutex one_launch;

uint64_t next_random() {
    machine.random ^= machine.random << 13;
    machine.random ^= machine.random >> 7;
    machine.random ^= machine.random << 17;
    return machine.random;
}

// ---- Threads ----

void begin_thread(Thread& thread) {
    thread.copies.clear();
    thread.first_copy = 0;
    thread.groups = 0;
    tsan_acquire(&machine.block_begin);
}

void end_thread(Thread& thread) {
    tsan_release(&machine.block_end);
    check_exit(thread);
    thread.state = State::exited;
    machine.warps[thread.warp()].exited |= 1u << thread.lane();
    ++machine.num_exited;
    open_barrier_if_complete();
}

// A fiber lives longer than a block: it waits in run_next for the next one.
void live() {
    Fiber::arrive();
    for (;;) {
        Thread& self = *machine.current;
        begin_thread(self);
        machine.program->thread(machine.arguments);
        end_thread(self);
        run_next();
    }
}

void prepare_threads() {
    while (machine.threads.size() < machine.num_threads) {
        machine.threads.push_back(std::make_unique<Thread>());
        Thread& thread = *machine.threads.back();
        thread.number = machine.threads.size() - 1;
        thread.fiber.prepare(live, thread.number);
    }
    for (unsigned i = 0; i < machine.num_threads; ++i) {
        const unsigned row = i / blockDim.x;
        machine.threads[i]->index = {i % blockDim.x, row % blockDim.y, row / blockDim.y};
    }
}

// After a failure every fiber may be in the middle of something.
void restart_fibers() {
    for (auto& thread : machine.threads) thread->fiber.prepare(live, thread->number);
}

// ---- Shared memory ----

constexpr size_t kDynamicBytes = 64 * kPageBytes;  // 256 KiB, more than any GPU has

unsigned char* dynamic_end() {
    void* memory = mmap(nullptr, kDynamicBytes + kPageBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) abort();
    unsigned char* const end = static_cast<unsigned char*>(memory) + kDynamicBytes;
    mprotect(end, kPageBytes, PROT_NONE);
    return end;
}

void place_dynamic_shared(size_t bytes) {
    static unsigned char* const end = dynamic_end();
    machine.dynamic_end = end;
    machine.dynamic_begin = end - (bytes + 15) / 16 * 16;
}

// Not memset, which a sanitizer would take for an access of the kernel: this is compiled with
// -fno-tree-loop-distribute-patterns, so that the loop stays a loop.
void fill_with_rubbish(unsigned char* begin, unsigned char* end) {
    for (unsigned char* byte = begin; byte < end; ++byte) *byte = kRubbish;
}

// The guard page sees nothing of up to 15 bytes before it.
void check_dynamic_tail() {
    const unsigned char* const end = machine.dynamic_begin + machine.launch->shared_bytes;
    for (const unsigned char* byte = end; byte < machine.dynamic_end; ++byte)
        if (*byte != kRubbish)
            return report("wrote %td bytes past the end of its dynamic shared memory", byte - end);
}

// ---- Blocks ----

void reset_warps() {
    for (unsigned w = 0; w * kLanes < machine.num_threads; ++w) {
        const unsigned lanes = std::min(kLanes, machine.num_threads - w * kLanes);
        machine.warps[w].waiting = 0;
        machine.warps[w].exited = lanes == kLanes ? 0 : ~0u << lanes;
    }
}

void reset_block() {
    fill_with_rubbish(machine.program->shared_begin, machine.program->shared_end);
    fill_with_rubbish(machine.dynamic_begin, machine.dynamic_end);
    reset_warps();
    machine.num_exited = 0;
    machine.num_at_barrier = 0;
    machine.ready = nullptr;
    arrange(machine.schedule.data(), machine.num_threads);
    for (unsigned i = machine.num_threads; i-- > 0;)
        make_ready(*machine.threads[machine.schedule[i]]);
}

size_t describe_waiting(const Thread& thread, char* text, size_t size) {
    const char* what = "__syncthreads";
    if (thread.state == State::in_collective)
        what = name_of(machine.warps[thread.warp()].operation[thread.lane()]);
    const uint3 t = thread.index;
    return snprintf(text, size, "; thread (%u, %u, %u) in %s at %s:%d", t.x, t.y, t.z, what,
                    thread.site.file, thread.site.line);
}

// One thread for each place where any waits tells enough.
void report_deadlock() {
    char text[512] = "";
    size_t used = 0;
    std::vector<const Thread*> told;
    for (unsigned i = 0; i < machine.num_threads; ++i) {
        const Thread& thread = *machine.threads[i];
        const auto same = [&](const Thread* other) {
            return other->state == thread.state && other->site == thread.site;
        };
        if (thread.state == State::exited || std::any_of(told.begin(), told.end(), same)) continue;
        told.push_back(&thread);
        if (used < sizeof text) used += describe_waiting(thread, text + used, sizeof text - used);
    }
    report("deadlock%s", text);
}

void run_block() {
    reset_block();
    tsan_release(&machine.block_begin);
    Thread& first = *machine.ready;
    machine.ready = first.next_ready;
    enter(first);
    machine.process.switch_to(first.fiber);
    machine.current = nullptr;
    tsan_acquire(&machine.block_end);
    if (machine.failed) return;
    if (machine.num_exited != machine.num_threads) return report_deadlock();
    check_dynamic_tail();
}

void run_blocks() {
    const uint3 grid = gridDim;
    std::vector<unsigned> blocks(size_t(grid.x) * grid.y * grid.z);
    arrange(blocks.data(), blocks.size());
    for (unsigned block : blocks) {
        blockIdx = {block % grid.x, block / grid.x % grid.y, block / grid.x / grid.y};
        run_block();
        if (machine.failed) return restart_fibers();
    }
}

// ---- Launches ----

void begin_launch(const ShimLaunch* launch, const ShimProgram* program, void** arguments,
                  ShimFailure* failure) {
    machine.launch = launch;
    machine.program = program;
    machine.arguments = arguments;
    machine.failure = failure;
    machine.failed = false;
    machine.current = nullptr;
    machine.random = 0x9E3779B97F4A7C15u ^ (uint64_t(launch->seed) + 1) << 20;
    gridDim = launch->grid;
    blockDim = launch->block;
    machine.num_threads = blockDim.x * blockDim.y * blockDim.z;
    machine.schedule.resize(machine.num_threads);
    place_dynamic_shared(launch->shared_bytes);
    machine.process.adopt_current();
    prepare_threads();
}

}  // namespace

void arrange(unsigned* numbers, unsigned count) {
    const unsigned order = machine.launch->order;
    for (unsigned i = 0; i < count; ++i) numbers[i] = order == SHIM_REVERSE ? count - 1 - i : i;
    if (order != SHIM_SEEDED) return;
    for (unsigned i = count; i > 1; --i) std::swap(numbers[i - 1], numbers[next_random() % i]);
}

extern "C" int shim_run(const ShimLaunch* launch, const ShimProgram* program, void** arguments,
                        ShimFailure* failure) {
    const std::lock_guard<std::mutex> lock(one_launch);
    begin_launch(launch, program, arguments, failure);
    const SignalGuard signals;
    run_blocks();
    return machine.failed;
}
