// A stack of its own that can be left in the middle of a call and entered again.
//
// On x86-64 a switch is eight instructions; elsewhere ucontext does it, several times slower. Each
// switch is announced to AddressSanitizer and ThreadSanitizer where one of them is loaded: their
// functions are weak, so one build of the runtime serves every build of a kernel.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#if !defined(__x86_64__)
#define SHIM_UCONTEXT
#endif
#ifdef SHIM_UCONTEXT
#include <ucontext.h>
#endif

extern "C" {
#define SHIM_WEAK __attribute__((weak))
SHIM_WEAK void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
SHIM_WEAK void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
SHIM_WEAK void __sanitizer_set_death_callback(void (*callback)());
SHIM_WEAK void __asan_poison_memory_region(const volatile void* begin, size_t size);
SHIM_WEAK void __asan_unpoison_memory_region(const volatile void* begin, size_t size);
SHIM_WEAK void* __tsan_create_fiber(unsigned flags);
SHIM_WEAK void __tsan_destroy_fiber(void* fiber);
SHIM_WEAK void __tsan_set_fiber_name(void* fiber, const char* name);
SHIM_WEAK void* __tsan_get_current_fiber();
SHIM_WEAK void __tsan_switch_to_fiber(void* fiber, unsigned flags);
SHIM_WEAK void __tsan_acquire(void* address);
SHIM_WEAK void __tsan_release(void* address);
}

constexpr size_t kPageBytes = 4096;
constexpr size_t kStackBytes = 256 * 1024;

#ifndef SHIM_UCONTEXT
// Saves what a call must preserve, then takes over the other stack.
extern "C" void shim_switch_stack(void** save, void* load);
asm(R"(
.text
.p2align 4
.type shim_switch_stack, @function
shim_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size shim_switch_stack, .-shim_switch_stack
)");
#endif

class Fiber {
public:
    // `entry` starts at the next switch to this fiber, and must never return.
    void prepare(void (*entry)(), unsigned number) {
        if (stack_ == nullptr) map_stack();
        if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(stack_, kStackBytes);
        if (__tsan_create_fiber) {
            if (tsan_) __tsan_destroy_fiber(tsan_);
            tsan_ = __tsan_create_fiber(0);
            char name[32];
            snprintf(name, sizeof name, "CUDA thread %u", number);
            __tsan_set_fiber_name(tsan_, name);
        }
        // Not all at the same offset in a page: their hot lines would share one cache set.
        set_entry(entry, kStackBytes - 128 * (number % 32));
    }

    // The stack that the process itself runs on, while a launch lasts.
    void adopt_current() {
        if (__tsan_get_current_fiber) tsan_ = __tsan_get_current_fiber();
    }

    bool guard_contains(const void* address) const {
        const auto* byte = static_cast<const unsigned char*>(address);
        return stack_ != nullptr && byte >= stack_ - kPageBytes && byte < stack_;
    }

    void switch_to(Fiber& next) {
        // The flag says that a switch orders nothing: only barriers do.
        if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(next.tsan_, 1);
        if (__sanitizer_start_switch_fiber)
            __sanitizer_start_switch_fiber(&fake_stack_, next.bottom_, next.size_);
        left_ = this;
        exchange(next);
        arrive(fake_stack_);
    }

    // The first thing that a new fiber does. AddressSanitizer tells where the stack lies that was
    // left, which nobody else knows of the stack of the process.
    static void arrive(void* fake_stack = nullptr) {
        if (__sanitizer_finish_switch_fiber)
            __sanitizer_finish_switch_fiber(fake_stack, &left_->bottom_, &left_->size_);
    }

private:
    void map_stack() {
        void* memory = mmap(nullptr, kPageBytes + kStackBytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) abort();
        mprotect(memory, kPageBytes, PROT_NONE);
        stack_ = static_cast<unsigned char*>(memory) + kPageBytes;
        bottom_ = stack_;
        size_ = kStackBytes;
    }

#ifndef SHIM_UCONTEXT
    void set_entry(void (*entry)(), size_t top) {
        // Six registers, the entry, and a slot where the caller of the entry would be: the stack
        // is aligned at the entry as it is after a call.
        void** slots = reinterpret_cast<void**>(stack_ + top) - 8;
        for (int i = 0; i < 8; ++i) slots[i] = nullptr;
        slots[6] = reinterpret_cast<void*>(entry);
        stack_pointer_ = slots;
    }
    void exchange(Fiber& next) { shim_switch_stack(&stack_pointer_, next.stack_pointer_); }
    void* stack_pointer_ = nullptr;
#else
    void set_entry(void (*entry)(), size_t top) {
        getcontext(&context_);
        context_.uc_stack.ss_sp = stack_;
        context_.uc_stack.ss_size = top;
        context_.uc_link = nullptr;
        makecontext(&context_, entry, 0);
    }
    void exchange(Fiber& next) { swapcontext(&context_, &next.context_); }
    ucontext_t context_ = {};
#endif

    static inline Fiber* left_ = nullptr;

    unsigned char* stack_ = nullptr;
    const void* bottom_ = nullptr;
    size_t size_ = 0;
    void* fake_stack_ = nullptr;
    void* tsan_ = nullptr;
};
