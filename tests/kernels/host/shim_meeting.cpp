// Where threads meet: __syncthreads, the intrinsics of a warp; and cp.async, which a thread has
// for itself.
#include "shim_machine.h"
#include "shim_mma.h"

namespace {

// ---- __syncthreads ----

void check_barrier_site(const Site& site) {
    if (machine.num_at_barrier == 0) machine.barrier = site;
    if (site == machine.barrier) return;
    fail("__syncthreads at %s:%d, while other threads of the block wait at the one in %s:%d: a "
         "barrier in a divergent branch",
         site.file, site.line, machine.barrier.file, machine.barrier.line);
}

// ---- What lanes do together ----

template <typename Action>
void for_each_lane(unsigned lanes, Action action) {
    for (; lanes != 0; lanes &= lanes - 1) action(static_cast<unsigned>(__builtin_ctz(lanes)));
}

void shuffle(Warp& warp, unsigned mask) {
    const auto shuffle_of = [&](unsigned lane) {
        return static_cast<ShimShuffle*>(warp.payload[lane]);
    };
    for_each_lane(mask, [&](unsigned lane) {
        const unsigned source = shuffle_of(lane)->source_lane % kLanes;
        if (!(mask >> source & 1))
            fail("__shfl_sync: lane %u reads lane %u, which is not in the mask 0x%08x", lane,
                 source, mask);
        shuffle_of(lane)->result = shuffle_of(source)->value;
    });
}

void ballot(Warp& warp, unsigned mask) {
    const auto ballot_of = [&](unsigned lane) {
        return static_cast<ShimBallot*>(warp.payload[lane]);
    };
    unsigned votes = 0;
    for_each_lane(mask, [&](unsigned lane) { votes |= ballot_of(lane)->predicate << lane; });
    for_each_lane(mask, [&](unsigned lane) { ballot_of(lane)->result = votes; });
}

void perform(ShimOperation operation, Warp& warp, unsigned mask) {
    switch (operation) {
        case SHIM_SYNCWARP: return;
        case SHIM_SHUFFLE: return shuffle(warp, mask);
        case SHIM_BALLOT: return ballot(warp, mask);
        case SHIM_MMA_M16N8K16_F16: return Mma<HalfElement, 16, 16>::run(warp.payload);
        case SHIM_MMA_M16N8K16_BF16: return Mma<Bfloat16Element, 16, 16>::run(warp.payload);
        case SHIM_MMA_M16N8K32_S8: return Mma<Int8Element, 16, 32>::run(warp.payload);
        case SHIM_MMA_M8N8K16_S8: return Mma<Int8Element, 8, 16>::run(warp.payload);
    }
}

// ---- Whether they may ----

void check_partner(const Thread& self, unsigned lane) {
    const Warp& warp = machine.warps[self.warp()];
    const Site own = self.site, other = machine.thread_of(self.warp(), lane).site;
    const char* name = name_of(warp.operation[self.lane()]);
    if (warp.operation[lane] != warp.operation[self.lane()])
        fail("%s at %s:%d, while lane %u of the warp is in %s at %s:%d", name, own.file, own.line,
             lane, name_of(warp.operation[lane]), other.file, other.line);
    if (warp.mask[lane] != warp.mask[self.lane()])
        fail("%s at %s:%d with mask 0x%08x, while lane %u gives mask 0x%08x", name, own.file,
             own.line, warp.mask[self.lane()], lane, warp.mask[lane]);
    if (!(other == own))
        fail("%s at %s:%d, while lane %u of the warp is at %s:%d: a warp intrinsic in a divergent "
             "branch",
             name, own.file, own.line, lane, other.file, other.line);
}

void check_mask(const Thread& self, unsigned mask) {
    const Warp& warp = machine.warps[self.warp()];
    const char* name = name_of(warp.operation[self.lane()]);
    if (!(mask >> self.lane() & 1))
        fail("%s at %s:%d: lane %u is not in its own mask 0x%08x", name, self.site.file,
             self.site.line, self.lane(), mask);
    if (mask & warp.exited)
        fail("%s at %s:%d: lane %d of the mask 0x%08x has exited or is not in the block", name,
             self.site.file, self.site.line, __builtin_ctz(mask & warp.exited), mask);
}

void release_lanes(unsigned number, unsigned mask) {
    Warp& warp = machine.warps[number];
    unsigned lanes[kLanes];
    arrange(lanes, kLanes);
    warp.waiting &= ~mask;
    ++warp.generation;
    for (unsigned i = kLanes; i-- > 0;)
        if (mask >> lanes[i] & 1) make_ready(machine.thread_of(number, lanes[i]));
}

void arrive_in_warp(Thread& self, Warp& warp, unsigned mask) {
    check_mask(self, mask);
    // The first that waits is enough to compare with, until all have come.
    const unsigned others = warp.waiting & mask;
    warp.waiting |= 1u << self.lane();
    const bool is_complete = (warp.waiting & mask) == mask;
    for_each_lane(is_complete ? others : others & -others,
                  [&](unsigned lane) { check_partner(self, lane); });
    if (!is_complete) return;
    perform(warp.operation[self.lane()], warp, mask);
    release_lanes(self.warp(), mask);
}

// ---- cp.async ----

bool is_shared(const void* address) {
    const auto* byte = static_cast<const unsigned char*>(address);
    const auto within = [byte](const unsigned char* begin, const unsigned char* end) {
        return byte >= begin && byte + 16 <= end;
    };
    return within(machine.program->shared_begin, machine.program->shared_end) ||
           within(machine.dynamic_begin, machine.dynamic_end);
}

void check_aligned(const char* which, const void* address) {
    if (reinterpret_cast<uintptr_t>(address) % 16 != 0)
        fail("cp.async %s address %p, which is not a multiple of 16: misaligned", which, address);
}

}  // namespace

void open_barrier_if_complete() {
    const unsigned alive = machine.num_threads - machine.num_exited;
    if (alive == 0 || machine.num_at_barrier < alive) return;
    machine.num_at_barrier = 0;
    ++machine.barrier_generation;
    arrange(machine.schedule.data(), machine.num_threads);
    for (unsigned i = machine.num_threads; i-- > 0;) {
        Thread& thread = *machine.threads[machine.schedule[i]];
        if (thread.state == State::at_barrier) make_ready(thread);
    }
}

void check_exit(const Thread& self) {
    const Warp& warp = machine.warps[self.warp()];
    for_each_lane(warp.waiting, [&](unsigned lane) {
        if (!(warp.mask[lane] >> self.lane() & 1)) return;
        const Site& site = machine.thread_of(self.warp(), lane).site;
        fail("exits, while lane %u of its warp waits for it in %s at %s:%d", lane,
             name_of(warp.operation[lane]), site.file, site.line);
    });
}

extern "C" {

void shim_barrier(const char* file, int line) {
    Thread& self = *machine.current;
    self.site = {file, line};
    check_barrier_site(self.site);
    self.state = State::at_barrier;
    ++machine.num_at_barrier;
    // Two by turns: who is late here must not see what others did before the next barrier.
    char* order = &machine.barrier_order[machine.barrier_generation % 2];
    tsan_release(order);
    open_barrier_if_complete();
    run_next();
    tsan_acquire(order);
}

void shim_collective(unsigned mask, ShimOperation operation, void* payload, const char* file,
                     int line) {
    Thread& self = *machine.current;
    Warp& warp = machine.warps[self.warp()];
    self.site = {file, line};
    self.state = State::in_collective;
    warp.mask[self.lane()] = mask;
    warp.operation[self.lane()] = operation;
    warp.payload[self.lane()] = payload;
    char* order = &warp.order[warp.generation % 2];
    if (operation == SHIM_SYNCWARP) tsan_release(order);
    arrive_in_warp(self, warp, mask);
    run_next();
    if (operation == SHIM_SYNCWARP) tsan_acquire(order);
}

unsigned shim_lane() { return machine.current->lane(); }

void* shim_dynamic_shared() { return machine.dynamic_begin; }

void shim_missing_instruction(int architecture, const char* file, int line) {
    fail("%s:%d: an instruction that begins at sm_%d", file, line, architecture / 10);
}

void shim_copy_issue(const ShimCopy* copy) {
    if (copy->source_bytes < 0 || copy->source_bytes > 16)
        fail("cp.async of %d bytes: 0 to 16 can be copied", copy->source_bytes);
    check_aligned("to shared", copy->shared);
    check_aligned("from global", copy->global);
    if (!is_shared(copy->shared))
        fail("cp.async to %p, where 16 bytes are not all in the block's shared memory",
             copy->shared);
    machine.current->copies.push_back({*copy, machine.current->groups});
}

void shim_copy_commit() { ++machine.current->groups; }

// The next copy that a wait has to perform, oldest first; 0 when there is none.
int shim_copy_next(int groups_still_pending, ShimCopy* copy) {
    Thread& self = *machine.current;
    if (self.first_copy == self.copies.size()) return 0;
    const PendingCopy& oldest = self.copies[self.first_copy];
    if (oldest.group >= self.groups - groups_still_pending) return 0;
    *copy = oldest.copy;
    ++self.first_copy;
    return 1;
}
}
